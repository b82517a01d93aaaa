"""One process per device: how many, with which environment, and what happens when one dies.

`paddle.distributed.launch` starts ranks on many hosts; under it `is_rank()` is true and nothing is
started here.  On one host this module does the same with less ceremony.  It is our own because
`paddle.distributed.spawn` leaves the ranks running when their parent is killed, and needs Paddle in
the parent before the number of threads per rank is known.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

from ranks.host import available_cores, die_with_parent, number_in, remove_batches, stop_signals
from ranks.report import REPORT_PIPE, has_launcher
from ranks.watchdog import END_SECONDS as _END_SECONDS
from utils import UserError, remove_temporary_files, show_path

# How long ranks that were asked to end may take.  watchdog.py limits how long a rank waits for the
# others, loader.py how long for a worker, gloo a collective (30 s).
_GRACE_SECONDS = 20  # between the end of a rank that was asked to end and that of the others
_SILENCE_SECONDS = 60  # of ranks that were asked to end: one that hangs has no other end
_SAME_REQUEST_SECONDS = 1  # some schedulers signal a process and then its group


def is_rank():
    """Whether a launcher, ours or Paddle's, started this process as a rank."""
    return number_in("PADDLE_TRAINER_ID", 0) is not None


_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")
_GPU_NODES = tuple(f"/dev/nvidia{number}" for number in range(10))


def count_gpus():
    """The GPUs that the installed Paddle can use, honouring CUDA_VISIBLE_DEVICES."""
    return _find_gpus()[0]


def plan_ranks(nprocs):
    """(number of ranks, number of GPUs, warning or None) for -nprocs on this machine.

    Raises:
        UserError: they cannot be, or nobody asked for the CPU of a machine with a GPU.
    """
    gpus, said = _find_gpus()
    if gpus == 0 and nprocs is None:
        _refuse_hidden_gpus(said)
    ranks, warning = choose_ranks(nprocs, gpus)
    return ranks, gpus, warning


def _find_gpus():
    """(the GPUs that Paddle can use, what it says where it finds none)."""
    return (0, "") if _cpu_is_asked_for() else _ask_paddle()


def _refuse_hidden_gpus(said):
    """Raises UserError where there is a GPU that Paddle does not find and nobody asked for the CPU.

    Without it a wheel for the CPU, or one that the driver is too old for, would train on a core.
    """
    if not _cpu_is_asked_for() and (_exists(_GPU_NODES) or _nvidia_smi_lists_one()):
        raise UserError(
            f"there is a GPU here, but Paddle finds none ({said}): install the wheel for this "
            "machine's driver (docs/install.md); to train on the CPU, give -nprocs 1"
        )


def _cpu_is_asked_for():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _exists(paths):
    return any(os.path.exists(path) for path in paths)


