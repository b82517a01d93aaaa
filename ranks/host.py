"""This process on its host: cores, threads, memory, its parent, and where Paddle is imported.

Needs no Paddle; import_paddle() is where every program and tool gets it.
"""

import contextlib
import ctypes
import glob
import io
import math
import os
import pathlib
import signal
import sys
import warnings

from utils import UserError, cause, show


def number_in(variable, low):
    """A whole number in the environment; None where the variable is unset or empty.

    Raises:
        UserError: it holds anything else, or a number below `low`.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    # OpenMP's may be a list, with a number for each level of threads that start threads.
    items = [item.strip() for item in text.split(",")] if variable == "OMP_NUM_THREADS" else [text]
    if not all(item.isdecimal() and int(item) >= low for item in items):
        raise UserError(
            f"the environment variable {variable} is {show(text)}, it must be a whole number, at "
            f"least {low}: unset it, or give it one"
        )
    return int(items[0])


def all_ranks():
    """How many ranks there are on all hosts."""
    return number_in("PADDLE_TRAINERS_NUM", 1) or 1


def local_ranks():
    """How many ranks run on this host."""
    return number_in("PADDLE_LOCAL_SIZE", 1) or all_ranks()


def stop_signals():
    """The signals that ask a run to end.

    Schedulers send SIGUSR1 or SIGUSR2 some time before they kill, a terminal that is closed SIGHUP.
    All but SIGTERM count unless they are ignored, as SIGHUP is under nohup, and SIGINT in what a
    script starts with `&`.
    """
    others = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    return [signal.SIGTERM] + [
        number for number in others if signal.getsignal(number) != signal.SIG_IGN
    ]


def available_cores():
    """The cores that this process may use, by its affinity and its cgroups' quotas; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file.read().splitlines():  # "number:controllers:path", none for version 2
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = "/sys/fs/cgroup" + ("/cpu" if controllers else "")
            group = pathlib.PurePosixPath(path)
            for one in (group, *group.parents):  # a container may see its own as the uppermost
                cores = min(cores, _quota(f"{mount}{one}".rstrip("/")))
    return max(1, cores)


def _quota(cgroup):
    """The whole cores of a cgroup's quota, of version 2 or 1; infinite where it has none."""
    with contextlib.suppress(OSError, ValueError), open(f"{cgroup}/cpu.max") as file:
        quota, period = file.read().split()  # int() refuses "max"
        return int(quota) // int(period)
    with contextlib.suppress(OSError, ValueError):
        with open(f"{cgroup}/cpu.cfs_quota_us") as file:  # -1 is no limit
            quota = int(file.read())
        with open(f"{cgroup}/cpu.cfs_period_us") as file:
            period = int(file.read())
        if quota >= 0:
            return quota // period
    return math.inf


def prepare_cpu(ranks):
    """Sets what Paddle's libraries for the CPU read when they are loaded, unless it is set already.

    The cores are shared out among the ranks of this host.  Has to run before Paddle is imported.
    docs/performance.md tells of them (What a run sets on a CPU).  Raises UserError for a number of
    threads that cannot be.
    """
    # Paddle takes one thread where this is unset.
    threads = number_in("OMP_NUM_THREADS", 1) or max(1, available_cores() // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Milliseconds that a thread without work spins before it sleeps: the default, 200, keeps the
    # cores from the loader workers.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    if _is_amd_with_avx2():
        # Paddle's MKL is of 2019 and takes its slowest kernels on CPUs that are not Intel's; 5
        # stands for those for AVX2 (https://danieldk.eu/Intel-MKL-on-AMD-Zen).
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def _is_amd_with_avx2():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return {"AuthenticAMD", "avx2"} <= set(file.read().split())
    return False


def keep_freed_memory():
    """Has glibc keep large blocks that were freed, for the next batch, here and in processes forked
    from here.

    It would give them back to the kernel, which clears each page when it is used again: an eighth
    of a training step on a CPU, half of normalizing a batch.  The price is up to two thirds more
    memory, as free blocks of one size are not always what is needed next.
    """
    m_mmap_max, m_trim_threshold = -4, -1
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # no trimming


def choose_workers(wanted, on_gpu):
    """Loader workers per rank: what DATA.NUM_WORKERS says, or for -1 by the cores.

    These are shared out among this host's ranks.  On a GPU machine the workers have the cores to
    themselves.  On the CPU one core of each rank's share is left to the model; a rank with one core
    loads in its own process (0 workers).
    """
    if wanted >= 0:
        return wanted
    share = max(1, available_cores() // local_ranks())
    return min(share, 16) if on_gpu else share - 1


def import_paddle():
    """Paddle with this rank's share of the cores, without its notes and its signal handlers.

    Raises:
        UserError: Paddle finds no folder to write in.
    """
    for name, value in dict(os.environ).items():
        if name.startswith("PADDLE_") and not value.strip():  # Paddle takes it for a wrong number
            del os.environ[name]
    prepare_cpu(local_ranks())
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's C++ notes on connections
    warnings.filterwarnings("ignore", message="No ccache found")
    # On stderr: a warning that OMP_NUM_THREADS is not 1; and on a signal that comes now, a stack.
    with contextlib.redirect_stderr(io.StringIO()), _blocked(stop_signals()):
        try:
            import paddle
        except OSError as error:  # it makes ~/.cache/paddle, or that in the temporary folder
            if not error.filename:
                raise
            raise UserError(
                f"Paddle cannot be loaded, as {error.filename} cannot be made "
                f"({cause(error)}): set HOME to a folder that can be written"
            ) from error
        paddle.disable_signal_handler()  # which prints a stack on SIGTERM
    return paddle


@contextlib.contextmanager
def _blocked(numbers):
    """Keeps signals back for as long as the context lasts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def threads():
    """The threads that Paddle computes with on the CPU."""
    return number_in("OMP_NUM_THREADS", 1) or 1


@contextlib.contextmanager
def quiet():
    """Silences standard output in here, of C++ code too."""
    sys.stdout.flush()
    libc, stdout, nothing = ctypes.CDLL(None), os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)


def die_with_parent(parent, number):
    """Has the kernel send this process a signal when its parent ends (on Linux).

    Args:
        parent: the parent's process id; where it has ended already, this process does too.
        number: the signal.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def remove_batches(pids):
    """Removes the batches that ended loader workers left in shared memory.

    Args:
        pids: their process ids; Paddle names a batch's file after the process that made it.
    """
    if _shares_memory_with_other_pids():
        return
    for pid in pids:
        for path in glob.glob(f"/dev/shm/paddle_{pid}_*"):
            with contextlib.suppress(OSError):
                os.remove(path)


def _shares_memory_with_other_pids():
    """Whether the shared memory is the host's and the process ids are a container's own.

    So it is under `docker run --ipc=host`, where another container's batch may have any name.
    """
    with contextlib.suppress(OSError):
        # The numbers of a host's own namespaces: Linux, include/linux/proc_ns.h.
        is_host_memory = os.readlink("/proc/self/ns/ipc") == "ipc:[4026531839]"
        return is_host_memory and os.readlink("/proc/self/ns/pid") != "pid:[4026531836]"
    return False
