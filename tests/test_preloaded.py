"""What the tests start as forks does what a program does that is started from nothing."""

import signal
import subprocess
import sys

import preloaded
import pytest
from program import CONFIG, ROOT, SMALL, flatten, run, run_preloaded, same

from weights import pdparams


def test_a_fork_trains_to_the_bits_of_a_program_that_imports_paddle_itself(few_digits, tmp_path):
    ends = []
    for name, start in (("fork", run_preloaded), ("program", run)):
        words = ["-cfg", CONFIG, "-data_path", few_digits, "-output", tmp_path / name, "-nprocs", 2]
        command = [sys.executable, ROOT / "main_multi_gpu.py", *words, "-opts", *flatten(SMALL)]
        result = start(command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=None).check()
        assert "1 thread(s) per rank" in result.out
        (path,) = (tmp_path / name).glob("train-*/last.pdparams")
        ends.append(pdparams.read(path, require_checksum=True))
    for key in ("model", "model_ema", "optimizer", "best", "run"):
        assert same(ends[0][key], ends[1][key]), key


@pytest.mark.parametrize(
    "code, status, out, err",
    [
        ("print(1)", 0, "1\n", ""),
        ("sys.exit(7)", 7, "", ""),
        ("sys.exit('wrong')", 1, "", "wrong\n"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), 9)", -9, "", ""),
        ("print(os.environ['A'], os.getcwd(), *sys.argv)", 0, "b / -c x y\n", ""),
        ("print(sorted(os.listdir('/proc/self/fd'))[:3])", 0, "['0', '1', '2']\n", ""),
    ],
)
def test_status_output_variables_and_arguments_are_the_programs_own(code, status, out, err):
    command = [sys.executable, "-c", f"import os, sys; {code}", "x", "y"]
    for start in (run_preloaded, run):
        result = start(command, A="b")
        assert (result.status, result.out) == (status, out)
        assert result.err.endswith(err) and bool(err) == bool(result.err)


def test_a_signal_ends_it_and_what_waits_learns_of_it():
    program = preloaded.Program([sys.executable, "-c", "import time; time.sleep(99)"], {})
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.1)
    program.terminate()
    assert program.wait(10) == -signal.SIGTERM
