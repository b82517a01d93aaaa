"""What tests ask of other processes: which there are, in which state, and what they left."""

import contextlib
import os
import signal
import time
from pathlib import Path

from ranks.host import remove_batches

HANG_SECONDS = 240  # a limit that only stops a hang


def wait_for(condition, process=None, seconds=HANG_SECONDS):
    """Waits until condition() holds; fails when the process ends first."""
    limit = time.monotonic() + seconds
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


def processes_of(session):
    return [pid for pid in process_ids() if session_of(pid) == session]


def children_of(parent):
    """Process ids of children, in the order in which they were started."""
    return sorted(pid for pid in process_ids() if parent_of(pid) == parent)


@contextlib.contextmanager
def ended(process):
    """Gives a process that leads a session; where the test fails, nothing of it goes on."""
    try:
        yield process
    except BaseException:
        kill_all(process)
        raise


def kill_all(process):
    """SIGKILL to the launcher, all ranks and all loader workers, of a session of their own."""
    pids = processes_of(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # with its parent
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not session_exists(process.pid))
    remove_batches(pids)  # with the launcher gone too, nobody else does this
