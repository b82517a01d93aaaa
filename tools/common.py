"""What the command-line tools share: one way to ask and to end, counted messages, a run's metrics.

def work(args): ...      # imports Paddle by common.import_paddle(), after the arguments are known

if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
"""

import argparse
import collections
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from config import ConfigWarning, show_warnings_of
    from ranks import host
    from ranks.report import REPORT_PIPE
    from utils import (
        SCORES,
        UserError,
        cannot_be_written,
        describe_error,
        prepare_streams,
        show_path,
        temporary_path,
    )
    from weights import WeightsError
    from weights.checkpoint import refuse_timms_names
except ModuleNotFoundError as error:
    sys.exit(f"this Python has no package {error.name}: see the README's install section")


class Failed(Exception):
    """What went wrong while running, in one sentence: exit status 1."""


class NoRows(UserError):
    """A run's folder has nothing of a training, or nothing yet."""


# What a launcher tells its ranks.  A container may have kept it: then a tool, which is
# one process, would wait for other ranks for ever.
_OF_A_RANK = re.compile(
    "PADDLE_(TRAINER|LOCAL_|GLOBAL_|RANK_|NNODES|MASTER|CURRENT_ENDPOINT|DISTRI_BACKEND)"
    f"|FLAGS_selected_gpus|{REPORT_PIPE}"
)


class Parser(argparse.ArgumentParser):
    """A tool's command line, with the first line of its docstring, which -OO leaves out, in -h."""

    def __init__(self, doc=None, **options):
        description = (doc or "").split("\n")[0]
        super().__init__(**{"description": description, "allow_abbrev": False, **options})

    def parse_args(self, args=None, namespace=None):
        """As argparse; words that are left over get the name of what took only one."""
        args = sys.argv[1:] if args is None else list(args)
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._took_one(args, rest[0])}")
        return parsed

    def _took_one(self, args, word):
        if word.startswith("-"):
            return ""
        before = args[: args.index(word)]
        flags = [name for name in before if name in self._option_string_actions]
        last = self._option_string_actions[flags[-1]] if flags else None
        if last and last.nargs is None:
            what = f"{flags[-1]} takes one {last.metavar or 'value'}"
        else:
            names = [action.metavar or action.dest for action in self._get_positional_actions()]
            what = f"it takes one {' and one '.join(names)}" if names else ""
        return f" ({what}: did a pattern match several files?)" if what else ""


def run(parser, work, argv=None):
    """Runs a tool.  An error is one sentence on stderr, `tool: path: what is wrong`.

    Args:
        parser: an argparse parser.
        work: a function of the parsed arguments; may return an exit status.
        argv: the arguments; None for the process's own.

    Returns:
        The exit status: 0; 1 for what failed while running (Failed, a full disk); 2 for what was
        asked wrongly (a file that is missing or damaged, a value that cannot be).
    """
    prepare_streams()
    args = parser.parse_args(argv)
    for name in filter(_OF_A_RANK.match, list(os.environ)):
        del os.environ[name]
    show_warnings_of(parser.prog)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if handlers[signal.SIGINT] != signal.SIG_IGN:  # as it is in what a script starts with `&`
        signal.signal(signal.SIGINT, leave)
    try:
        status = work(args)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:  # Paddle's too
        print(
            f"{parser.prog}: there is not enough memory: take a smaller -batch_size or -image_size",
            file=sys.stderr,
        )
        return 1
    except _ASKED_WRONGLY as error:
        print(f"{parser.prog}: {describe_error(error)}", file=sys.stderr)
        return 2
    except (Failed, OSError) as error:
        print(f"{parser.prog}: {describe_error(error)}", file=sys.stderr)
        return 1
    finally:
        if "IPython" in sys.modules:  # a notebook, which goes on
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)


_ASKED_WRONGLY = (
    UserError, ConfigWarning,
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip


def leave(number, frame):
    """A signal handler: ends the process, by an exception, with the status of the signal."""
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)


def sizes_of(weights, path):
    """The gmlp.Sizes of weights; raises WeightsError where they are no gMLP's."""
    from gmlp import Sizes

    refuse_timms_names(weights, path)
    try:
        return Sizes.from_weights(weights)
    except ValueError as error:
        raise WeightsError(f"{show_path(path)}: is no gMLP's: {error}") from None


def import_paddle():
    """Paddle, on all cores and without its notes; SIGTERM then ends a tool as Ctrl-C does."""
    paddle = host.import_paddle()
    signal.signal(signal.SIGTERM, leave)
    return paddle


