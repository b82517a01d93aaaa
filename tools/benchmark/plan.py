"""What training would take on other devices: the subcommand `plan`.

Everything but the constants below is counted, measured or given; docs/performance.md has the
formulas in words.
"""

import math
import statistics
from typing import NamedTuple

from tools import common
from config import get_config
from tools.benchmark.images import prepare_images

# The share of its memory's bandwidth that a step reaches, if matrix products take their time at the
# device's peak.  A step of S/16 with 256 images, without stochastic depth, moves 187 GB by count
# with LayerNorm in float32 and 137 GB with LayerNorm in bfloat16; an H100 takes 145.5 and 125.3 ms
# for it (analogy.py): 0.40 and 0.34 of its 3,350 GB/s.  An RTX 3090 (936 GB/s, 71 TFLOP/s) reaches
# 0.68 with S/16 and 0.69 with B/16, if timm's formulation moves what this one does: timm publishes
# 657.63 and 275.97 images/s, batches of 192 and 96 under AMP
# (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv in its repository).  Taken is the
# H100's, by which a slower memory is planned with too many hours rather than with too few.
BANDWIDTH_SHARE = 0.37
# AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
OPTIMIZER_TRAFFIC = 7 * 4  # bytes per parameter
STATE_BYTES = 4 * 4  # per parameter: weight, gradient, two moments in float32
SMALL = str(common.ROOT / "configs" / "gmlp_ti16_224.yaml")


class Device(NamedTuple):
    """A device and the host around it."""

    peak: float  # matrix products, TFLOP/s: 16 bits with float32 sums, without sparsity
    memory: float  # GB
    bandwidth: float  # of its memory, GB/s
    link: float  # to the other devices of its host, GB/s each way
    in_host: int  # devices
    network: float  # of a host, GB/s each way
    cores: int  # of a host
    amp_dtype: str = "bfloat16"  # what AMP_DTYPE auto takes in training


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
    "v100": Device(125, 32, 900, 150, 8, 50, 40, "float16"),
    "rtx4090": Device(165, 24, 1008, 32, 8, 1.25, 64),
}


def facts(config, amp=None):
    """What is counted of a config's model in mixed precision, an optim.Amp, or in float32 (None).

    Returns:
        A dict: parameters; products, [rows, inner, columns, times] of an image's forward pass, and
        their multiply_adds; forward_bytes and backward_bytes, which the passes move in memory for
        an image; kept_bytes, what is kept of it for the backward pass, and kept_bytes_recompute,
        the same with TRAIN.RECOMPUTE.
    """
    common.import_paddle()
    from tools.benchmark.mixed import image_bytes, total
    from tools.model_table import count_multiply_adds, count_parameters, matrix_products
    from training.run import build_model

    model = build_model(config)  # ConfigError where the sizes make none
    sizes = model.sizes
    products = matrix_products(model, sizes.image_size)
    _, one_block, whole = image_bytes(sizes, amp)
    block_inputs = 4 * sizes.depth * sizes.num_tokens * sizes.dim
    return {
        "parameters": count_parameters(model),
        "products": [[*shape, times] for shape, times in products.items()],
        "multiply_adds": count_multiply_adds(model, sizes.image_size),
        **{f"{kind}_bytes": total(whole, kind) for kind in ("forward", "backward", "kept")},
        "kept_bytes_recompute": total(one_block, "kept") + block_inputs,
    }


def traffic_bytes(model, images, recompute=False):
    """Bytes that an optimizer step of `images` images moves in a device's memory."""
    passes = model["forward_bytes"] * (2 if recompute else 1) + model["backward_bytes"]
    return images * passes + OPTIMIZER_TRAFFIC * model["parameters"]


def exchange_seconds(num_bytes, devices, device):
    """A ring all-reduce within each host, then one between hosts."""
    local = min(devices, device.in_host)
    hosts = math.ceil(devices / device.in_host)
    seconds = 2 * (local - 1) / local * num_bytes / (device.link * 1e9)
    return seconds + 2 * (hosts - 1) / hosts * num_bytes / (device.network * 1e9)


