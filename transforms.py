"""What happens to images between the file and the model.

Part 1, one image on the host: a PIL image in mode RGB (the dataset converts) becomes a uint8 array
[size, size, 3]. Part 2, one batch on the device: normalize, erase, mix, soft targets.

Every random choice comes from the numpy Generator passed in, never from global state, so that it
can be a function of (seed, epoch, image) or (seed, epoch, batch, rank). Semantics and
constants are timm 1.0.31's unless a line says otherwise.
"""

import math
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

from augment import BICUBIC, AutoAugment, ColorJitter, RandAugment

# --- one image: crops ---


class EvalTransform:
    """Resize the short side to floor(image_size / crop_pct), bicubic, and keep the centre square.

    The same pixels as timm's evaluation transform.

    Args:
        image_size: side of the output in pixels.
        crop_pct: its share of the resized image's short side.

    Raises:
        ValueError: crop_pct is not above 0 and at most 1.
    """

    def __init__(self, image_size, crop_pct):
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct is {crop_pct}; it must be above 0 and at most 1.")
        self.image_size = image_size
        self.short_side = math.floor(image_size / crop_pct)

    def __call__(self, image, rng=None):
        """PIL image (mode RGB) to uint8 [size, size, 3]; `rng` is not used."""
        image = _shorten(image)
        size, sides = self.image_size, image.size
        resized = [int(self.short_side * side / min(sides)) for side in sides]
        left, top = (round((side - size) / 2) for side in resized)  # half to even, as torchvision
        image = image.resize(resized, BICUBIC)
        return np.asarray(image.crop((left, top, left + size, top + size)))


