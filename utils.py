"""Small things with no better home: ranks, logs, meters."""

import contextlib
import io
import logging
import os
import platform
import subprocess
import sys

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
