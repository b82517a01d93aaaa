"""What a rank tells its launcher: an error, the run's folder, that it is alive.

Without a launcher of ours an error is printed, and the rest goes nowhere.
"""

import contextlib
import json
import os
import sys

from ranks.watchdog import watchdog

REPORT_PIPE = "GMLP_REPORT_PIPE"  # the file descriptor on which a rank tells its launcher things


def has_launcher():
    """Whether a launcher of ours started this process."""
    return REPORT_PIPE in os.environ


def report_error(message, status=None):
    """Prints an error, or has the launcher print it once however many ranks report it.

    A rank that does not end within watchdog.END_SECONDS after that is killed.

    Args:
        message: one sentence.
        status: what this rank ends with, for an error of its own; None where it may only be the
            consequence of another rank's end.
    """
    # Of a traceback the end counts.
    text = message.encode(errors="replace")[-3000:].decode(errors="ignore")
    if not _report(error=text, status=status):
        print(message, file=sys.stderr, flush=True)
    watchdog.limit_end()


def report_folder(folder):
    """Tells the launcher where this run's files are: it names the log of a rank that fails."""
    _report(folder=os.path.abspath(folder))


def report_alive():
    """Tells the launcher that this rank, which was asked to end, gets on."""
    _report()


@contextlib.contextmanager
def busy():
    """In here the launcher does not take this rank's silence for a hang."""
    _report(busy=True)
    try:
        yield
    finally:
        _report(busy=False)


def _report(**what):
    """Returns True if the launcher received it."""
    if not has_launcher():
        return False
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    line = json.dumps({"rank": rank, **what}, ensure_ascii=False) + "\n"
    with contextlib.suppress(OSError):
        # One write below PIPE_BUF is atomic, so that ranks do not mix their sentences.
        os.write(int(os.environ[REPORT_PIPE]), line.encode(errors="replace"))
        return True
    return False
