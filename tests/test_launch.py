"""Launching: how many ranks, with which environment, and that none outlives its launcher."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import HANG_SECONDS, is_running, wait_for
from program import CONFIG, ROOT, run

import main_multi_gpu
from ranks import again, launch, report
from utils import UserError

# Ranks say that they run by a file named by their number that holds their process's.
STARTED = """
import os, signal, sys
rank = os.environ["PADDLE_TRAINER_ID"]
with open(f"{sys.argv[1]}/{rank}.tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{sys.argv[1]}/{rank}.tmp", f"{sys.argv[1]}/{rank}")
"""
WAIT = STARTED + "while True: signal.pause()\n"


def start_launcher(folder, ranks, rank_code, gpus=0, **seconds):
    """A process that runs `rank_code` (argument: `folder`) in so many ranks.

    Args:
        seconds: launch's limits, such as grace for _GRACE_SECONDS.
    """
    command = [sys.executable, "-c", rank_code, str(folder)]
    limits = "; ".join(f"launch._{name.upper()}_SECONDS = {n}" for name, n in seconds.items())
    code = f"import sys; from ranks import launch; {limits}\n"
    code += f"sys.exit(launch.run({ranks}, {gpus}, {command!r}))"
    with open(folder / "stderr", "w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stderr=file, start_new_session=True
        )


def run_launcher(folder, ranks, rank_code, **options):
    """(exit status, stderr) of a launcher."""
    launcher = start_launcher(folder, ranks, rank_code, **options)
    try:
        status = launcher.wait(HANG_SECONDS)
    finally:
        launcher.kill()
    return status, (folder / "stderr").read_text()


def started(folder, ranks):
    """The process numbers of the ranks, when all have started."""
    wait_for(lambda: all((folder / str(rank)).exists() for rank in range(ranks)))
    return [int((folder / str(rank)).read_text()) for rank in range(ranks)]


# --- what to start ---


@pytest.mark.parametrize(
    ("nprocs", "gpus", "named", "ranks", "warned"),
    [
        (None, 0, None, 1, None),
        (3, 0, None, 3, None),
        (None, 4, None, 4, None),
        (2, 4, "0,1,2,3", 2, None),
        (4, 4, None, 4, None),
        (None, 0, "", 1, None),
        (2, 0, "-1", 2, None),
        (2, 0, " -1 ", 2, None),
        (None, 0, " ", 1, None),
        (None, 0, "0,1", 1, "no GPU here: running on the CPU"),
        (2, 0, "0,1", 2, "no GPU here: running on the CPU"),
        (None, 1, "0,1", 1, "1 GPU(s)"),
        (4, 0, None, 4, None),
        (64, 0, None, 64, "-nprocs is 64, but there are 4 core(s)"),
        (64, 64, None, 64, None),
    ],
)
def test_there_is_one_rank_for_each_gpu_or_as_many_as_asked(
    environment, monkeypatch, nprocs, gpus, named, ranks, warned
):
    monkeypatch.setattr(launch, "available_cores", lambda: 4)
    if named is not None:
        environment(CUDA_VISIBLE_DEVICES=named)
    number, warning = launch.choose_ranks(nprocs, gpus)
    assert number == ranks
    if warned:
        assert ("CUDA_VISIBLE_DEVICES names 0,1" in warning) == (named == "0,1")
        assert warned in warning
    else:
        assert warning is None


@pytest.mark.parametrize(("nprocs", "gpus"), [(0, 0), (-1, 0), (0, 4), (5, 4), (2, 1)])
def test_ranks_that_cannot_be_are_refused(environment, nprocs, gpus):
    with pytest.raises(UserError, match=f"-nprocs is {nprocs}, "):
        launch.choose_ranks(nprocs, gpus)


@pytest.mark.parametrize(
    ("driver", "named", "answer", "gpus"),
    [
        (True, None, "echo a warning; echo 4", 4),
        (True, "2,3", "echo 2", 2),
        (True, "", "echo 4", 0),
        (True, "-1", "echo 4", 0),
        (False, None, "echo 4", 0),
        (True, None, "exit 1", 0),
        (True, None, "echo no number", 0),
    ],
)
def test_gpus_are_those_that_paddle_can_use(
    environment, monkeypatch, tmp_path, driver, named, answer, gpus
):
    if named is not None:
        environment(CUDA_VISIBLE_DEVICES=named)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(python))
    monkeypatch.setattr(launch.os.path, "exists", lambda path: driver)
    assert launch.count_gpus() == gpus


@pytest.mark.parametrize(
    ("node", "smi", "named", "answer", "reason"),
    [
        ("/dev/nvidia0", "exit 9", None, "echo 0; echo a 1 >&2; echo too old >&2", "too old"),
        ("/dev/nvidia9", "exit 9", "0,1", "echo no libcudnn.so >&2; exit 1", "no libcudnn.so"),
        (None, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", None, "echo 0", "does not say why"),
        ("/dev/nvidia0", "exit 9", None, "echo 1", None),
        ("/dev/nvidia0", "exit 9", "", "echo 0", None),
        ("/dev/nvidia0", "exit 9", "-1", "echo 0", None),
        (None, "echo No devices were found; exit 6", None, "echo 0", None),
        (None, None, None, "echo 0", None),
        # A container that was given no GPU sees its host's driver.
        ("/proc/driver/nvidia/version", None, None, "echo 0", None),
    ],
)
def test_a_gpu_that_paddle_does_not_find_is_refused_with_its_reason(
    environment, monkeypatch, tmp_path, node, smi, named, answer, reason
):
    if named is not None:
        environment(CUDA_VISIBLE_DEVICES=named)
    asked = tmp_path / "asked"
    for name, code in (("python", f"echo >>'{asked}'; {answer}"), ("nvidia-smi", smi)):
        if code:
            (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launch.os.path, "exists", lambda path: path == node)
    if reason is None:
        launch.plan_ranks(None)
    else:
        with pytest.raises(UserError, match=rf"finds none \(.*{reason}\): install .* -nprocs 1"):
            launch.plan_ranks(None)
        assert asked.read_text() == "\n"  # once: the import takes seconds


@pytest.mark.parametrize("words, status", [([], 2), (["-nprocs", "1"], 0)])
def test_nprocs_asks_for_the_cpu_of_a_machine_with_a_gpu(
    environment, monkeypatch, capsys, words, status
):
    monkeypatch.setattr(launch, "_exists", lambda paths: True)
    monkeypatch.setattr(launch, "_ask_paddle", lambda: (0, "a wheel for the CPU"))
    monkeypatch.setattr(launch, "run", lambda *args: 0)
    assert main_multi_gpu.main(["-cfg", str(CONFIG), *words]) == status
    assert ("a wheel for the CPU" in capsys.readouterr().err) == bool(status)


# --- running ---


@pytest.mark.parametrize("gpus", [0, 3])
def test_ranks_get_the_variables_of_paddles_launcher(environment, tmp_path, gpus):
    code = "import json, os, sys; rank = os.environ['PADDLE_TRAINER_ID']\n"
    code += "json.dump(dict(os.environ), open(f'{sys.argv[1]}/{rank}', 'w'))"
    environment(OTHER_VARIABLE="kept")
    assert run_launcher(tmp_path, 3, code, gpus=gpus) == (0, "")
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    endpoints = ranks[0]["PADDLE_TRAINER_ENDPOINTS"].split(",")
    assert len(set(endpoints)) == 3
    for number, variables in enumerate(ranks):
        expected = {
            "PADDLE_TRAINERS_NUM": "3",
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[number],
            "PADDLE_MASTER": endpoints[0],
            "PADDLE_LOCAL_SIZE": "3",
            "PADDLE_LOCAL_RANK": str(number),
            "OTHER_VARIABLE": "kept",
        }
        assert {name: variables.get(name) for name in expected} == expected
        assert variables.get("FLAGS_selected_gpus") == (str(number) if gpus else None)
        assert variables.get("PADDLE_DISTRI_BACKEND") == (None if gpus else "gloo")
        assert variables.get("GLOO_SOCKET_IFNAME") == (None if gpus else "lo")


def test_a_network_interface_that_the_user_names_stays(environment, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    ranks = launch._environments(2, on_gpu=False)
    assert [variables["GLOO_SOCKET_IFNAME"] for variables in ranks] == ["eth7"] * 2


def test_ranks_join_on_a_host_whose_own_name_does_not_resolve(environment, tmp_path):
    network = ["unshare", "-n", "-u", "sh", "-c"]
    alone = 'hostname nowhere.invalid && ip link set lo up && exec "$@"'
    if run([*network, alone, "sh", "true"]).status:
        pytest.skip("a network of its own needs root and a sandbox that allows it")
    rank = "import os; from ranks import collective as c\n"
    rank += "os.write(1, b'%d of %d\\n' % c.init_distributed())"  # in one piece
    code = "import sys; from ranks import launch; sys.exit(launch.run(2, 0, sys.argv[1:]))"
    words = [sys.executable, "-c", code, sys.executable, "-c", rank]
    result = run([*network, alone, "sh", *words], cwd=ROOT, CUDA_VISIBLE_DEVICES="").check()
    assert sorted(result.out.split("\n")) == ["", "0 of 2", "1 of 2"]


RANK = "from ranks import again; print(again.how_to_go_on('/nowhere/train-1'))"
LAUNCHER = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], *sys.argv[2:]])"
)


@pytest.mark.parametrize(
    "words, resumed",
    [
        (["-cfg", "my file.yaml"], "-cfg 'my file.yaml' -resume auto"),
        (["-resume", "x y", "-amp"], "-amp -resume auto"),
        (["-res=auto", "-opts", "A", "1"], "-resume auto -opts A 1"),
        (["-opts", "A", "it's", "MODEL.RESUME", "x"], """-resume auto -opts A 'it'"'"'s'"""),
        (["-amp", "-opt", "MODEL.RESUME", "x"], "-amp -resume auto"),
    ],
)
def test_the_command_to_go_on_is_the_launchers_ready_to_paste(words, resumed):
    command = [sys.executable, "-c", LAUNCHER, RANK, *words]
    result = run(command, cwd=ROOT, CUDA_VISIBLE_DEVICES="0,1", OMP_NUM_THREADS=None).check()
    start = f"to go on: cd {shlex.quote(str(ROOT))} && CUDA_VISIBLE_DEVICES=0,1 "
    assert result.out == f"{start}{shlex.join(command[:4])} {resumed}\n"
    several = run(command, cwd=ROOT, PADDLE_TRAINERS_NUM="4", PADDLE_LOCAL_SIZE="2").check()
    assert several.out.startswith("to go on here, and with each host's own command on the others:")
    alone = run([sys.executable, "-c", RANK, *words], cwd=ROOT).check()  # pytest is no launcher
    assert alone.out.endswith(f" -c {resumed}\n")


def test_the_command_names_its_run_where_there_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "-amp"])
    for name in ("a run/train-1", "runs/train-1", "runs/train-2"):
        (tmp_path / name).mkdir(parents=True)
    assert again.how_to_go_on(tmp_path / "a run" / "train-1").endswith("-amp -resume auto")
    folder = tmp_path / "runs" / "train-1"
    assert again.how_to_go_on(folder).endswith(f"-amp -resume {folder}")


def test_a_rank_that_reads_the_terminal_finds_its_end_instead_of_being_stopped(tmp_path):
    code = "import os, sys\nsys.exit(input() and 0)"
    terminal, own = pty.openpty()
    command = [sys.executable, "-c", code]
    launcher = f"import sys; from ranks import launch; sys.exit(launch.run(1, 0, {command!r}))"
    done = subprocess.run(
        [sys.executable, "-c", launcher], cwd=ROOT, stdin=own, capture_output=True, text=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    os.close(terminal)
    os.close(own)
    assert done.returncode == 1 and "EOFError" in done.stderr


def test_a_rank_that_is_asked_to_end_before_its_program_starts_ends():
    code = "import os, signal, sys; from ranks import launch\n"
    code += "os.setpgid = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "sys.exit(launch.run(1, 0, ['true']))"
    assert run([sys.executable, "-c", code], cwd=ROOT).status == 143


def test_ranks_that_a_signal_ends_before_they_train_were_ended_as_asked(tmp_path):
    launcher = start_launcher(tmp_path, 2, WAIT)
    for pid in (*started(tmp_path, 2), launcher.pid):  # as a scheduler does
        os.kill(pid, signal.SIGUSR1)
    assert launcher.wait(HANG_SECONDS) == 138
    assert (tmp_path / "stderr").read_text() == ""


def test_what_was_ignored_before_is_ignored(tmp_path):
    numbers = (signal.SIGHUP, signal.SIGINT)  # by nohup, and by a script that starts it with &
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        launcher = start_launcher(tmp_path, 1, WAIT)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    (rank,) = started(tmp_path, 1)
    for pid in (rank, launcher.pid):
        for number in numbers:
            os.kill(pid, number)
    time.sleep(0.2)
    assert is_running(rank)
    launcher.terminate()
    assert launcher.wait(HANG_SECONDS) == 143


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ("sys.exit(3)", 3, "exit status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
    ],
)
def test_when_a_rank_fails_the_others_are_killed_and_it_is_named(tmp_path, end, status, reason):
    code = f"""
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
{STARTED}
while rank != "1": signal.pause()
while not all(os.path.exists(f"{{sys.argv[1]}}/{{other}}") for other in (0, 2)): pass
{end}
"""
    ended, err = run_launcher(tmp_path, 3, code)
    assert ended == status, err
    assert err.splitlines() == [f"rank 1 of 3 failed ({reason}); the other ranks were ended"]
    assert not any(map(is_running, started(tmp_path, 3)))


@pytest.mark.parametrize("grace, ends", [(HANG_SECONDS, True), (0.1, False)])
def test_when_a_rank_left_as_asked_the_others_have_time_to_follow(tmp_path, grace, ends):
    code = f"""
