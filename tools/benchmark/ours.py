"""This repository's side of benchmark.py: a worker, or one rank of several that work together.

python tools/benchmark_ours.py RANKS      (benchmark.py starts it)
"""

import contextlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P

from config import get_config
from ranks import host, launch
from tools import common
from tools.benchmark.worker import added_memory, serve

# Paddle comes with common.import_paddle(), once the number of ranks is known.


def versions():
    import numpy
    import paddle
    import PIL

    facts = {"python": sys.version.split()[0], "paddle": paddle.__version__}
    return None, {**facts, "numpy": numpy.__version__, "pillow": PIL.__version__}


def _config(cfg, **changes):
    """The configuration of a file with other values, such as TRAIN__RECOMPUTE=True."""
    config = get_config(cfg)
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[name] = value
    return config


def _augmented(cfg, folder):
    """RandAugment alone, as timm's rand-m9: what differs from that is drawn on the device."""
    return _config(
        cfg, DATA__DATA_PATH=folder, TRAIN__RAND_AUGMENT=True, TRAIN__AUTO_AUGMENT=False,
        TRAIN__MIXUP_PROB=0.0, TRAIN__RANDOM_ERASE_PROB=0.0,
    )  # fmt: skip


def decode(cfg, folder, images, train, recipe=False):
    """Reading, decoding and transforming images of the list, in this process.

    Args:
        recipe: augment as the configuration says, not as timm is measured.
    """
    from datasets import build_dataset

    host.keep_freed_memory()  # as a run does
    config = _config(cfg, DATA__DATA_PATH=folder) if recipe else _augmented(cfg, folder)
    dataset = build_dataset(config, train)
    epochs = iter(range(1, sys.maxsize))  # each with other draws

    def run():
        epoch = next(epochs)
        start = time.perf_counter()
        for index in range(images):
            dataset[epoch, index]
        return {"seconds": time.perf_counter() - start, "images": images}

    return run, {}


def decode_alone(paths):
    """The limit: Pillow's JPEG decoder."""
    from PIL import Image

    def run():
        start = time.perf_counter()
        for path in paths:
            with Image.open(path) as image:
                image.convert("RGB")
        return {"seconds": time.perf_counter() - start, "images": len(paths)}

    return run, {}


def loader(cfg, folder, train, batch_size, workers, lead, batches):
    """The run's own loader and batch transform: batches on the device, normalized.

    Each repetition has new workers, and is timed from the batch `lead` on: their start and the
    batches that they have ready do not count, and none of them works while others are measured.
    """
    import numpy as np

    from datasets import EvalSampler, TrainSampler, build_dataset, build_loader
    from transforms import BatchTransform

    host.keep_freed_memory()  # as a run does
    config = _augmented(cfg, folder)
    dataset = build_dataset(config, train)
    transform = BatchTransform(config, train)
    images = (lead + batches) * batch_size

    def run():
        if train:
            sampler = TrainSampler(images, batch_size, 0, 1, 0, 1)
        else:
            sampler = EvalSampler(images, batch_size, 0, 1)
        with contextlib.closing(build_loader(dataset, sampler, workers)) as loader:
            for number, (pixels, labels) in enumerate(loader, 1):
                transform(pixels, labels, np.random.default_rng(0))
                if number == lead:
                    start = time.perf_counter()
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "images": batches * batch_size}

    return run, {}


def _batch(config, batch_size):
    """A batch as the loader gives it, of the first images of the list."""
    import numpy as np
    import paddle

    from datasets import build_dataset

    dataset = build_dataset(config, train=False)
    pixels, labels = zip(*(dataset[0, index] for index in range(batch_size)))
    return paddle.to_tensor(np.stack(pixels)), paddle.to_tensor(labels)


def evaluate(cfg, folder, batch_size, batches, kind):
    """engine.validate, what `-eval` spends its time in, on batches that are in memory.

    Args:
        kind: as CPU_INFERENCE: "layers", or what Paddle Inference computes in.
    """
    from training import engine
    from training.inference import CompiledModel
    from training.run import build_model
    from transforms import BatchTransform

    host.keep_freed_memory()  # as a run does
    config = _config(cfg, DATA__DATA_PATH=folder)
    model, size = build_model(config), config.DATA.IMAGE_SIZE
    if kind != "layers":
        model = CompiledModel(model, [3, size, size], kind)
    transform = BatchTransform(config, train=False)
    batch = _batch(config, batch_size)

    def run():
        start = time.perf_counter()
        engine.validate(model, [batch] * batches, transform, contextlib.nullcontext)
        return {"seconds": time.perf_counter() - start, "images": batches * batch_size}

    return run, {}


