"""When a run will end: what the log, the bar and the rows say of it."""

import time

import paddle
import pytest

from training import pace


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that the pace is taken by."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_after_a_hundred_steps_the_rest_is_said_once_and_then_in_every_row(clock):
    said = []
    run = pace.Pace(total=1020, accum_iter=2, say=said.append)
    assert run.report(20) == ({}, "")
    clock(1000.0)  # slow at first
    assert run.report(218) == ({}, "") and said == []
    clock(500.0)
    row, until = run.report(220)
    assert row == {"seconds_left": 1600}  # 400 s for 200 batches, 800 to go
    assert until == time.strftime(", until %b %d %H:%M", time.localtime(time.time() + 1600))
    assert said == [f"at this pace the run takes 0 h 27 min more, until {_minute(1600)}"]
    clock(1300.0)
    assert run.report(1020)[0] == {"seconds_left": 0} and len(said) == 1


def _minute(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))


def test_a_run_that_goes_on_counts_its_own_batches_alone(clock):
    run = pace.Pace(total=1000, accum_iter=1, say=lambda sentence: None)
    run.report(500)
    clock(200.0)
    assert run.report(600)[0] == {"seconds_left": 400}


def test_on_a_gpu_the_most_memory_is_in_row_and_log(clock, monkeypatch):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "max_memory_allocated", lambda: 3 << 30)
    said = []
    run = pace.Pace(total=1000, accum_iter=1, say=said.append)
    assert run.report(0)[0] == {"peak_memory": 3 << 30}
    run.report(100)
    assert said[0].endswith("; up to 3.0 GiB of GPU memory so far")
