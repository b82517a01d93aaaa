"""tools/plot_run.py as its users run it: runs that are killed, resumed, damaged, compared."""

import json
import os
import signal
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from program import ROOT, run, run_tool

from tools import common, plot_run

TOOL = ROOT / "tools" / "plot_run.py"
PNG = b"\x89PNG\r\n\x1a\n"

matplotlib = pytest.importorskip("matplotlib")


def train(epoch, batch, step, loss=1.0, speed=100.0):
    return {"time": 1.5, "kind": "train", "epoch": epoch, "batch": batch, "step": step,
            "loss": loss, "lr": 0.001 * step, "images_per_second": speed}  # fmt: skip


def epoch_end(epoch, step, loss=1.0):
    return {"time": 1.5, "kind": "epoch", "epoch": epoch, "step": step, "loss": loss}


def validation(epoch, acc1, weights="model", loss=0.5):
    return {"time": 1.5, "kind": "eval", "epoch": epoch, "weights": weights, "acc1": acc1,
            "acc5": 99.0, "loss": loss, "images": 1000}  # fmt: skip


ROWS = [
    train(1, 3, 3, 2.0, 150.0),
    train(1, 4, 4, 1.5, 100.0),
    epoch_end(1, 4),
    validation(1, 50.0),
    validation(1, 40.0, "ema"),
    train(2, 3, 7, 1.0),
    train(2, 4, 8, 0.5),
    epoch_end(2, 8),
    validation(2, 60.0, loss=None),
    validation(2, 70.0, "ema"),
]


