"""Hangs end by themselves, and a run that gets on is never ended, however long it takes."""

import ctypes
import signal
import sys
import time

import pytest
from processes import is_running
from program import ROOT, SMALL, flatten, metrics, run, run_as_rank, run_preloaded

from ranks.watchdog import Watchdog, watchdog

# main_multi_gpu.py, with `code` run before it.  The limit is short once the start is over, which
# takes seconds on a busy machine.
PROGRAM = """
import ctypes, os, signal, sys, time
from ranks import host
host.import_paddle()
import main_multi_gpu
from paddle import distributed as dist
from ranks.watchdog import watchdog
from training.train import Training

rank, whole = int(os.environ["PADDLE_TRAINER_ID"]), Training.train
def train(self):
    watchdog._seconds = {seconds}
    return whole(self)
Training.train = train
{code}
sys.exit(main_multi_gpu.main(sys.argv[1:]))
"""
# A collective that one rank does not come to: it sleeps in C code, holding Python's lock, or not
# even its threads run.
HANG = """
real, calls = dist.all_reduce, []
def all_reduce(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        open(f"{folder}/{rank}", "w").write(str(os.getpid()))
        if rank == 1: ctypes.PyDLL(None).sleep(600)
        if rank == 2: os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args, **kwargs)
dist.all_reduce = all_reduce
"""
# Each batch takes less than the limit, an epoch longer; rank 1's part of the validation takes
# several times as long, and rank 0's no time.
LONG = """
from training.evaluate import Scores
def slowly(call, seconds):
    def slow(*args):
        time.sleep(seconds)
        return call(*args)
    return slow
Training.train_batch = slowly(Training.train_batch, 0.15)
Scores.add = slowly(Scores.add, 0.3 * rank)
"""


def run_ranks(ranks, seconds, code, data, output, opts):
    """Trains the small model on ranks that run PROGRAM with this limit and code."""
    program = PROGRAM.format(seconds=seconds, code=code)
    words = ["-cfg", "configs/gmlp_digits.yaml", "-data_path", str(data), "-output", str(output)]
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 1, "TRAIN.MODEL_EMA": False, "REPORT_FREQ": 2, **opts}
    command = [sys.executable, "-c", program, *words, "-num_workers", "0", "-opts", *flatten(opts)]
    launcher = f"import sys; from ranks import launch; sys.exit(launch.run({ranks}, 0, {command}))"
    return run_preloaded([sys.executable, "-c", launcher], cwd=ROOT)


def test_ranks_that_hang_end_and_their_logs_say_where_they_are(few_digits, tmp_path):
    output, code = tmp_path / "output", f"folder = {str(tmp_path)!r}{HANG}"
    result = run_ranks(3, 1, code, few_digits, output, {"HANG_MINUTES": 90})
    assert result.status == 128 + signal.SIGALRM, result.err
    assert not any(is_running(int((tmp_path / str(rank)).read_text())) for rank in range(3))
    *_, hung, named = result.err.splitlines()
    assert hung.startswith("no rank got any further for HANG_MINUTES: one hangs, or is gone, ")
    (folder,) = output.iterdir()
    assert any(
        named == f"rank {rank} of 3 failed (SIGALRM); its log is {folder}/log_{rank}.txt; "
        "the other ranks were ended"
        for rank in (0, 1)
    )
    for rank in (0, 1):
        before, stacks = (folder / f"log_{rank}.txt").read_text().split("Timeout (0:00:01)!\n")
        assert "a rank that gets no further for 90 minutes (HANG_MINUTES) writes " in before
        assert " in all_reduce\n" in stacks and " in train_batches\n" in stacks


def test_an_epoch_and_another_ranks_validation_may_take_longer_than_the_limit(few_digits, tmp_path):
    opts, start = {"DATA.BATCH_SIZE_EVAL": 5}, time.monotonic()
    run_ranks(2, 1.2, LONG, few_digits, tmp_path, opts).check()
    (folder,) = tmp_path.iterdir()
    assert [row["images"] for row in metrics(folder, "eval")] == [101]
    assert (
        time.monotonic() - start > 10 * 0.15 + 10 * 0.3
    )  # the epoch's batches, rank 1's validation
    assert "Timeout" not in "".join(path.read_text() for path in folder.glob("log_*.txt"))


def test_each_batch_of_training_and_of_validation_is_a_sign_of_life(
    few_digits, tmp_path, monkeypatch
):
    signs = []
    monkeypatch.setattr(watchdog, "show_life", lambda: signs.append(1))
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 1, "TRAIN.MODEL_EMA": False}
    words = ["-data_path", few_digits, "-output", tmp_path, "-num_workers", 0]
    run_as_rank(*words, "-opts", *flatten(opts)).check()
    assert len(signs) == 203 // 10 + -(-101 // 16)


@pytest.mark.parametrize("ranks, minutes", [("1", 30), ("2", 0)])
def test_with_one_rank_or_a_limit_of_0_nothing_is_armed(environment, ranks, minutes):
    environment(PADDLE_TRAINERS_NUM=ranks)
    dog = Watchdog()
    dog.start(minutes)
    dog.log_to(None)
    dog.show_life()
    dog.follow_others()
    dog.limit_end()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_end_after_an_error_that_hangs_in_cpp_code_is_cut_short_without_a_launcher():
    if not hasattr(ctypes.CDLL(None), "__cxa_atexit"):
        pytest.skip("this C library has no __cxa_atexit")
    code = """
import ctypes, signal, sys
from ranks import report, watchdog
signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as a parent may have it
watchdog.END_SECONDS = 0.5
watchdog.watchdog.start(30)
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)  # after Python's end
report.report_error("the disk is full", 1)
sys.exit(1)
"""
    result = run([sys.executable, "-c", code], cwd=ROOT, PADDLE_TRAINERS_NUM="2")
    assert (result.status, result.err) == (-signal.SIGALRM, "the disk is full\n")
