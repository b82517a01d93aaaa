"""Ending a training run when asked: what a signal does, and how the ranks agree where to stop.

    with stop.request.finishing():  # SIGTERM and its like no longer end the process
        ...
            if stop.request.is_due_after(steps_done):  # the same step on every rank
                raise stop.Stopped

Signals reach ranks at different moments, and a rank that leaves alone leaves the others hanging in
a collective.  So within steps a rank announces how far it is, in the key-value store that Paddle
starts for all ranks, and all stop after the step that the furthest can still reach with the others
(is_due_after).  Outside of steps they stop at the next barrier: a rank that will not come adds so
much to its count that no rank passes (barrier).  A host whose ranks got no signal learns of it at
the next report (share).  Before a signal comes this costs training one small all-reduce a report.
"""

import contextlib
import itertools
import signal
import time

import paddle
from paddle import distributed as dist

from ranks import host
from ranks.collective import add_in_store, all_reduce_max
from ranks.report import report_alive
from ranks.watchdog import watchdog

_QUIT = 1 << 30  # what a rank that will not come adds to a barrier's count, instead of 1
_barriers = itertools.count()


class Stopped(Exception):
    """The run was asked to end, and every rank has done the same steps."""


class StopRequest:
    """Whether this process was asked to end.

    Attributes:
        signal_number: the signal that came first; None before.
    """

    def __init__(self):
        self.signal_number = None
        self._announced = False
        self._last_step = None

    @contextlib.contextmanager
    def finishing(self):
        """In here host.stop_signals do not end the process; the methods below ask for them."""
        numbers = host.stop_signals()
        for number in numbers:
            signal.signal(number, self.take)
            # Paddle's store does not stand a system call that a signal interrupts.
            signal.siginterrupt(number, False)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)

    def take(self, number, frame=None):
        """The signals' handler: notes the first one and ignores the others."""
        if self.signal_number is None:
            self.signal_number = number

    def show_life(self):
        """Tells the watchdog, and once a signal has come the launcher, that a batch is done."""
        watchdog.show_life()
        if self.signal_number is not None:
            report_alive()

    def is_due_after(self, steps):
        """Whether all ranks stop now; to be asked on every rank after each optimizer step.

        Signals reach the ranks at different steps.  A rank that got one announces how far it is and
        trains on; all stop after the step that follows the furthest one.  By then each of them
        knows of all the others: no step ends before every rank has begun it, and so has announced
        itself.

        Args:
            steps: optimizer steps that this rank has tried, the same count on all ranks.
        """
        if self.signal_number is None:
            return False
        if not dist.is_initialized():
            return True
        if paddle.get_device() != "cpu":
            paddle.device.synchronize()  # the host may be steps ahead of its GPU
        ranks = dist.get_world_size()
        if not self._announced:
            self._announced = True
            add_in_store(f"gmlp/stop/rank {dist.get_rank()}", steps)
            add_in_store("gmlp/stop/announced", 1)
        if self._last_step is None and add_in_store("gmlp/stop/announced", 0) == ranks:
            self._last_step = 1 + max(
                add_in_store(f"gmlp/stop/rank {rank}", 0) for rank in range(ranks)
            )
        return self._last_step is not None and steps >= self._last_step

    def share(self):
        """Lets every rank know of a signal that only some got, as those of one host; a collective.

        To be called on all ranks together, between steps.
        """
        number = all_reduce_max(self.signal_number or 0)
        if number:
            self.take(number)

    def raise_if_asked(self):
        """Raises Stopped where no step is under way, as in validation.

        All ranks have done the same steps there; the others follow at the next barrier.
        """
        if self.signal_number is not None:
            if dist.is_initialized():
                add_in_store(f"gmlp/barrier/{next(_barriers)}", _QUIT)
            raise Stopped


request = StopRequest()


def barrier():
    """Waits until every rank is here, for as long as one of the others gets on.

    gloo's collectives give up after 30 seconds, which ranks can be apart after a long evaluation or
    while one of them writes a checkpoint.  Paddle's key-value store has no such limit.

    Raises:
        Stopped: a rank was asked to end before it was here; no rank passes then.
    """
    request.raise_if_asked()
    if not dist.is_initialized():
        return
    if _wait_for_all(f"gmlp/barrier/{next(_barriers)}") > dist.get_world_size():
        raise Stopped


def leave_together():
    """Waits until every rank is done; to be called on all of them, last.

    Launchers end all ranks when the first one ends as asked, and rank 0 takes the store with it,
    from which a slow rank may still read whether all have come to the last barrier.
    """
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError):  # the store went with rank 0
            _wait_for_all("gmlp/stop/leaving")


def _wait_for_all(key):
    """How many ranks are here, once all are; the watchdog ends a wait for ranks that hang."""
    watchdog.show_life()
    here = add_in_store(key, 1)
    while here < dist.get_world_size():
        time.sleep(0.01)
        watchdog.follow_others()
        here = add_in_store(key, 0)
    watchdog.show_life()
    return here