def write(path, rows, end=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


@pytest.fixture
def metrics(tmp_path):
    return write(tmp_path / "a run" / "metrics.jsonl", ROWS)


def called(*args):
    """The tool's exit status, in this process."""
    return common.run(plot_run.build_parser(), plot_run.work, [str(arg) for arg in args])


def refused(capsys, *args):
    """The sentence with which the tool refuses its arguments."""
    assert called(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def drawn(paths, x="epochs", names=None):
    """The lines of each panel: lists of (label, x values, y values)."""
    plt = plot_run.import_pyplot()
    runs = [plot_run.read_run(str(path)) for path in paths]
    figure = plot_run.draw(plt, runs, names or [str(path) for path in paths], x)
    plt.close(figure)
    return [
        [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in lines]
        for lines in (axis.get_lines() for axis in figure.axes)
    ]


def test_two_runs_make_a_picture(metrics, tmp_path):
    second = write(tmp_path / "b" / "metrics.jsonl", ROWS[:4])
    output = tmp_path / "curves.png"
    result = run([sys.executable, TOOL, metrics.parent, second, "-output", output]).check()
    assert result.err == ""
    assert result.out == (
        "a run: 8 steps, 2 epochs, best model Acc@1 60.00, best ema Acc@1 70.00\n"
        "b: 4 steps, 1 epoch, best model Acc@1 50.00\n"
        f"curves in {output}\n"
    )
    assert output.read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a run", "b", "curves.png"]


def test_the_panels_show_the_rows(metrics):
    loss, accuracy, rate, speed = drawn([metrics])
    assert loss[0] == ("training", [0.75, 1, 1.75, 2], [2.0, 1.5, 1.0, 0.5])
    assert [line[0] for line in loss[1:]] == ["validation", "validation, averaged weights (EMA)"]
    assert loss[1][1] == [1, 2] and loss[1][2][0] == 0.5 and loss[1][2][1] != loss[1][2][1]
    assert accuracy == [
        ("weights", [1, 2], [50.0, 60.0]),
        ("averaged weights (EMA)", [1, 2], [40.0, 70.0]),
    ]
    assert rate[0][2] == [0.003, 0.004, 0.007, 0.008]
    # Of the first epoch's four batches, three together took twice as long as the fourth.
    assert speed[1] == ("epoch's mean", [1, 2], [pytest.approx(4 / (3 / 150 + 1 / 100)), 100.0])


def test_a_single_report_is_a_point_that_can_be_seen(tmp_path):
    path = write(tmp_path / "a" / "metrics.jsonl", ROWS[:1])
    plt = plot_run.import_pyplot()
    figure = plot_run.draw(plt, [plot_run.read_run(str(path))], ["a"], "epochs")
    plt.close(figure)
    for axis in (figure.axes[0], figure.axes[2], figure.axes[3]):
        assert [line.get_marker() for line in axis.get_lines() if len(line.get_xdata())] == ["o"]


def test_the_speed_of_an_epochs_short_last_report_is_left_out(tmp_path):
    rows = [train(1, 20, 20), train(1, 40, 40), train(1, 42, 42, 1.0, 1750.0), epoch_end(1, 42),
            train(2, 20, 62), train(2, 31, 73, 1.0, 90.0)]  # fmt: skip
    path = write(tmp_path / "a" / "metrics.jsonl", rows)
    run = plot_run.read_run(str(path))
    assert [value for *_, value in run["images_per_second"]] == [100, 100, 100, 90]
    assert len(run["loss"]) == 5


def test_no_two_runs_have_one_colour():
    plt = plot_run.import_pyplot()
    for count in (1, 8, 9, 20):
        assert len(set(map(tuple, plot_run.colours_of(plt, count)))) == count


def test_the_curves_run_over_steps_where_that_is_asked_for_or_no_epoch_is_done(metrics, tmp_path):
    loss, accuracy, _, speed = drawn([metrics], x="steps")
    assert loss[0][1] == [3, 4, 7, 8]
    assert accuracy[0][1] == accuracy[1][1] == speed[1][1] == [4, 8]
    young = write(tmp_path / "young" / "metrics.jsonl", ROWS[:1])
    loss, *_ = drawn([metrics, young])
    assert loss[0][1] == [3, 4, 7, 8] and loss[-1][1] == [3]
    # In the second epoch, a length is known.
    young = write(tmp_path / "older" / "metrics.jsonl", [*ROWS[:5], train(2, 1, 5)])
    loss, *_ = drawn([young])
    assert loss[0][1] == [0.75, 1, 1.25]


def test_of_rows_that_a_resumed_run_repeats_the_last_count(tmp_path):
    killed = [*ROWS[:5], train(2, 3, 7, 9.0), train(2, 4, 8, 9.0), epoch_end(2, 8, 9.0),
              validation(2, 10.0), validation(2, 11.0, "ema"), train(3, 3, 11, 9.0)]  # fmt: skip
    path = write(tmp_path / "a" / "metrics.jsonl", [*killed, *ROWS[5:]])
    whole = write(tmp_path / "b" / "metrics.jsonl", ROWS)
    resumed, wanted = plot_run.read_run(str(path)), plot_run.read_run(str(whole))
    assert resumed == wanted
    # What lies after the newest row was of the run that is no more.
    path = write(tmp_path / "c" / "metrics.jsonl", [*killed, train(2, 2, 6, 0.7)])
    assert plot_run.read_run(str(path))["loss"] == [(0.75, 3, 2.0), (1.0, 4, 1.5), (1.5, 6, 0.7)]


def test_a_line_that_a_killed_run_left_unfinished_does_not_count(tmp_path):
    path = write(tmp_path / "a" / "metrics.jsonl", ROWS[:5], end='{"time": 1, "kind": "train", "ep')
    assert len(plot_run.read_run(str(path))["loss"]) == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1, "kind": "train", "ep',
        "",
        "[]",
        "3",
        '"kind"',
        '{"kind": "what", "time": 1}',
        '{"kind": "epoch", "time": 1, "epoch": "1", "step": 3, "loss": 1}',
        '{"kind": "epoch", "time": 1, "epoch": 1, "step": 3}',
        '{"kind": "eval", "time": 1, "epoch": 1, "weights": "x", "acc1": 1, "acc5": 1, "loss": 1}',
        '{"kind": "epoch", "time": 1, "epoch": 1, "step": null, "loss": 1}',
        json.dumps(validation(1, None)),
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_line_is_named(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    text = json.dumps(ROWS[0]) + "\n" + line + "\n" + json.dumps(ROWS[1]) + "\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    error = refused(capsys, path, "-output", tmp_path / "a.png")
    assert f": {path}:2: this line is no row" in error
    assert not (tmp_path / "a.png").exists()


def test_files_without_a_training_are_refused(tmp_path, capsys):
    output = ["-output", tmp_path / "a.svg"]
    empty = write(tmp_path / "a" / "metrics.jsonl", [])
    assert f"{empty}: there are no rows of a training" in refused(capsys, empty, *output)
    # As run.py writes it for -eval.
    only = {**ROWS[3], "weights": "/some/file.pdparams", "seconds": 1.0}
    del only["epoch"]
    evaluation = write(tmp_path / "b" / "metrics.jsonl", [only])
    assert "of an evaluation alone" in refused(capsys, evaluation.parent, *output)
    assert f"{tmp_path}: there is no metrics.jsonl" in refused(capsys, tmp_path, *output)
    assert f"{tmp_path / 'gone'}: No such file" in refused(capsys, tmp_path / "gone", *output)
    assert not (tmp_path / "a.svg").exists()


def test_outputs_and_names_that_cannot_be_are_refused(metrics, tmp_path, capsys):
    assert ".png or .svg" in refused(capsys, metrics, "-output", metrics)
    assert json.loads(metrics.read_text().splitlines()[0]) == ROWS[0]
    gone = tmp_path / "gone" / "a.png"
    assert f"there is no folder {gone.parent}" in refused(capsys, metrics, "-output", gone)
    (tmp_path / "a.png").mkdir()
    assert "this is a folder" in refused(capsys, metrics, "-output", tmp_path / "a.png")
    words = [metrics, metrics, "-names", "one", "-output", tmp_path / "b.png"]
    assert "1 names for 2 runs" in refused(capsys, *words)


def test_a_disk_that_fills_up_is_status_1_and_leaves_the_old_picture(
    metrics, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "a.png"
    output.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_run.import_pyplot().Figure, "savefig", full)
    assert called(metrics, "-output", output) == 1
    assert capsys.readouterr().err.endswith(
        f": {output}: cannot be written: No space left on device\n"
    )
    assert output.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_sigterm_leaves_the_old_picture_and_no_other_file(metrics, tmp_path, monkeypatch):
    output = tmp_path / "a.png"
    output.write_text("old")

    def end(figure, path, **kwargs):
        Path(path).write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where the tool does not listen to it
    monkeypatch.setattr(plot_run.import_pyplot().Figure, "savefig", end)
    result = run_tool(plot_run, metrics, "-output", output)
    signal.signal(signal.SIGTERM, before)
    assert result.status == 143
    assert output.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_an_svg_is_the_same_each_time_and_has_the_names(metrics, tmp_path):
    for name in ("a.svg", "b.svg"):
        assert called(metrics, metrics, "-names", "x", "y", "-output", tmp_path / name) == 0
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.fromstring(content).tag.endswith("svg")
    assert b"<!-- x: best Acc@1 70.00 in epoch 2 -->" in content


def test_runs_are_called_by_the_shortest_endings_of_their_folders_that_differ(
    tmp_path, monkeypatch
):
    for name in ("a", "b", "a/b"):
        (tmp_path / name / "train-1").mkdir(parents=True)
    (tmp_path / "train-2").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "train-1")
    assert plot_run.run_names([".", "../../b"]) == ["train-1", "b"]
    assert plot_run.run_names(["metrics.jsonl"]) == ["train-1"]
    monkeypatch.chdir(tmp_path)
    assert plot_run.run_names(["a/train-1", "train-2"]) == ["train-1", "train-2"]
    assert plot_run.run_names(["a/train-1", "b/train-1/"]) == ["a/train-1", "b/train-1"]
    names = ["a/train-1", "train-2", "b/train-1", "a/b/train-1"]
    last = [f"{tmp_path.name}/b/train-1", "a/b/train-1"]
    assert plot_run.run_names(names) == [*names[:2], *last]
    assert plot_run.run_names(["a/train-1", "./a/train-1"]) == ["a/train-1", "./a/train-1"]


def test_matplotlib_is_asked_for_in_a_sentence(metrics, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(capsys, metrics, "-output", tmp_path / "a.png")
    assert "pip install matplotlib" in error


def test_help_and_wrong_flags_are_answered_without_paddle(metrics, tmp_path):
    for package in ("paddle", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    command, path = [sys.executable, str(TOOL)], {"PYTHONPATH": str(tmp_path)}
    help_text = run([*command, "-h"], **path).check().out
    for flag in ("-output", "-names", "-x", "RUN"):
        assert flag in help_text
    run([*command, metrics], **path).refused(2, "required: -output")
    run([*command, metrics, "-output", "a.pdf"], **path).refused(2, "a.pdf", ".png or .svg")


def test_a_dollar_in_a_name_begins_no_formula(metrics, tmp_path):
    output = tmp_path / "a.svg"
    assert called(metrics, metrics, "-output", output, "-names", "a$x^$", "b") == 0
    assert "a$x^$" in output.read_text()