import os, signal, sys, time
{STARTED}
if rank == "1": sys.exit(143)
while os.path.exists(f"/proc/{{open(sys.argv[1] + '/1').read()}}/fd/0"): pass
time.sleep({1 if ends else HANG_SECONDS})
open(f"{{sys.argv[1]}}/followed", "w")
sys.exit(143)
"""
    code = code.replace("if rank", "while not os.path.exists(f'{sys.argv[1]}/1'): pass\nif rank")
    status, _ = run_launcher(tmp_path, 2, code, grace=grace)
    assert status == 143
    assert (tmp_path / "followed").exists() == ends
    assert not any(map(is_running, started(tmp_path, 2)))


def test_a_process_that_a_failed_rank_leaves_behind_is_ended(tmp_path):
    code = "import os, signal, sys\npid = os.fork()\nwhile pid == 0: signal.pause()\n"
    code += "open(f'{sys.argv[1]}/left', 'w').write(str(pid)); os._exit(5)"
    assert run_launcher(tmp_path, 1, code)[0] == 5
    assert not is_running(int((tmp_path / "left").read_text()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_rank_is_named_with_its_log_and_what_it_left_is_removed(tmp_path, ranks):
    # Its loader worker, a child that dies with it, has a batch in shared memory.
    code = f"""
