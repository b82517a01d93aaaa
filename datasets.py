"""Data sets: where images come from, and the order in which ranks see them.

The ImageNet list-file format is a folder with `train_list.txt` and `val_list.txt`; each line is an
image's path relative to the folder, white space, and an integer label.  Another format is a
subclass of ImageSource and an entry in DATASETS.
"""

import functools
import hashlib
import os
import warnings
from array import array

import numpy as np
import paddle
from PIL import Image

from transforms import build_transform
from utils import DataError, cause, only_pixels, show, show_path, text_lines

_LINE_LIMIT = 5000  # bytes; a path has at most 4096
# The first number of a seed says what is drawn, as NumPy takes [0, 1] and [0, 1, 0] for the same
# seed: the order of an epoch, what happens to an image, to a batch (training/train.py).
ORDER_STREAM, IMAGE_STREAM, BATCH_STREAM = 1, 2, 3
_16_BITS = (("I", "PNG"), ("I", "PPM"))  # modes and formats that mean 16 bits, besides "I;16"


class ImageSource:
    """Images and their labels; a data set's format is a subclass that gives these.

    Attributes:
        name: what messages call the whole, such as the path of its list.
        labels: int32 array, one label per image, 0 .. MODEL.NUM_CLASSES - 1.
    """

    name, labels = "", ()

    def __len__(self):
        return len(self.labels)

    def image_path(self, index):
        """The path of an image's file."""
        raise NotImplementedError

    def place(self, index):
        """Where a person finds the image in this data set, such as "list:line"; may be empty."""
        return ""

    def digest(self, root):
        """What tells images and labels, in their order, from others: 64 hex digits.

        A resumed run compares it.  `root` is the data set's folder, which may be elsewhere then.
        """
        paths = (os.fspath(self.image_path(index)) for index in range(len(self)))
        paths = "\0".join(path.removeprefix(os.path.join(root, "")) for path in paths)
        labels = np.asarray(self.labels, dtype="<i4").tobytes()
        return hashlib.sha256(os.fsencode(paths) + b"\0" + labels).hexdigest()


class ImageList(ImageSource):
    """A list file: paths, labels and line numbers in flat buffers.

    ImageNet's 1,281,167 lines take about 80 MB in four objects, which forked loader workers share
    with their parent (Python objects a line would be copied by their reference counts).

    Args:
        root: the data set's folder.
        name: the list's file name in it.
        num_classes: labels must be 0 .. num_classes - 1.
        on_bad_line: called with a sentence for each wrong line, which is left out; None: the first
            wrong line is raised.

    Raises:
        DataError: the list is missing, empty or not UTF-8, or a line has no label or a wrong one.
    """

    def __init__(self, root, name, num_classes, on_bad_line=None):
        self.root = root
        self.name = os.path.join(root, name)
        paths, ends, labels, numbers = bytearray(), array("q"), array("i"), array("q")
        number = 0
        for number, line in self._lines():
            try:
                path, label = _parse_line(line, num_classes, root)
            except DataError as error:
                hint = self._hint if isinstance(error, LabelError) else ""
                sentence = f"{self.name}:{number}: {error}{hint}"
                if on_bad_line is None:
                    raise DataError(sentence) from None
                on_bad_line(sentence)
                continue
            paths += path
            ends.append(len(paths))
            labels.append(label)
            numbers.append(number)
        if not number:
            raise DataError(f"{self.name}: the list is empty")
        self._paths = bytes(paths)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int32)

    def image_path(self, index):
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._paths[start : self._ends[index]]))

    def place(self, index):
        return f"{self.name}:{self._numbers[index]}"

    def digest(self, root):
        digest = hashlib.sha256(self._paths)
        for numbers in (self._ends, self.labels):
            digest.update(numbers.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _hint(self):
        """What helps where labels were counted from 1."""
        words = (line.rsplit(None, 1) for _, line in self._lines())
        zero = any(not some[-1].strip(b"0") for some in words if some)  # none in odd blanks alone
        return "" if zero else "; labels start at 0, and no line has a 0"

    def _lines(self):
        """(number, stripped bytes) of every line that is not blank; the start of one too long."""
        try:
            yield from text_lines(self.name, _LINE_LIMIT)
        except DataError as error:
            raise DataError(f"{self.name}:1: this list is {error}") from None
        # An OSError, or a ValueError for a path that cannot be one (with a NUL).
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.name}: cannot read this image list: {cause(error)}; -data_path (DATA_PATH "
                "of the scripts) is a folder with train_list.txt and val_list.txt, which "
                "tools/make_lists.py writes (docs/data.md)"
            ) from error