def _nvidia_smi_lists_one():
    """Whether NVIDIA's tool knows of a GPU; under WSL there are no device nodes."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return "GPU " in _output_of(["nvidia-smi", "-L"], timeout=20).stdout
    return False


def _ask_paddle():
    """(the GPUs that Paddle finds, its last line where it finds none).

    Asked in a process of its own, and only where there is a trace of a GPU: the import takes
    seconds, and this process must not load CUDA before it starts the ranks.
    """
    if not _exists(_DRIVER_FILES + _GPU_NODES) and not _nvidia_smi_lists_one():
        return 0, ""
    code = (
        "import paddle, sys\n"
        "if not paddle.is_compiled_with_cuda():\n"
        "    sys.exit(f'Paddle {paddle.__version__} here is a wheel for the CPU')\n"
        "print(paddle.device.cuda.device_count())"
    )
    answer = _output_of([sys.executable, "-c", code])
    with contextlib.suppress(ValueError, IndexError):
        return int(answer.stdout.split()[-1]), _last_line(answer.stderr)
    return 0, _last_line(answer.stderr)


def _output_of(command, **options):
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


def _last_line(text):
    lines = text.strip().splitlines()
    return show_path(lines[-1].strip()) if lines else "it does not say why"


def unused_nprocs(nprocs):
    """A warning, on the first rank, where -nprocs is given under another launcher; else None."""
    if nprocs is None or has_launcher() or number_in("PADDLE_TRAINER_ID", 0) > 0:
        return None
    return (
        f"-nprocs {nprocs} does not count: the environment variable PADDLE_TRAINER_ID says that a "
        "launcher has started this process (where none has, unset it)"
    )


def choose_ranks(nprocs, gpus):
    """(number of ranks, warning or None) for -nprocs and the number of GPUs.

    Raises:
        UserError: more ranks are asked for than there are GPUs, or none.
    """
    if nprocs is not None and nprocs < 1:
        raise UserError(f"-nprocs is {nprocs}, it must be at least 1")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    warning = None
    if named and not _cpu_is_asked_for() and len(named.split(",")) > gpus:
        use = f"{gpus} GPU(s): using those" if gpus else "no GPU here: running on the CPU"
        warning = f"CUDA_VISIBLE_DEVICES names {named}, but Paddle finds {use}"
    if gpus == 0:
        cores = available_cores()
        if warning is None and (nprocs or 1) > cores:
            warning = f"-nprocs is {nprocs}, but there are {cores} core(s): more take longer"
        return nprocs or 1, warning
    if nprocs is not None and nprocs > gpus:
        raise UserError(
            f"-nprocs is {nprocs}, but only {gpus} GPU(s) are visible: one process needs one GPU"
        )
    return nprocs or gpus, warning


def run(ranks, gpus, command, stdin=subprocess.DEVNULL):
    """Runs `command` once for each rank on this host and waits for all of them.

    When a rank fails, the others are killed and its error is printed.  The signals that ask to end
    (host.stop_signals) are passed on as SIGTERM; a second one kills the ranks, and so does a minute
    without a sign of life (report.report_alive, report.busy) after the first.  A rank that reports
    an error and lives on counts as failed.  When this process is killed, the kernel sends the ranks
    a SIGTERM.  A killed rank leaves no process, temporary file or batch in shared memory.

    Args:
        ranks: number of processes.
        gpus: number of visible GPUs; 0 runs the ranks on the CPU with gloo.
        command: the program and its arguments.
        stdin: the ranks' standard input, as subprocess.Popen takes it.  A terminal would stop a
            rank that reads from it, as the ranks are out of its group.

    Returns:
        The exit status: 0, the first failed rank's, or 128 + the signal that ended it or us.
    """
    reader, writer = os.pipe()
    reports, received = _Reports(reader), _Signals()
    for number in stop_signals():
        signal.signal(number, received.take)
    _adopt_orphans()
    processes = [
        _start_rank(rank, env, command, writer, stdin)
        for rank, env in enumerate(_environments(ranks, bool(gpus)))
    ]
    os.close(writer)
    failed, code = _wait(processes, received, reports)
    pids = _end_groups([process.pid for process in processes])
    reports.read()
    remove_batches(pids)
    if reports.folder:
        for pid in pids:
            remove_temporary_files(reports.folder, pid)
    # The rank that knows what went wrong, even where another ended first as a consequence.
    own = next((error for error in reports.errors if error["status"]), None)
    if own:
        return _describe_failure(own["rank"], own["status"], ranks, reports)
    if code == 0:
        return 0
    if received.first and (_is_as_asked(code) or received.again):
        return 128 + received.first
    return _describe_failure(failed, code, ranks, reports)


def _describe_failure(failed, code, ranks, reports):
    """Prints which rank failed, with its error and its log.  Returns the exit status."""
    errors, folder = reports.errors, reports.folder
    message = next((error["error"] for error in errors if error["rank"] == failed), None)
    if message is None and code == -signal.SIGALRM:
        message = (
            "no rank got any further for HANG_MINUTES: one hangs, or is gone, and the others wait "
            "for it; where each was, the end of its log says, or the lines above"
        )
    if message:
        print(message, file=sys.stderr, flush=True)
    if not message or ranks > 1:
        reason = f"exit status {code}" if code > 0 else signal.Signals(-code).name
        parts = [f"rank {failed} of {ranks} failed ({reason})"]
        parts += [f"its log is {os.path.join(folder, f'log_{failed}.txt')}"] if folder else []
        parts += ["the other ranks were ended"] if ranks > 1 else []
        print("; ".join(parts), file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def _environments(ranks, on_gpu):
    """Each rank's variables: those that `paddle.distributed.launch` sets."""
    endpoints = [f"127.0.0.1:{port}" for port in _free_ports(ranks)]
    for rank in range(ranks):
        env = {
            "PADDLE_MASTER": endpoints[0],
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(ranks),
            "PADDLE_LOCAL_SIZE": str(ranks),
            "PADDLE_LOCAL_RANK": str(rank),
        }
        if on_gpu:
            env["FLAGS_selected_gpus"] = str(rank)
        else:
            env["PADDLE_DISTRI_BACKEND"] = "gloo"
            env.update(_loopback())
        yield {**os.environ, **env}