from ranks import host, report
import os
import signal
import sys
import time
{STARTED}
folder = sys.argv[1]
if rank == "0": report.report_folder(folder)
while not all(os.path.exists(f"{{folder}}/{{other}}") for other in range({ranks})): pass
if rank == str({ranks - 1}):
    rank_pid, child = os.getpid(), os.fork()
    if child == 0:
        host.die_with_parent(rank_pid, signal.SIGKILL)
        while True: signal.pause()
    for pid in (os.getpid(), child): open(f"/dev/shm/paddle_{{pid}}_0_1", "w")
    open(f"/dev/shm/paddle_{{os.getpid()}}0_0_1", "w")  # another process's
    open(f"{{folder}}/.last.pdparams.tmp-{{os.getpid()}}", "w")
    open(f"{{folder}}/.last.pdparams.tmp-1", "w")  # another process's
    open(f"{{folder}}/child", "w").write(str(child))
    os.kill(os.getpid(), signal.SIGKILL)
while True: signal.pause()
"""
    status, err = run_launcher(tmp_path, ranks, code)
    pids = started(tmp_path, ranks)
    others = Path(f"/dev/shm/paddle_{pids[-1]}0_0_1")
    try:
        assert status == 137
        expected = f"rank {ranks - 1} of {ranks} failed (SIGKILL); its log is {tmp_path}/log_"
        assert err.startswith(expected) and err.count("\n") == 1, err
        for pid in (pids[-1], int((tmp_path / "child").read_text())):
            assert not list(Path("/dev/shm").glob(f"paddle_{pid}_*"))
            assert not is_running(pid)
        assert others.exists()
        assert [path.name for path in tmp_path.glob(".*")] == [".last.pdparams.tmp-1"]
    finally:
        others.unlink()


def test_what_a_rank_says_because_another_was_killed_is_not_the_error(tmp_path):
    code = f"""
