"""A run's numbers: `metrics.jsonl`, which always has them, and VisualDL, which can show them.

Needs no Paddle, so that tools can read them anywhere.
"""

import json
import math
import os
import re
import time

from files import write_text


class MetricsFile:
    """Appends one JSON object per row to `metrics.jsonl`; does nothing on other ranks than 0."""

    def __init__(self, folder, rank):
        self.path = os.path.join(folder, "metrics.jsonl") if rank == 0 else None
        if self.path and os.path.exists(self.path):
            _cut_last_line(self.path)
        self.dashboard = None  # a VisualDL that gets every row too

    def write(self, **row):
        """Appends a row with the time.  Raises OSError, with the file's name in it."""
        if self.path:
            row = {"time": round(time.time(), 3), **row}
            write_text(self.path, to_json(row) + "\n", mode="a")
        if self.dashboard:
            self.dashboard.add(row)


def _cut_last_line(path):
    """Takes off what a killed process left of a line, so that the next one starts on its own."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path):
    """The rows of a training's `metrics.jsonl`, without those that the run wrote again.

    A run that goes on from a checkpoint repeats what came after that.  So a row takes the place of
    the earlier ones of its place in the training, and of any later place.  What a killed process
    left of a last line does not count, nor do the rows of an evaluation alone.

    Returns:
        list of dicts, from the first place to the last; see metrics_place.

    Raises:
        ValueError: a line is damaged; the sentence begins with `path:line`.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            place = metrics_place(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{path}:{number}: this line is no row of a metrics.jsonl: take the line out, or "
                "take the file that the run wrote"
            ) from None
        if place is None:
            continue
        while rows and metrics_place(rows[-1]) >= place:
            rows.pop()
        rows.append(row)
    return rows


def metrics_place(row):
    """Where in the training a row was written, to compare: (epochs done, batches of the next, n).

    None for the row of an evaluation alone.  Raises ValueError, TypeError or KeyError for a row
    that MetricsFile has not written for run.py and trainer.py.
    """
    # The order in which trainer.py writes them, and the numbers that each has.
    if row["kind"] == "train":
        place, names = (row["epoch"] - 1, row["batch"], 0), ["step", "loss", "lr"]
        names.append("images_per_second")
    elif row["kind"] == "epoch":
        place, names = (row["epoch"], 0, 0), ["step", "loss"]
    elif row["kind"] == "eval":
        order = {"model": 1, "ema": 2}
        place = (row["epoch"], 0, order[row["weights"]]) if "epoch" in row else None
        names = ["acc1", "acc5", "loss"]
    else:
        raise ValueError(row["kind"])
    # A loss may be null: it was not finite.
    values = [row[name] for name in names if (name, row[name]) != ("loss", None)]
    if any(type(value) not in (int, float) for value in (row["time"], *values, *(place or ()))):
        raise TypeError
    return place


class VisualDL:
    """Shows a run's numbers in VisualDL: scalars over optimizer steps, in `<folder>/visualdl`.

    VisualDL reads the last file of a folder by name, and no point in it can be taken back.  So a
    run that goes on writes all of its points to a new file, and empties the old one.  The first
    error ends the writing and not the run, as `metrics.jsonl` has every number: the next
    `-resume auto` shows them all.

    Args:
        folder: the run's folder.
        rows: the rows of read_metrics that this run goes on from.
        warn: called with a sentence when something goes wrong while running.

    Raises:
        ImportError, OSError: at the start.
    """

    def __init__(self, folder, rows, warn):
        visualdl = import_visualdl()
        self._folder, self._warn = os.path.join(folder, "visualdl"), warn
        os.makedirs(self._folder, exist_ok=True)
        number = int(time.time())
        for name in os.listdir(self._folder):
            if match := re.fullmatch(r"vdlrecords\.(\d+)\.log", name):
                number = max(number, int(match[1]) + 1)
                # Not removed: a dashboard that is open would end its answers with an error.
                os.truncate(os.path.join(self._folder, name), 0)
        name = f"vdlrecords.{number:010}.log"
        self._writer = visualdl.LogWriter(self._folder, file_name=name)
        self._step = 0
        for row in rows:
            self._add(row)
        self._writer.flush()

    def add(self, row):
        """Writes a row of metrics.jsonl; its numbers are on disk when this returns."""
        if self._writer is None:
            return
        try:
            self._add(row)
            self._writer.flush()  # the writer is a thread, which an end of the process does not ask
        except Exception as error:
            self._warn(f"{self._folder}: VisualDL failed, the run goes on without it: {error}")
            self._writer = None

    def _add(self, row):
        self._step = row.get("step", self._step)  # that of a validation is its epoch's
        if row["kind"] == "train":
            group, names = "train", ("loss", "lr", "images_per_second")
        elif row["kind"] == "eval":
            group, names = f"validation_{row['weights']}", ("loss", "acc1", "acc5")
        else:
            return
        for name in names:
            if row[name] is not None and math.isfinite(row[name]):
                milliseconds = round(row["time"] * 1000)
                self._writer.add_scalar(f"{group}/{name}", row[name], self._step, milliseconds)


def import_visualdl():
    """The package visualdl.  Raises ImportError, with what is wrong where it is broken."""
    try:
        import visualdl
    except Exception as error:  # an OSError too: it writes into the home folder
        raise ImportError(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    return visualdl


def to_json(row, **kwargs):
    """A flat dict as JSON; numbers that are not finite, which JSON has not, become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite, **kwargs)
