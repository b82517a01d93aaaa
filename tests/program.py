"""Runs the program as a user does: as a process with arguments, from another folder."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import preloaded
import yaml
from processes import HANG_SECONDS

from tools import common

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "gmlp_digits.yaml"

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
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=_environment(env),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=HANG_SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_tool(tool, *args):
    """Runs a module of tools/ in this process, without the seconds that importing Paddle takes."""
    return _in_this_process(lambda argv: common.run(tool.build_parser(), tool.work, argv), args)


def run_as_rank(*args):
    """Runs main_multi_gpu.py as the only rank and in this process, with the demo's config."""
    import main_multi_gpu

    with mock.patch.dict(os.environ, PADDLE_TRAINER_ID="0", CUDA_VISIBLE_DEVICES=""):
        return _in_this_process(main_multi_gpu.main, ["-cfg", CONFIG, *args])


def _in_this_process(main, args, encoding="utf-8"):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(arg) for arg in args])
    except SystemExit as error:  # argparse's
        status = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return Result(status, *texts)


def flatten(opts):
    """{"KEY": value} as the words after -opts."""
    return [
        word for key, value in opts.items() for word in (key, yaml.safe_dump(value).split("\n")[0])
    ]


def run_program(*args, opts=None, cfg=CONFIG, launcher=(), **env):
    """Runs main_multi_gpu.py with the demo's config, on the CPU unless env says otherwise."""
    command, env = _program(args, opts, cfg, launcher), {**_ON_CPU, **env}
    if launcher or env.keys() != _ON_CPU.keys() or env["CUDA_VISIBLE_DEVICES"] != "":
        return run(command, **env)
    return run_preloaded(command, **env)


def run_preloaded(command, cwd="/", **env):
    """run, in a process that has Paddle already, on the CPU."""
    pipe, command = subprocess.PIPE, [str(part) for part in command]
    program = preloaded.Program(command, _environment({**_ON_CPU, **env}), cwd, pipe, pipe)
    out, err = program.communicate(HANG_SECONDS)
    return Result(program.returncode, out, err)


def start_program(data, output, *args, opts=None, visible="", **popen):
    """A running training of the small model, of 300 epochs unless opts say otherwise.

    `visible` is CUDA_VISIBLE_DEVICES, "" for the CPU.
    """
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 300, "REPORT_FREQ": 1, **(opts or {})}
    command = _program(["-data_path", data, "-output", output, *args], opts)
    env = _environment({**_ON_CPU, "CUDA_VISIBLE_DEVICES": visible})
    if visible == "":
        return preloaded.Program(command, env, **popen)
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, text=True, **popen)


def write_run(folder, names, **keys):
    """Makes the folder of a run of the small model of ten classes, as its program leaves it.

    `names` are its classes', `keys` further values of its config, with __ for the dots.  The random
    weights tell images apart.
    """
    import paddle  # not above: its threads are set before

    from config import get_config, update_config
    from training.run import build_model
    from weights import pdparams

    folder.mkdir()
    changes = {name.replace("__", "."): value for name, value in keys.items()}
    opts = SimpleNamespace(opts=flatten({**SMALL, **changes}))
    config = update_config(get_config(CONFIG), opts)
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    paddle.seed(1)
    state = build_model(config).state_dict()
    state["head.weight"] = paddle.randn(state["head.weight"].shape)
    pdparams.write(folder / "best_weights.pdparams", state)
    return folder


_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": None}


def _program(args, opts, cfg=CONFIG, launcher=()):
    words = [sys.executable, *launcher, ROOT / "main_multi_gpu.py", "-cfg", cfg, *args]
    return [str(word) for word in words + (["-opts", *flatten(opts)] if opts else [])]


def _environment(changes):
    """This process's variables with others; those that are None are unset."""
    variables = {**os.environ, "NVIDIA_TF32_OVERRIDE": None, **changes}  # of devices.py
    return {name: value for name, value in variables.items() if value is not None}


def folder_of(output):
    """The folder of the only training run in `output`."""
    (folder,) = output.glob("train-*")
    return folder


def log_of(output):
    """The log of the only run in `output`; nothing before it has begun."""
    return "".join(path.read_text() for path in output.glob("train-*/log.txt"))


def metrics(folder, kind):
    """The rows of one kind in a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def same(first, second):
    """Whether two nested trees of arrays are equal bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return np.array_equal(np.asarray(first), np.asarray(second))
