"""Measure speed and memory on this machine's CPU, beside timm and beside what the CPU can do.

    python tools/benchmark.py loader -peer /path/to/timm/bin/python
    python tools/benchmark.py eval -peer /path/to/timm/bin/python -json eval.json
    python tools/benchmark.py train -peer /path/to/timm/bin/python -ranks 1 2
    python tools/benchmark.py start
    python tools/benchmark.py memory
    python tools/benchmark.py plan -device a100
    python tools/benchmark.py plan -check

Ours, the peer and the limits (Pillow's decoder alone, the model's matrix products alone) are
measured in turn, one repetition of each after the other, so that what else the machine does hits
all of them; each in a process of its own, so that none finds memory or threads as another left
them.  A ratio is the median over the turns.  Without -data_path the images are made from the
photographs of tests/data/images: 500x375 JPEGs.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P

from config import ConfigError
from tools import common
from tools.benchmark import plan as planner
from tools.benchmark.turns import (
    DEFAULT_CFG,
    Bench,
    Entry,
    Group,
    describe_machine,
    prepare_images,
)
from utils import new_file


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, text, options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        for option in (*options, "json"):
            flag = OPTIONS[option]
            command.add_argument(f"-{option}", **{**flag, **DEFAULTS.get((name, option), {})})
    return parser


def _count(low):
    def convert(text):
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
        return number

    convert.__name__ = "whole number"  # what argparse calls it
    return convert


_positive, _whole = _count(1), _count(0)
_LIST_BATCH = 1024  # lines that a loader worker reads at a time


def _rate(text):
    number = float(text)
    if not 1e-6 <= number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.000001 and 1,000,000,000")
    return number


_rate.__name__ = "number"  # what argparse calls it
_PEER_MODES = ["float32", "float32-compiled", "bfloat16", "bfloat16-compiled"]
# fmt: off
OPTIONS = {
    "json": {"metavar": "FILE", "help": "write the same as data"},
    "cfg": {"metavar": "YAML", "default": DEFAULT_CFG, "help": "the model (default S/16)"},
    "peer": {"metavar": "PYTHON", "help": "an interpreter with torch, torchvision, timm, pillow"},
    "data_path": {"metavar": "DIR", "help": "folder with val_list.txt, for other images"},
    "images": {"metavar": "N", "type": _positive, "default": 64, "help": "images (default 64)"},
    "repetitions": {"metavar": "N", "type": _positive, "help": "turns that count (default 7)",
                    "default": 7},
    "warmup": {"metavar": "N", "type": _whole, "default": 1, "help": "turns before (default 1)"},
    "threads": {"metavar": "N", "type": _positive, "help": "threads in all (default: the cores)"},
    "batch_size": {"metavar": "N", "type": _positive, "help": "images per batch and rank"},
    "num_workers": {"metavar": "N", "type": _positive, "default": 2,
                    "help": "loader processes (default 2)"},
    "batches": {"metavar": "N", "type": _positive, "help": "batches, or steps, per turn"},
    "ranks": {"metavar": "N", "type": _positive, "nargs": "+", "default": [1, 2],
              "help": "numbers of ranks (default 1 2)"},
    "peer_modes": {"metavar": "MODE", "nargs": "+", "choices": _PEER_MODES,
                   "default": _PEER_MODES, "help": "how the peer runs (default: all)"},
    "engines": {"metavar": "KIND", "nargs": "+", "choices": ["layers", "float32", "bfloat16"],
                "default": ["float32", "layers", "bfloat16"],
                "help": "how ours runs, as CPU_INFERENCE (default: all)"},
    "lines": {"metavar": "N", "type": _positive, "default": 1_281_167,
              "help": "lines of the image list (default 1281167, ImageNet's)"},
    "parts": {"metavar": "PART", "nargs": "+", "choices": ["list", "train"],
              "default": ["list", "train"], "help": "what to measure (default: list train)"},
    "device": {"metavar": "NAME", "choices": list(planner.DEVICES), "default": "a100",
               "help": f"{', '.join(planner.DEVICES)} (default a100)"},
    "devices": {"metavar": "N", "type": _positive, "nargs": "+", "default": [1, 8, 64, 512],
                "help": "numbers of devices (default 1 8 64 512)"},
    "loader_rate": {"metavar": "X", "type": _rate,
                    "help": "images/s per core (default: measured)"},
    "epoch_images": {"metavar": "N", "type": _positive, "default": 1_281_167,
                     "help": "images of an epoch (default 1281167, ImageNet's)"},
    "total_batch": {"metavar": "N", "type": _positive,
                    "help": "images per optimizer step (default: the recipe's, LINEAR_SCALED_LR)"},
    "recompute": {"action": "store_true", "default": None, "help": "plan with TRAIN.RECOMPUTE"},
    "check": {"action": "store_true", "help": "compare predictions for this CPU with measurement; "
              "of the device and the recipe it takes -cfg and -batch_size alone"},
    **{name: {"metavar": "X", "type": _rate, "help": text} for name, text in (
        ("peak", "matrix products of a device, TFLOP/s"),
        ("memory", "memory of a device, GB"),
        ("bandwidth", "bandwidth of that memory, GB/s"),
        ("link", "between devices of a host, GB/s each way"),
        ("network", "of a host, GB/s each way"),
        ("cores", "of a host"),
    )},
}
DEFAULTS = {
    ("loader", "batch_size"): {"default": 32}, ("loader", "batches"): {"default": 48},
    ("eval", "batch_size"): {"default": 16}, ("eval", "batches"): {"default": 1},
    ("train", "batch_size"): {"default": 8}, ("train", "batches"): {"default": 1},
    ("train", "repetitions"): {"default": 5}, ("eval", "repetitions"): {"default": 5},
    ("memory", "batch_size"): {"default": 16},
    ("memory", "cfg"): {"default": str(common.ROOT / "configs" / "gmlp_b16_224.yaml"),
                        "help": "the model of the training step (default B/16)"},
}
# fmt: on


def with_peer(bench, name, case, threads=None, **options):
    """A list of the peer's entry, in a process of its own; empty where there is no peer."""
    worker = bench.peer(threads)
    return [Entry(name, "peer", worker.prepare(case, **options))] if worker else []


