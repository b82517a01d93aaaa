"""What training would take on other devices: benchmark.py's subcommand `plan`.

Everything but the constants below is counted, measured or given; the README has the formulas in
words.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P

from tools import common
from tools.benchmark.turns import prepare_images

# timm publishes 657.63 images/s for training gmlp_s16_224 and 275.97 for gmlp_b16_224 on an RTX
# 3090 under AMP (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv in its repository).  Less
# the matrix products at that card's 71 TFLOP/s, its 936 GB/s move 1.08 and 2.15 GB an image in that
# time: 7.4 times what a pass keeps for the backward pass in float32, for both models.
TRAFFIC_PER_KEPT_BYTE = 7.4
# Of what float32 keeps, mixed precision keeps this share: timm's batches of 192 (S/16) and 96
# (B/16) are the largest of its table's that fit into 24 GB, 256 and 128 do not, so that it is
# between 0.64 and 0.85.
KEPT_SHARE_AMP = 0.75
# AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
OPTIMIZER_TRAFFIC = 7 * 4  # bytes per parameter
STATE_BYTES = 4 * 4  # per parameter: weight, gradient, two moments in float32


class Device(NamedTuple):
    """A device and the host around it.

    peak: matrix products, TFLOP/s, float16 or bfloat16 with float32 sums, without sparsity.
    memory: GB.  bandwidth: of its memory, GB/s.
    link: to the other devices of its host, GB/s each way.
    devices: in a host.  network: of a host, GB/s each way.  cores: of a host.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    devices: int
    network: float
    cores: int
    kept_share: float = KEPT_SHARE_AMP


# NVIDIA's data sheets, as the pages in brackets give their numbers; links are half of the
# "bidirectional" totals printed there.
#   A100 80 GB SXM: nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
#     nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
#     (glennklockwood.com/garden/processors/A100); host: DGX A100 (8 x 200 Gb/s, 128 cores)
#   H100 SXM: nvidia.com/en-us/data-center/h100 (glennklockwood.com/garden/processors/h100; the
#     1,979 TFLOP/s are with sparsity); host: DGX H100 (8 x 400 Gb/s, 112 cores)
#   V100 32 GB SXM2: images.nvidia.com/content/technologies/volta/pdf/
#     volta-v100-datasheet-update-us-1165301-r5.pdf (its rate: developer.nvidia.com/
#     programming-tensor-cores-cuda-9-0); host: DGX-1 (4 x 100 Gb/s, 40 cores)
#   RTX 4090: images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
#     (waredb.com/processor/nvidia-geforce-rtx-4090); PCIe 4.0 x16 (no NVLink); the host, 8 cards,
#     10 Gb/s and 64 cores, is an assumption
DEVICES = {
    "a100": Device(312, 80, 2039, 300, 8, 200, 128),
    "h100": Device(989, 80, 3350, 450, 8, 400, 112),
    "v100": Device(125, 32, 900, 150, 8, 50, 40),
    "rtx4090": Device(165, 24, 1008, 32, 8, 1.25, 64),
}


class Plan(NamedTuple):
    """What `devices` devices make of a recipe; see the README for each."""

    devices: int
    batch_size: int  # per device
    accum_iter: int
    images_per_second: float
    hours: float
    memory: float  # GB per device
    cores: float  # per device, to keep it busy
    bottleneck: str
    seconds: dict  # of a step, by what takes them


def image_seconds(model, device, recompute=False):
    """Seconds of one image's forward and backward pass: (matrix products, memory traffic)."""
    # The backward pass has two products for each of the forward pass's; recomputation repeats that.
    passes = 4 if recompute else 3
    products = passes * 2 * model["multiply_adds"] / (device.peak * 1e12)
    traffic = TRAFFIC_PER_KEPT_BYTE * model["kept_bytes"] * passes / 3
    return products, traffic / (device.bandwidth * 1e9)


def exchange_seconds(num_bytes, devices, device):
    """A ring all-reduce within each host, then one between hosts."""
    local = min(devices, device.devices)
    hosts = math.ceil(devices / device.devices)
    seconds = 2 * (local - 1) / local * num_bytes / (device.link * 1e9)
    return seconds + 2 * (hosts - 1) / hosts * num_bytes / (device.network * 1e9)


