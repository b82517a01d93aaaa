"""Augmentation of one image: operators as a table, and the policies that draw from it.

PIL images in mode RGB in and out. Every random choice comes from the numpy Generator passed in.
Operators, levels and policies are timm 1.0.31's unless a line says otherwise; for a given level and
sign the pixels are the same.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BICUBIC = Image.Resampling.BICUBIC
MAX_LEVEL = 10  # an operator's strength is 0 to 10
GRAY = (128, 128, 128)  # what geometric operators uncover: the mean pixel
_ROWS = 32  # of an image that _slide moves at a time: what it computes of them stays in the cache

# Operators are called with (image, value, resample); these make one from what each needs.


def _plain(function):
    return lambda image, value, resample: function(image)


def _valued(function):
    return lambda image, value, resample: function(image, value)


def _enhance(enhancer):
    return lambda image, factor, resample: enhancer(image).enhance(factor)


def _along_rows(movement):
    """`movement` is a function of (value, width): to `_slide`'s shear and offset."""

    def move(image, value, resample):
        shear, offset = movement(value, image.width)
        if resample == BICUBIC:
            return _slide(image, shear, offset)
        matrix = (1, shear, offset, 0, 1, 0)  # from output to source coordinates
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GRAY)

    return move


def _along_columns(movement):
    move, turned = _along_rows(movement), Image.Transpose.TRANSPOSE
    return lambda image, value, resample: move(image.transpose(turned), value, resample).transpose(
        turned
    )


def _slide(image, shear, offset):
    """Move every row to the left by `shear` x its y + `offset` pixels, in cubic interpolation.

    The pixels of Image.transform with BICUBIC, in about 0.6 of its time: that weighs 4 x 4 pixels
    for each, of which only 4 of its own row count here.
    """
    width, height = image.size
    # Line by line, first all red values of a line, then green, then blue.
    pixels = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(height, 3, width)
    moved = np.full_like(pixels, GRAY[0])
    for top in range(0, height, _ROWS):
        rows = slice(top, min(top + _ROWS, height))
        y = np.arange(rows.start, rows.stop)[:, None] + 0.5
        places = np.arange(width) + 0.5 + shear * y + offset
        inside = (places >= 0) & (places < width)
        seen = np.flatnonzero(inside.any(axis=0))
        if len(seen):
            part = slice(seen[0], seen[-1] + 1)
            values = _cubic(pixels[rows], places[:, part] - 0.5)
            where = inside[:, None, part]
            np.copyto(moved[rows, :, part], values, casting="unsafe", where=where)
    return Image.frombytes("RGB", image.size, moved, "raw", "RGB;L")


def _cubic(pixels, places):
    """Values between pixels, as Pillow's transform has them before it cuts off the fraction.

    Args:
        pixels: uint8 array [rows, 3, width]; those at the borders repeat beyond.
        places: float64 array [rows, n] of x, each 1 after the one before; 0 is the first pixel.

    Returns:
        float64 array [rows, 3, n] in 0..255.
    """
    n = places.shape[1]
    first = np.floor(places[:, 0]).astype(int) - 1  # of the 4 pixels around a row's first place
    low = first.min()
    near = pixels.take(np.arange(low, first.max() + n + 3), axis=2, mode="clip").astype(np.int16)
    window = np.empty((len(pixels), 3, n + 3), np.int16)
    for row, start in enumerate(first - low):
        window[row] = near[row, :, start : start + n + 3]
    v1, v2, v3, v4 = (window[:, :, k : k + n] for k in range(4))
    d = (places - (first[:, None] + np.arange(1, n + 1)))[:, None]
    # Keys' cubic with a = -1, factored as in Pillow, so that the last bits are the same.
    left, right = v1 - v2, v3 - v4
    values = d * -(left + right)
    values += 2 * left + right
    values *= d
    values += v3 - v1
    values *= d
    values += v2
    return np.clip(values, 0, 255, out=values)


def _rotate(image, degrees, resample):
    return image.rotate(degrees, resample, fillcolor=GRAY)


def _sharpen(image, factor, resample):
    """ImageEnhance.Sharpness; its filter, SMOOTH, in integers is 5 times as fast."""
    pixels = np.array(image)
    rows = pixels.astype(np.uint16)
    total = rows[1:-1, 1:-1] * 4  # the weights are 5 in the middle and 1 around it
    rows = rows[:-2] + rows[1:-1] + rows[2:]
    total += rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    pixels[1:-1, 1:-1] = (total + 6) // 13  # rounded; the border stays
    return Image.blend(Image.fromarray(pixels), image, factor)


def _solarize_add(image, addition):
    dark = [min(255, value + addition) for value in range(128)]
    return image.point((dark + list(range(128, 256))) * 3)


def _signed(most):
    return lambda share, sign: sign * share * most


def _factor(share, sign):
    return share * 1.8 + 0.1


def _factor_from_1(share, sign):
    return max(0.1, 1 + sign * share * 0.9)