def loader(bench):
    args = bench.args
    lead = 4 * args.num_workers
    paths = prepare_images(bench, (lead + args.batches) * args.batch_size)
    kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1000
    print(f"{len(paths)} images of {kilobytes:.0f} kB on average")
    common = {"cfg": args.cfg, "folder": bench.folder}
    decoder = bench.ours(threads=1).prepare("decode_alone", paths=paths)
    for train, what in ((False, "evaluation"), (True, "training (RandAugment)")):
        timm = {"paths": paths, "images": bench.images(), "train": train}
        own = bench.ours(threads=1).prepare("decode", images=len(paths), train=train, **common)
        entries = [
            Entry("ours", "ours", own),
            *with_peer(bench, "timm, uint8", "decode", threads=1, as_float=False, **timm),
            *with_peer(bench, "timm, float32", "decode", threads=1, as_float=True, **timm),
            Entry("limit: JPEG decoder", "limit", decoder),
        ]
        bench.measure(Group(f"decode + {what} transform, one thread", entries))
        sizes = {"batch_size": args.batch_size, "workers": args.num_workers}
        sizes.update(lead=lead, batches=args.batches)
        # The main process has all cores, as in a run.
        own = bench.ours().prepare("loader", train=train, **common, **sizes)
        entries = [
            Entry("ours", "ours", own),
            *with_peer(bench, "timm", "loader", **timm, **sizes),
            *with_peer(bench, "timm, OMP_NUM_THREADS=1", "loader", threads=1, **timm, **sizes),
        ]
        title = f"loader, {what}: {args.num_workers} workers, batches of {args.batch_size}"
        bench.measure(Group(f"{title} on the device, normalized", entries))


def batch_paths(bench):
    """The paths of a batch's images, some of them more than once."""
    paths = prepare_images(bench, bench.args.batch_size)
    return [paths[i % len(paths)] for i in range(bench.args.batch_size)]


def evaluation(bench):
    args, paths = bench.args, batch_paths(bench)
    common = {"cfg": args.cfg, "batch_size": args.batch_size, "folder": bench.folder}
    title = f"evaluation of {bench.config.MODEL.NAME}, batches of {args.batch_size}"
    for dtype, known in (("float32", ("float32", "layers")), ("bfloat16", ("bfloat16",))):
        entries = []
        for kind in args.engines:
            if kind in known:
                worker = bench.ours()
                measure = worker.prepare("evaluate", batches=args.batches, kind=kind, **common)
                entries.append(Entry(f"ours, {kind}", "ours", measure))
        if not entries:  # nothing to compare others with
            continue
        for mode in args.peer_modes:
            precision, _, compiled = mode.partition("-")
            if precision == dtype:
                entries += with_peer(
                    bench, f"timm, {compiled or 'eager'}", "evaluate", paths=paths, dtype=dtype,
                    batches=args.batches, compiled=bool(compiled), **bench.timm_model(),
                )  # fmt: skip
        entries += product_limits(bench, dtype)
        bench.measure(Group(f"{title}, {bench.threads} thread(s), {dtype}", entries))


