"""Runs the program as a user does: as a process with arguments, from another folder."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

import cli

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "gmlp_digits.yaml"
HANG_SECONDS = 240  # a limit that only stops a hang

# Config keys for a model and a run that take seconds, with every random part on.
SMALL = {
    "DATA.BATCH_SIZE": 10,
    "DATA.BATCH_SIZE_EVAL": 16,
    "MODEL.MIXER.PATCH_SIZE": 7,
    "MODEL.MIXER.EMBED_DIM": 16,
    "MODEL.MIXER.DEPTH": 2,
    "MODEL.DROPOUT": 0.1,
    "MODEL.DROPPATH": 0.2,
    "TRAIN.NUM_EPOCHS": 2,
    "TRAIN.ACCUM_ITER": 3,
    "TRAIN.MODEL_EMA": True,
    "TRAIN.MODEL_EMA_DECAY": 0.9,
    "TRAIN.RAND_AUGMENT": True,
    "TRAIN.MIXUP_PROB": 0.8,
    "TRAIN.RANDOM_ERASE_PROB": 0.25,
    "SAVE_FREQ": 1,
    "REPORT_FREQ": 4,
}


@dataclass
class Result:
    """How a program ended and what it printed."""

    status: int
    out: str
    err: str

    def check(self):
        """Itself, if the program succeeded."""
        if self.status:
            raise AssertionError(f"exit status {self.status}\n{self.out}\n{self.err}")
        return self

    def refused(self, status, *parts):
        """Asserts an exit status and one sentence on stderr with these parts, no traceback."""
        assert self.status == status, (self.status, self.out, self.err)
        assert "Traceback" not in self.err + self.out, self.err
        for part in parts:
            assert part in self.err, (part, self.err)


def run(command, cwd="/", **env):
    """Runs a command without a terminal; variables that are None are unset."""
    environment = {**os.environ, **env}
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=HANG_SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_tool(tool, *args):
    """Runs a module of tools/ in this process, without the seconds that importing Paddle takes."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.run(tool.build_parser(), tool.work, [str(arg) for arg in args])
    except SystemExit as error:  # argparse's
        status = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    return Result(status, *texts)


def flatten(opts):
    """{"KEY": value} as the words after -opts."""
    return [
        word for key, value in opts.items() for word in (key, yaml.safe_dump(value).split("\n")[0])
    ]


def run_program(*args, opts=None, cfg=CONFIG, launcher=(), **env):
    """Runs main_multi_gpu.py with the demo's config, on the CPU unless env says otherwise."""
    command = [sys.executable, *launcher, ROOT / "main_multi_gpu.py", "-cfg", cfg, *args]
    if opts:
        command += ["-opts", *flatten(opts)]
    return run(command, **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": None, **env})


def metrics(folder, kind):
    """The rows of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def same(first, second):
    """Whether two nested trees of arrays are equal bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return np.array_equal(np.asarray(first), np.asarray(second))


def start_program(data, output, *args, opts=None, **popen):
    """A running training of the small model, of 300 epochs unless opts say otherwise."""
    words = flatten({**SMALL, "TRAIN.NUM_EPOCHS": 300, "REPORT_FREQ": 1, **(opts or {})})
    command = [sys.executable, ROOT / "main_multi_gpu.py", "-cfg", CONFIG,
               "-data_path", data, "-output", output, *args, "-opts", *words]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen([str(word) for word in command], env=env, **popen)


def batches_in_shared_memory():
    """Loader batches whose maker has ended; those of other programs that run are none of ours."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith("paddle_")}
    running = {str(pid) for pid in process_ids()}
    return {name for name in names if name.split("_")[1] not in running}


def process_ids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def is_stopped(pid):
    return _stat_of(pid, 0) == "T"


def parent_of(pid):
    return int(_stat_of(pid, 1))


def session_of(pid):
    return int(_stat_of(pid, 3))


def _stat_of(pid, field):
    """A field of /proc/<pid>/stat, counted from the state behind the name; "-1" for no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[field]
    except OSError:
        return "-1"


def session_exists(session):
    """Whether any process is left in a session, in whatever group."""
    return any(session_of(pid) == session for pid in process_ids())


def wait_for(condition, process=None):
    """Waits until condition() holds; fails when the process ends first."""
    limit = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "the program ended early"
        assert time.monotonic() < limit, "the program hangs"
        time.sleep(0.1)
