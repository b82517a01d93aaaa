"""What tests ask of other processes: which there are, in which state, and what they left."""

import os
import time
from pathlib import Path

HANG_SECONDS = 240  # a limit that only stops a hang


def wait_for(condition, process=None):
    """Waits until condition() holds; fails when the process ends first."""
    limit = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "the program ended early"
        assert time.monotonic() < limit, "the program hangs"
        time.sleep(0.02)


def batches_in_shared_memory():
    """Loader batches whose maker has ended; those of other programs that run are none of ours."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith("paddle_")}
    running = {str(pid) for pid in process_ids()}
    return {name for name in names if name.split("_")[1] not in running}


def wait_until_no_batches_but(before):
    """Waits until /dev/shm has no more batches; tests beside this one leave some for moments."""
    wait_for(lambda: batches_in_shared_memory() <= before)


def process_ids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def is_running(pid):
    return _stat_of(pid, 0) not in ("Z", "-1")


def is_stopped(pid):
    return _stat_of(pid, 0) == "T"


def parent_of(pid):
    return int(_stat_of(pid, 1))


def session_of(pid):
    return int(_stat_of(pid, 3))


def _stat_of(pid, field):
    """A field of /proc/<pid>/stat, counted from the state behind the name; "-1" for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[field]
    except OSError:
        return "-1"


def session_exists(session):
    """Whether any process is left in a session, in whatever group."""
    return any(session_of(pid) == session for pid in process_ids())