def _shorten(image):
    """Cuts the ends off an image that is more than 64 times as long as wide.

    They are not in the crop, and resized with it they would take gigabytes.
    """
    width, height = image.size
    x, y = ((side - min(side, 64 * min(image.size))) // 2 for side in image.size)
    return image.crop((x, y, width - x, height - y)) if x or y else image


def random_crop_box(width, height, rng, scale, ratio):
    """Draw the part of an image that a random resized crop keeps.

    A share of the area (uniform in `scale`) and an aspect width / height (log-uniform in `ratio`)
    are drawn up to 10 times until they fit; then it is the largest central box that `ratio` allows.

    Returns:
        ints (left, top, right, bottom), inside the image and never empty (timm's can be, for an
        image of a few pixels).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = max(1, round(math.sqrt(area * aspect)))
        h = max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class TrainTransform:
    """Random resized crop (bicubic), horizontal flip with probability `flip`, then `augment`.

    Args:
        image_size: side of the output in pixels.
        augment: None, or one of augment.py's classes, called with (PIL image, rng).
        scale, ratio: see `random_crop_box`.
    """

    def __init__(self, image_size, augment, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
        self.image_size, self.augment = image_size, augment
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def __call__(self, image, rng):
        """PIL image (mode RGB) and numpy Generator to uint8 [size, size, 3]."""
        box = random_crop_box(*image.size, rng, self.scale, self.ratio)
        # Not resize(box=box), whose filter sees pixels beyond the box.
        image = image.crop(box).resize((self.image_size, self.image_size), BICUBIC)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image, rng)
        return np.asarray(image)


def build_transform(config, train):
    """The transform of one image, called with (image, rng), that `config` asks for.

    TRAIN.RAND_AUGMENT wins over AUTO_AUGMENT; COLOR_JITTER is for when both are off (as PaddleViT).
    Raises ValueError for an unknown operator.
    """
    if not train:
        return EvalTransform(config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT)
    options, augment = config.TRAIN, None
    fill = tuple(min(255, max(0, round(255 * mean))) for mean in config.DATA.IMAGENET_MEAN)
    if options.RAND_AUGMENT:
        layers, magnitude = options.RAND_AUGMENT_LAYERS, options.RAND_AUGMENT_MAGNITUDE
        names = options.RAND_AUGMENT_OPERATORS
        augment = RandAugment(layers, magnitude, operators=names, fill=fill)
    elif options.AUTO_AUGMENT:
        augment = AutoAugment(fill=fill)
    elif options.COLOR_JITTER:
        augment = ColorJitter(options.COLOR_JITTER)
    crop = {"scale": options.CROP_SCALE, "ratio": options.CROP_RATIO}
    return TrainTransform(config.DATA.IMAGE_SIZE, augment, **crop, flip=options.HFLIP)


# --- one batch: drawn on the host, applied on the device, nothing read back ---
# A box is (top, left, bottom, right) in pixels, the last two excluded; one without area is none.


def normalize(images, mean, std):
    """(images / 255 - mean) / std, with channels first.

    Args:
        images: uint8 Tensor [batch, height, width, channels].
        mean, std: Tensors [channels], where 1 is full intensity.

    Returns:
        Tensor [batch, channels, height, width] of their type.
    """
    # In an exported program: plain operators, which its engine fuses.
    if not paddle.in_dynamic_mode():
        images = images.astype(mean.dtype).transpose([0, 3, 1, 2])
        return (images / 255 - mean.reshape([-1, 1, 1])) / std.reshape([-1, 1, 1])
    # Transposing bytes moves a quarter of the data, and a batch norm with fixed statistics does the
    # rest in one pass: less than half the time on a CPU.
    images = images.transpose([0, 3, 1, 2]).astype(mean.dtype)
    return F.batch_norm(images, 255 * mean, (255 * std) ** 2, epsilon=0)


def _queue(array, dtype):
    """A small array as a Tensor of a type, for which the host does not wait.

    On a GPU to_tensor's copy waits until all that is queued has been computed; what assign and full
    do is queued itself (paddle/phi/kernels/assign_kernel.cc).
    """
    if array.size == 1:
        return paddle.full(array.shape, array.item(), dtype)
    return paddle.assign(array.astype(dtype)).astype(dtype)


def _inside(boxes, height, width):
    """Which pixels are in each image's box: bool Tensor [n, 1, height, width] of array [n, 4]."""
    top, left, bottom, right = _queue(boxes.T, "int64").unsqueeze(-1).unbind()
    y, x = paddle.arange(height), paddle.arange(width)
    rows = paddle.logical_and(top <= y, y < bottom).reshape([-1, 1, height, 1])
    columns = paddle.logical_and(left <= x, x < right).reshape([-1, 1, 1, width])
    return paddle.logical_and(rows, columns)


def draw_erasing(rng, batch, size, prob, count=1, split=False):
    """Draw the boxes that random erasing fills (arXiv 1708.04896).

    An image is erased with probability `prob`, in 1 to `count` boxes. Together they have 2% to 33%
    of its area, each with log-uniform aspect 0.3 to 1 / 0.3. With `split` the first half of the
    batch stays as it is (timm's num_splits = 2).

    Returns:
        int64 array [batch, count, 4] of boxes.
    """
    boxes = np.zeros((batch, count, 4), np.int64)
    for i in range(batch // 2 if split else 0, batch):
        if rng.random() < prob:
            number = rng.integers(1, count + 1)
            boxes[i, :number] = [_erased_box(rng, size, number) for _ in range(number)]
    return boxes


def _erased_box(rng, size, number):
    height, width = size
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width / number
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return top, left, top + h, left + w
    return 0, 0, 0, 0


def erase(images, boxes, mode):
    """Fill boxes of normalized images.

    Args:
        images: float Tensor [batch, channels, height, width].
        boxes: int array [batch, count, 4]; a later box covers an earlier one.
        mode: "pixel", normal noise; "rand", one normally distributed colour a box; "const", 0, the
            mean colour. Noise is from Paddle's device generator, which the caller seeds.

    Returns:
        Tensor like `images`.
    """
    batch, channels, height, width = images.shape
    for k in range(boxes.shape[1]):
        if mode == "pixel":
            fill = paddle.randn([batch, channels, height, width], dtype=images.dtype)
        elif mode == "rand":
            fill = paddle.randn([batch, channels, 1, 1], dtype=images.dtype)
        else:
            fill = paddle.zeros([1], dtype=images.dtype)
        images = paddle.where(_inside(boxes[:, k], height, width), fill, images)
    return images


class Mix(NamedTuple):
    """How images are mixed with their partners, those of the flipped batch; n is batch or 1.

    lam: float array [n], the share of an image's own label.
    boxes: int64 array [n, 4]: cutmix takes these pixels from the partner. Where there is no box it
        is mixup: lam of the image plus (1 - lam) of the partner.
    """

    lam: np.ndarray
    boxes: np.ndarray


def draw_mix(
    rng, batch, size, mixup_alpha, cutmix_alpha, minmax=None, prob=1, switch_prob=0.5, mode="batch"
):
    """Draw mixup (arXiv 1710.09412) and cutmix (1905.04899) for a batch, odd ones too.

    Args:
        size: (height, width).
        mixup_alpha, cutmix_alpha: lam is Beta(alpha, alpha); one of them may be 0, off.
        minmax: None, or the (least, most) share of a side that cutmix's boxes have, whatever lam;
            cutmix_alpha is then taken as 1.
        prob: probability of any mixing for each draw.
        switch_prob: probability of cutmix where both are on.
        mode: "batch" draws once, "pair" for each image and its partner, "elem" for each image.

    Returns:
        Mix, with cutmix's lam corrected to the share of pixels that the image keeps.
    """
    n = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[mode]
    if minmax is not None:
        cutmix_alpha = 1.0
    both = mixup_alpha > 0 and cutmix_alpha > 0
    cutmix = rng.random(n) < (switch_prob if both else cutmix_alpha > 0)
    mixed = rng.random(n) < prob
    alpha = np.where(cutmix, cutmix_alpha, mixup_alpha)
    lam = np.where(mixed, rng.beta(alpha, alpha), 1)
    boxes = _cutmix_boxes(rng, lam, np.array(size), minmax) * (cutmix & mixed)[:, None]
    top, left, bottom, right = boxes.T
    lam = np.where(cutmix, 1 - (bottom - top) * (right - left) / (size[0] * size[1]), lam)
    mix = Mix(lam, boxes)
    if mode == "pair":
        pair = np.minimum(np.arange(batch), np.arange(batch)[::-1])
        mix = Mix(mix.lam[pair], boxes[pair])
    return mix


def _cutmix_boxes(rng, lam, size, minmax):
    """Boxes [n, 4] for lam [n]; without `minmax` centred anywhere and clipped to the image."""
    if minmax is not None:
        least, most = (size * minmax[0]).astype(int), (size * minmax[1]).astype(int)
        cut = rng.integers(least, np.maximum(most, least + 1), size=(len(lam), 2))
        first = rng.integers(size - cut + 1)
        return np.concatenate([first, first + cut], axis=1)
    cut = (size * np.sqrt(1 - lam)[:, None]).astype(int)
    centre = rng.integers(size, size=(len(lam), 2))
    first, last = np.maximum(centre - cut // 2, 0), np.minimum(centre + (cut + 1) // 2, size)
    return np.concatenate([first, last], axis=1)


def mix_images(images, mix):
    """Mix a float Tensor [batch, channels, height, width] with its flip as a Mix says."""
    has_box = mix.boxes.any(axis=1)
    # An image's own weight: lam for mixup; for cutmix 1, and 0 in the box.
    weight = np.where(has_box, 1, mix.lam).astype(float).reshape([-1, 1, 1, 1])
    weight = _queue(weight, paddle.get_default_dtype())
    if has_box.any():
        weight = weight * (1 - _inside(mix.boxes, *images.shape[2:]).astype(images.dtype))
    return images * weight + images.flip(0) * (1 - weight)


def soft_targets(labels, num_classes, smoothing=0.0, lam=None):
    """Label distributions, smoothed, then mixed with those of the flipped batch.

    Args:
        labels: int64 Tensor [batch].
        smoothing: the share that is spread evenly over all classes.
        lam: None, or float array [batch] or [1], the share of a row's own label.

    Returns:
        Tensor [batch, num_classes] of Paddle's default type; rows sum to 1.
    """
    targets = F.one_hot(labels, num_classes).astype(paddle.get_default_dtype())
    targets = targets * (1 - smoothing) + smoothing / num_classes
    if lam is not None:
        lam = _queue(lam.reshape([-1, 1]), paddle.get_default_dtype())
        targets = targets * lam + targets.flip(0) * (1 - lam)
    return targets


class BatchTransform:
    """Turns a loader's batch into the model's input and the loss's targets.

    Evaluation only normalizes.  Training erases where TRAIN.RANDOM_ERASE_PROB is above 0, mixes
    where MIXUP_PROB is and one of MIXUP_ALPHA, CUTMIX_ALPHA and CUTMIX_MINMAX is on, and smooths
    the labels by SMOOTHING.
    """

    def __init__(self, config, train):
        dtype = paddle.get_default_dtype()
        self.mean = paddle.to_tensor(config.DATA.IMAGENET_MEAN, dtype)
        self.std = paddle.to_tensor(config.DATA.IMAGENET_STD, dtype)
        self.num_classes = config.MODEL.NUM_CLASSES
        self.options = config.TRAIN if train else None

    def __call__(self, images, labels, rng=None):
        """Normalizes, erases, mixes.

        Args:
            images: uint8 Tensor [batch, height, width, channels].
            labels: int64 Tensor [batch].
            rng: numpy Generator, for training's erasing and mixing.

        Returns:
            Tensor [batch, channels, height, width] of Paddle's default type (float32); labels, or
            for training Tensor [batch, num_classes].
        """
        batch, height, width, _ = images.shape
        images, lam, options = normalize(images, self.mean, self.std), None, self.options
        if options is None:
            return images, labels
        if options.RANDOM_ERASE_PROB > 0:
            boxes = draw_erasing(
                rng, batch, (height, width), prob=options.RANDOM_ERASE_PROB,
                count=options.RANDOM_ERASE_COUNT, split=options.RANDOM_ERASE_SPLIT,
            )  # fmt: skip
            images = erase(images, boxes, options.RANDOM_ERASE_MODE)
        mixes = options.MIXUP_ALPHA or options.CUTMIX_ALPHA or options.CUTMIX_MINMAX
        if mixes and options.MIXUP_PROB > 0:
            mix = draw_mix(
                rng, batch, (height, width), options.MIXUP_ALPHA, options.CUTMIX_ALPHA,
                minmax=options.CUTMIX_MINMAX, prob=options.MIXUP_PROB,
                switch_prob=options.MIXUP_SWITCH_PROB, mode=options.MIXUP_MODE,
            )  # fmt: skip
            images, lam = mix_images(images, mix), mix.lam
        return images, soft_targets(labels, self.num_classes, options.SMOOTHING, lam)
