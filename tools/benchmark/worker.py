"""A long-lived worker of benchmark.py, which asks its workers in turn; the standard library alone.

A worker reads one JSON object a line and answers with one:

    {"case": "decode", "options": {...}}   prepares a case; {"key": 0, "facts": {...}}
    {"run": 0}                             one repetition; {"seconds": 1.2, "images": 64}

Anything that goes wrong is {"error": "one sentence"}.  The end of the input ends the worker.
"""

import json
import os
import resource
import sys


def serve(cases, share=None):
    """Answers until there is nothing more to read.

    Args:
        cases: names to functions of the options that return (a function that runs one repetition
            and returns its answer, facts for the benchmark).
        share: where several ranks work together, gives rank 0's request to all of them; called on
            rank 0 with a function that reads it, on the others with None.
    """
    # What libraries print belongs to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs = []
    while True:
        request = share(_read) if share else _read()
        if request is None:
            return
        try:
            answer = _answer(request, cases, runs)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(json.dumps(answer), file=answers, flush=True)


def added_memory(run):
    """A case's answer and facts: the bytes that a first call of `run` adds to this process."""

    def measure():
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        run()
        return {"added": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}

    return measure, {}


def _read():
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def _answer(request, cases, runs):
    if "run" in request:
        return runs[request["run"]]()
    run, facts = cases[request["case"]](**request["options"])
    runs.append(run)
    return {"key": len(runs) - 1, "facts": facts}
