"""tools/to_visualdl.py: what VisualDL shows of a run, read with VisualDL's own reader."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import wait_for
from program import ROOT, run, run_tool

from tools import to_visualdl
from tools.common import read_metrics

visualdl = pytest.importorskip("visualdl")

TOOL = ROOT / "tools" / "to_visualdl.py"


def train(step, loss=1.0, start=1000.5):
    """A report of a run whose epochs have three steps."""
    epoch, batch = divmod(step - 1, 3)
    return {"time": start + step, "kind": "train", "epoch": epoch + 1, "batch": batch + 1,
            "step": step, "loss": loss, "lr": 0.001 * step, "images_per_second": 100.0}  # fmt: skip


ROWS = [
    *(train(step) for step in (1, 2, 3)),
    {"time": 1004, "kind": "epoch", "epoch": 1, "step": 3, "loss": 1.0},
    *({"time": 1005, "kind": "eval", "epoch": 1, "weights": weights, "acc1": 50.0, "acc5": 90.0,
       "loss": 0.5, "images": 100} for weights in ("model", "ema")),
]  # fmt: skip


def add(folder, rows, end=""):
    """Appends rows to a run's metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + end)


@pytest.fixture
def folder(tmp_path):
    """A run's folder."""
    add(tmp_path / "a run", ROWS)
    return tmp_path / "a run"


def newest(folder):
    """The file that VisualDL takes of a run's folder."""
    ((place, name),) = visualdl.LogReader(logdir=str(folder)).logs().items()
    assert place == str(folder / "visualdl")
    return folder / "visualdl" / name


def shown(folder):
    """Curves to (step, milliseconds, value), as VisualDL reads them now."""
    reader = visualdl.LogReader(file_path=str(newest(folder)))
    points = {}
    for tag in reader.get_tags()["scalar"]:
        name = tag.replace("%", "/")
        points[name] = [(p.id, p.timestamp, p.value) for p in reader.get_data("scalar", tag)]
    return points


def wanted(folder):
    """The same out of metrics.jsonl, with float32 values as VisualDL has them."""
    points, step = {}, 0
    for row in read_metrics(folder / "metrics.jsonl"):
        step = row.get("step", step)
        group = {"train": "train", "eval": f"validation_{row.get('weights')}"}.get(row["kind"])
        for name in ("loss", "lr", "images_per_second", "acc1", "acc5"):
            if group and row.get(name) is not None:
                value = pytest.approx(row[name], rel=1e-6)
                points.setdefault(f"{group}/{name}", []).append((step, row["time"] * 1000, value))
    return points


def contents(folder):
    """Names to contents of what is in a run's visualdl/."""
    return {path.name: path.read_bytes() for path in (folder / "visualdl").iterdir()}