# name: (value from (level as a share of the highest, sign), operator). "Increasing" ones change the
# image more as the level rises; those they replace, AutoAugment's, need not.
OPERATORS = {
    "AutoContrast": (lambda share, sign: None, _plain(ImageOps.autocontrast)),
    "Equalize": (lambda share, sign: None, _plain(ImageOps.equalize)),
    "Invert": (lambda share, sign: None, _plain(ImageOps.invert)),
    "PosterizeOriginal": (lambda share, sign: 4 + int(share * 4), _valued(ImageOps.posterize)),
    # At level 10 timm keeps 0 bits, a black image, which Pillow 13 refuses: one bit stays.
    "PosterizeIncreasing": (
        lambda share, sign: max(1, 4 - int(share * 4)),
        _valued(ImageOps.posterize),
    ),
    "Solarize": (lambda share, sign: int(share * 256), _valued(ImageOps.solarize)),
    "SolarizeIncreasing": (lambda share, sign: 256 - int(share * 256), _valued(ImageOps.solarize)),
    "SolarizeAdd": (lambda share, sign: int(share * 110), _valued(_solarize_add)),
    "Color": (_factor, _enhance(ImageEnhance.Color)),
    "ColorIncreasing": (_factor_from_1, _enhance(ImageEnhance.Color)),
    "Contrast": (_factor, _enhance(ImageEnhance.Contrast)),
    "ContrastIncreasing": (_factor_from_1, _enhance(ImageEnhance.Contrast)),
    "Brightness": (_factor, _enhance(ImageEnhance.Brightness)),
    "BrightnessIncreasing": (_factor_from_1, _enhance(ImageEnhance.Brightness)),
    "Sharpness": (_factor, _sharpen),
    "SharpnessIncreasing": (_factor_from_1, _sharpen),
    "Rotate": (_signed(30), _rotate),  # degrees
    "ShearX": (_signed(0.3), _along_rows(lambda factor, width: (factor, 0))),
    "ShearY": (_signed(0.3), _along_columns(lambda factor, width: (factor, 0))),
    "TranslateXRel": (_signed(0.45), _along_rows(lambda offset, width: (0, offset * width))),
    "TranslateYRel": (_signed(0.45), _along_columns(lambda offset, width: (0, offset * width))),
}

# fmt: off
RAND_AUGMENT_OPERATORS = (  # of timm's rand-m9-mstd0.5-inc1
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
    "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)
# fmt: on

# AutoAugment's ImageNet policy (arXiv 1805.09501): pairs of (operator, probability, level).
AUTO_AUGMENT_POLICY = (
    (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("PosterizeOriginal", 0.6, 7), ("PosterizeOriginal", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("PosterizeOriginal", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("PosterizeOriginal", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def apply_op(image, name, level, sign=1, resample=BICUBIC):
    """Apply the operator `name` of OPERATORS to a PIL image (mode RGB) and return the result.

    Args:
        level: strength, 0 to 10.
        sign: +1 or -1, the direction of operators that have one; the others ignore it.
        resample: PIL's filter for geometric operators.
    """
    to_value, operator = OPERATORS[name]
    return operator(image, to_value(level / MAX_LEVEL, sign), resample)


class RandAugment:
    """`num_layers` operators drawn with replacement, each applied with probability `prob`.

    Levels are normal(magnitude, magnitude_std), clipped to 0..10. Source: arXiv 1909.13719.

    Args:
        operators: names in OPERATORS; None for timm's, RAND_AUGMENT_OPERATORS.
    """

    def __init__(
        self, num_layers=2, magnitude=9, magnitude_std=0.5, prob=0.5, resample=BICUBIC,
        operators=None,
    ):  # fmt: skip
        self.num_layers, self.prob, self.resample = num_layers, prob, resample
        self.magnitude, self.magnitude_std = magnitude, magnitude_std
        self.operators = operators or RAND_AUGMENT_OPERATORS
        unknown = next((name for name in self.operators if name not in OPERATORS), None)
        if unknown is not None:
            raise ValueError(
                f"TRAIN.RAND_AUGMENT_OPERATORS: there is no operator {unknown!r}; there are "
                + ", ".join(OPERATORS)
            )

    def __call__(self, image, rng):
        """PIL image (mode RGB) and numpy Generator to PIL image of the same size."""
        for index in rng.integers(len(self.operators), size=self.num_layers):
            if rng.random() < self.prob:
                level = min(max(rng.normal(self.magnitude, self.magnitude_std), 0), MAX_LEVEL)
                name = self.operators[index]
                image = apply_op(image, name, level, rng.choice((1, -1)), self.resample)
        return image


class AutoAugment:
    """One sub-policy drawn from `policy`, its operators applied with their probabilities."""

    def __init__(self, policy=AUTO_AUGMENT_POLICY, resample=BICUBIC):
        self.policy, self.resample = policy, resample

    def __call__(self, image, rng):
        """PIL image (mode RGB) and numpy Generator to PIL image of the same size."""
        for name, prob, level in self.policy[rng.integers(len(self.policy))]:
            if rng.random() < prob:
                image = apply_op(image, name, level, rng.choice((1, -1)), self.resample)
        return image


class ColorJitter:
    """Brightness, contrast and saturation times factors in 1 +- strength, in random order.

    Factors are uniform and never below 0. Source: torchvision's ColorJitter(s, s, s).
    """

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def __init__(self, strength=0.4):
        self.low, self.high = max(0, 1 - strength), 1 + strength

    def __call__(self, image, rng):
        """PIL image (mode RGB) and numpy Generator to PIL image of the same size."""
        factors = rng.uniform(self.low, self.high, size=3)
        for index in rng.permutation(3):
            image = self.enhancers[index](image).enhance(factors[index])
        return image
