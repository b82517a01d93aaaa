"""A worker, a process that does one kind of work whenever it is asked.

python tools/benchmark/worker.py peer           (the benchmark starts it, with -peer PYTHON)
python tools/benchmark/worker.py ours RANKS

It reads a line of JSON and answers with one:

    {"case": "decode", "train": true, ...}   prepares the work; {"python": "3.11.7", ...}: versions
    {}                                       does it; {"seconds": 1.2, "images": 64}

What goes wrong is {"error": "one sentence"}.  The end of the input ends the worker.
"""

import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def serve(cases, read=sys.stdin.readline):
    """Answers until there is nothing more to read.

    Args:
        cases: a module with VERSIONS, and functions of a job, the first line as a namespace.  Each
            returns a function that does the work, and of how many images its seconds are.  Where
            that returns a dict, the answer has it too: the seconds of a step for those of the call.
        read: gives the next line; "" at the end.
    """
    # What libraries print belongs to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = None
    while line := read():
        try:
            if work is None:
                job = json.loads(line, object_hook=lambda pairs: SimpleNamespace(**pairs))
                work, images = getattr(cases, job.case)(job) if job.case else (None, 0)
                answer = {"python": sys.version.split()[0], **cases.VERSIONS}
            else:
                start = time.perf_counter()
                result = added_memory(work) if job.added_memory else work()
                answer = {"seconds": time.perf_counter() - start, "images": images}
                answer.update(result or {})
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(json.dumps(answer), file=answers, flush=True)


def products(job, random_matrix):
    """The limit: the model's matrix products on random numbers, and nothing else.

    Args:
        job: its `products` are [rows, inner, columns, times] of one image's forward pass.
        random_matrix: (rows, columns) -> a framework's matrix.
    """
    shapes = [(rows * job.batch_size, *others) for rows, *others in job.products]
    if job.train:  # each has the gradients of both its factors
        backward = (((m, n, k, times), (k, m, n, times)) for m, k, n, times in shapes)
        shapes.extend(itertools.chain(*backward))
    factors = [(random_matrix(m, k), random_matrix(k, n), times) for m, k, n, times in shapes]

    def step(number):
        for a, b, times in factors:
            for _ in range(times):
                a @ b

    return in_a_row(job, step)


def in_a_row(job, step):
    """The work of a job: the mean seconds of `batches` steps, after `lead` that do not count.

    After another process's turn caches and clocks are cold, and the first steps slower than those
    of a run.

    Args:
        step: takes its number, from 0.
    """

    def work():
        for number in range(job.lead + job.batches):
            if number == job.lead:
                start = time.perf_counter()
            step(number)
        return {"seconds": (time.perf_counter() - start) / job.batches}

    return work, job.batch_size


def added_memory(work):
    """The bytes that the first call of `work` adds to this process."""
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    work()
    return {"added": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def main(side, ranks=1):
    if side == "peer":
        try:
            from tools.benchmark import peer
        except ImportError as error:
            sys.exit(f"the peer's Python needs torch, torchvision, timm and pillow: {error}")
        return serve(peer)
    from tools import common
    from ranks import launch

    if ranks > 1 and not launch.is_rank():
        return launch.run(ranks, 0, [sys.executable, *sys.argv], stdin=None)
    common.import_paddle()
    from ranks import collective, stop
    from tools.benchmark import ours

    rank, _ = collective.init_distributed()
    if rank > 0:  # rank 0 alone answers
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def read():
        """Rank 0's next line, on every rank; waits for it as long as it takes."""
        line = sys.stdin.readline() if rank == 0 else None
        stop.barrier()
        return collective.broadcast_object(line)

    return serve(ours, read)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
