"""Measure speed and memory on this machine's CPU, beside timm and beside what the CPU can do.

    python tools/benchmark loader -peer /path/to/timm/bin/python
    python tools/benchmark eval -peer /path/to/timm/bin/python -json eval.json
    python tools/benchmark train -peer /path/to/timm/bin/python -ranks 1 2
    python tools/benchmark start
    python tools/benchmark memory
    python tools/benchmark traffic
    python tools/benchmark rounding
    python tools/benchmark plan -device a100
    python tools/benchmark plan -check

Ours, the peer and the limits (Pillow's decoder alone, the model's matrix products alone) are
measured in turn, one repetition of each after the other, so that what else the machine does hits
all of them; each in a process of its own, so that none finds memory or threads as another left
them.  A repetition of a step, in training or evaluation, is the mean of five in a row after two
that do not count: on its own a step would start cold.  A ratio is the median over the turns.
Without -data_path the images are made from the photographs of tests/data/images: 500x375 JPEGs.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P

from tools import common
from ranks import host
from tools.benchmark import plan
from tools.benchmark.images import prepare_images
from tools.benchmark.turns import Bench, Row
from utils import UserError, new_file

S16, B16 = (str(common.ROOT / "configs" / f"gmlp_{size}_224.yaml") for size in ("s16", "b16"))
ENGINES = ["float32", "layers", "bfloat16"]
PARTS = ["list", "train"]
PEER_MODES = ["float32", "float32-compiled", "bfloat16", "bfloat16-compiled"]
LIST_BATCH = 1024  # lines that a loader worker reads at a time
# What the peer has, timm's rand-m9, and nothing else.
RAND_AUGMENT = [
    "TRAIN.RAND_AUGMENT", True, "TRAIN.AUTO_AUGMENT", False,
    "TRAIN.MIXUP_PROB", 0.0, "TRAIN.RANDOM_ERASE_PROB", 0.0,
]  # fmt: skip


def build_parser():
    parser = common.Parser(__doc__, prog="benchmark")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, defaults) in COMMANDS.items():
        text = (function.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=text, doc=text)
        for option, default in {**defaults, "json": None}.items():
            flag = dict(OPTIONS[option])
            if default:
                shown = default if isinstance(default, list) else [default]
                flag["help"] += f" (default {' '.join(map(str, shown))})"
            command.add_argument(f"-{option}", default=default, **flag)
    return parser


def number_type(kind, name, low):
    def convert(text):
        number = kind(text)
        if not low <= number <= 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and 1,000,000,000")
        return number

    convert.__name__ = name  # what argparse calls it
    return convert


COUNT = {"metavar": "N", "type": number_type(int, "whole number", 1)}
RATE = {"metavar": "X", "type": number_type(float, "number", 0.001)}
# fmt: off
OPTIONS = {
    "json": {"metavar": "FILE", "help": "write the same as data"},
    "cfg": {"metavar": "YAML", "help": "the model"},
    "peer": {"metavar": "PYTHON", "help": "an interpreter with torch, torchvision, timm, pillow"},
    "data_path": {"metavar": "DIR", "help": "folder with val_list.txt, for other images"},
    "images": {**COUNT, "help": "images"},
    "repetitions": {**COUNT, "help": "turns that count"},
    "warmup": {"metavar": "N", "type": number_type(int, "whole number", 0), "help": "turns before"},
    "threads": {**COUNT, "help": "threads in all (default: the cores)"},
    "batch_size": {**COUNT, "help": "images per batch and rank"},
    "num_workers": {**COUNT, "help": "loader processes"},
    "batches": {**COUNT, "help": "batches, or steps, per turn that count"},
    "ranks": {**COUNT, "nargs": "+", "help": "numbers of ranks"},
    "peer_modes": {"metavar": "MODE", "nargs": "+", "choices": PEER_MODES,
                   "help": "how the peer runs"},
    "engines": {"metavar": "KIND", "nargs": "+", "choices": ENGINES,
                "help": "how ours runs, as CPU_INFERENCE"},
    "lines": {**COUNT, "help": "lines of the image list"},
    "parts": {"metavar": "PART", "nargs": "+", "choices": PARTS, "help": "what to measure"},
    "check": {"action": "store_true", "help": "compare predictions for this CPU with measurement; "
              "of the device and the recipe it takes -cfg and -batch_size alone"},
    "device": {"metavar": "NAME", "choices": list(plan.DEVICES), "help": ", ".join(plan.DEVICES)},
    "devices": {**COUNT, "nargs": "+", "help": "numbers of devices"},
    "peak": {**RATE, "help": "matrix products of a device, TFLOP/s"},
    "memory": {**RATE, "help": "memory of a device, GB"},
    "bandwidth": {**RATE, "help": "bandwidth of that memory, GB/s"},
    "link": {**RATE, "help": "between devices of a host, GB/s each way"},
    "network": {**RATE, "help": "of a host, GB/s each way"},
    "cores": {**RATE, "help": "of a host"},
    "loader_rate": {**RATE, "help": "images/s per core (default: measured)"},
    "epoch_images": {**COUNT, "help": "images of an epoch"},
    "total_batch": {**COUNT, "help": "images per optimizer step (default: LINEAR_SCALED_LR)"},
    "recompute": {"action": "store_true", "help": "plan with TRAIN.RECOMPUTE"},
}
# fmt: on


def loader(bench):
    """Images per second of decoding, transforms and the whole loader."""
    args = bench.args
    lead = 4 * args.num_workers  # batches before those that count
    paths = prepare_images(args, bench.folder, (lead + args.batches) * args.batch_size)
    bench.job.update(paths=paths, lead=lead, changes=RAND_AUGMENT)
    kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1000
    print(f"{len(paths)} images of {kilobytes:.0f} kB on average")
    for train, what in ((False, "evaluation"), (True, "training (RandAugment)")):
        one = {"threads": 1, "train": train}
        rows = [
            bench.ours("ours", "decode", **one),
            bench.peer("timm, uint8", "decode", as_float=False, **one),
            bench.peer("timm, float32", "decode", as_float=True, **one),
            bench.ours("limit: JPEG decoder", "decode_alone", **one),
        ]
        bench.measure(f"decode + {what} transform, one thread", rows)
        rows = [
            bench.ours("ours", "loader", train=train),  # with all cores, as in a run
            bench.peer("timm", "loader", train=train),
            bench.peer("timm, OMP_NUM_THREADS=1", "loader", **one),
        ]
        title = f"loader, {what}: {args.num_workers} workers, batches of {args.batch_size}"
        bench.measure(f"{title} on the device, normalized", rows)


def product_limits(bench, dtype="float32", train=False):
    """Rows of the model's matrix products alone, by both frameworks (Paddle's has float32)."""
    job = {"dtype": dtype, "train": train, "products": plan.facts(bench.config)["products"]}
    name = "limit: matrix products, "
    ours = bench.ours(name + "Paddle", "products", **job) if dtype == "float32" else None
    return [ours, bench.peer(name + "PyTorch", "products", **job)]


def evaluation(bench):
    """Evaluation of a model."""
    args = bench.args
    bench.job["paths"] = prepare_images(args, bench.folder, args.batch_size)
    title = f"evaluation of {bench.config.MODEL.NAME}, batches of {args.batch_size}"
    for dtype, known in (("float32", ("float32", "layers")), ("bfloat16", ("bfloat16",))):
        kinds = [kind for kind in args.engines if kind in known]
        if not kinds:  # nothing to compare others with
            continue
        rows = [bench.ours(f"ours, {kind}", "evaluate", kind=kind) for kind in kinds]
        for mode in args.peer_modes:
            if mode.startswith(dtype):
                name = "timm, compiled" if mode.endswith("compiled") else "timm, eager"
                rows.append(bench.peer(name, "evaluate", mode=mode))
        rows += product_limits(bench, dtype)
        bench.measure(f"{title}, {bench.threads} thread(s), {dtype}", rows)


def training(bench):
    """Training steps, on one rank and on several."""
    args = bench.args
    bench.job["paths"] = prepare_images(args, bench.folder, args.batch_size)

    def ours(ranks, threads):
        return bench.ours(f"ours, {ranks} rank(s) of {threads} thread(s)", "train", threads, ranks)

    numbers = sorted(set(args.ranks))
    rows = [ours(ranks, max(1, bench.threads // ranks)) for ranks in numbers]
    rows += [
        bench.peer("timm, float32 eager", "train", keep_freed=False),
        bench.peer("timm, keeping freed memory", "train"),  # as ours does
        *product_limits(bench, train=True),
    ]
    title = f"training step of {bench.config.MODEL.NAME}, batches of {args.batch_size} per rank"
    bench.measure(f"{title}, {bench.threads} core(s)", rows)
    if len(numbers) > 1:
        rows = [ours(ranks, threads=1) for ranks in numbers]
        bench.measure(f"{title}, one thread each", rows)


def start(bench):
    """Seconds until the help text, and of imports."""
    for side in (bench.ours, bench.peer):  # their versions, and whether the peer has timm
        side("", None)
    bench.close()

    def row(name, *command):
        def measure():
            begin = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            if done.returncode:
                raise common.Failed(f"{shlex.join(command)}: {done.stderr.strip()[-300:]}")
            return {"seconds": seconds, "images": None}

        return Row(name, measure)

    python, main = sys.executable, str(common.ROOT / "main_multi_gpu.py")
    reach = f"import sys; sys.path.insert(0, {str(common.ROOT)!r}); "
    timm = reach + "import tools.benchmark.peer"
    rows = [
        row("main_multi_gpu.py -eval -h", python, main, "-eval", "-h"),
        row("import main_multi_gpu", python, "-c", reach + "import main_multi_gpu"),
        row("import gmlp, with Paddle", python, "-c", reach + "import gmlp"),
        row("import timm, with PyTorch", bench.args.peer, "-c", timm) if bench.args.peer else None,
        row("limit: Python alone", python, "-c", "pass"),
    ]
    bench.measure("start", rows)


def memory(bench):
    """Memory of an image list and of a training step."""
    if "list" in bench.args.parts:
        list_memory(bench)
    if "train" in bench.args.parts:
        train_memory(bench)


def list_memory(bench):
    lines, workers = bench.args.lines, bench.args.num_workers
    least = LIST_BATCH * (8 * workers + 2)
    if lines < least:
        raise UserError(
            f"-lines {lines} is too few to see {workers} workers grow: take at least {least}"
        )
    with open(os.path.join(bench.folder, "long_list.txt"), "w") as file:
        for i in range(lines):  # as long as ImageNet's
            file.write(f"train/n{i % 1000 * 13 + 1440764:08}/n{i % 1000:08}_{i:08}.JPEG 0\n")
    row = bench.ours("", "image_list", list="long_list.txt", batch_size=LIST_BATCH)
    result = row.measure()
    bench.close()
    values = {
        "reading, seconds": f"{result['seconds']:.2f}",
        "added by reading, MB": f"{result['added'] / 1e6:.1f}",
        "growth of a loader worker in an epoch, MB": f"{result['growth'] / 1e6:.1f}",
        "of that in its second half, MB": f"{result['late_growth'] / 1e6:.1f}",
    }
    cells = [{"": name, "value": value} for name, value in values.items()]
    bench.show(f"a list of {lines:,} lines", [result], cells)


def train_memory(bench):
    args = bench.args
    bench.job.update(paths=prepare_images(args, bench.folder, args.batch_size))
    results = []
    for name, side, job in (
        ("ours", bench.ours, {}),
        ("ours, not keeping it", bench.ours, {"keep_freed": False}),
        ("ours, recomputing", bench.ours, {"recompute": True}),
        ("timm", bench.peer, {"keep_freed": False}),
        ("timm, recomputing", bench.peer, {"keep_freed": False, "recompute": True}),
    ):
        if row := side(name, "train", added_memory=True, **job):
            results.append({"name": name, "added": row.measure()["added"]})
            bench.close()  # before the next one starts
    cells = [
        {
            "": result["name"],
            "MB": f"{result['added'] / 1e6:,.0f}",
            "of ours": f"{result['added'] / results[0]['added']:.2f}",
        }
        for result in results
    ]
    title = f"added by training {bench.config.MODEL.NAME}, batch {args.batch_size}"
    bench.show(title, results, cells)


def traffic(bench):
    """Memory traffic of a training step by operator, in float32 and mixed precision; no timing."""
    common.import_paddle()
    from tools.benchmark import mixed

    mixed.show_traffic(bench, bench.args.batch_size)


def rounding(bench):
    """What the rounding of mixed precision does to logits and to a short training; simulated."""
    common.import_paddle()
    from tools.benchmark import rounding

    rounding.run(bench)


def planning(bench):
    """What training would take on other devices."""
    args = bench.args
    if not args.check:
        return plan.run(bench)
    given = [name for name, default in PLANNED.items() if getattr(args, name) != default]
    if given:
        raise UserError(f"-check predicts for this CPU: it takes no -{given[0]}")
    return plan.check(bench)


# fmt: off
TURNS = {"repetitions": 7, "warmup": 1}
# A turn is so many steps after two that do not count, so that no whole turn has to be left out.
IN_A_ROW = {"repetitions": 5, "warmup": 0, "batches": 5}
IMAGES = {"data_path": None, "images": 64}
MODEL = {"cfg": S16, "peer": None, "threads": None, **IMAGES}
IMAGENET = 1_281_167  # training images
PLANNED = {
    "device": "a100", "devices": [1, 8, 64, 512], "peak": None, "memory": None, "bandwidth": None,
    "link": None, "network": None, "cores": None, "loader_rate": None, "epoch_images": IMAGENET,
    "total_batch": None, "recompute": False,
}
# Each subcommand's options, with their defaults.
COMMANDS = {
    "loader": (loader, {**MODEL, **TURNS, "batch_size": 32, "num_workers": 2, "batches": 48}),
    "eval": (evaluation, {**MODEL, **IN_A_ROW, "batch_size": 16, "engines": ENGINES,
                          "peer_modes": PEER_MODES}),
    "train": (training, {**MODEL, **IN_A_ROW, "batch_size": 8, "ranks": [1, 2]}),
    "start": (start, {"peer": None, **TURNS}),
    "memory": (memory, {**MODEL, "cfg": B16, "batch_size": 16, "lines": IMAGENET,
                        "num_workers": 2, "parts": PARTS, "batches": 5}),
    "traffic": (traffic, {"cfg": S16, "batch_size": 256}),
    "rounding": (rounding, {"batches": 200}),
    "plan": (planning, {"cfg": S16, **PLANNED, **IMAGES, **TURNS, "batch_size": None,
                        "check": False}),
}
# fmt: on


def work(args):
    """Runs the subcommand, and writes what it found where -json says."""
    signal.signal(signal.SIGTERM, common.leave)  # so that the workers end too
    with contextlib.ExitStack() as stack:
        file = None
        if args.json:  # now, so that what cannot be written fails before minutes of measuring
            file = stack.enter_context(open(stack.enter_context(new_file(args.json)), "w"))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gmlp-benchmark-"))
        bench = stack.enter_context(contextlib.closing(Bench(args, folder)))
        machine = describe_machine()
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        COMMANDS[args.command][0](bench)
        for side, versions in bench.versions.items():
            print(f"{side}: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
        if file:
            command = ["benchmark", *sys.argv[1:]]
            data = {"command": command, "machine": machine, "versions": bench.versions}
            json.dump({**data, "results": bench.results}, file, indent=2)
            file.write("\n")


def describe_machine():
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        model = next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    load = f"{os.getloadavg()[0]:.1f}"
    return {"cpu": model, "cores": host.available_cores(), "load before": load}


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
