"""The ImageNet list-file data set, the order in which ranks see it, and the loaders.

A data set is a folder with `train_list.txt` and `val_list.txt`; each line is an image's path
relative to the folder, white space, and an integer label.
"""

import contextlib
import functools
import gc
import os
import signal
import traceback
import warnings
from array import array

import numpy as np
import paddle
from PIL import Image

from files import show_path
from ranks.host import die_with_parent, remove_batches
from transforms import build_transform

_LINE_LIMIT = 5000  # bytes; a path has at most 4096
# What a draw is for, first in its seed: NumPy takes [0, 1] and [0, 1, 0] for the same seed.
_ORDER_STREAM, _IMAGE_STREAM = 1, 2  # engine.py has 3
_PREFETCH = 2  # batches that each loader worker works ahead
_END_SECONDS = 10  # for a worker to finish the batch that it is at
_16_BITS = (("I", "PNG"), ("I", "PPM"))  # modes and formats that mean 16 bits, besides "I;16"


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file and the line."""


class ImageList:
    """A list file: paths, labels and line numbers in flat buffers.

    ImageNet's 1,281,167 lines take about 80 MB in four objects, which forked loader workers share
    with their parent (Python objects a line would be copied by their reference counts).

    Args:
        root: the data set's folder.
        name: the list's file name in it.
        num_classes: labels must be 0 .. num_classes - 1.
        on_bad_line: called with a sentence for each line that is wrong, which is then left out;
            without it the first one is raised.

    Attributes:
        path: the list file.
        labels: int32 array, one label per image.

    Raises:
        DataError: the list is missing, empty or not UTF-8, or a line has no label or a wrong one.
    """

    def __init__(self, root, name, num_classes, on_bad_line=None):
        self.root = root
        self.path = os.path.join(root, name)
        paths, ends, labels, numbers = bytearray(), array("q"), array("i"), array("q")
        number = 0
        for number, line in self._lines():
            try:
                path, label = _parse_line(line, num_classes)
            except DataError as error:
                sentence = f"{self.path}:{number}: {error}"
                if on_bad_line is None:
                    raise DataError(sentence) from None
                on_bad_line(sentence)
                continue
            paths += path
            ends.append(len(paths))
            labels.append(label)
            numbers.append(number)
        if not number:
            raise DataError(f"{self.path}: the list is empty")
        self._paths = bytes(paths)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int32)

    def __len__(self):
        return len(self.labels)

    def image_path(self, index):
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, self._paths[start : self._ends[index]].decode())

    def line_number(self, index):
        """The line of an image in the list file."""
        return int(self._numbers[index])

    def _lines(self):
        """(number, stripped bytes) of every line that is not blank; the start of one too long."""
        try:
            with open(self.path, "rb") as file:
                if file.read(3) != b"\xef\xbb\xbf":  # a UTF-8 byte order mark
                    file.seek(0)
                for number, line in enumerate(iter(lambda: file.readline(_LINE_LIMIT + 1), b""), 1):
                    if len(line) > _LINE_LIMIT:
                        yield number, line
                        while line and not line.endswith(b"\n"):
                            line = file.readline(_LINE_LIMIT + 1)
                    elif line := line.strip():
                        yield number, line
        # An OSError, or a ValueError for a path that cannot be one (with a NUL).
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: cannot read this image list: {_cause(error)}; the data folder "
                "needs train_list.txt and val_list.txt (README, data preparation)"
            ) from error


class ImageDataset(paddle.io.Dataset):
    """Images of a list, transformed.

    The key of an item is (epoch, index): what happens to an image is drawn from a generator seeded
    by (seed, epoch, index), so that neither the number of workers nor a resume changes it.

    Args:
        images: an ImageList.
        transform: function of (PIL RGB image, numpy Generator) -> uint8 [H, W, 3].
        seed: the run's seed.
    """

    def __init__(self, images, transform, seed):
        super().__init__()
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """(uint8 [H, W, 3], int label); raises DataError for an image that cannot be read."""
        epoch, index = key
        rng = np.random.default_rng([_IMAGE_STREAM, self.seed, epoch, index])
        pixels = self.transform(self.read(index), rng)
        return pixels, int(self.images.labels[index])

    def read(self, index):
        """An image of the list, decoded, in mode RGB; raises DataError where that cannot be."""
        path = self.images.image_path(index)
        try:
            return _read_rgb(path)
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            raise DataError(
                f"{self.images.path}:{self.images.line_number(index)}: cannot read "
                f"{show_path(path)}: {_cause(error)}"
            ) from error


def _read_rgb(path):
    """The image of a file as Pillow converts it to RGB: the first frame, what transparency hides.

    Pixels of 16 bits keep their high 8, as a viewer's do (Pillow would clip them all to white).
    """
    with warnings.catch_warnings():
        # A run's terminal is no place for what Pillow remarks about metadata and palettes.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16") or (image.mode, image.format) in _16_BITS:
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise DataError("its pixels have 32 bits, and no known black and white")
                if image.mode != "RGB":  # most images are, and need no copy
                    return image.convert("RGB")
                image.load()
                return image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels: shrink it, or take it off "
                "the list"
            ) from error


class EvalSampler(paddle.io.BatchSampler):
    """A rank's share of the evaluation: images rank, rank + ranks, ...; none twice, none left out.

    Ranks may have different numbers of batches, or none: evaluation communicates only at its end.
    """

    def __init__(self, num_images, batch_size, rank, ranks):
        self.indices = range(rank, num_images, ranks)
        self.batch_size = batch_size

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class TrainSampler(paddle.io.BatchSampler):
    """A rank's batches of one epoch, in an order that is a function of (seed, epoch).

    Every rank gets the same number of full batches; what is left of the permutation is dropped.

    Args:
        num_images: images in the list.
        batch_size: images per rank and batch.
        seed, epoch: what the permutation is drawn from.
        rank, ranks: whose batches.
        first_batch: batches to leave out at the start, to go on in the middle of an epoch.
    """

    def __init__(self, num_images, batch_size, seed, epoch, rank, ranks, first_batch=0):
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.epoch = seed, epoch
        self.rank, self.ranks = rank, ranks
        self.first_batch = first_batch

    def __len__(self):
        return batches_per_epoch(self.num_images, self.batch_size, self.ranks) - self.first_batch

    def __iter__(self):
        rng = np.random.default_rng([_ORDER_STREAM, self.seed, self.epoch])
        order = rng.permutation(self.num_images)
        for batch in range(self.first_batch, self.first_batch + len(self)):
            start = (batch * self.ranks + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


def batches_per_epoch(num_images, batch_size, ranks):
    """Training batches that each rank sees in an epoch."""
    return num_images // (batch_size * ranks)


def build_dataset(config, train):
    """The training or validation images of the config's data folder.

    Raises:
        DataError: as ImageList, or the config asks for other channels than RGB's.
    """
    if config.DATA.IMAGE_CHANNELS != 3:
        raise DataError(
            f"DATA.IMAGE_CHANNELS is {config.DATA.IMAGE_CHANNELS}: images are loaded as RGB, "
            "so the program needs 3"
        )
    name = "train_list.txt" if train else "val_list.txt"
    images = ImageList(config.DATA.DATA_PATH, name, config.MODEL.NUM_CLASSES)
    return ImageDataset(images, build_transform(config, train), config.SEED)


class _Fetch(paddle.io.Dataset):
    """A data set whose errors come as values.

    Paddle's reader threads print the traceback of an exception and give the training loop another
    one, without the message; so an error travels to the loop as a batch (_collate, _unpack).
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except Exception as error:  # a bug too must end the run, with its traceback
            return error if isinstance(error, DataError) else DataError(traceback.format_exc())


