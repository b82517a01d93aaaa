"""A process's share of the machine, and its place among the ranks."""

import io
import os
import platform
import signal
import subprocess
import sys

import pytest
from program import CONFIG, ROOT, SMALL, flatten, run_as_rank
from program import run as run_command

from config import ConfigError
from ranks import host, launch
from training import run
from utils import UserError

V1 = "5:memory:/\n4:cpu,cpuacct:/job\n3:cpuset:/other\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"/proc/self/cgroup": "0::/\n", "cpu.max": "max 100000\n"}, 8),
        ({"/proc/self/cgroup": "0::/\n", "cpu.max": "250000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/\n", "cpu.max": "50000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/\n", "cpu.max": "9900000 100000\n"}, 8),
        # A group of its own, whose parent has less.
        (
            {
                "/proc/self/cgroup": "0::/user.slice/a job:1.scope\n",
                "user.slice/cpu.max": "300000 100000\n",
                "user.slice/a job:1.scope/cpu.max": "600000 100000\n",
            },
            3,
        ),
        # The host's path, which this container does not see.
        ({"/proc/self/cgroup": "0::/docker/7f\n", "cpu.max": "400000 100000\n"}, 4),
        ({"/proc/self/cgroup": V1, "cpu/job/cpu.cfs_quota_us": "-1\n"}, 8),
        (
            {
                "/proc/self/cgroup": V1,
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "cpu/job/cpu.cfs_quota_us": "300000\n",
                "cpu/job/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_cgroups_quotas(monkeypatch, files, cores):
    assert 1 <= host.available_cores() <= os.cpu_count()

    def fake_open(path):
        name = path.removeprefix("/sys/fs/cgroup/")
        if name not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[name])

    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(host, "open", fake_open, raising=False)
    assert host.available_cores() == cores


@pytest.mark.parametrize(
    ("already", "ranks", "threads"),
    [
        (None, 2, "4"),
        (None, 16, "1"),
        ("3", 2, "3"),
        ("", 2, "4"),
        (" ", 2, "4"),
        (" 2 ", 1, "2"),
        ("4,1", 2, "4"),
        ("3 , 2,1", 2, "3"),
    ],
)
def test_threads_are_shared_out_unless_the_user_has_set_them(monkeypatch, already, ranks, threads):
    monkeypatch.setattr(host, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", already or "")
    if already is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    host.prepare_cpu(ranks)
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    "name, text",
    [
        *(("OMP_NUM_THREADS", text) for text in ("0", "-1", "0,2", "2,", "2,two", "1.5", "²")),
        ("PADDLE_TRAINERS_NUM", "0"), ("PADDLE_TRAINERS_NUM", "2,1"),
        ("PADDLE_LOCAL_SIZE", "x"), ("PADDLE_TRAINER_ID", "-1"),
    ],
)  # fmt: skip
def test_a_number_in_the_environment_that_cannot_be_is_refused_by_name(environment, name, text):
    environment(**{name: text})
    ask = {"OMP_NUM_THREADS": lambda: host.prepare_cpu(1), "PADDLE_TRAINER_ID": launch.is_rank}
    with pytest.raises(UserError, match=f"{name} is '{text}', it must be a whole number"):
        ask.get(name, host.local_ranks)()


def test_an_empty_variable_of_a_launcher_is_an_unset_one(environment):
    environment(PADDLE_TRAINER_ID="", PADDLE_TRAINERS_NUM=" ", PADDLE_TRAINER_ENDPOINTS="")
    host.import_paddle()  # which would take them for numbers
    assert not [name for name in os.environ if name.startswith("PADDLE_TRAINER")]


def test_where_paddle_finds_no_folder_to_write_in_home_is_named(tmp_path):
    (tmp_path / "paddle.py").write_text("raise PermissionError(13, 'Permission denied', '/.cache')")
    words = [sys.executable, ROOT / "main_multi_gpu.py", "-cfg", CONFIG]
    result = run_command(words, PADDLE_TRAINER_ID="0", PYTHONPATH=str(tmp_path))
    result.refused(2, "/.cache cannot be made (Permission denied): set HOME to a folder")


@pytest.mark.parametrize("ignored, rank, status", [(1, "0", 2), (0, "0", -2), (0, None, -2)])
def test_an_interrupt_while_paddle_loads_ends_without_a_traceback_unless_it_is_ignored(
    tmp_path, ignored, rank, status
):
    interrupted = "os.getpid()" if rank else "os.getppid()"  # the launcher asks another process
    (tmp_path / "paddle.py").write_text(
        f"import os, signal; os.kill({interrupted}, signal.SIGINT)\n"
        "raise PermissionError(13, 'Permission denied', '/.cache')"
    )
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: one")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        result = run_command(
            [sys.executable, ROOT / "main_multi_gpu.py", "-cfg", CONFIG], PATH=path,
            PADDLE_TRAINER_ID=rank, PYTHONPATH=str(tmp_path), CUDA_VISIBLE_DEVICES=None,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    result.refused(status)


@pytest.mark.parametrize(
    ("variables", "is_rank", "local_ranks"),
    [
        ({}, False, 1),
        ({"PADDLE_TRAINER_ID": "", "PADDLE_TRAINERS_NUM": "", "PADDLE_LOCAL_SIZE": ""}, False, 1),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_TRAINERS_NUM": "1"}, True, 1),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_TRAINERS_NUM": "4"}, True, 4),
        (
            {"PADDLE_TRAINER_ID": "1", "PADDLE_TRAINERS_NUM": "4", "PADDLE_LOCAL_SIZE": "2"},
            True,
            2,
        ),
    ],
)
def test_a_rank_knows_its_place_from_the_environment(environment, variables, is_rank, local_ranks):
    environment(**variables)
    assert (launch.is_rank(), host.local_ranks()) == (is_rank, local_ranks)