def _loopback():
    """Has gloo talk over the loopback; it would look for the host's own name, which not every
    container or laptop can resolve."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    names = []
    with contextlib.suppress(OSError):
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start_rank(rank, env, command, writer, stdin):
    parent = os.getpid()

    def prepare():  # runs in the child
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's handler would lose it here
        # Out of the terminal's group: the launcher alone gets Ctrl-C, and tells each rank once,
        # which then ends its loader workers in good order.
        os.setpgid(0, 0)
        die_with_parent(parent, signal.SIGTERM)

    env[REPORT_PIPE] = str(writer)
    return subprocess.Popen(
        command,
        env=env,
        pass_fds=[writer],
        stdin=stdin,
        preexec_fn=prepare,
    )


def _adopt_orphans():
    """Makes this process the parent of what a rank leaves behind (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # 36 is PR_SET_CHILD_SUBREAPER


class _Signals:
    """The signals that this process got.

    Attributes:
        first: the number of the first one, None before it.
        again: whether there was another one that is not the same request.
    """

    def __init__(self):
        self.first, self.again = None, False
        self._time = None  # when the first one came

    def take(self, number, frame):
        if self.first is None:
            self.first, self._time = number, time.monotonic()
        elif time.monotonic() > self._time + _SAME_REQUEST_SECONDS:
            self.again = True


class _Reports:
    """What the ranks have said on the pipe.

    Attributes:
        folder: the run's folder; None before it is known.
        errors: the reports of errors, as dicts, in their order.
    """

    def __init__(self, reader):
        # A process that a rank leaves behind may hold the other end open for good.
        os.set_blocking(reader, False)
        self._reader, self._rest = reader, b""
        self._busy = set()
        self.folder, self.errors = None, []

    def read(self):
        """Reads the reports that have come.  Returns whether a rank got on, or is busy."""
        with contextlib.suppress(BlockingIOError):  # nothing there
            self._rest += os.read(self._reader, 1 << 20)
        *lines, self._rest = self._rest.split(b"\n")
        for report in map(json.loads, lines):
            self.folder = report.get("folder", self.folder)
            if "error" in report:
                self.errors.append({**report, "time": time.monotonic()})
            if "busy" in report:
                (self._busy.add if report["busy"] else self._busy.discard)(report["rank"])
        return bool(lines or self._busy)

    def late(self, codes):
        """The first rank that reported an error and has not ended since then; None for none."""
        limit = time.monotonic() - _END_SECONDS
        ranks = [error["rank"] for error in self.errors if error["time"] <= limit]
        return next((rank for rank in ranks if codes[rank] is None), None)


def _wait(processes, received, reports):
    """Waits for all; ends the rest when one fails or a signal came.

    Returns:
        The first failed rank, or None, and how it ended: as Popen.returncode has it, but 1 where it
        had reported an error and did not end.
    """
    failed, late, signalled, deadline = None, None, False, math.inf
    while None in (codes := [process.poll() for process in processes]):
        now, heard = time.monotonic(), reports.read()
        if failed is None and (failed := _first_failed(codes)) is not None:
            deadline = now + (_GRACE_SECONDS if _is_as_asked(codes[failed]) else 0)
        elif failed is None and (late := reports.late(codes)) is not None:
            failed, deadline = late, now
        elif received.first and not signalled:
            signalled, deadline = True, now + _SILENCE_SECONDS
            _signal_all(processes, signal.SIGTERM)
        elif failed is None and signalled and heard:
            deadline = now + _SILENCE_SECONDS
        if received.again or now >= deadline:
            if failed is None and not received.again:
                print(
                    f"asked to end, the ranks show no sign of life for {_SILENCE_SECONDS} s: "
                    "killing them", file=sys.stderr, flush=True,
                )  # fmt: skip
            _signal_all(processes, signal.SIGKILL)
            deadline = math.inf
        time.sleep(0.02)
    failed = _first_failed(codes) if failed is None else failed
    code = 0 if failed is None else codes[failed]
    return failed, code if late is None else 1


def _first_failed(codes):
    """The first failed rank, but a killed one before others, which fail because it is gone."""
    failed = [rank for rank, code in enumerate(codes) if code]
    killed = [rank for rank in failed if codes[rank] < 0 and codes[rank] != -signal.SIGABRT]
    return next(iter(killed + failed), None)


def _is_as_asked(code):
    """Whether a rank ended because it was asked to: by stop.py, or where that does not handle the
    signal, by the signal itself."""
    return any(code in (128 + number, -number) for number in stop_signals())


def _signal_all(processes, number):
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _end_groups(groups):
    """Kills what is left of process groups whose leaders have ended.  All their process ids."""
    pids = list(groups)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                pids.append(os.waitpid(-group, 0)[0])
    return pids
