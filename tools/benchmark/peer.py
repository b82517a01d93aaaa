"""timm's side, for another interpreter: what its workers do, with torch, timm and Pillow alone."""

import contextlib
import itertools
import time

import PIL
import torch
from PIL import ImageOps
from torch.nn import functional as F

from ranks import host
from tools.benchmark import worker

# torchvision, which timm imports, refuses a CPU's torch that lacks two operators.  They are only
# declared, for as long as this object lives.
_library = torch.library.Library("torchvision", "FRAGMENT")
with contextlib.suppress(RuntimeError):  # this wheel has them
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm.data  # noqa: E402
import timm.loss  # noqa: E402
import timm.optim  # noqa: E402

# timm's RandAugment asks for 0 bits, which Pillow 13 refuses.
_posterize = ImageOps.posterize
ImageOps.posterize = lambda image, bits: _posterize(image, max(1, bits))

AUGMENT = "rand-m9-mstd0.5-inc1"
VERSIONS = {"torch": torch.__version__, "timm": timm.__version__, "pillow": PIL.__version__}


class _Files(list):
    """Paths as a reader of timm's, which gives files and labels."""

    def __getitem__(self, index):
        return open(super().__getitem__(index), "rb"), 0


def _dataset(job, count, transform=None):
    """`count` images, those of the job in turn."""
    files = _Files(itertools.islice(itertools.cycle(job.paths), count))
    return timm.data.ImageDataset("", files, transform=transform)


def _options(job, train):
    """timm's options for the config's images."""
    data = job.config.DATA
    options = {"mean": data.IMAGENET_MEAN, "std": data.IMAGENET_STD, "interpolation": "bicubic"}
    if train:
        return {**options, "is_training": True, "auto_augment": AUGMENT, "color_jitter": None}
    return {**options, "crop_pct": data.CROP_PCT}


def _transform(job, train, as_float=False):
    """timm's transform, whose pixels stay uint8 as under its prefetcher, or not."""
    return timm.data.create_transform(
        job.config.DATA.IMAGE_SIZE, use_prefetcher=not as_float, **_options(job, train)
    )


def decode(job):
    """Reading, decoding and timm's transform."""
    transform = _transform(job, job.train, job.as_float)
    dataset = _dataset(job, len(job.paths), transform)

    def work():
        for index in range(len(dataset)):
            dataset[index]

    return work, len(dataset)


def loader(job):
    """timm's loader with its prefetcher: batches on the device, normalized."""
    size = job.config.DATA.IMAGE_SIZE
    dataset = _dataset(job, (job.lead + job.batches) * job.batch_size)

    def work():
        batches = timm.data.create_loader(
            dataset, (3, size, size), job.batch_size, num_workers=job.num_workers,
            device=torch.device("cpu"), persistent_workers=False, **_options(job, job.train),
        )  # fmt: skip
        for number, _ in enumerate(batches, 1):
            if number == job.lead - 1:  # its prefetcher gives a batch when the next one has come
                start = time.perf_counter()
        return {"seconds": time.perf_counter() - start}

    return work, job.batches * job.batch_size


def _model(job, **options):
    name, size = job.config.MODEL.NAME, job.config.DATA.IMAGE_SIZE
    model = timm.create_model(name, num_classes=job.config.MODEL.NUM_CLASSES, **options)
    if model.stem.img_size != (size, size):
        raise ValueError(f"timm's {name} takes images of {model.stem.img_size} pixels")
    return model


def _batch(job):
    """A function that normalizes a batch as timm's prefetcher does, and labels."""
    dataset, data = _dataset(job, job.batch_size, _transform(job, train=False)), job.config.DATA
    pixels = torch.stack([torch.as_tensor(dataset[index][0]) for index in range(len(dataset))])
    mean = 255 * torch.tensor(data.IMAGENET_MEAN).view(-1, 1, 1)
    std = 255 * torch.tensor(data.IMAGENET_STD).view(-1, 1, 1)
    return lambda: pixels.to(torch.float32).sub_(mean).div_(std), torch.arange(len(dataset))


def evaluate(job):
    """Normalization, the model, its loss and top-5 counts on batches that are in memory."""
    dtype, _, compiled = job.mode.partition("-")
    precision = getattr(torch, dtype)
    model = _model(job).to(precision).eval()
    if compiled:
        model = torch.compile(model)
    normalized, labels = _batch(job)

    @torch.inference_mode()
    def step(number):
        logits = model(normalized().to(precision)).float()
        F.cross_entropy(logits, labels, reduction="sum").item()
        (logits.topk(5).indices == labels[:, None]).sum(0).tolist()

    step(0)  # torch.compile works at the first call
    return worker.in_a_row(job, step)


def train(job):
    """Whole training steps by the config's recipe: mixup or cutmix, AdamW with clipping."""
    if job.keep_freed:
        host.keep_freed_memory()
    recipe, optimizer = job.config.TRAIN, job.config.TRAIN.OPTIMIZER
    model = _model(job, drop_path_rate=job.config.MODEL.DROPPATH).train()
    model.set_grad_checkpointing(job.recompute)
    groups = timm.optim.param_groups_weight_decay(model, recipe.WEIGHT_DECAY)
    update = torch.optim.AdamW(groups, lr=1e-5, betas=optimizer.BETAS, eps=optimizer.EPS)
    mixup = timm.data.Mixup(
        recipe.MIXUP_ALPHA, recipe.CUTMIX_ALPHA, prob=recipe.MIXUP_PROB,
        switch_prob=recipe.MIXUP_SWITCH_PROB, label_smoothing=recipe.SMOOTHING,
        num_classes=job.config.MODEL.NUM_CLASSES,
    )  # fmt: skip
    criterion = timm.loss.SoftTargetCrossEntropy()
    normalized, labels = _batch(job)

    def step(number):
        images, targets = mixup(normalized(), labels)
        loss = criterion(model(images), targets)
        loss.backward()
        if recipe.GRAD_CLIP:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.GRAD_CLIP)
        update.step()
        update.zero_grad()
        loss.item()

    return worker.in_a_row(job, step)


def products(job):
    """The limit: the model's matrix products alone."""
    kind = getattr(torch, job.dtype)
    work, images = worker.products(job, lambda *shape: torch.randn(shape).to(kind))
    return torch.inference_mode()(work), images