def step_seconds(model, device, devices, batch_size, accum_iter=1, recompute=False):
    """Seconds of an optimizer step by what takes them, one after the other (a dict)."""
    products, traffic = image_seconds(model, device, recompute)
    images = batch_size * accum_iter
    optimizer = model["parameters"] * OPTIMIZER_TRAFFIC / (device.bandwidth * 1e9)
    return {
        "matrix products": images * products,
        "memory traffic": images * traffic + optimizer,
        "links": exchange_seconds(4 * model["parameters"], devices, device),
    }


def memory_bytes(model, device, batch_size, recompute=False, ema=False):
    """Bytes that training takes on a device: weights, gradients, moments, what passes keep."""
    kept = model["kept_bytes_recompute" if recompute else "kept_bytes"]
    state = model["parameters"] * (STATE_BYTES + (4 if ema else 0))
    return state + batch_size * kept * device.kept_share


def plan(model, device, devices, loader_rate, images, total_batch, batch_size, epochs, recompute):
    """The plan for a number of devices.

    Args:
        model: the facts of benchmark_ours.facts.
        loader_rate: images/s that a core decodes and augments; a device has its share of its
            host's cores.
        images: of an epoch.
        total_batch: images per optimizer step, the recipe's; kept as nearly as whole batches allow.
        batch_size: the most that a device takes at a time.
    """
    accum_iter = math.ceil(total_batch / (devices * batch_size))
    batch_size = max(1, round(total_batch / (devices * accum_iter)))
    seconds = step_seconds(model, device, devices, batch_size, accum_iter, recompute)
    possible = devices * batch_size * accum_iter / sum(seconds.values())
    cores = possible / devices / loader_rate
    loaded = devices * device.cores / device.devices * loader_rate
    rate = min(possible, loaded)
    return Plan(
        devices,
        batch_size,
        accum_iter,
        rate,
        epochs * images / rate / 3600,
        memory_bytes(model, device, batch_size, recompute, model["ema"]) / 1e9,
        cores,
        "loader" if loaded < possible else max(seconds, key=seconds.get),
        seconds,
    )


def bandwidth_of(seconds, model, peak, batch_size):
    """The GB/s of memory with which a measured step of one device fits step_seconds."""
    products = batch_size * 3 * 2 * model["multiply_adds"] / (peak * 1e12)
    traffic = batch_size * TRAFFIC_PER_KEPT_BYTE * model["kept_bytes"]
    traffic += model["parameters"] * OPTIMIZER_TRAFFIC
    # Where products alone took longer than the step, noise is all there is to divide by.
    return traffic / max(seconds - products, 0.05 * seconds) / 1e9


def run(bench):
    args = bench.args
    if args.check:
        return check_plan(bench)
    given = {
        name: getattr(args, name)
        for name in ("peak", "memory", "bandwidth", "link", "network", "cores")
        if getattr(args, name) is not None
    }
    device = DEVICES[args.device]._replace(**given)
    worker = bench.ours(1)
    model = worker.prepare("facts", cfg=args.cfg).facts
    rate = args.loader_rate or measured_loader_rate(bench, worker)
    recompute = args.recompute or model["recompute"]
    plans = [
        plan(
            model, device, devices, rate, args.epoch_images,
            args.total_batch or model["total_batch"], args.batch_size or model["batch_size"],
            model["epochs"], recompute,
        )
        for devices in args.devices
    ]  # fmt: skip
    print(
        f"{model['name']}: {model['parameters']:,} parameters, {model['multiply_adds']:,} "
        f"multiply-adds, {model['kept_bytes'] / 1e6:.0f} MB kept per image; "
        f"a core loads {rate:.0f} images/s"
    )
    header = [
        "devices", "batch x accum", "images/step", "images/s", "hours", "GB", "cores", "bottleneck",
    ]  # fmt: skip
    cells = [
        [
            str(one.devices),
            f"{one.batch_size} x {one.accum_iter}",
            f"{one.devices * one.batch_size * one.accum_iter:,}",
            f"{one.images_per_second:,.0f}",
            f"{one.hours:,.1f}",
            f"{one.memory:.1f}" + (" (too much)" if one.memory > device.memory else ""),
            f"{one.cores:.1f}",
            one.bottleneck,
        ]
        for one in plans
    ]
    rows = [one._asdict() for one in plans]
    bench.add(f"{model['epochs']} epochs on {args.device}", rows, header, cells)