def step_seconds(model, device, devices, images, recompute=False):
    """Seconds of an optimizer step by what takes them, one after the other.

    Args:
        model: facts().
        images: of each device in a step.
    """
    # The backward pass has two products for each of the forward pass's; recomputation repeats that.
    flops = images * (4 if recompute else 3) * 2 * model["multiply_adds"]
    bandwidth = BANDWIDTH_SHARE * device.bandwidth * 1e9
    return {
        "matrix products": flops / (device.peak * 1e12),
        "memory traffic": traffic_bytes(model, images, recompute) / bandwidth,
        "links": exchange_seconds(4 * model["parameters"], devices, device),
    }


def with_bandwidth(device, model, devices, images, seconds):
    """The device with the bandwidth by which a step that took `seconds` fits step_seconds."""
    parts = step_seconds(model, device._replace(bandwidth=1), devices, images)
    rest = seconds - parts["matrix products"] - parts["links"]
    # Where those alone took longer than the step, noise is all there is to divide by.
    return device._replace(bandwidth=parts["memory traffic"] / max(rest, 0.05 * seconds))


def memory_bytes(model, batch_size, recompute=False, ema=False):
    """Bytes that training takes on a device: weights, gradients, moments, what passes keep."""
    kept = model["kept_bytes_recompute" if recompute else "kept_bytes"]
    state = model["parameters"] * (STATE_BYTES + (4 if ema else 0))
    return state + batch_size * kept


def plan(model, config, device, devices, loader_rate, epoch_images):
    """What `devices` devices make of a config's recipe; docs/performance.md tells of the columns.

    The images of an optimizer step stay the recipe's, as nearly as whole batches allow; its batch
    size is the most that a device takes at a time.

    Args:
        model: facts().
        loader_rate: images/s that a core decodes and augments; a device has its share of its
            host's cores.
    """
    recipe = config.TRAIN
    total = recipe.LINEAR_SCALED_LR or config.DATA.BATCH_SIZE
    accum_iter = math.ceil(total / (devices * config.DATA.BATCH_SIZE))
    batch_size = max(1, round(total / (devices * accum_iter)))
    images_per_step = devices * batch_size * accum_iter
    seconds = step_seconds(model, device, devices, batch_size * accum_iter, recipe.RECOMPUTE)
    possible = images_per_step / sum(seconds.values())
    loaded = devices * device.cores / device.in_host * loader_rate
    rate = min(possible, loaded)
    return {
        "devices": devices,
        "batch_size": batch_size,
        "accum_iter": accum_iter,
        "images_per_step": images_per_step,
        "images_per_second": rate,
        "hours": recipe.NUM_EPOCHS * epoch_images / rate / 3600,
        "memory": memory_bytes(model, batch_size, recipe.RECOMPUTE, recipe.MODEL_EMA) / 1e9,
        "cores": possible / devices / loader_rate,
        "bottleneck": "loader" if loaded < possible else max(seconds, key=seconds.get),
        "seconds": seconds,
    }


def run(bench):
    args, config = bench.args, bench.config
    config.DATA.BATCH_SIZE = args.batch_size or config.DATA.BATCH_SIZE
    config.TRAIN.LINEAR_SCALED_LR = args.total_batch or config.TRAIN.LINEAR_SCALED_LR
    config.TRAIN.RECOMPUTE = args.recompute or config.TRAIN.RECOMPUTE
    given = {name: value for name, value in vars(args).items() if name in Device._fields and value}
    device = DEVICES[args.device]._replace(**given)
    amp = recipe_amp(config, device)
    model, rate = facts(config, amp), args.loader_rate or measured_loader_rate(bench)
    plans = [plan(model, config, device, n, rate, args.epoch_images) for n in args.devices]
    moved = model["forward_bytes"] + model["backward_bytes"]
    name = config.MODEL.NAME
    print(f"{name}: {model['parameters']:,} parameters; a core loads {rate:.0f} images/s")
    print(
        f"an image in {amp.dtype}, LayerNorm in {amp.dtype if amp.layer_norm else 'float32'}: "
        f"{model['multiply_adds']:,} multiply-adds, {moved / 1e6:.0f} MB moved, "
        f"{model['kept_bytes'] / 1e6:.0f} MB kept"
    )
    cells = [
        {
            "devices": str(one["devices"]),
            "batch x accum": f"{one['batch_size']} x {one['accum_iter']}",
            "images/step": f"{one['images_per_step']:,}",
            "images/s": f"{one['images_per_second']:,.0f}",
            "hours": f"{one['hours']:,.1f}",
            "GB": f"{one['memory']:.1f}" + (" (too much)" * (one["memory"] > device.memory)),
            "cores": f"{one['cores']:.1f}",
            "bottleneck": one["bottleneck"],
        }
        for one in plans
    ]
    bench.show(f"{config.TRAIN.NUM_EPOCHS} epochs on {args.device}", plans, cells)


