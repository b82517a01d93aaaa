"""When a run will end, and how much of the GPU's memory it takes."""

import time

import paddle

_STEPS = 100  # before them the pace is that of the start


class Pace:
    """How long the rest of a run takes, by the batches that this process has done.

    Validations and checkpoints count as far as there have been any.

    Args:
        total: batches of the whole run.
        accum_iter: batches of an optimizer step.
        say: called once, with a sentence.
    """

    def __init__(self, total, accum_iter, say):
        self._total, self._least, self._say = total, _STEPS * accum_iter, say
        self._first = None  # the batches done and the time at the first report

    def report(self, done):
        """To be called at each report.

        Args:
            done: batches of the run, with those before this process.

        Returns:
            (what to add to the report's row: seconds_left after a hundred steps, on a GPU
            peak_memory, the most bytes that tensors have had; the end's time for people, or "").
        """
        now, row = time.perf_counter(), {}
        if paddle.get_device() != "cpu":
            row["peak_memory"] = paddle.device.cuda.max_memory_allocated()
        if self._first is None:
            self._first = done, now
        first, began = self._first
        if done - first < self._least:
            return row, ""
        left = (now - began) / (done - first) * (self._total - done)
        end = time.localtime(time.time() + left)
        if self._say:
            memory = row.get("peak_memory")
            most = f"; up to {memory / 2**30:.1f} GiB of GPU memory so far" if memory else ""
            hours, minutes = divmod(round(left / 60), 60)
            self._say(
                f"at this pace the run takes {hours} h {minutes:02} min more, until "
                f"{time.strftime('%Y-%m-%d %H:%M', end)}{most}"
            )
            self._say = None
        row["seconds_left"] = round(left)
        return row, f", until {time.strftime('%b %d %H:%M', end)}"