def test_every_step_of_a_run_is_shown_once(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    result = run([sys.executable, TOOL, folder]).check()
    assert (result.out, result.err) == (f"curves in {folder}/visualdl\n", "")
    assert shown(folder) == wanted(folder)
    assert set(shown(folder)) == {
        *(f"train/{name}" for name in ("loss", "lr", "images_per_second")),
        *(f"validation_{w}/{name}" for w in ("model", "ema") for name in ("loss", "acc1", "acc5")),
    }
    assert [step for step, *_ in shown(folder)["validation_ema/acc1"]] == [
        row["step"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "epoch"
    ]


def test_a_run_may_be_named_by_its_metrics_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert run_tool(to_visualdl, "metrics.jsonl").check().out == "curves in visualdl\n"
    assert shown(folder) == wanted(folder)


def test_numbers_that_are_not_finite_are_left_out(folder):
    add(folder, [train(4, None), train(5, float("nan")), train(6, float("inf"))])
    run_tool(to_visualdl, folder).check()
    points = shown(folder)
    assert [step for step, *_ in points["train/loss"]] == [1, 2, 3]
    assert [step for step, *_ in points["train/lr"]] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_a_version_with_fewer_scores_is_shown(folder):
    row = {**ROWS[-1], "epoch": 2}
    del row["acc5"]
    add(folder, [row])
    run_tool(to_visualdl, folder).check()
    assert [len(shown(folder)[f"validation_ema/{name}"]) for name in ("acc1", "acc5")] == [2, 1]


def test_the_tool_run_again_adds_what_is_new(folder):
    run_tool(to_visualdl, folder).check()
    before = contents(folder)
    run_tool(to_visualdl, folder).check()
    assert contents(folder) == before
    add(folder, [train(4)], end='{"time": 17')
    assert run_tool(to_visualdl, folder).check().out == f"curves in {folder}/visualdl\n"
    assert list(contents(folder)) == list(before)
    assert shown(folder) == wanted(folder)


def test_of_steps_that_a_resumed_run_repeats_the_last_are_shown(folder):
    run_tool(to_visualdl, folder).check()
    old = newest(folder)
    add(folder, [train(2, 7.0, start=2000)])
    result = run_tool(to_visualdl, folder).check()
    assert "start an open visualdl again" in result.out
    assert shown(folder) == wanted(folder)
    assert [value for *_, value in shown(folder)["train/loss"]] == [1.0, 7.0]
    assert newest(folder) != old and old.read_bytes() == b""


def test_curves_that_another_program_wrote_there_are_replaced(folder):
    writer = visualdl.LogWriter(str(folder / "visualdl"), file_name="vdlrecords.9000000000.log")
    writer.add_scalar("train/loss", 5.0, 1)
    writer.close()
    run_tool(to_visualdl, folder).check()
    assert newest(folder).name == "vdlrecords.9000000001.log"
    assert shown(folder) == wanted(folder)


def test_a_file_that_was_cut_short_is_completed(folder):
    run_tool(to_visualdl, folder).check()
    whole = contents(folder)
    newest(folder).write_bytes(newest(folder).read_bytes()[:-5])
    run_tool(to_visualdl, folder).check()
    assert contents(folder) == whole


def test_an_open_dashboard_reads_on(folder):
    add(folder, [train(4)])
    run_tool(to_visualdl, folder).check()
    reader = visualdl.LogReader(logdir=str(folder))
    add(folder, [train(5), train(6)])
    run_tool(to_visualdl, folder).check()

    def steps():
        reader.load_new_data()  # as for each request
        scalars = reader.data_manager.get_reservoir("scalar")
        return [point.id for point in scalars.get_items(str(folder / "visualdl"), "train%lr")]

    assert steps() == [1, 2, 3, 4, 5, 6]
    add(folder, [train(6, start=2000), train(7)])
    run_tool(to_visualdl, folder).check()
    assert steps() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7]  # so it has to be started again


@pytest.mark.parametrize("before", [1, 2])
def test_tools_that_run_at_once_do_not_disturb_each_other(folder, monkeypatch, before):
    run_tool(to_visualdl, folder).check()
    add(folder, [train(2, 7.0, start=2000)])
    replace, calls = os.replace, []

    def replace_later(*paths):
        calls.append(paths)
        if len(calls) == before:
            run([sys.executable, TOOL, folder]).check()
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_later)
    run_tool(to_visualdl, folder).check()
    assert len(calls) >= before
    assert shown(folder) == wanted(folder)
    assert len(contents(folder)) == 2


@pytest.fixture
def follow(tmp_path):
    """Starts the tool with -follow, which then looks often; a function of the run's folder."""
    started = []

    def start(folder):
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from tools import common, to_visualdl as tool\n"
            "tool._SECONDS = 0.1\n"
            "sys.exit(common.run(tool.build_parser(), tool.work))"
        )
        command = [sys.executable, "-c", code, folder, "-follow"]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert started[-1].stdout.readline() == f"following {folder} until Ctrl-C\n".encode()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process, number):
    """What a process prints until a signal has ended it, with the status of that signal."""
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + number, b"")
    return out.decode()


