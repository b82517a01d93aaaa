"""The program on two hosts: two network namespaces, each with Paddle's launcher, and a cable."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import HANG_SECONDS
from program import CONFIG, ROOT, SMALL, flatten, metrics, run, run_program

from weights import pdparams

EPOCHS = 5  # enough that one host can be killed before the run is over
OPTS = {**SMALL, "TRAIN.NUM_EPOCHS": EPOCHS}
INTERFACE = "eth0"  # in both namespaces, where nothing else has it
# Longer than gloo's 30 seconds, after which a rank gives up on one that sends nothing.
SURVIVOR_SECONDS = 60
# Runs a command with one host's folder in the place of the folder that both name.
OWN_DISK = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


@dataclass
class Host:
    """One of the two: a network namespace, which holds its processes too."""

    number: int
    namespace: str

    @property
    def address(self):
        return f"10.0.0.{self.number + 1}"

    def pids(self):
        """Its processes, the launcher's and the ranks' and their loader workers'."""
        return [int(pid) for pid in run(["ip", "netns", "pids", self.namespace]).out.split()]

    def kill(self):
        """Ends every process at once, as a host does that loses its power."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def start(self, log, launcher, program, arguments, prefix=(), **env):
        """The launcher as a process; log gets what it and its ranks print."""
        command = [
            "ip", "netns", "exec", self.namespace, *prefix,
            sys.executable, "-m", "paddle.distributed.launch",
            "--master", "10.0.0.1:8090", "--host", self.address, "--nnodes", 2,
            "--rank", self.number, "--log_dir", log.with_suffix(".launch"), *launcher,
            program, "-cfg", CONFIG, *arguments,
        ]  # fmt: skip
        # A proxy would get the launchers' requests, and a launcher's variables are meant for ranks.
        left_out = ("_proxy", "_PROXY")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.endswith(left_out) and not name.startswith("PADDLE_")
        }
        environment.update(
            {
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                **env,
            }
        )
        with open(log, "w") as file:
            return subprocess.Popen(
                [str(part) for part in command],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )


class Hosts:
    """Both, and the program on both.

    Args:
        pair: the hosts.
        folder: where their logs go.
    """

    def __init__(self, pair, folder):
        self.pair, self.folder = pair, folder

    def start(
        self, *arguments, launcher=("--nproc_per_node", 1), program=ROOT / "main_multi_gpu.py",
        opts=None, disks=None, **env,
    ):  # fmt: skip
        """The two launchers, and the paths of their logs.

        Args:
            arguments: main_multi_gpu.py's; the same on both hosts.
            program: what runs with them.
            launcher: further arguments of Paddle's launcher.
            opts: config keys.
            disks: (a folder, host 0's folder in its place, host 1's), or None where they share all.
        """
        # Loader workers cost time for each epoch, and change no bit.
        arguments = ["-num_workers", 0, *arguments, "-opts", *flatten(opts or OPTS)]
        number = len(list(self.folder.glob("*.log")))
        logs = [self.folder / f"{number}-host{host.number}.log" for host in self.pair]
        processes = []
        for host, log in zip(self.pair, logs):
            prefix = ("sh", "-c", OWN_DISK, "sh", disks[1 + host.number], disks[0]) if disks else ()
            processes.append(host.start(log, launcher, program, arguments, prefix, **env))
        return processes, logs

    def run(self, *arguments, **kwargs):
        """Both exit statuses and logs of a run that ends by itself."""
        processes, logs = self.start(*arguments, **kwargs)
        statuses = [process.wait(timeout=HANG_SECONDS) for process in processes]
        return statuses, [log.read_text() for log in logs]

    def check(self, *arguments, **kwargs):
        """run, where both have to succeed; host 0's log."""
        statuses, logs = self.run(*arguments, **kwargs)
        assert statuses == [0, 0], logs
        return logs[0]


