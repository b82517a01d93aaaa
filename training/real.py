"""The ReaL labels of ImageNet's validation images, with -eval -real_labels real.json.

Beyer et al., "Are we done with ImageNet?" (arXiv 2006.07159) list for each of the 50,000 images all
classes that are in it.  A prediction is right if it is one of them; an image without any does not
count.
"""

import json
import os
import re

import numpy as np
import paddle

from datasets import LabelError
from ranks.collective import all_reduce_sum
from training.evaluate import Scores, places
from utils import DataError, cause, show, show_path, wide_text

_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.\w+", re.ASCII)


class RealLabels:
    """The labels of a data set's images, which are found by the images' names.

    Args:
        path: real.json: a list whose entry i has the labels of ILSVRC2012_val_<i + 1>.
        images: a datasets.ImageSource.
        num_classes: labels must be 0 .. num_classes - 1.

    Raises:
        DataError: the file cannot be read or is no such list, a label is no class, or an image has
            another name; none of the images has labels.
    """

    def __init__(self, path, images, num_classes):
        entries = _read(path, num_classes)
        paths = (images.image_path(index) for index in range(len(images)))
        self._labels = [
            entries[_number(image, len(entries), images.place(index), path) - 1]
            for index, image in enumerate(paths)
        ]
        if not any(self._labels):
            raise DataError(f"{show_path(path)}: has no label for any image of {images.name}")

    def scores(self, indices):
        """RealScores for batches that have the images of these indices, in their order."""
        return RealScores([self._labels[index] for index in indices])


class RealScores(Scores):
    """Scores, and the accuracies by the ReaL labels, as exact as they are.

    Args:
        labels: for each image that will be added, in that order, the list of its labels.
    """

    def __init__(self, labels):
        super().__init__()
        # [images, labels]: the first label repeated where an image has fewer; 0 where it has none.
        table = np.zeros([len(labels), max(map(len, labels), default=1) or 1], np.int64)
        for row, own in zip(table, labels):
            row[:] = [*own, *own[:1] * (len(row) - len(own))] or 0
        self._real_labels = paddle.to_tensor(table)
        self._has_labels = paddle.to_tensor(np.array([bool(own) for own in labels], bool))
        self._real_correct = paddle.zeros([2], dtype="int64")
        self._real_images = sum(map(bool, labels))

    def add(self, logits, labels):
        rows = slice(self._images, self._images + len(labels))
        super().add(logits, labels)
        best = places(logits.astype("float32"), self._real_labels[rows]).min(axis=1)
        counts = self._has_labels[rows]
        self._real_correct += paddle.stack(
            [((best < k) & counts).astype("int64").sum() for k in (1, 5)]
        )

    def result(self):
        """Those of Scores, real_acc1 and real_acc5 in percent, and real_images, their number."""
        result = super().result()
        correct = all_reduce_sum(self._real_correct)
        images = int(all_reduce_sum(paddle.to_tensor(self._real_images, dtype="int64")))
        acc1, acc5 = (100 * int(count) / images for count in correct.numpy())
        return {**result, "real_acc1": acc1, "real_acc5": acc5, "real_images": images}


def _read(path, num_classes):
    """The lists of labels in a real.json."""
    name = show_path(path)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{name}: cannot read these labels: {cause(error)}") from error
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = wide_text(content) or f"not JSON ({cause(error)})"
        raise DataError(f"{name}: these labels are {what}") from None
    if not (isinstance(entries, list) and entries):
        raise DataError(f"{name}: must hold a list of lists of labels, not {show(entries)}")
    for number, entry in enumerate(entries, 1):
        if not (isinstance(entry, list) and all(type(label) is int for label in entry)):
            raise DataError(
                f"{name}: entry {number:,} must be a list of labels, whole numbers, not "
                f"{show(entry)}"
            )
        entry[:] = sorted(set(entry))  # so that one line cannot fill the memory
        for label in entry:
            if not 0 <= label < num_classes:
                raise DataError(f"{name}: entry {number:,}: {LabelError(label, num_classes)}")
    return entries


def _number(image, entries, place, path):
    """The number in a validation image's name, from 1."""
    match = _NAME.fullmatch(os.path.basename(image))
    where = f"{place}: " if place else ""
    if not match:
        raise DataError(
            f"{where}{show_path(image)}: -real_labels needs ImageNet's validation images, with "
            "their names (ILSVRC2012_val_00000001.JPEG, ...)"
        )
    number = int(match[1])
    if not 1 <= number <= entries:
        raise DataError(
            f"{where}{show_path(image)}: {show_path(path)} has labels for images 1 to "
            f"{entries:,}, and none for this one: is it the whole real.json?"
        )
    return number