@contextlib.contextmanager
def new_folder(path):
    """Gives a temporary folder to fill, which takes the name `path` if all goes well.

    Otherwise it is removed with all that is in it.  There must be no `path` yet.

    Raises:
        OSError: it cannot be made; an error that names a file of its own keeps it.
    """
    path = os.path.abspath(path)
    temporary = temporary_path(path)
    try:
        os.mkdir(temporary)
        yield temporary
        if os.path.lexists(path):  # os.rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(temporary, path)
    except OSError as error:
        if not str(error.filename or temporary).startswith(temporary):
            raise
        raise cannot_be_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Tally:
    """Sentences printed as they come, above a progress bar, and counted by their kind.

    Args:
        prefix: what each sentence begins with.
        stream: "stderr" or "stdout", as it is when something is printed.
    """

    def __init__(self, prefix="", stream="stderr"):
        self.counts = collections.Counter()
        self._prefix, self._stream = prefix, stream

    def add(self, kind, sentence=None):
        """Counts one of a kind, and says what it is."""
        self.counts[kind] += 1
        if sentence is not None:
            self.say(sentence)

    def say(self, sentence):
        """Prints a sentence that does not count."""
        from tqdm import tqdm

        tqdm.write(f"{self._prefix}{sentence}", file=getattr(sys, self._stream))


class LeftOut:
    """What utils.find_images leaves out: counted by its kind, with a few names of each."""

    def __init__(self):
        self.counts, self._names = collections.Counter(), {}

    def add(self, kind, path):
        self.counts[kind] += 1
        names = self._names.setdefault(kind, [])
        if len(names) < 3:
            names.append(show_path(path))

    def sentences(self):
        """One for each kind."""
        for kind, names in self._names.items():
            more = ", ..." if self.counts[kind] > len(names) else ""
            yield f"left out: {self.counts[kind]:,} ({kind}): {', '.join(names)}{more}"


def metrics_path(run):
    """The metrics.jsonl of a run, which is named by its folder or by that file itself."""
    return os.path.join(run, "metrics.jsonl") if os.path.isdir(run) else run


def read_run(run):
    """The rows of a run's training; see read_metrics.

    Args:
        run: the run's folder, or the metrics.jsonl in it.

    Raises:
        NoRows: there is no training in it, or nothing of it yet.
        UserError: a line is damaged.
        OSError: it cannot be read.
    """
    path = metrics_path(run)
    if path != run and not os.path.exists(path):
        raise NoRows(f"{run}: there is no metrics.jsonl: give the folder of a run")
    rows = read_metrics(path)
    if not rows:
        raise NoRows(
            f"{path}: there are no rows of a training: nothing was reported yet, or this is of an "
            "evaluation alone"
        )
    return rows


def read_metrics(path):
    """The rows of a training's `metrics.jsonl`, without those that the run wrote again.

    A run that goes on from a checkpoint repeats what came after that.  So a row takes the place of
    the earlier ones of its place in the training, and of any later place.  What a killed process
    left of a last line does not count, nor do the rows of an evaluation alone.

    Returns:
        list of dicts, from the first place to the last; see metrics_place.

    Raises:
        UserError: a line is damaged; the sentence begins with `path:line`.
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
            raise UserError(
                f"{path}:{number}: this line is no row of a metrics.jsonl: delete the line, or "
                "use the file as the run wrote it"
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
    that no run has written.
    """
    # The order in which training/train.py writes them, and the numbers that each has.
    if row["kind"] == "train":
        place, names = (row["epoch"] - 1, row["batch"], 0), ["step", "loss", "lr"]
        names.append("images_per_second")
    elif row["kind"] == "epoch":
        place, names = (row["epoch"], 0, 0), ["step", "loss"]
    elif row["kind"] == "eval":
        order = {"model": 1, "ema": 2}
        place = (row["epoch"], 0, order[row["weights"]]) if "epoch" in row else None
        # Runs of a version with fewer scores have these two.
        names = ["acc1", "loss", *(name for name in SCORES if name in row)]
    else:
        raise ValueError(row["kind"])
    # A loss may be null: it was not finite.
    values = [row[name] for name in names if (name, row[name]) != ("loss", None)]
    if any(type(value) not in (int, float) for value in (row["time"], *values, *(place or ()))):
        raise TypeError
    return place
