"""This repository's side: what its workers do.  Imported once Paddle is (worker.py)."""

import contextlib
import itertools
import logging
import multiprocessing
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import PIL
from PIL import Image

from config import get_config
from datasets import EvalSampler, ImageDataset, ImageList, TrainSampler, build_dataset
from ranks import host
from ranks.loader import build_loader
from tools.benchmark import worker
from training.evaluate import validate
from training.inference import CompiledModel
from training.run import build_model
from training.train import Training
from transforms import BatchTransform

VERSIONS = {"paddle": paddle.__version__, "numpy": np.__version__, "pillow": PIL.__version__}


def _config(job):
    """The job's configuration: its file, its list of images, its changes [key, value, ...]."""
    config = get_config(job.cfg)
    config.merge_from_list(["DATA.DATA_PATH", job.folder, *job.changes])
    return config


def decode(job):
    """Reading, decoding and transforming the images, in this process."""
    host.keep_freed_memory()  # as a run does
    dataset = build_dataset(_config(job), job.train)
    epochs = itertools.count(1)  # each with other draws

    def work():
        epoch = next(epochs)
        for index in range(len(job.paths)):
            dataset[epoch, index]

    return work, len(job.paths)


def decode_alone(job):
    """The limit: Pillow's JPEG decoder."""

    def work():
        for path in job.paths:
            with Image.open(path) as image:
                image.convert("RGB")

    return work, len(job.paths)


def loader(job):
    """The run's own loader and batch transform: batches on the device, normalized.

    Each repetition has new workers, and is timed from the batch `lead` on: their start and the
    batches that they have ready do not count, and none of them works while others are measured.
    """
    host.keep_freed_memory()  # as a run does
    config = _config(job)
    dataset = build_dataset(config, job.train)
    transform = BatchTransform(config, job.train)
    images, size = (job.lead + job.batches) * job.batch_size, config.DATA.IMAGE_SIZE

    def work():
        if job.train:
            sampler = TrainSampler(images, job.batch_size, 0, 1, 0, 1)
        else:
            sampler = EvalSampler(images, job.batch_size, 0, 1)
        with contextlib.closing(build_loader(dataset, sampler, job.num_workers, size)) as batches:
            for number, (pixels, labels) in enumerate(batches, 1):
                transform(pixels, labels, np.random.default_rng(0))
                if number == job.lead:
                    start = time.perf_counter()
            return {"seconds": time.perf_counter() - start}

    return work, job.batches * job.batch_size


def _batch(config, batch_size):
    """A batch as the loader gives it, of the first images of the list."""
    dataset = build_dataset(config, train=False)
    pixels, labels = zip(*(dataset[0, index] for index in range(batch_size)))
    return paddle.to_tensor(np.stack(pixels)), paddle.to_tensor(labels)


def evaluate(job):
    """What `-eval` spends its time in, on batches that are in memory.

    The job's `kind` is as CPU_INFERENCE: "layers", or what Paddle Inference computes in.
    """
    host.keep_freed_memory()  # as a run does
    config = _config(job)
    model, size = build_model(config), config.DATA.IMAGE_SIZE
    if job.kind != "layers":
        model = CompiledModel(model, [3, size, size], job.kind)
    transform = BatchTransform(config, train=False)
    batch = [_batch(config, job.batch_size)]

    def step(number):
        validate(model, batch, transform, contextlib.nullcontext)

    return worker.in_a_row(job, step)


def train(job):
    """Whole training steps of this rank, and of the others at the same time."""
    if job.keep_freed and not job.recompute:  # as a run does
        host.keep_freed_memory()
    config = _config(job)
    config.DATA.BATCH_SIZE, config.TRAIN.RECOMPUTE = job.batch_size, job.recompute
    config.TRAIN.ACCUM_ITER, config.TRAIN.MODEL_EMA = 1, False
    rank, ranks = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    steps = job.lead + job.batches
    data = range(steps * job.batch_size * ranks)  # asked for its length alone
    run = SimpleNamespace(
        config=config, model=build_model(config), rank=rank, world_size=ranks, train_data=data,
        val_data=data, on_gpu=False, amp=False, autocast=contextlib.nullcontext,
        log=logging.Logger("none", logging.CRITICAL), start=SimpleNamespace(path=None),
    )  # fmt: skip
    training = Training(run)
    pixels, labels = _batch(config, job.batch_size)

    work, images = worker.in_a_row(
        job, lambda batch: training.train_batch(pixels, labels, 1, batch)
    )
    return work, images * ranks


def products(job):
    """The limit: the model's matrix products alone."""
    return worker.products(job, lambda *shape: paddle.randn(shape))


def exchange(job):
    """An all-reduce of as many numbers as the job says."""
    gradients = paddle.zeros([job.numbers])

    work, _ = worker.in_a_row(job, lambda number: paddle.distributed.all_reduce(gradients))
    return work, None


def image_list(job):
    """What reading a list takes and adds, and what an epoch of it adds to each loader worker.

    All of the loader is real but the images: a grey one of a pixel stands for each, as decoding
    would take hours.
    """

    class Grey(ImageDataset):
        def read(self, index):
            self.images.image_path(index)
            return Image.new("RGB", (1, 1))

    def work():
        before, start = _own_memory("self"), time.perf_counter()
        images = ImageList(job.folder, job.list, 1000)
        seconds, added = time.perf_counter() - start, _own_memory("self") - before
        grey = Grey(images, lambda image, rng: np.asarray(image), 0)
        sampler = TrainSampler(len(images), job.batch_size, 0, 1, 0, 1)
        lead = 4 * job.num_workers
        times, own = (lead, len(sampler) // 2, len(sampler) - lead), []
        with contextlib.closing(build_loader(grey, sampler, job.num_workers, 1)) as batches:
            for batch, _ in enumerate(batches, 1):
                if batch in times:
                    children = multiprocessing.active_children()
                    own.append({child.pid: _own_memory(child.pid) for child in children})
        *earlier, last = own
        growth, late_growth = (max(last[pid] - then[pid] for pid in then) for then in earlier)
        return {"seconds": seconds, "added": added, "growth": growth, "late_growth": late_growth}

    return work, None


def _own_memory(pid):
    """A process's bytes that it shares with no other one (Linux)."""
    kilobytes = re.findall(r"Private_\w+: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return 1024 * sum(map(int, kilobytes))