def recipe_amp(config, device):
    """The mixed precision in which a device trains with `-amp`."""
    common.import_paddle()
    from training.run import amp_of

    dtype = device.amp_dtype if config.AMP_DTYPE == "auto" else config.AMP_DTYPE
    return amp_of(config, dtype)


def measured_loader_rate(bench):
    """Images/s that one core decodes and augments with the recipe's own transform."""
    bench.job["paths"] = prepare_images(bench.args, bench.folder)
    row = bench.ours("", "decode", threads=1, train=True)
    (answers,) = bench.take_turns("decoding", [row])
    return statistics.median(answer["images"] / answer["seconds"] for answer in answers)


def check(bench):
    """Predicts training steps of this CPU, one thread a rank, and measures them.

    What goes in: the rate of matrix products and a training step of Ti/16, which tells the
    bandwidth of memory, both alone and beside another rank, and the all-reduce's rate.
    """
    small = get_config(SMALL)
    model, small_model = facts(bench.config), facts(small)
    batch_size = bench.args.batch_size or 4
    bench.job["paths"] = prepare_images(bench.args, bench.folder, batch_size)
    bench.job.update(batch_size=batch_size, batches=5, train=True, products=model["products"])
    rows = {("exchange", 2): bench.ours("", "exchange", 1, 2, numbers=model["parameters"])}
    for ranks in (1, 2):
        rows["products", ranks] = bench.ours("", "products", 1, ranks)
        rows["small", ranks] = bench.ours("", "train", 1, ranks, cfg=SMALL)
        rows["step", ranks] = bench.ours("", "train", 1, ranks)
    answers = bench.take_turns("predictions and steps", list(rows.values()))
    seconds = {
        key: statistics.median(answer["seconds"] for answer in of_row)
        for key, of_row in zip(rows, answers)
    }
    link = 4 * model["parameters"] / seconds["exchange", 2] / 1e9
    results, devices = [], []
    for ranks in (1, 2):
        peak = 6 * batch_size * model["multiply_adds"] / seconds["products", ranks] / 1e12
        device = Device(peak, 0, 1, link, in_host=2, network=1, cores=2)
        device = with_bandwidth(device, small_model, ranks, batch_size, seconds["small", ranks])
        parts = step_seconds(model, device, ranks, batch_size)
        predicted = ranks * batch_size / sum(parts.values())
        measured = ranks * batch_size / seconds["step", ranks]
        result = {"ranks": ranks, "predicted": predicted, "measured": measured}
        results.append({**result, "error": predicted / measured - 1, **parts})
        devices.append(device)
    cells = [
        {
            "ranks": str(result["ranks"]),
            "predicted images/s": f"{result['predicted']:.2f}",
            "measured": f"{result['measured']:.2f}",
            "error": f"{100 * result['error']:+.0f}%",
        }
        for result in results
    ]
    name = bench.config.MODEL.NAME
    title = f"training {name} on this CPU, one thread a rank, batches of {batch_size}"
    bench.show(title, results, cells)
    alone, beside = devices
    moved = [BANDWIDTH_SHARE * device.bandwidth for device in devices]
    print(
        f"from, alone (beside another rank): {1000 * alone.peak:.0f} ({1000 * beside.peak:.0f}) "
        f"GFLOP/s, {moved[0]:.1f} ({moved[1]:.1f}) GB/s by {small.MODEL.NAME}, "
        f"all-reduce {link:.2f} GB/s"
    )