@pytest.fixture(scope="module")
def namespaces():
    """Two hosts with a cable between them, which are gone after the tests, whatever happens."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("two hosts are two network namespaces, which only root on Linux can make")
    if not shutil.which("ip"):
        pytest.skip("two hosts are two network namespaces, and there is no `ip` (iproute2)")
    tag = secrets.token_hex(4)  # so that other runs of these tests are other hosts
    pair = [Host(number, f"gmlp-{tag}-{number}") for number in (0, 1)]
    first, second = (host.namespace for host in pair)
    # The interfaces never lie outside the namespaces: their names can meet no others.
    commands = [
        f"netns add {first}",
        f"netns add {second}",
        f"-n {first} link add {INTERFACE} type veth peer name {INTERFACE} netns {second}",
    ]
    for host in pair:
        inside = f"-n {host.namespace}"
        commands += [
            f"{inside} address add {host.address}/24 dev {INTERFACE}",
            f"{inside} link set {INTERFACE} up",
            f"{inside} link set lo up",
            f"netns exec {host.namespace} true",
        ]
    try:
        for command in commands:
            result = run(["ip", *command.split()])
            if result.status:
                refusal = result.err.strip().splitlines()[-1:]
                pytest.skip(f"network namespaces are refused here: ip {command}: {refusal}")
        yield pair
    finally:
        for host in pair:
            host.kill()
            run(["ip", "netns", "delete", host.namespace])


@pytest.fixture
def hosts(namespaces, tmp_path):
    """The two hosts without processes, before a test and after it."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    yield Hosts(namespaces, folder)
    for host in namespaces:
        host.kill()


@pytest.fixture(scope="module")
def one_host(few_digits, tmp_path_factory):
    """The folder of the same training with two ranks on one host, of one thread each."""
    output = tmp_path_factory.mktemp("one host")
    run_program(
        "-data_path", few_digits, "-output", output, "-nprocs", 2, opts=OPTS, OMP_NUM_THREADS="1"
    ).check()
    return only(output, "train-*")


def only(folder, pattern):
    """The one path that there is."""
    (path,) = folder.glob(pattern)
    return path


