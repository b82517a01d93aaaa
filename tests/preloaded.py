"""Programs that start at once: forks of a process that has Paddle loaded already.

To import Paddle takes each rank a second of computing, and the tests start some two hundred ranks.
A fork runs the same code, from the program's first line on, in processes of its own with their own
variables, files and signals.  That the program starts from nothing too is shown by the tests with
real processes: test_scripts.py, test_two_hosts.py, and test_preloaded.py, which compares the two.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_server = None


class Program:
    """A program that runs; what tests use of subprocess.Popen, with text."""

    def __init__(self, command, env, cwd=None, stdout=None, stderr=None, start_new_session=False):
        """Starts [python, FILE, argument, ...] or [python, "-c", code, argument, ...]."""
        self.returncode = None
        self._out, stdout = _open(stdout)
        self._err, stderr = _open(stdout if stderr is subprocess.STDOUT else stderr)
        self._answers, theirs = socket.socketpair()
        request = [command[1:], env, str(cwd or os.getcwd()), start_new_session]
        with open(os.devnull) as stdin, theirs:
            files = [theirs.fileno(), stdin.fileno(), stdout or 1, stderr or 2]
            socket.send_fds(_start_server(), [json.dumps(request).encode()], files)
        self.pid = int(self._answers.recv(100))
        atexit.register(self.kill)  # where a test that failed has left it

    def poll(self):
        """The exit status; None while it runs."""
        return self._receive(0)

    def wait(self, timeout=None):
        """The exit status, when it has ended."""
        if self._receive(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """(stdout, stderr) when it has ended; None for what was not PIPE."""
        self.wait(timeout)
        return self._read(self._out), self._read(self._err)

    def send_signal(self, number):
        """Sends a signal, where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _receive(self, timeout):
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._answers.recv(100))
            except (BlockingIOError, TimeoutError, socket.timeout):
                return None
            self._answers.close()
            atexit.unregister(self.kill)
        return self.returncode

    @staticmethod
    def _read(file):
        if file is None:
            return None
        with file:
            return Path(file.name).read_text()


def _open(target):
    """(a file to read from or None, its descriptor) for what Popen takes as stdout."""
    if target is subprocess.PIPE:
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115, which lives as long as its Program
        return file, file.fileno()
    if target is subprocess.DEVNULL:
        return None, _DEVNULL
    return None, target if target is None or isinstance(target, int) else target.fileno()


_DEVNULL = os.open(os.devnull, os.O_RDWR)


def _start_server():
    """The socket that takes programs to start; it ends with this process."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                pass_fds=[theirs.fileno()],
            )
        atexit.register(_server.close)
    return _server


# --- in the server and its forks ---


def _serve(requests):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombies are left
    while True:
        request, files, *_ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:  # the tests have ended
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            return _watch(json.loads(request), *files)
        for file in files:
            os.close(file)


def _watch(request, answers, *streams):
    """Runs a program in another fork and answers with its process id, then with its status."""
    command, env, cwd, new_session = request
    pid = os.fork()
    if pid == 0:
        if new_session:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(cwd)
        return _become(command, env)
    for stream in streams:
        os.close(stream)
    os.write(answers, str(pid).encode())
    os.write(answers, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _become(command, env, keep=()):
    """Goes on as the program, with the variables and without files but `keep`."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, *_own_files, *keep):
            try:
                os.close(int(name))
            except OSError:  # listdir's own
                continue
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # New ones, as a stream does not forget whether its first file could be sought in.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": _Rank})
    host.prepare_cpu = _prepare_cpu
    _end(_run(*command))


def _run(first, *rest):
    """Runs FILE ARGUMENT... or -c CODE ARGUMENT... and returns the exit status."""
    try:
        if first == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = [first, *rest], os.path.dirname(first)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status):
    """Ends this process as Python does, without the half second that it takes to free Paddle."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def _prepare_cpu(ranks):
    """host.prepare_cpu, where Paddle is loaded already."""
    _real_prepare_cpu(ranks)
    paddle.base.core.set_num_threads(host.threads())


def _wait_for_rank_0(env):
    """Waits until rank 0 listens: Paddle tries again after 3 s only, and forks are fast enough."""
    port = int(env["PADDLE_MASTER"].split(":")[1])
    limit = time.monotonic() + 2  # where it ends before
    while env["PADDLE_TRAINER_ID"] != "0" and time.monotonic() < limit:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if any(row[3] == "0A" and int(row[1].split(":")[1], 16) == port for row in rows):
            return
        time.sleep(0.02)


class _Rank:
    """What launch.py uses of subprocess.Popen."""

    def __init__(self, command, env, pass_fds, stdin, preexec_fn):
        self.returncode = None
        with warnings.catch_warnings():  # Python 3.12's on threads, which none of the program's is
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.dup2(_DEVNULL if stdin == subprocess.DEVNULL else stdin, 0)
            preexec_fn()
            _wait_for_rank_0(env)
            _become(command[1:], env, pass_fds)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from ranks import host, launch

    _real_prepare_cpu = host.prepare_cpu
    paddle = host.import_paddle()
    import datasets  # noqa: F401
    import main_multi_gpu  # noqa: F401
    import training.evaluate
    import training.inference
    import training.train  # noqa: F401

    os.environ.pop("OMP_NUM_THREADS")
    _requests = socket.socket(fileno=int(sys.argv[1]))
    _own_files = {int(name) for name in os.listdir("/proc/self/fd")} - {_requests.fileno()}
    _serve(_requests)
