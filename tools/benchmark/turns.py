"""Rows of a table, each of a process of its own, measured in turn."""

import contextlib
import json
import operator
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

from config import get_config
from ranks import host
from tools.common import Failed
from utils import UserError, progress_bar

WORKER = str(Path(__file__).resolve().parent / "worker.py")


class Row(NamedTuple):
    """Something to measure: measure() does it once and gives {"seconds": ..., "images": ...}."""

    name: str
    measure: Callable[[], dict]


class Worker:
    """A process that does one kind of work whenever it is asked (worker.py)."""

    def __init__(self, side, command, env):
        self.side = side  # "ours" or "peer", for messages
        try:
            self._process = subprocess.Popen(
                command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the benchmark's to answer
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started: {error.strerror}") from error

    def ask(self, **request):
        """The answer to a request: the first one prepares the work, each later one does it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise Failed(f"{self.side} has ended (exit status {status}); see above")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.side}: {answer['error']}")
        return answer

    def close(self):
        """Ends the process, in the middle of its work too."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for end in (self._process.terminate, self._process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
                return
            end()
        self._process.wait()


class Bench:
    """One run of the program: its arguments, its workers and the tables so far."""

    def __init__(self, args, folder):
        self.args = args
        self.folder = folder  # where images and lists are written
        self.config = get_config(getattr(args, "cfg", None))
        self.threads = getattr(args, "threads", None) or host.available_cores()  # of a row
        # What each worker is told beside the arguments, where its row says nothing else.
        self.job = {"folder": folder, "config": self.config, "changes": []}
        self.job.update(recompute=False, keep_freed=True, added_memory=False, lead=2)
        self.versions = {}  # of each side that was started
        self.results = []  # the tables, as data
        self._environment = dict(os.environ)  # before what importing Paddle here adds to it
        self._workers = []

    def ours(self, name, case, threads=None, ranks=1, **job):
        """The row of a function of ours.py, done by `ranks` processes of `threads` threads each."""
        threads = threads or max(1, self.threads // ranks)
        command = [sys.executable, WORKER, "ours", str(ranks)]
        return self._row(name, "ours", command, threads, {"case": case, **job})

    def peer(self, name, case, threads=None, **job):
        """The row of a function of peer.py; None where there is no peer."""
        if not self.args.peer:
            return None
        command = [self.args.peer, WORKER, "peer"]
        return self._row(name, "peer", command, threads or self.threads, {"case": case, **job})

    def _row(self, name, side, command, threads, job):
        env = {**self._environment, "CUDA_VISIBLE_DEVICES": ""}
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        worker = Worker(side, command, env)
        self._workers.append(worker)
        self.versions[side] = worker.ask(**{**vars(self.args), **self.job, **job})
        return Row(name, worker.ask)

    def close(self):
        """Ends all workers."""
        while self._workers:
            self._workers[-1].close()
            self._workers.pop()

    def measure(self, title, rows):
        """Prints and keeps the table of rows (None is none), the first of which is ours."""
        rows = [row for row in rows if row]
        answers = self.take_turns(title, rows)
        results = [summarize(row.name, own, answers[0]) for row, own in zip(rows, answers)]
        cells = [
            {
                "": result["name"],
                "seconds": f"{result['median']:.3f}",
                "lowest to highest": f"{result['lowest']:.3f} to {result['highest']:.3f}",
                "images/s": f"{result['images_per_second']:.1f}" if result["images"] else "",
                "ours / this": "" if result is results[0] else f"{result['ratio']:.2f}",
            }
            for result in results
        ]
        self.show(title, results, cells)

    def take_turns(self, title, rows):
        """Lists of answers, one of each row in every turn that counts; ends the workers."""
        args, answers = self.args, [[] for _ in rows]
        turns = list(zip(rows, answers)) * (args.warmup + args.repetitions)
        for row, of_row in progress_bar(turns, len(turns), title[:40], "row"):
            of_row.append(row.measure())
        self.close()
        return [of_row[args.warmup :] for of_row in answers]

    def show(self, title, results, cells):
        """Keeps results, a list of dicts, and prints a table: a dict from header to text a row."""
        self.results.append({"title": title, "rows": results})
        header = list(cells[0])
        widths = [max(len(name), *(len(row[name]) for row in cells)) for name in header]
        print(f"\n{title}")
        for row in (dict(zip(header, header)), *cells):
            first, *rest = row.values()
            numbers = (text.rjust(width) for text, width in zip(rest, widths[1:]))
            print("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
        sys.stdout.flush()


def summarize(name, answers, ours):
    """A row of results: its seconds, their median, images/s, and how many times as fast ours are.

    Args:
        answers, ours: the row's and the first row's, turn by turn.  The ratio is the median of each
            turn's own, as what else the machine does hits a whole turn.
    """
    seconds, images = [answer["seconds"] for answer in answers], answers[0]["images"]
    per_image = [answer["seconds"] / (answer["images"] or 1) for answer in answers]
    ours_per_image = [answer["seconds"] / (answer["images"] or 1) for answer in ours]
    return {
        "name": name,
        "seconds": [round(second, 5) for second in seconds],
        "median": statistics.median(seconds),
        "lowest": min(seconds),
        "highest": max(seconds),
        "images": images,
        "images_per_second": images and statistics.median(1 / one for one in per_image),
        "ratio": statistics.median(map(operator.truediv, per_image, ours_per_image)),
    }
