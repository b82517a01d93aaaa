"""The images that are measured: a user's own, or JPEGs made from the photographs of the tests."""

import os

from tools import common

PHOTOGRAPHS = ("landscape_500x375.jpg", "portrait_333x500.jpg")


def prepare_images(args, folder, lines=0):
    """Writes train_list.txt and val_list.txt into `folder`: the images in turn, `lines` at least.

    Returns:
        The images' paths, each once: args.images of those in args.data_path, or made ones.
    """
    if args.data_path:
        paths = _listed(args.data_path, args.images)
    else:
        paths = make_images(folder, args.images)
    text = "".join(f"{paths[i % len(paths)]} 0\n" for i in range(max(lines, len(paths))))
    for name in ("train_list.txt", "val_list.txt"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    return paths


def make_images(folder, count):
    """Writes JPEGs of 500x375, each another part of a photograph.  Returns their paths."""
    import numpy as np
    from PIL import Image, ImageOps

    photographs = [Image.open(common.ROOT / "tests/data/images" / name) for name in PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    paths = [os.path.join(folder, f"{number}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        photograph, place = photographs[number % len(photographs)], rng.random(2)
        margin = rng.uniform(0, 0.1)  # of each side, cut off first
        image = ImageOps.fit(photograph, (500, 375), Image.BICUBIC, margin, tuple(place))
        image = ImageOps.mirror(image) if rng.random() < 0.5 else image
        image.save(path, quality=95)
    return paths


def _listed(folder, count):
    """The first images of a user's folder, which can be read; raises DataError otherwise."""
    common.import_paddle()
    from datasets import ImageDataset, ImageList

    any_label = 10**9
    images = ImageList(folder, "val_list.txt", any_label)
    indices = range(min(count, len(images)))
    for index in indices:
        ImageDataset(images, None, 0).read(index)
    return [os.path.abspath(images.image_path(index)) for index in indices]
