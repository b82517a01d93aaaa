"""What the command-line tools share: the modules in reach, and one way to end.

from tools import common

def work(args): ...      # imports Paddle by common.import_paddle(), after the arguments are known

if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from config import ConfigError
    from ranks import host
    from weights.pdparams import WeightsError
except ModuleNotFoundError as error:
    sys.exit(f"this Python has no package {error.name}: see the README's install section")


class Failed(Exception):
    """What went wrong while running, in one sentence: exit status 1."""


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
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, leave)
    sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be text of this terminal
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
    except (Failed, OSError, *_user_errors()) as error:
        print(f"{parser.prog}: {host.describe_error(error)}", file=sys.stderr)
        asked_wrongly = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
        return 2 if isinstance(error, (*asked_wrongly, *_user_errors())) else 1


def _user_errors():
    # datasets.py imports Paddle; without it, it cannot have raised anything.
    datasets = sys.modules.get("datasets")
    return (ConfigError, WeightsError, *([datasets.DataError] if datasets else []))


def leave(number, frame):
    """A signal handler: ends the process, by an exception, with the status of the signal."""
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)


def import_paddle():
    """Paddle, on all cores and without its notes; SIGTERM then ends a tool as Ctrl-C does."""
    paddle = host.import_paddle()
    signal.signal(signal.SIGTERM, leave)
    return paddle