from ranks import report
import os
import signal
import sys
{STARTED}
if rank == "1":
    while not os.path.exists(f"{{sys.argv[1]}}/0"): pass
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists(f"{{sys.argv[1]}}/1"): pass
def runs(pid):
    try:
        return " Z " not in open(f"/proc/{{pid}}/stat").read()
    except OSError:
        return False
while runs(open(f"{{sys.argv[1]}}/1").read()): pass
report.report_error("connection lost")
sys.exit(1)
"""
    status, err = run_launcher(tmp_path, 2, code)
    assert status == 137 and "SIGKILL" in err and "connection lost" not in err


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_error_that_all_ranks_report_is_printed_once(tmp_path, ranks):
    code = (
        "import sys; from ranks import report\n"
        "report.report_error('the list is empty: é'); sys.exit(2)"
    )
    status, err = run_launcher(tmp_path, ranks, code)
    assert status == 2
    error, *named = err.splitlines()
    assert error == "the list is empty: é"
    assert len(named) == (ranks > 1) and all(line.startswith("rank ") for line in named)


@pytest.mark.parametrize("reported, ended", [(None, 1), (2, 2)])
def test_a_rank_that_reports_an_error_and_lives_on_ends_the_run(tmp_path, reported, ended):
    # As in NCCL's teardown: it neither ends nor lets Python run.
    code = f"""