def _collate(samples):
    """uint8 [batch, H, W, 3] and int64 [batch]; an error as one axis and its message's bytes."""
    for sample in samples:
        if isinstance(sample, DataError):
            message = str(sample).encode(errors="replace")  # a path need not be UTF-8
            return np.zeros(1, np.uint8), np.frombuffer(message, np.uint8)
    pixels, labels = zip(*samples)
    return np.stack(pixels), np.array(labels, dtype=np.int64)


def _unpack(loader):
    """The batches of a loader; raises DataError where a batch is an error or a worker died."""
    batches = iter(loader)
    workers = getattr(batches, "_workers", ())
    pids = [worker.pid for worker in workers]
    try:
        while True:
            try:
                images, labels = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _dead_worker(error) from error
            if images.ndim == 1:
                raise DataError(bytes(labels.numpy()).decode())
            yield images, labels
    finally:
        # Left to itself, an iterator that is not used up keeps its workers until this process ends.
        batches._try_shutdown_all(*([_END_SECONDS] if workers else []))
        for worker in workers:  # one that has not ended would take no SIGTERM
            worker.kill()
            worker.join()
        remove_batches(pids)


@contextlib.contextmanager
def explain_dead_workers():
    """Turns the error that Paddle raises, wherever the main thread is, into a DataError."""
    try:
        yield
    except SystemError as error:
        raise _dead_worker(error) from error


