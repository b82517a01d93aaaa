"""Small things with no better home: ranks, logs, meters."""

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np
import paddle
import PIL
from paddle import distributed as dist
from tqdm import tqdm


def init_distributed():
    """Takes this rank's device and joins the other ranks.  Returns (rank, number of ranks)."""
    ranks = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    backend = os.environ.get("PADDLE_DISTRI_BACKEND")
    if backend != "gloo" and paddle.device.cuda.device_count() > 0:
        # Paddle's launcher names all GPUs to a single rank; as Paddle does, take the first.
        device = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]
        paddle.set_device(f"gpu:{device}")
    else:
        paddle.set_device("cpu")
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    if ranks == 1:
        return 0, 1
    with contextlib.redirect_stderr(io.StringIO()):  # it lists Paddle's flags; errors are raised
        dist.init_parallel_env()
    return dist.get_rank(), ranks


def is_parallel():
    """Whether this process has joined other ranks."""
    return dist.is_initialized()


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks; the tensor itself where there is one rank."""
    if is_parallel():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value):
    """Rank 0's picklable value, on every rank."""
    if not is_parallel():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def lock(path):
    """Locks a file, which is made where it is missing, until this process and its children end.

    Returns:
        The open file, to be kept.

    Raises:
        BlockingIOError: another process has it.
        OSError: this file system has no locks.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def setup_logging(folder, rank):
    """A logger: `log_<rank>.txt` for every rank; on rank 0 also `log.txt` and standard output.

    On a terminal, where a progress bar shows them, reports (level DEBUG) go to the files only, and
    so does what is logged with `extra={"file_only": True}`.
    """
    logger = logging.getLogger("gmlp")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logging.raiseExceptions = False  # a full disk would print a traceback for each line
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers = [logging.FileHandler(os.path.join(folder, f"log_{rank}.txt"))]
    if rank == 0:
        handlers.append(logging.FileHandler(os.path.join(folder, "log.txt")))
        console = _ConsoleHandler()
        console.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
        console.addFilter(lambda record: not getattr(record, "file_only", False))
        handlers.append(console)
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


class _ConsoleHandler(logging.Handler):
    """Prints on standard output, above a progress bar where there is one."""

    def emit(self, record):
        with contextlib.suppress(OSError):  # such as `| head`, a full disk: the run itself goes on
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def to_json(row, **kwargs):
    """A flat dict as JSON; numbers that are not finite, which JSON has not, become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite, **kwargs)


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
    that MetricsFile has not written for worker.py and trainer.py.
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


def import_visualdl():
    """The package visualdl.  Raises ImportError, with what is wrong where it is broken."""
    try:
        import visualdl
    except Exception as error:  # an OSError too: it writes into the home folder
        raise ImportError(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    return visualdl


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


def _cut_last_line(path):
    """Takes off what a killed process left of a line, so that the next one starts on its own."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def write_text(path, text, mode="w"):
    """Writes or appends text.  Raises OSError, always with the file's name in it."""
    try:
        with open(path, mode) as file:
            file.write(text)
    except OSError as error:  # of a full disk it would not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error


class MeanMeter:
    """The mean of device scalars over batches and ranks, without a host read until it is asked.

    Args:
        mean, count: what to go on from.
    """

    def __init__(self, mean=0.0, count=0):
        self.count = count
        self.total = paddle.to_tensor(mean * count, dtype="float64")

    def add(self, value):
        self.total = self.total + value.detach().astype("float64")
        self.count += 1

    def read(self):
        """The mean over all ranks, a number; every rank has to call it.

        The same number on every rank, so that all of them stop where it is not finite.
        """
        return float(all_reduce_sum(self.total / self.count)) / dist.get_world_size()


def progress_bar(batches, total, title, rank, done=0):
    """`batches` with a progress bar on rank 0's terminal, without one elsewhere."""
    disable = rank != 0 or not sys.stderr.isatty()
    return tqdm(batches, title, total, leave=False, disable=disable, unit="batch", initial=done)


def describe_machine(world_size):
    """Lines about versions, device, ranks and threads for the start of a log."""
    device = paddle.get_device()
    if device.startswith("gpu"):
        device += f" ({paddle.device.cuda.get_device_name()})"
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        f"python {platform.python_version()}, paddle {paddle.__version__}, "
        f"numpy {np.__version__}, pillow {PIL.__version__}, {platform.platform()}",
        f"device {device}, {world_size} rank(s), {threads} thread(s) per rank",
        f"git revision {git_revision() or 'unknown (not a git checkout)'}",
    ]


def git_revision():
    """The commit of this source tree, with "+" where files differ from it; None outside git."""
    folder = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", folder]
    try:
        # Not the revision of some other repository that this folder happens to lie in.
        top = _output([*git, "rev-parse", "--show-toplevel"])
        if os.path.realpath(top) != os.path.realpath(folder):
            return None
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
        return _output([*git, "rev-parse", "HEAD"]) + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