import os, signal, sys
from ranks import report
{STARTED}
while not all(os.path.exists(f"{{sys.argv[1]}}/{{other}}") for other in (0, 1)): pass
if rank == "1": report.report_error("the disk is full", {reported})
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
while True: signal.pause()
"""
    status, err = run_launcher(tmp_path, 2, code, end=0.5)
    named = f"rank 1 of 2 failed (exit status {ended}); the other ranks were ended"
    assert (status, err.splitlines()) == (ended, ["the disk is full", named])
    assert not any(map(is_running, started(tmp_path, 2)))


def test_a_rank_that_reports_an_error_has_time_to_end(tmp_path):
    code = "import sys, time; from ranks import report\n"
    code += "report.report_error('the disk is full', 1); time.sleep(0.5); sys.exit(3)"
    status, err = run_launcher(tmp_path, 1, code)
    assert (status, err) == (1, "the disk is full\n")


def test_without_a_launcher_an_error_is_printed_at_once(environment, capsys):
    report.report_error("wrong")
    assert capsys.readouterr().err == "wrong\n"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140),
        (signal.SIGHUP, 129),
    ],
)  # fmt: skip
def test_a_signal_to_the_launcher_ends_all_ranks(tmp_path, number, status):
    launcher = start_launcher(tmp_path, 2, WAIT)
    ranks = started(tmp_path, 2)
    launcher.send_signal(number)
    assert launcher.wait(HANG_SECONDS) == status
    assert not any(map(is_running, ranks))


def test_a_second_signal_kills_ranks_that_take_their_time(tmp_path):
    code = f"""