def _dead_worker(error):
    return DataError(
        "a loader worker died; where the system ended it for want of memory, take fewer "
        f"-num_workers ({_cause(error).split('. ')[0]})"
    )


def build_loader(dataset, sampler, num_workers, ranks_on_host=1):
    """A generator of (uint8 [batch, H, W, 3], int64 [batch]) Tensors on the current device.

    Its close(), needed where not all batches are taken, ends the workers.

    Args:
        dataset: an ImageDataset.
        sampler: which images, in which batches.
        num_workers: loader processes; 0 loads in this process.
        ranks_on_host: how many ranks share this host's memory.

    Raises:
        DataError: the shared memory through which workers pass batches is too small; while
            iterating, an image cannot be read.
    """
    num_workers = min(num_workers, len(sampler))  # a worker without a batch is only a cost
    if num_workers:
        image_bytes = 3 * dataset.transform.image_size**2
        batches = num_workers * (_PREFETCH + 1) * ranks_on_host
        require_shared_memory(batches * sampler.batch_size * image_bytes)
    loader = paddle.io.DataLoader(
        _Fetch(dataset),
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        prefetch_factor=_PREFETCH,
        use_shared_memory=num_workers > 0,
    )
    return _unpack(loader)


def _start_worker(parent, worker_id):
    # Paddle's workers wait for work without looking whether their parent still lives.
    die_with_parent(parent, signal.SIGKILL)
    gc.freeze()  # otherwise its first collection writes to, and so copies, the parent's objects
    # Both are the rank's alone, which ends its workers when it is done with them: a terminal sends
    # Ctrl-C, and Paddle's launcher a SIGTERM, to the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def require_shared_memory(num_bytes, folder="/dev/shm"):
    """Raises DataError where `folder` has less than `num_bytes` free; a worker would die there."""
    if not os.path.isdir(folder):
        return
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < num_bytes:
        raise DataError(
            f"{folder} has {free >> 20} MB free, the loader workers need about "
            f"{(num_bytes >> 20) + 1} MB of shared memory: start the container with a larger "
            "--shm-size, or take fewer workers (-num_workers 0 needs none)"
        )


def _parse_line(line, num_classes):
    """(path in bytes, label) of a line of a list; DataError says what is wrong with it."""
    if len(line) > _LINE_LIMIT:
        raise DataError("this line is longer than any path and label")
    parts = line.rsplit(None, 1)
    if len(parts) < 2 or not parts[1].lstrip(b"+-").isdigit():
        raise DataError(f"{_show(line)} has no label; a line is a path, white space and an integer")
    path, digits = parts
    try:
        path.isascii() or path.decode()
    except UnicodeDecodeError:
        raise DataError("this line is not UTF-8 text") from None
    # Ten digits exceed any number of classes; int() of thousands would take its time.
    label = int(digits) if len(digits) <= 10 and digits.isdigit() else num_classes
    if label >= num_classes:
        raise DataError(
            f"label {_show(digits)} is not in 0..{num_classes - 1} "
            f"(MODEL.NUM_CLASSES is {num_classes})"
        )
    return path, label


def _show(raw):
    text = raw[:80].decode(errors="replace")
    return repr(text) + ("..." if len(raw) > 80 else "")


def _cause(error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