def test_follow_waits_for_a_run_and_goes_on_with_it(tmp_path, follow):
    folder = tmp_path / "run"
    folder.mkdir()
    process = follow(folder)
    time.sleep(0.5)  # some looks
    add(folder, [])
    time.sleep(0.5)
    add(folder, ROWS[:2])
    wait_for(lambda: any(folder.glob("visualdl/vdlrecords.*")), process)
    wait_for(lambda: shown(folder) == wanted(folder), process)
    line = json.dumps(ROWS[2])
    add(folder, [], end=line[:20])
    add(folder, [], end=line[20:] + "\n")
    wait_for(lambda: shown(folder) == wanted(folder), process)
    first = newest(folder)
    add(folder, ROWS[3:])
    wait_for(lambda: shown(folder) == wanted(folder), process)
    assert newest(folder) == first
    add(folder, [train(2, 7.0, start=2000)])
    wait_for(lambda: newest(folder) != first and shown(folder) == wanted(folder), process)
    out = ended(process, signal.SIGINT)
    assert out.count("\n") == 1 and "start an open visualdl again" in out
    assert len(contents(folder)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_follow_with_its_status_and_whole_files(folder, follow, number):
    add(folder, [train(step) for step in range(10, 10_000)])
    process = follow(folder)
    assert ended(process, number) == ""
    left = contents(folder) if (folder / "visualdl").exists() else {}
    assert len(left) <= 1 and all(name.startswith("vdlrecords.") for name in left)
    run_tool(to_visualdl, folder).check()
    assert not left or contents(folder) == left


def test_a_line_that_is_damaged_ends_follow_too(folder, follow):
    process = follow(folder)
    add(folder, [], end="{}\n")
    assert process.wait() == 2
    assert f"{folder}/metrics.jsonl:7: this line is no row" in process.communicate()[1].decode()


def test_runs_without_a_training_are_refused(folder, tmp_path):
    def refused(path, *parts):
        result = run_tool(to_visualdl, path)
        result.refused(2, *parts)
        assert result.out == "" and result.err.count("\n") == 1

    refused(tmp_path, f"{tmp_path}: there is no metrics.jsonl")
    refused(tmp_path / "gone", f"{tmp_path / 'gone'}: No such file")
    add(tmp_path / "eval", [{**ROWS[-1], "weights": "/some/file.pdparams"}])
    only = {name: value for name, value in ROWS[-1].items() if name != "epoch"}
    (tmp_path / "eval" / "metrics.jsonl").write_text(json.dumps(only) + "\n")
    refused(tmp_path / "eval", "of an evaluation alone")
    add(folder, [{**train(4), "lr": 10**400}])
    refused(folder, f"{folder}/metrics.jsonl: VisualDL cannot show such a number")
    add(folder, [], end="{}\n")
    refused(folder, f"{folder}/metrics.jsonl:8: this line is no row")
    assert not (folder / "visualdl").exists() and not (tmp_path / "eval" / "visualdl").exists()


def test_a_full_disk_is_one_sentence_and_leaves_the_old_curves(folder):
    run_tool(to_visualdl, folder).check()
    before = contents(folder)
    add(folder, [train(step) for step in range(10, 1000)])
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-"]  # which a write meets as it does a disk
    result = run([*limited, sys.executable, TOOL, folder])
    result.refused(1, f"{folder}/visualdl/", "cannot be written: File too large")
    assert result.err.count("\n") == 1 and contents(folder) == before


def test_a_folder_that_cannot_be_made_is_one_sentence(folder):
    (folder / "visualdl").write_text("mine")
    run_tool(to_visualdl, folder).refused(1, f"{folder}/visualdl: File exists")


@pytest.mark.parametrize(
    "error", ["ImportError('no module for you')", "TypeError('no module for you\\nat all')"]
)
def test_a_package_that_is_missing_or_broken_is_one_sentence(folder, tmp_path, error):
    (tmp_path / "visualdl.py").write_text(f"raise {error}")
    result = run([sys.executable, TOOL, folder], PYTHONPATH=str(tmp_path))
    result.refused(2, "no module for you", "pip install visualdl==2.5.3")
    assert result.err.count("\n") == 1


def test_help_and_wrong_flags_are_answered_without_packages(tmp_path):
    for package in ("paddle", "visualdl"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    command, path = [sys.executable, str(TOOL)], {"PYTHONPATH": str(tmp_path)}
    assert "-follow" in run([*command, "-h"], **path).check().out
    run(command, **path).refused(2, "required: RUN")