import os, signal, sys
def take_time(*_): open(f"{{sys.argv[1]}}/asked", "w")
signal.signal(signal.SIGTERM, take_time)
{WAIT}
"""
    launcher = start_launcher(tmp_path, 1, code)
    ranks = started(tmp_path, 1)
    launcher.send_signal(signal.SIGINT)
    wait_for((tmp_path / "asked").exists)
    assert is_running(ranks[0])
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert is_running(ranks[0])  # schedulers signal a process and then its group: one request
    time.sleep(0.6)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(HANG_SECONDS) == 130
    assert not is_running(ranks[0])
    assert (tmp_path / "stderr").read_text() == ""  # it is not said that they showed no life


def test_a_rank_that_was_asked_to_end_and_hangs_is_killed(tmp_path):
    # In C++ code, where no Python handler runs: here, with the signal blocked.
    code = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
    launcher = start_launcher(tmp_path, 2, code + WAIT, silence=1)
    ranks = started(tmp_path, 2)
    launcher.terminate()
    assert launcher.wait(HANG_SECONDS) == 137
    err = (tmp_path / "stderr").read_text()
    assert "show no sign of life for 1 s" in err and "rank 0 of 2 failed (SIGKILL)" in err
    assert not any(map(is_running, ranks))


@pytest.mark.parametrize("sign", ["report.report_alive()", "busy.__enter__()"])
def test_ranks_that_get_on_have_the_time_they_need(tmp_path, sign):
    code = f"""
from ranks import report
import signal
import sys
import time
asked, busy = [], report.busy()
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
{STARTED}
while not asked: time.sleep(0.01)
{sign}
for _ in range(20):
    time.sleep(0.1)
    if "alive" in {sign!r}: {sign}
sys.exit(143)
"""
    launcher = start_launcher(tmp_path, 2, code, silence=1)
    started(tmp_path, 2)
    launcher.terminate()
    assert launcher.wait(HANG_SECONDS) == 143
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize(
    "end, status, said",
    [
        ("report.report_error('the disk is full', 1); sys.exit(1)", 1, "the disk is full"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 0 of 1 failed (SIGKILL)"),
        ("sys.exit(0)", 0, ""),  # it was done already
        ("sys.exit(143)", 143, ""),
    ],
)
def test_143_says_that_the_run_ended_as_asked(tmp_path, end, status, said):
    code = f"import os, signal, sys; from ranks import report\ndef act(*_): {end}\n"
    launcher = start_launcher(tmp_path, 1, code + "signal.signal(signal.SIGTERM, act)\n" + WAIT)
    started(tmp_path, 1)
    launcher.terminate()
    assert launcher.wait(HANG_SECONDS) == status
    err = (tmp_path / "stderr").read_text()
    assert said in err and bool(said) == bool(err)


def test_ctrl_c_reaches_the_ranks_as_one_request_to_end(tmp_path):
    code = """
import signal, sys
def tidy(*_):
    open(f"{sys.argv[1]}/tidy", "w")
    sys.exit(143)
signal.signal(signal.SIGTERM, tidy)
"""
    launcher = start_launcher(tmp_path, 1, code + WAIT)
    started(tmp_path, 1)
    os.killpg(launcher.pid, signal.SIGINT)  # a terminal sends it to the whole group
    assert launcher.wait(HANG_SECONDS) == 130
    assert (tmp_path / "tidy").exists()
    assert "KeyboardInterrupt" not in (tmp_path / "stderr").read_text()


def test_killing_the_launcher_leaves_no_rank(tmp_path):
    launcher = start_launcher(tmp_path, 2, WAIT)
    ranks = started(tmp_path, 2)
    launcher.kill()
    launcher.wait(HANG_SECONDS)
    wait_for(lambda: not any(map(is_running, ranks)))