@pytest.mark.parametrize(
    ("cores", "ranks", "on_gpu", "workers"),
    [
        (8, 2, False, 3),
        (2, 2, False, 0),
        (1, 2, False, 0),
        (8, 2, True, 4),
        (1, 2, True, 1),
        (256, 4, True, 16),
        (1, 1, True, 1),
    ],
)
def test_loader_workers_are_shared_out_from_the_cores(
    monkeypatch, environment, cores, ranks, on_gpu, workers
):
    monkeypatch.setattr(host, "available_cores", lambda: cores)
    environment(PADDLE_LOCAL_SIZE=str(ranks))
    assert host.choose_workers(-1, on_gpu) == workers


@pytest.mark.parametrize(
    ("cpu", "already", "kernels"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n", None, "5"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n", "4", "4"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx fma\n", None, None),  # it has no AVX2
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2 fma\n", None, None),
        (None, None, None),  # not Linux
    ],
)
def test_mkl_is_told_of_avx2_on_amd_alone(monkeypatch, cpu, already, kernels):
    def fake_open(path, *args, **kwargs):
        if cpu is None or path != "/proc/cpuinfo":
            raise FileNotFoundError(path)
        return io.StringIO(cpu)

    monkeypatch.setattr(host, "open", fake_open, raising=False)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", already or "")
    if already is None:
        monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    host.prepare_cpu(1)
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == kernels


@pytest.mark.parametrize(
    "ipc, pid, removed",
    [
        ("ipc:[4026531839]", "pid:[4026531836]", True),
        ("ipc:[4026532201]", "pid:[4026532203]", True),  # a container with memory of its own
        ("ipc:[4026531839]", "pid:[4026532203]", False),  # with --ipc=host
        (None, None, True),  # no /proc
    ],
)
def test_batches_are_removed_only_where_their_process_numbers_are_unique(
    monkeypatch, tmp_path, ipc, pid, removed
):
    def readlink(path):
        link = {"/proc/self/ns/ipc": ipc, "/proc/self/ns/pid": pid}[path]
        if link is None:
            raise FileNotFoundError(path)
        return link

    batch = tmp_path / "paddle_7_0"
    batch.touch()
    monkeypatch.setattr(host.os, "readlink", readlink)
    monkeypatch.setattr(host.glob, "glob", lambda pattern: [str(batch)])
    host.remove_batches([7])
    assert batch.exists() != removed


def test_what_is_printed_in_silence_does_not_come_after_it(monkeypatch, capfd):
    with open(1, "w", closefd=False) as stdout:  # buffered, as into a file
        monkeypatch.setattr(sys, "stdout", stdout)
        print("before")
        with host.quiet():
            print("within")
        print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is asked")
def test_a_large_block_that_was_freed_is_used_again_without_the_kernel():
    code = (
        "import ctypes, resource, sys; sys.path.insert(0, sys.argv[1]); from ranks import host\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "def pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = ctypes.c_void_p(libc.malloc(50 << 20))\n"
        "    ctypes.memset(block, 1, 50 << 20); libc.free(block)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "pages(); host.keep_freed_memory(); pages(); print(pages())\n"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert int(answer.stdout) < 100, answer.stderr  # of 12,800


@pytest.mark.parametrize("recompute", [True, False])
def test_freed_memory_is_kept_but_by_a_run_that_recomputes(few_digits, monkeypatch, recompute):
    def leave(self):
        raise ConfigError("far enough")

    kept = []
    monkeypatch.setattr(run, "can_recompute", lambda: True)
    monkeypatch.setattr(run, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(run.Run, "_make_folder", leave)
    opts = flatten({**SMALL, "TRAIN.RECOMPUTE": recompute})
    run_as_rank("-data_path", few_digits, "-opts", *opts).refused(2, "far enough")
    assert kept == ([] if recompute else [True])