def measured_loader_rate(bench, worker):
    """Images/s that one core decodes and augments with the recipe's own transform."""
    images = len(prepare_images(bench))
    measure = worker.prepare(
        "decode", cfg=bench.args.cfg, folder=bench.folder, images=images, train=True, recipe=True
    )
    args = bench.args
    answers = [measure() for _ in range(args.warmup + args.repetitions)][args.warmup :]
    return statistics.median(answer["images"] / answer["seconds"] for answer in answers)


def check_plan(bench):
    """Predicts training steps of this CPU, one thread a rank, and measures them.

    What goes in: the rate of matrix products and a training step of Ti/16, which tells the
    bandwidth of memory, both alone and beside another rank, and the all-reduce's rate.
    """
    args = bench.args
    small = str(common.ROOT / "configs" / "gmlp_ti16_224.yaml")
    batch_size = args.batch_size or 4
    prepare_images(bench, batch_size)
    workers = {ranks: bench.ours(1, ranks) for ranks in (1, 2)}
    model, small_model = (workers[1].prepare("facts", cfg=cfg).facts for cfg in (args.cfg, small))
    options = {"folder": bench.folder, "batch_size": batch_size, "steps": 1}
    products = {"cfg": args.cfg, "batch_size": batch_size, "repeats": 1, "train": True}
    cases = {"exchange": workers[2].prepare("exchange", cfg=args.cfg)}
    for ranks, worker in workers.items():
        cases["products", ranks] = worker.prepare("products", **products)
        cases["small", ranks] = worker.prepare("train", cfg=small, **options)
        cases["step", ranks] = worker.prepare("train", cfg=args.cfg, **options)
    answers = {key: [] for key in cases}
    for turn in range(args.warmup + args.repetitions):
        for key, measure in cases.items():
            answer = measure()
            if turn >= args.warmup:
                answers[key].append(answer)
    seconds = {key: statistics.median(a["seconds"] for a in of) for key, of in answers.items()}
    flops = answers["products", 1][0]["flops"]
    link = answers["exchange"][0]["bytes"] / seconds["exchange"] / 1e9
    rows, devices = [], {}
    for ranks in (1, 2):
        peak = flops / seconds["products", ranks] / 1e12
        device = Device(peak, 0, 0, link, devices=2, network=1, cores=2, kept_share=1.0)
        exchange = exchange_seconds(4 * small_model["parameters"], ranks, device)
        bandwidth = bandwidth_of(seconds["small", ranks] - exchange, small_model, peak, batch_size)
        device = devices[ranks] = device._replace(bandwidth=bandwidth)
        parts = step_seconds(model, device, ranks, batch_size)
        predicted = ranks * batch_size / sum(parts.values())
        measured = ranks * batch_size / seconds["step", ranks]
        error = predicted / measured - 1
        rows.append(
            {"ranks": ranks, "predicted": predicted, "measured": measured, "error": error, **parts}
        )
    cells = [
        [
            str(row["ranks"]),
            f"{row['predicted']:.2f}",
            f"{row['measured']:.2f}",
            f"{100 * row['error']:+.0f}%",
        ]
        for row in rows
    ]
    header = ["ranks", "predicted images/s", "measured", "error"]
    title = f"training {model['name']} on this CPU, one thread a rank, batches of {batch_size}"
    bench.add(title, rows, header, cells)
    alone, shared = devices[1], devices[2]
    print(
        f"from, alone (beside another rank): {1000 * alone.peak:.0f} ({1000 * shared.peak:.0f}) "
        f"GFLOP/s, {alone.bandwidth:.1f} ({shared.bandwidth:.1f}) GB/s by {small_model['name']}, "
        f"all-reduce {link:.2f} GB/s"
    )
