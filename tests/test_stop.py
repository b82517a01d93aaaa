"""Ending when asked: the ranks agree on a step and pass a barrier all or none."""

import os
import signal
import sys

import pytest
from program import ROOT, run_preloaded

from ranks import stop

# Each rank trains: a step ends when all have begun it.  A rank's signal comes at its own step.
RANK = """
import os, signal, sys, time
import paddle
from ranks import stop
from ranks import collective
from ranks.watchdog import watchdog

rank, ranks = collective.init_distributed()
signal_at = {signal_at}
def signal_me(step):
    if signal_at.get(rank) == step:
        os.kill(os.getpid(), signal.SIGTERM)
def say(text):
    open(f"{{sys.argv[1]}}/{{rank}}", "w").write(str(text))
with stop.request.finishing():
    {code}
"""
TRAIN = """
    for step in range(1, 60):
        signal_me(step)
        collective.all_reduce_sum(paddle.ones([1]))
        if step % 10 == 0: stop.request.share()
        if stop.request.is_due_after(step):
            say(step)
            stop.leave_together()
            break
    else: say("never")
"""
MEET = """
    try:
        signal_me(0)
        stop.barrier()
        if rank == 0: time.sleep(1)
        signal_me(1)
        stop.barrier()
        say("passed")
    except stop.Stopped:
        say("stopped")
    stop.leave_together()
"""


def run_ranks(folder, code, signal_at, ranks=3):
    """(exit status, what each rank said, stderr) of ranks that run `code`."""
    program = RANK.format(code=code.strip(), signal_at=signal_at)
    command = [sys.executable, "-c", program, str(folder)]
    launcher = (
        f"import sys; from ranks import launch; sys.exit(launch.run({ranks}, 0, {command!r}))"
    )
    result = run_preloaded([sys.executable, "-c", launcher], cwd=ROOT)
    said = [(folder / str(rank)) for rank in range(ranks)]
    return result.status, [path.read_text() if path.exists() else "" for path in said], result.err


def test_signals_are_noted_within_and_have_their_effect_again_after_it():
    numbers = (signal.SIGTERM, signal.SIGINT)
    request, before = stop.StopRequest(), [signal.getsignal(number) for number in numbers]
    try:
        with request.finishing():
            for number in numbers:
                os.kill(os.getpid(), number)
        assert request.signal_number == signal.SIGTERM  # the first
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "signal_at, steps",
    [
        pytest.param({0: 5, 1: 9, 2: 7}, range(9, 12), marks=pytest.mark.slow),
        ({0: 1, 1: 30, 2: 2}, range(10, 13)),  # rank 1 hears of it at the report of step 10
        pytest.param({2: 14}, range(20, 23), marks=pytest.mark.slow),
    ],
)
def test_all_ranks_stop_after_the_same_step(signal_at, steps, tmp_path):
    status, said, err = run_ranks(tmp_path, TRAIN, signal_at)
    assert status == 0, err
    assert len(set(said)) == 1 and int(said[0]) in steps, said


def test_one_rank_alone_stops_at_once(tmp_path):
    status, said, err = run_ranks(tmp_path, TRAIN, {0: 7}, ranks=1)
    assert (status, said) == (0, ["7"]), err


@pytest.mark.parametrize(
    "signal_at, said", [({}, "passed"), ({1: 0}, "stopped"), ({0: 1}, "stopped")]
)
def test_all_ranks_pass_a_barrier_or_none(signal_at, said, tmp_path):
    status, all_said, err = run_ranks(tmp_path, MEET, signal_at, ranks=2)
    assert (status, all_said) == (0, [said] * 2), err


def test_a_barrier_to_which_a_rank_never_comes_ends_the_others(tmp_path):
    code = """
    say(rank)
    if rank == 0:
        while not os.path.exists(f"{sys.argv[1]}/1"): pass
        watchdog.start(1 / 60)
        stop.barrier()
    while True: time.sleep(1)
"""
    status, said, err = run_ranks(tmp_path, code, {}, ranks=2)
    assert status == 142 and said == ["0", "1"]
    assert "_wait_for_all" in err


def test_what_asks_a_run_to_end_does_so_in_it_alone_and_never_ends_a_loader_worker():
    code = """
import os, signal
from ranks import loader, stop
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
with stop.request.finishing():
    for number in numbers:
        stop.request.signal_number = None
        os.kill(os.getpid(), number)
        assert stop.request.signal_number == number
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.request.signal_number == numbers[-1]
assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 4
loader._start_worker(os.getppid(), 0)
assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 4
"""
    run_preloaded([sys.executable, "-c", code], cwd=ROOT).check()