def product_limits(bench, dtype="float32", train=False):
    """Entries of the model's matrix products alone, by both frameworks (Paddle's has float32)."""
    args, name = bench.args, "limit: matrix products, "
    products = bench.ours().prepare(
        "products", cfg=args.cfg, batch_size=args.batch_size, repeats=args.batches, train=train
    )
    options = {"shapes": products.facts["shapes"], "images": args.batch_size, "dtype": dtype}
    limits = [Entry(name + "Paddle", "limit", products)] if dtype == "float32" else []
    limits += with_peer(bench, name + "PyTorch", "products", repeats=args.batches, **options)
    return [entry._replace(role="limit") for entry in limits]


def training(bench):
    args, threads, paths = bench.args, bench.threads, batch_paths(bench)
    common = {"cfg": args.cfg, "folder": bench.folder, "batch_size": args.batch_size}
    entries = {}

    def entry(ranks, threads):
        key = ranks, threads
        if key not in entries:
            measure = bench.ours(threads, ranks).prepare("train", steps=args.batches, **common)
            entries[key] = Entry(f"ours, {ranks} rank(s) of {threads} thread(s)", "ours", measure)
        return entries[key]

    numbers = sorted(set(args.ranks))
    shared = {ranks: max(1, threads // ranks) for ranks in numbers}
    group = [entry(*share) for share in shared.items()]
    group += with_peer(
        bench, "timm, float32 eager", "train", paths=paths, steps=args.batches,
        recipe=bench.recipe(), checkpointing=False, **bench.timm_model(),
    )  # fmt: skip
    group += product_limits(bench, train=True)
    title = f"training step of {bench.config.MODEL.NAME}, batches of {args.batch_size} per rank"
    bench.measure(Group(f"{title}, {threads} core(s)", group))
    if len(numbers) > 1:
        alone = [entry(ranks, 1) for ranks in numbers]
        bench.measure(Group(f"{title}, one thread each", alone))


def start(bench):
    args = bench.args
    for worker in (bench.ours(), bench.peer()):  # for their versions, and whether they have timm
        if worker:
            worker.close()
    main = str(common.ROOT / "main_multi_gpu.py")
    reach = f"import sys; sys.path.insert(0, {str(common.ROOT)!r}); "

    def entry(name, role, *command):
        def measure():
            begin = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            if done.returncode:
                raise common.Failed(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
            return {"seconds": seconds}

        return Entry(name, role, measure)

    python = sys.executable
    entries = [
        entry("main_multi_gpu.py -eval -h", "ours", python, main, "-eval", "-h"),
        entry("import main_multi_gpu", "ours", python, "-c", reach + "import main_multi_gpu"),
        entry("import gmlp, with Paddle", "ours", python, "-c", reach + "import gmlp"),
        entry("limit: Python alone", "limit", python, "-c", "pass"),
    ]
    if args.peer:
        code = reach + "from tools.benchmark import peer; peer.import_timm()"
        entries.insert(3, entry("import timm, with PyTorch", "peer", args.peer, "-c", code))
    bench.measure(Group("start", entries))


def memory(bench):
    args = bench.args
    if "list" in args.parts:
        name = "long_list.txt"
        with open(os.path.join(bench.folder, name), "w") as file:
            for i in range(args.lines):  # as long as ImageNet's
                file.write(f"train/n{i % 1000 * 13 + 1440764:08}/n{i % 1000:08}_{i:08}.JPEG 0\n")
        least = _LIST_BATCH * (8 * args.num_workers + 2)
        if args.lines < least:
            raise ConfigError(
                f"-lines {args.lines} is too few to see {args.num_workers} workers grow: take at "
                f"least {least}"
            )
        reading = bench.ours().prepare("image_list", folder=bench.folder, name=name)()
        worker = bench.ours()
        grow = worker.prepare(
            "list_growth", folder=bench.folder, name=name, workers=args.num_workers,
            batch_size=_LIST_BATCH,
        )  # fmt: skip
        growing = grow()
        rows = {"seconds": reading["seconds"], "added": reading["added"], **growing}
        cells = [
            ["reading, seconds", f"{reading['seconds']:.2f}"],
            ["added by reading, MB", f"{reading['added'] / 1e6:.1f}"],
            ["growth of a loader worker in an epoch, MB", f"{growing['growth'] / 1e6:.1f}"],
            ["of that in its second half, MB", f"{growing['late_growth'] / 1e6:.1f}"],
        ]
        bench.add(f"a list of {args.lines:,} lines", [rows], ["", "value"], cells)
    if "train" in args.parts:
        train_memory(bench)


def train_memory(bench):
    """What a training step adds, each in a process of its own."""
    args, paths = bench.args, batch_paths(bench)
    options = {"cfg": args.cfg, "folder": bench.folder, "batch_size": args.batch_size}
    rows = []

    def add(name, worker, **options):
        rows.append({"name": name, "added": worker.prepare("step_memory", **options)()["added"]})
        worker.close()

    # As a run does: it keeps freed memory unless it recomputes.
    add("ours", bench.ours(), recompute=False, keep_freed=True, **options)
    add("ours, not keeping it", bench.ours(), recompute=False, keep_freed=False, **options)
    add("ours, recomputing", bench.ours(), recompute=True, keep_freed=False, **options)
    if args.peer:
        timm = {"paths": paths, "recipe": bench.recipe(), **bench.timm_model()}
        add("timm", bench.peer(), checkpointing=False, **timm)
        add("timm, recomputing", bench.peer(), checkpointing=True, **timm)
    first = rows[0]["added"]
    cells = [
        [row["name"], f"{row['added'] / 1e6:,.0f}", f"{row['added'] / first:.2f}"] for row in rows
    ]
    title = f"added by a training step of {bench.config.MODEL.NAME}, batch {args.batch_size}"
    bench.add(title, rows, ["", "MB", "of ours"], cells)


def planning(bench):
    args = bench.args
    given = [name for name in _PLANNED if getattr(args, name) != OPTIONS[name].get("default")]
    if args.check and given:
        raise ConfigError(f"-check predicts for this CPU: it takes no -{given[0]}")
    planner.run(bench)


_TURNS = ("repetitions", "warmup")
_PLANNED = (
    "device", "devices", "peak", "memory", "bandwidth", "link", "network", "cores", "loader_rate",
    "epoch_images", "total_batch", "recompute",
)  # fmt: skip
_IMAGES = ("data_path", "images")
COMMANDS = {
    "loader": (
        loader, "images per second of decoding, transforms and the whole loader",
        ("cfg", "peer", *_IMAGES, "batch_size", "num_workers", "batches", "threads", *_TURNS),
    ),
    "eval": (
        evaluation, "evaluation of a model",
        ("cfg", "peer", *_IMAGES, "batch_size", "batches", "threads", "engines", "peer_modes",
         *_TURNS),
    ),
    "train": (
        training, "training steps, on one rank and on several",
        ("cfg", "peer", *_IMAGES, "batch_size", "batches", "threads", "ranks", *_TURNS),
    ),
    "start": (start, "seconds until the help text, and of imports", ("peer", *_TURNS)),
    "memory": (
        memory, "memory of an image list and of a training step",
        ("cfg", "peer", "batch_size", "lines", "num_workers", "threads", "parts"),
    ),
    "plan": (
        planning, "what training would take on other devices",
        ("cfg", *_PLANNED, "batch_size", *_IMAGES, "check", *_TURNS),
    ),
}  # fmt: skip


def work(args):
    """Runs the subcommand, and writes what it found where -json says."""
    signal.signal(signal.SIGTERM, common.leave)  # so that the workers end too
    with contextlib.ExitStack() as stack:
        file = None
        if args.json:  # now, so that what cannot be written fails before minutes of measuring
            file = stack.enter_context(open(stack.enter_context(new_file(args.json)), "w"))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gmlp-benchmark-"))
        bench = Bench(args, folder, stack)
        machine = describe_machine(bench)
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        args.function(bench)
        for name, versions in bench.versions.items():
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
        if file:
            data = {
                "command": ["benchmark.py", *sys.argv[1:]],
                "machine": machine,
                "versions": bench.versions,
                "results": bench.results,
            }
            json.dump(data, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