def differences(first, second, names=()):
    """The names of the leaves in which two nested trees are not the same bits."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return [
            name
            for key in sorted(keys)
            for name in differences(first.get(key), second.get(key), (*names, str(key)))
        ]
    if hasattr(first, "tobytes") and hasattr(second, "tobytes"):
        equal = (first.dtype, first.shape) == (second.dtype, second.shape)
        equal = equal and first.tobytes() == second.tobytes()
    else:
        equal = first == second
    return [] if equal else ["/".join(names)]


def assert_same_end(folder, reference, leave_out=()):
    """Asserts that two trainings ended with the same weights, average and optimizer state."""
    ends = [pdparams.read(path / f"Epoch-{EPOCHS}.pdparams") for path in (folder, reference)]
    keys = {"model", "model_ema", "optimizer", "lr_scheduler", "step", "epoch", "best"}
    keys -= set(leave_out)
    for end in ends:
        assert keys <= set(end) and len(end["optimizer"]) > len(end["model"])
    first, second = ({key: end[key] for key in keys} for end in ends)
    assert differences(first, second) == []


def assert_nothing_runs(hosts):
    limit = time.monotonic() + 10
    while left := [pid for host in hosts.pair for pid in host.pids()]:
        assert time.monotonic() < limit, f"processes are left: {left}"
        time.sleep(0.1)


def wait_for_epoch(epoch, output, processes, logs):
    """Waits until a training has saved an epoch."""
    limit = time.monotonic() + HANG_SECONDS
    while not list(output.glob(f"train-*/Epoch-{epoch}.pdparams")):
        assert [process.poll() for process in processes] == [None, None], logs[0].read_text()
        assert time.monotonic() < limit, "the program hangs"
        time.sleep(0.01)


def kill_in_training(hosts, number, arguments, epoch=1, **kwargs):
    """Kills a host when it has trained some epochs; (status, log) of the other."""
    processes, logs = hosts.start(*arguments, **kwargs)
    output = Path(arguments[arguments.index("-output") + 1])
    if "disks" in kwargs:
        output = kwargs["disks"][1]
    wait_for_epoch(epoch, output, processes, logs)
    hosts.pair[number].kill()
    start = time.monotonic()
    status = processes[1 - number].wait(timeout=SURVIVOR_SECONDS)
    print(f"host {1 - number} ended {time.monotonic() - start:.1f} s later with status {status}")
    processes[number].wait()
    assert not list(output.glob(f"train-*/Epoch-{EPOCHS}.pdparams")), "the kill came too late"
    return status, logs[1 - number].read_text()


def test_training_on_two_hosts_gives_the_bits_of_two_ranks_on_one(
    hosts, one_host, few_digits, tmp_path
):
    hosts.check("-data_path", few_digits, "-output", tmp_path / "runs")
    folder = only(tmp_path / "runs", "train-*")
    assert_same_end(folder, one_host)
    assert {"log.txt", "log_0.txt", "log_1.txt"} <= {path.name for path in folder.iterdir()}
    assert_nothing_runs(hosts)


def test_evaluation_on_two_hosts_gives_the_counts_of_one(hosts, one_host, few_digits, tmp_path):
    log = hosts.check(
        "-data_path", few_digits, "-output", tmp_path, "-eval", "-batch_size_eval", 7,
        "-pretrained", one_host / "best.pdparams",
    )  # fmt: skip
    scores = json.loads(only(tmp_path, "eval-*/eval.json").read_text())
    rows = [row for row in metrics(one_host, "eval") if row["weights"] == "ema"]
    best = max(rows, key=lambda row: row["acc1"])
    assert (scores["images"], scores["acc1"], scores["acc5"]) == (101, best["acc1"], best["acc5"])
    assert f"Acc@1 {best['acc1']:.2f}" in log  # and the launcher shows it


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_host_ends_the_other_and_a_restart_goes_on(
    number, hosts, one_host, few_digits, tmp_path
):
    arguments = (
        "-data_path", few_digits, "-output", tmp_path / "runs", "-resume", "auto",
        "-num_workers", number,
    )  # fmt: skip
    status, _ = kill_in_training(hosts, number, arguments)
    assert status != 0
    assert_nothing_runs(hosts)
    log = hosts.check(*arguments)
    assert f"epoch {EPOCHS}/{EPOCHS}" in log and f"epoch 1/{EPOCHS}" not in log
    assert_same_end(only(tmp_path / "runs", "train-*"), one_host)


@pytest.mark.slow
def test_two_ranks_on_each_host_do_what_four_do_on_one(hosts, few_digits, tmp_path):
    opts = {**SMALL, "DATA.BATCH_SIZE": 5}
    arguments = ("-data_path", few_digits, "-num_workers", 0)
    run_program(
        *arguments, "-output", tmp_path / "one", "-nprocs", 4, opts=opts, OMP_NUM_THREADS="1"
    ).check()
    # On a CPU the launcher starts as many processes as it is told of GPUs; these do not exist.
    hosts.check(
        *arguments, "-output", tmp_path / "two", opts=opts, launcher=("--nproc_per_node", 2),
        CUDA_VISIBLE_DEVICES="-1,-1",
    )  # fmt: skip
    folders = [only(tmp_path / name, "train-*") for name in ("two", "one")]
    ends = [pdparams.read(folder / "last.pdparams") for folder in folders]
    assert differences(ends[0]["model"], ends[1]["model"]) == []
    assert {f"log_{rank}.txt" for rank in range(4)} <= {path.name for path in folders[0].iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["auto", "file"])
def test_a_restart_goes_on_where_only_rank_0s_disk_has_the_checkpoint(
    flag, hosts, one_host, few_digits, tmp_path
):
    disks = [tmp_path / name for name in ("runs", "disk of host 0", "disk of host 1")]
    for disk in disks:
        disk.mkdir()
    arguments = ("-data_path", few_digits, "-output", disks[0])
    status, _ = kill_in_training(hosts, 1, arguments, disks=disks)
    assert status != 0
    stopped = only(disks[1], "train-*")
    assert [path.name for path in only(disks[2], "train-*").iterdir()] == ["log_1.txt"]
    resume = "auto" if flag == "auto" else disks[0] / stopped.name / "Epoch-1.pdparams"
    log = hosts.check(*arguments, "-resume", resume, disks=disks)
    assert "rank 0 has sent it" in log and f"epoch 1/{EPOCHS}:" not in log
    # A new folder has no best model yet.
    leave_out = () if flag == "auto" else ("best",)
    assert_same_end(max(disks[1].glob("train-*")), one_host, leave_out)
    assert not list(disks[0].iterdir()) and not list(disks[2].glob("*/*.pdparams"))


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=["both", "one"])
def test_sigterm_to_a_launcher_saves_and_a_restart_goes_on(
    told, hosts, one_host, few_digits, tmp_path
):
    arguments = (
        "-data_path", few_digits, "-output", tmp_path / "runs", "-resume", "auto",
        "-num_workers", 1,  # which gets the signal too
    )  # fmt: skip
    processes, logs = hosts.start(*arguments)
    wait_for_epoch(1, tmp_path / "runs", processes, logs)
    for number in told:
        processes[number].send_signal(signal.SIGTERM)
    statuses = [process.wait(timeout=SURVIVOR_SECONDS) for process in processes]
    # Paddle's launcher gives its signal's number, or its rank's status.
    assert statuses == [15 if number in told else 143 for number in (0, 1)]
    assert_nothing_runs(hosts)
    folder = only(tmp_path / "runs", "train-*")
    assert "-resume auto" in (folder / "log.txt").read_text().splitlines()[-1]
    assert not (folder / f"Epoch-{EPOCHS}.pdparams").exists(), "the signal came too late"
    log = hosts.check(*arguments)
    assert f"epoch 1/{EPOCHS}:" not in log
    assert_same_end(folder, one_host)


# main_multi_gpu.py; in rank 1's fourth collective something happens first.
STAND_IN = f"""
import ctypes, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from ranks import host, watchdog
host.import_paddle()
import main_multi_gpu
from paddle import distributed as dist

