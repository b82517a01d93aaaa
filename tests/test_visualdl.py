"""VISUALDL: what a run shows in VisualDL, read with VisualDL's own reader."""

import shutil
import sys

import metrics
import pytest
from program import SMALL, run_program

from utils import MetricsFile, VisualDL, read_metrics

# A training resumes and all of its parts write; the model itself does not matter here.
OPTS = {**SMALL, "VISUALDL": True, "TRAIN.RAND_AUGMENT": False, "DATA.NUM_WORKERS": 0}


def read(folder):
    """Tags to (step, milliseconds, value) of the file that a dashboard takes from visualdl/."""
    visualdl = pytest.importorskip("visualdl")
    ((place, name),) = visualdl.LogReader(logdir=str(folder)).logs().items()
    reader = visualdl.LogReader(file_path=f"{place}/{name}")
    points = {}
    for tag in reader.get_tags().get("scalar", []):
        name = tag.replace("%", "/")
        points[name] = [(p.id, p.timestamp, p.value) for p in reader.get_data("scalar", tag)]
    return points


def wanted(rows):
    """The same out of metrics rows, with float32 values as VisualDL has them."""
    points, step = {}, 0
    for row in rows:
        step = row.get("step", step)
        group = {"train": "train", "eval": f"validation_{row.get('weights')}"}.get(row["kind"])
        for name in ("loss", "lr", "images_per_second", "acc1", "acc5"):
            if group and name in row:
                value = pytest.approx(row[name], rel=1e-6)
                points.setdefault(f"{group}/{name}", []).append((step, row["time"] * 1000, value))
    return points


def test_a_run_and_its_resumption_show_every_step_once(few_digits, tmp_path):
    pytest.importorskip("visualdl")
    words = ["-data_path", few_digits, "-output", tmp_path, "-resume", "auto"]
    run_program(*words, "-nprocs", 2, opts={**OPTS, "SAVE_FREQ_STEPS": 2}).check()
    (folder,) = tmp_path.glob("train-*")
    first = read(folder)
    assert set(first) == {
        *(f"train/{name}" for name in ("loss", "lr", "images_per_second")),
        *(f"validation_{w}/{name}" for w in ("model", "ema") for name in ("loss", "acc1", "acc5")),
    }
    rows = read_metrics(folder / "metrics.jsonl")
    assert first == wanted(rows)
    assert len(rows) == len((folder / "metrics.jsonl").read_text().splitlines())

    # As if it had been killed before it saved the second epoch.
    for name in ("last", "previous", "best", "best_weights", "Epoch-2"):
        (folder / f"{name}.pdparams").unlink(missing_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"time": 17')
    (old,) = (folder / "visualdl").iterdir()
    with open(old, "ab") as file:
        file.write(b"\x50\0\0\0\0\0\0\0half")
    old.rename(old.with_name("vdlrecords.9000000000.log"))  # as if the clock had been set back
    run_program(*words, "-nprocs", 2, opts=OPTS).check()
    again = read(folder)
    assert again == wanted(read_metrics(folder / "metrics.jsonl"))
    assert set(again) == set(first)
    for points in again.values():
        steps = [step for step, _, _ in points]
        assert steps == sorted(set(steps))
    old, new = first["validation_model/loss"], again["validation_model/loss"]
    assert len(new) == 2 and new[0] == old[0] and new[1][1] > old[1][1]


def test_without_the_package_a_run_says_so_before_it_starts(few_digits, tmp_path):
    (tmp_path / "visualdl.py").write_text("raise ImportError('no module for you')")
    words = ["-data_path", few_digits, "-output", tmp_path / "out"]
    result = run_program(*words, opts=OPTS, PYTHONPATH=str(tmp_path))
    result.refused(2, "VISUALDL", "no module for you", "pip install visualdl")
    assert not (tmp_path / "out").exists()


def test_a_broken_package_is_as_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "visualdl.py").write_text("raise TypeError('Descriptors cannot be\\nmade')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "visualdl", raising=False)
    with pytest.raises(ImportError, match=r"^TypeError: Descriptors cannot be$"):
        metrics.import_visualdl()


ROW = {"kind": "train", "time": 2.5, "epoch": 1, "batch": 1, "step": 1, "loss": 1.0, "lr": 0.5,
       "images_per_second": 3.0}  # fmt: skip


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("visualdl")
    dashboard = VisualDL(str(tmp_path), [], warn=pytest.fail)
    for loss in (float("nan"), float("inf"), None):
        dashboard.add({**ROW, "loss": loss})
    assert {name: len(points) for name, points in read(tmp_path).items()} == {
        "train/lr": 3,
        "train/images_per_second": 3,
    }


def test_a_disk_that_refuses_ends_neither_the_run_nor_its_metrics(tmp_path):
    pytest.importorskip("visualdl")
    metrics = MetricsFile(tmp_path, 0)
    metrics.dashboard = VisualDL(str(tmp_path), [], warn=pytest.fail)
    (path,) = (tmp_path / "visualdl").iterdir()
    path.unlink()
    path.mkdir()  # VisualDL opens it for each record
    for _ in range(300):  # more than VisualDL's queue holds
        metrics.write(**ROW)
    assert len(read_metrics(metrics.path)) == 1
    shutil.rmtree(path)


def test_an_error_of_visualdl_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("visualdl")
    warnings = []
    metrics = MetricsFile(tmp_path, 0)
    metrics.dashboard = VisualDL(str(tmp_path), [], warnings.append)

    def fail(*args):
        raise RuntimeError("what a dashboard may raise")

    monkeypatch.setattr("visualdl.LogWriter.add_scalar", fail)
    metrics.write(**ROW)
    metrics.write(**{**ROW, "batch": 2, "step": 2})
    assert len(read_metrics(metrics.path)) == 2
    (warning,) = warnings
    assert "what a dashboard may raise" in warning and str(tmp_path / "visualdl") in warning
