"""The command that goes on with a run."""

import contextlib
import glob
import os
import shlex
import sys

from ranks.host import all_ranks, local_ranks


def how_to_go_on(folder):
    """The end of a sentence: what started this run, with `-resume auto`, to paste into a shell.

    Where there are other runs beside the run's folder, it is named in the place of `auto`.
    It is the launcher's command where the launcher, ours or Paddle's, is this process's parent;
    with the folder and the variables that a script, or an earlier shell, had set.
    """
    args = sys.argv[1:]
    words = _read_proc("cmdline")
    variables = dict(word.partition("=")[::2] for word in _read_proc("environ"))
    if not args or words[-len(args) :] != args:
        words, variables = [sys.executable, *sys.argv], os.environ
    words = [*words[: len(words) - len(args)], *_resuming(args, _auto_or(folder))]
    named = [f"{name}={shlex.quote(variables[name])}" for name in _TO_NAME if name in variables]
    where = " here, and with each host's own command on the others" * (all_ranks() > local_ranks())
    line = " ".join([*named, shlex.join(words)])
    with contextlib.suppress(OSError):  # the folder may be gone
        line = f"cd {shlex.quote(os.getcwd())} && {line}"
    return f"to go on{where}: {line}"


# Variables that the same command needs to have; others are the user's own shell's.
_TO_NAME = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def _read_proc(name):
    """The words in a file about the parent process; none where there is no /proc."""
    with contextlib.suppress(OSError), open(f"/proc/{os.getppid()}/{name}", "rb") as file:
        return os.fsdecode(file.read()).split("\0")[:-1]
    return []


def _auto_or(folder):
    """`auto` where that means the run in a folder, otherwise its path."""
    folder = os.path.abspath(folder)
    runs = glob.glob(os.path.join(glob.escape(os.path.dirname(folder)), "train-*"))
    return folder if any(run != folder for run in runs) else "auto"


def _resuming(args, resume):
    """The program's arguments with `-resume` and its value in the place of any other."""
    before, opts, words = [], [], list(args)
    while words:
        name, equals, _ = words[0].partition("=")
        if _is_flag(name, "-opts", 3):  # takes all that follows
            pairs = zip(words[1::2], words[2::2])
            opts = [word for pair in pairs if pair[0] != "MODEL.RESUME" for word in pair]
            opts = opts and [words[0], *opts]
            break
        if _is_flag(name, "-resume", 2):
            del words[: 1 if equals else 2]
        else:
            before.append(words.pop(0))
    return [*before, "-resume", resume, *opts]


def _is_flag(word, flag, shortest):
    """Whether a word is a flag, or a beginning of it that argparse takes for it."""
    return len(word) >= shortest and flag.startswith(word)