real, calls, libc = dist.all_reduce, [], ctypes.CDLL(None)
def hang_at_the_end():
    watchdog.END_SECONDS = 1
    libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)
    raise OSError("the disk is full")
def all_reduce(*args, **kwargs):
    calls.append(1)
    if os.environ["PADDLE_TRAINER_ID"] == "1" and len(calls) == 4:
        %s
    return real(*args, **kwargs)
dist.all_reduce = all_reduce
sys.exit(main_multi_gpu.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "ended", "tell"),  # by SIGALRM, and where they were
    [
        ("ctypes.PyDLL(None).sleep(600)", [0, 1], [0, 1]),  # in C code, with Python's lock
        ("os.kill(os.getpid(), signal.SIGSTOP)", [0, 1], [0]),
        (f"os.system('ip link set {INTERFACE} down')", [0, 1], [0, 1]),  # the cable
        ("hang_at_the_end()", [1], []),
    ],
    ids=["C", "stopped", "cable", "end"],
)
def test_a_hang_on_one_host_ends_the_ranks_on_both(
    happens, ended, tell, hosts, few_digits, tmp_path
):
    program, second = tmp_path / "program.py", hosts.pair[1]
    program.write_text(STAND_IN % happens)
    opts = {**OPTS, "HANG_MINUTES": 0.2, "REPORT_FREQ": 1}  # sooner than gloo's 30 s
    arguments = ("-data_path", few_digits, "-output", tmp_path / "runs")
    processes, logs = hosts.start(*arguments, program=program, opts=opts)
    try:
        statuses = [processes[0].wait(timeout=SURVIVOR_SECONDS)]
        for pid in second.pids():
            os.kill(pid, signal.SIGCONT)
        statuses.append(processes[1].wait(timeout=SURVIVOR_SECONDS))
    finally:
        run(["ip", "-n", second.namespace, "link", "set", INTERFACE, "up"])
    assert 0 not in statuses
    assert_nothing_runs(hosts)
    folder = only(tmp_path / "runs", "train-*")
    printed = [log.read_text() for log in logs]
    own = [(folder / f"log_{rank}.txt").read_text() for rank in (0, 1)]
    assert [rank for rank in (0, 1) if "code -14" in printed[rank]] == ended, printed
    assert [rank for rank in (0, 1) if "Timeout (0:00:12)!" in own[rank]] == tell, own
    assert ("the disk is full" in printed[1]) == (ended == [1])
