"""timm's side of benchmark.py: a worker for another interpreter, with torch, timm and Pillow alone.

python tools/benchmark_peer.py THREADS      (benchmark.py starts it, with -peer PYTHON)
"""

import functools
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P


from tools.benchmark import worker

AUGMENT = "rand-m9-mstd0.5-inc1"


def import_timm():
    """timm; torchvision, which it imports, refuses a CPU's torch that lacks two operators."""
    import torch

    # Declared only; kept, as they go with this object.
    import_timm.library = torch.library.Library("torchvision", "FRAGMENT")
    for signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            import_timm.library.define(signature)
        except RuntimeError:  # this wheel has them
            break
    import timm
    import timm.data
    import timm.loss
    from PIL import ImageOps

    if not hasattr(import_timm, "posterize"):  # its RandAugment asks for 0 bits, Pillow 13 refuses
        import_timm.posterize = ImageOps.posterize
        ImageOps.posterize = lambda image, bits: import_timm.posterize(image, max(1, bits))
    return timm


def versions():
    import PIL
    import torch

    timm = import_timm()
    facts = {"python": sys.version.split()[0], "torch": torch.__version__}
    return None, {**facts, "timm": timm.__version__, "pillow": PIL.__version__}


class _Files:
    """A timm reader of a list of files."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return open(self.paths[index], "rb"), 0


def _options(images, train):
    """timm's options for images as the configuration has them (benchmark_turns.Bench.images)."""
    options = {"mean": images["mean"], "std": images["std"], "interpolation": "bicubic"}
    if train:
        return {**options, "is_training": True, "auto_augment": AUGMENT, "color_jitter": None}
    return {**options, "crop_pct": images["crop_pct"]}


def decode(paths, images, train, as_float):
    """Decoding and timm's transform; its pixels stay uint8 as under its prefetcher, or not."""
    timm = import_timm()
    transform = timm.data.create_transform(
        images["size"], use_prefetcher=not as_float, **_options(images, train)
    )
    dataset = timm.data.ImageDataset("", _Files(paths), transform=transform)

    def run():
        start = time.perf_counter()
        for index in range(len(paths)):
            dataset[index]
        return {"seconds": time.perf_counter() - start, "images": len(paths)}

    return run, {}


def loader(paths, images, train, batch_size, workers, lead, batches):
    """timm's loader with its prefetcher: batches on the device, normalized."""
    import torch

    timm = import_timm()
    needed = itertools.islice(itertools.cycle(paths), (lead + batches) * batch_size)
    dataset = timm.data.ImageDataset("", _Files(list(needed)))
    batches_of = functools.partial(
        timm.data.create_loader, dataset, (3, images["size"], images["size"]), batch_size,
        num_workers=workers, device=torch.device("cpu"), persistent_workers=False,
        **_options(images, train),
    )  # fmt: skip

    def run():
        start = None
        for number, _ in enumerate(batches_of(), 1):
            if number == lead - 1:  # its prefetcher gives a batch when the next one has come
                start = time.perf_counter()
        return {"seconds": time.perf_counter() - start, "images": batches * batch_size}

    return run, {}


def _model(name, image_size, num_classes, **options):
    model = import_timm().create_model(name, num_classes=num_classes, **options)
    if model.stem.img_size != (image_size, image_size):
        raise ValueError(f"timm's {name} takes images of {model.stem.img_size} pixels")
    return model


def _batch(paths, images):
    """A function that normalizes a batch as timm's prefetcher does, and labels."""
    import torch

    transform = import_timm().data.create_transform(
        images["size"], use_prefetcher=True, **_options(images, train=False)
    )
    dataset = import_timm().data.ImageDataset("", _Files(paths), transform=transform)
    pixels = torch.stack([torch.as_tensor(dataset[index][0]) for index in range(len(paths))])
    mean, std = (255 * torch.tensor(images[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return lambda: pixels.to(torch.float32).sub_(mean).div_(std), torch.arange(len(paths))


def evaluate(model, images, num_classes, paths, batches, dtype, compiled):
    """Normalization, the model, its loss and top-5 counts on batches that are in memory."""
    import torch
    from torch.nn import functional as F

    precision = getattr(torch, dtype)
    model = _model(model, images["size"], num_classes).to(precision).eval()
    if compiled:
        model = torch.compile(model)
    normalized, labels = _batch(paths, images)

    @torch.inference_mode()
    def run():
        start = time.perf_counter()
        for _ in range(batches):
            logits = model(normalized().to(precision)).float()
            F.cross_entropy(logits, labels, reduction="sum").item()
            (logits.topk(5).indices == labels[:, None]).sum(0).tolist()
        return {"seconds": time.perf_counter() - start, "images": batches * len(paths)}

    run()  # torch.compile works at the first call
    return run, {}


def train(model, images, num_classes, paths, steps, recipe, checkpointing):
    """Whole training steps: normalization, mixup or cutmix, model, AdamW with clipping.

    Args:
        recipe: see benchmark_turns.Bench.recipe.
    """
    import torch

    timm = import_timm()
    model = _model(model, images["size"], num_classes, drop_path_rate=recipe["drop_path"]).train()
    model.set_grad_checkpointing(checkpointing)
    decayed = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim <= 1]
    update = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        **recipe["adamw"],
    )  # fmt: skip
    mixup = timm.data.Mixup(**recipe["mixup"], num_classes=num_classes)
    criterion = timm.loss.SoftTargetCrossEntropy()
    normalized, labels = _batch(paths, images)

    def run():
        start = time.perf_counter()
        for _ in range(steps):
            mixed, targets = mixup(normalized(), labels)
            loss = criterion(model(mixed), targets)
            loss.backward()
            if recipe["grad_clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["grad_clip"])
            update.step()
            update.zero_grad()
            loss.item()
        return {"seconds": time.perf_counter() - start, "images": steps * len(paths)}

    return run, {}


def products(shapes, images, repeats, dtype):
    """The limit: matrix products of these shapes [rows, inner, columns, times], nothing else."""
    import torch

    kind = getattr(torch, dtype)
    pairs = [
        (torch.randn(m, k).to(kind), torch.randn(k, n).to(kind), times) for m, k, n, times in shapes
    ]

    @torch.inference_mode()
    def run():
        start = time.perf_counter()
        for _ in range(repeats):
            for a, b, times in pairs:
                for _ in range(times):
                    a @ b
        return {"seconds": time.perf_counter() - start, "images": images * repeats}

    return run, {}


def step_memory(**options):
    """The memory that a first training step adds, in bytes."""
    run, _ = train(steps=1, **options)
    return worker.added_memory(run)


CASES = {
    "versions": versions,
    "decode": decode,
    "loader": loader,
    "evaluate": evaluate,
    "train": train,
    "products": products,
    "step_memory": step_memory,
}

if __name__ == "__main__":
    try:
        import torch

        torch.set_num_threads(int(sys.argv[1]))
        import_timm()
    except ImportError as error:
        sys.exit(f"the peer's Python needs torch, torchvision, timm and pillow: {error}")
    worker.serve(CASES)