def _training(config):
    """The parts of engine.train_one_epoch, as trainer.py puts them together, without a data set."""
    import paddle

    from training import engine, optim
    from training.run import build_model
    from transforms import BatchTransform

    model, no_sync = build_model(config), contextlib.nullcontext
    schedule = optim.build_schedule(lambda step: 1e-5)
    optimizer = optim.build_optimizer(config, model, schedule)
    scaler = optim.build_scaler(False, "float16")
    updater = optim.Updater(optimizer, schedule, scaler, optim.NoEMA(model))
    if paddle.distributed.is_initialized():
        model = paddle.DataParallel(model)
        no_sync = model.no_sync
    return engine.Training(
        model=model,
        updater=updater,
        batch_transform=BatchTransform(config, train=True),
        autocast=contextlib.nullcontext,
        no_sync=no_sync,
        accum_iter=1,
        seed=0,
        rank=paddle.distributed.get_rank(),
        report_freq=sys.maxsize,
        report=lambda *report: None,
        after_step=lambda *step: None,
    )


def train(cfg, folder, batch_size, steps, recompute=False, keep_freed=True):
    """Whole training steps of this rank, and of the others at the same time."""
    import paddle

    from training import engine

    if keep_freed:
        host.keep_freed_memory()
    config = _config(cfg, DATA__DATA_PATH=folder, TRAIN__RECOMPUTE=recompute)
    training = _training(config)
    batch = _batch(config, batch_size)

    def run():
        start = time.perf_counter()
        engine.train_one_epoch(training, [batch] * steps, 1, steps)
        seconds = time.perf_counter() - start
        ranks = paddle.distributed.get_world_size()
        return {"seconds": seconds, "images": steps * batch_size * ranks}

    return run, {}


def products(cfg, batch_size, repeats, train):
    """The limit: the model's matrix products on random numbers, and nothing else.

    Facts: their shapes as [rows, inner, columns, times].
    """
    import collections

    import paddle

    shapes = collections.Counter(_product_shapes(_config(cfg), batch_size))
    if train:  # each has the gradients of both its factors
        for (m, k, n), times in list(shapes.items()):
            shapes[m, n, k] += times
            shapes[k, m, n] += times
    shapes = [[*shape, times] for shape, times in shapes.items()]
    pairs = [(paddle.randn([m, k]), paddle.randn([k, n]), times) for m, k, n, times in shapes]
    flops = 2 * repeats * sum(m * k * n * times for m, k, n, times in shapes)

    def run():
        start = time.perf_counter()
        for _ in range(repeats):
            for a, b, times in pairs:
                for _ in range(times):
                    paddle.matmul(a, b)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "images": batch_size * repeats, "flops": flops}

    return run, {"shapes": shapes}