class ImageDataset(paddle.io.Dataset):
    """Images of a source, transformed.

    The key of an item is (epoch, index): what happens to an image is drawn from a generator seeded
    by (seed, epoch, index), so that neither the number of workers nor a resume changes it.

    Args:
        images: an ImageSource.
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
        rng = np.random.default_rng([IMAGE_STREAM, self.seed, epoch, index])
        pixels = self.transform(self.read(index), rng)
        return pixels, int(self.images.labels[index])

    def read(self, index):
        """An image, decoded, in mode RGB; raises DataError where that cannot be."""
        path = self.images.image_path(index)
        try:
            return _read_rgb(path)
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            place = self.images.place(index)
            sentence = f"cannot read {show_path(path)}: {cause(error)}"
            if "\\" in path and os.path.exists(path.replace("\\", "/")):
                sentence += "; write / for \\, which separates folders on Windows alone"
            raise DataError(f"{place}: {sentence}" if place else sentence) from error


def _read_rgb(path):
    """A file's image in RGB, as Pillow converts it: the first frame, without transparency.

    Pixels of 16 bits keep their high 8, as a viewer's do (Pillow would clip them all to white).
    """
    with warnings.catch_warnings(), only_pixels():
        # A run's terminal is no place for what Pillow remarks about metadata and palettes.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16") or (image.mode, image.format) in _16_BITS:
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise DataError(
                        "its pixels have 32 bits, and what is black and white is unknown"
                    )
                if image.mode != "RGB":  # most images are, and need no copy
                    return image.convert("RGB")
                image.load()
                return image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels: shrink it, or leave it out"
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
        rng = np.random.default_rng([ORDER_STREAM, self.seed, self.epoch])
        order = rng.permutation(self.num_images)
        for batch in range(self.first_batch, self.first_batch + len(self)):
            start = (batch * self.ranks + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


def batches_per_epoch(num_images, batch_size, ranks):
    """Training batches that each rank sees in an epoch."""
    return num_images // (batch_size * ranks)


def _list_of(config, train):
    name = "train_list.txt" if train else "val_list.txt"
    return ImageList(config.DATA.DATA_PATH, name, config.MODEL.NUM_CLASSES)


# By DATA.DATASET: a function of (config, train) that gives the ImageSource of a split.
DATASETS = {"imagenet2012": _list_of}


def build_dataset(config, train):
    """The training or validation images of the config's data set.

    Raises:
        DataError: the source cannot be used, DATA.DATASET or an operator is unknown, or
            DATA.IMAGE_CHANNELS is not 3.
    """
    if config.DATA.DATASET not in DATASETS:
        raise DataError(
            f"DATA.DATASET must be {' or '.join(map(repr, DATASETS))}, not "
            f"{show(config.DATA.DATASET)} (any data set works in the layout of imagenet2012: a "
            "folder with images, train_list.txt and val_list.txt, see docs/data.md)"
        )
    if config.DATA.IMAGE_CHANNELS != 3:
        raise DataError(
            f"DATA.IMAGE_CHANNELS is {config.DATA.IMAGE_CHANNELS}: images are loaded as RGB, "
            "so the program needs 3"
        )
    try:
        transform = build_transform(config, train)
    except ValueError as error:
        raise DataError(str(error)) from None
    return ImageDataset(DATASETS[config.DATA.DATASET](config, train), transform, config.SEED)


class LabelError(DataError):
    """A label that is none of the classes'."""

    def __init__(self, label, num_classes):
        super().__init__(
            f"label {show(label)} is not in 0..{num_classes - 1} "
            f"(MODEL.NUM_CLASSES is {num_classes})"
        )


def _parse_line(line, num_classes, root):
    """(path in bytes, label) of a line of a list; DataError says what is wrong with it."""
    if len(line) > _LINE_LIMIT:
        raise DataError("this line is longer than any path and label")
    parts = line.rsplit(None, 1)
    if len(parts) < 2 or not parts[1].lstrip(b"+-").isdigit():
        raise DataError(f"{show(line)} has no label; a line is a path, white space and an integer")
    path, digits = parts
    # The bytes are the file's name in any locale; such that are no UTF-8 are mostly a mistake.
    utf8 = path.isascii() or path.decode(errors="ignore").encode() == path
    if not utf8 and not os.path.exists(os.path.join(os.fsencode(root), path)):
        raise DataError("this line is not UTF-8 text, and no file has its bytes for a name")
    # Ten digits exceed any number of classes; int() of thousands would take its time.
    label = int(digits) if len(digits) <= 10 and digits.isdigit() else num_classes
    if label >= num_classes:
        raise LabelError(digits, num_classes)
    return path, label
