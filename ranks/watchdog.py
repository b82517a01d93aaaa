"""The end of a rank that hangs: without a sign of life for HANG_MINUTES the kernel ends it.

    watchdog.start(config.HANG_MINUTES)  # before the first collective
    watchdog.show_life()  # after each batch

Under NCCL nothing else does.  A collective whose other side is gone waits without limit (Paddle's
process_group_nccl.cc, NCCLTask::Wait: "now timeout unused"; a call of the key-value store does too,
tcp_store.cc), on the device or in C++ code that lets no Python run.  So the timers are a thread of
faulthandler's, which writes where Python is, and SIGALRM, which ends the process a little later.
Both need neither Python's lock nor the device, and the second one works after Python's end too,
when C++ destroys what it has left (an exit by faulthandler would not).

With one rank, which waits for no other, nothing is ever armed.
"""

import faulthandler
import signal
import sys
import time

from ranks import host

END_SECONDS = 20  # between the report of an error and the end of the process


class Watchdog:
    """The timers of this process, of which there is one each: nothing else may take them."""

    def __init__(self):
        self._seconds = 0  # the limit; 0: nothing is armed
        self._file = None  # where faulthandler writes
        self._shown = self._looked = 0.0  # when life was last shown, and looked for
        self._signs = 0  # of life, of all ranks, at the last look

    def start(self, minutes):
        """Arms it for the rest of this process, where there are several ranks; 0 minutes: never."""
        if minutes and host.all_ranks() > 1:
            self._seconds, self._file = 60 * minutes, sys.stderr
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may have had it ignored
            self._arm(self._seconds)

    def log_to(self, log):
        """Has a rank's log, and no longer standard error, tell where the rank hangs."""
        if self._seconds:
            self._file = log.handlers[0].stream
            log.info(
                f"a rank that gets no further for {self._seconds / 60:g} minutes (HANG_MINUTES) "
                "writes into its log where it is, and ends by SIGALRM"
            )
            self.show_life()

    def show_life(self):
        """This rank gets on: its time begins anew, and ranks that wait for it are told.

        A twentieth of the limit passes between two signs and between two looks at them, and the
        end is a tenth late: so nobody ends who waits for batches of less than the limit.
        """
        now = time.monotonic()
        if self._seconds and now >= self._shown + self._seconds / 20:
            self._shown = now
            self._arm(self._seconds)
            _add_signs(1)

    def follow_others(self):
        """To be called by a rank that waits in Python: others' signs of life count for it."""
        now = time.monotonic()
        if self._seconds and now >= self._looked + self._seconds / 20:
            self._looked, before = now, self._signs
            self._signs = _add_signs(0)
            if self._signs != before:
                self._arm(self._seconds)

    def limit_end(self):
        """This rank has reported an error and is about to end, in which NCCL too may hang."""
        if self._seconds:
            self._arm(END_SECONDS)

    def _arm(self, seconds):
        faulthandler.dump_traceback_later(seconds, file=self._file)
        signal.setitimer(signal.ITIMER_REAL, 1.1 * seconds)


def _add_signs(count):
    from ranks.collective import add_in_store  # which imports Paddle

    return add_in_store("gmlp/signs of life", count)


watchdog = Watchdog()