def _product_shapes(config, batch_size):
    """(rows, inner, columns) of each matrix product of a forward pass."""
    import paddle

    from gmlp import build_gmlp

    shapes = []

    def record(layer, inputs, output):
        if isinstance(layer, paddle.nn.Linear):
            inner, columns = layer.weight.shape
        else:  # a convolution whose patches do not overlap
            columns, inner = layer.weight.shape[0], int(layer.weight[0].size)
        outputs = output if isinstance(output, tuple) else [output]
        size = sum(int(part.size) for part in outputs)
        shapes.append((batch_size * size // columns, inner, columns))

    model = build_gmlp(config)
    model.eval()
    for layer in model.sublayers():
        if isinstance(layer, (paddle.nn.Linear, paddle.nn.Conv2D)):
            layer.register_forward_post_hook(record)
    with paddle.no_grad():
        model(paddle.zeros([1, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE]))
    return shapes


def exchange(cfg):
    """An all-reduce of as many bytes as the model has gradients."""
    import paddle

    from training.run import build_model

    size = sum(int(param.size) for param in build_model(_config(cfg)).parameters())
    gradients = paddle.zeros([size])

    def run():
        start = time.perf_counter()
        paddle.distributed.all_reduce(gradients)
        return {"seconds": time.perf_counter() - start, "bytes": 4 * size}

    return run, {}


def facts(cfg):
    """What benchmark_plan.py needs to know of a model and its recipe."""
    from gmlp import build_gmlp
    from tools.model_table import count_multiply_adds, count_parameters

    config = _config(cfg, MODEL__DROPPATH=0.0)
    depth, size = config.MODEL.MIXER.DEPTH, config.DATA.IMAGE_SIZE
    model = build_gmlp(config)
    tokens = model.patch_embed.num_tokens
    # Outside of the blocks, and in one of them: all of them are alike.
    one, two = (_kept_bytes(_config(cfg, MODEL__MIXER__DEPTH=blocks)) for blocks in (1, 2))
    outside, block = 2 * one - two, two - one
    block_input = 4 * tokens * config.MODEL.MIXER.EMBED_DIM
    train = config.TRAIN
    return None, {
        "name": config.MODEL.NAME,
        "parameters": count_parameters(model),
        "multiply_adds": count_multiply_adds(model, size),
        "kept_bytes": outside + depth * block,
        "kept_bytes_recompute": outside + depth * block_input + block,
        "batch_size": config.DATA.BATCH_SIZE,
        "total_batch": int(train.LINEAR_SCALED_LR or config.DATA.BATCH_SIZE),
        "epochs": train.NUM_EPOCHS,
        "recompute": train.RECOMPUTE,
        "ema": train.MODEL_EMA,
    }


def _kept_bytes(config):
    """What a forward pass in training keeps of an image for the backward pass, in float32."""
    import paddle

    from gmlp import build_gmlp

    model = build_gmlp(config)
    model.train()
    size = config.DATA.IMAGE_SIZE

    def kept(batch_size):
        tensors = {}  # the objects too, so that no memory is used twice

        def keep(tensor):
            tensors[tensor.data_ptr()] = tensor
            return tensor

        with paddle.autograd.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(paddle.zeros([batch_size, 3, size, size]))
        return sum(int(tensor.size) * tensor.element_size() for tensor in tensors.values())

    return kept(2) - kept(1)  # so that weights do not count


def step_memory(cfg, folder, batch_size, recompute, keep_freed):
    """The memory that a first training step adds, in bytes."""
    run, _ = train(cfg, folder, batch_size, 1, recompute, keep_freed)
    return added_memory(run)


def image_list(folder, name):
    """Reading a list file: seconds, and the bytes that this process has more of its own."""
    from datasets import ImageList

    kept = []  # the list, until its memory has been read

    def run():
        before, start = _own_memory("self"), time.perf_counter()
        kept.append(ImageList(folder, name, 1000))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "added": _own_memory("self") - before}

    return run, {}


def list_growth(folder, name, workers, batch_size):
    """The bytes that loader workers have more of their own at an epoch's end than at its start.

    All of the loader is real but the images: a grey one of a pixel stands for each, as decoding
    would take hours.
    """
    import numpy as np
    from PIL import Image

    from datasets import ImageDataset, ImageList, TrainSampler, build_loader

    class Grey(ImageDataset):
        def read(self, index):
            self.images.image_path(index)
            return Image.new("RGB", (1, 1))

    def pixel(image, rng):
        return np.zeros((1, 1, 3), np.uint8)

    pixel.image_size = 1
    images = ImageList(folder, name, 1000)
    sampler = TrainSampler(len(images), batch_size, 0, 1, 0, 1)

    times = (4 * workers, len(sampler) // 2, len(sampler) - 4 * workers)

    def run():
        own = []  # of each worker, at the three times
        with contextlib.closing(build_loader(Grey(images, pixel, 0), sampler, workers)) as loader:
            for batch, _ in enumerate(loader, 1):
                if batch in times:
                    children = multiprocessing.active_children()
                    own.append({child.pid: _own_memory(child.pid) for child in children})
        start, middle, end = own
        return {
            "growth": max(end[pid] - start[pid] for pid in start),
            "late_growth": max(end[pid] - middle[pid] for pid in start),
        }

    return run, {"images": len(images)}


def _own_memory(pid):
    """A process's bytes that it shares with no other one (Linux)."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        fields = dict(line.split(":") for line in file.read().splitlines()[1:])
    names = ("Private_Clean", "Private_Dirty")
    return 1024 * sum(int(fields[name].split()[0]) for name in names)


CASES = {
    "versions": versions,
    "decode": decode,
    "decode_alone": decode_alone,
    "loader": loader,
    "evaluate": evaluate,
    "train": train,
    "products": products,
    "exchange": exchange,
    "facts": facts,
    "step_memory": step_memory,
    "image_list": image_list,
    "list_growth": list_growth,
}


def _share(read):
    """Rank 0's request, on every rank; waits for it as long as it takes."""
    import paddle

    import utils
    from ranks import stop

    request = read() if paddle.distributed.get_rank() == 0 else None
    stop.barrier()
    return utils.broadcast_object(request)


def main():
    ranks = int(sys.argv[1])
    if ranks > 1 and not launch.is_rank():
        command = [sys.executable, os.path.abspath(__file__), sys.argv[1]]
        return launch.run(ranks, 0, command)
    common.import_paddle()
    import utils

    rank, _ = utils.init_distributed()
    if rank > 0:  # rank 0 alone answers
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(CASES, _share if ranks > 1 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
