"""Augmentation of one image: operators as a table, and the policies that draw from it.

PIL images in mode RGB in and out. Every random choice comes from the numpy Generator passed in.
Operators, levels and policies are timm 1.0.31's unless a line says otherwise; for a given level and
sign the pixels are the same.
"""

from PIL import Image, ImageEnhance, ImageOps

BICUBIC = Image.Resampling.BICUBIC
MAX_LEVEL = 10  # an operator's strength is 0 to 10
GRAY = (128, 128, 128)  # the mean pixel, where the means are 0.5

# Operators are called with (image, value, resample, fill); these make one from what each needs.


def _plain(function):
    return lambda image, value, resample, fill: function(image)


def _valued(function):
    return lambda image, value, resample, fill: function(image, value)


def _enhance(enhancer):
    return lambda image, factor, resample, fill: enhancer(image).enhance(factor)


def _affine(matrix_of):
    """`matrix_of` is a function of (value, size): from output to source coordinates."""

    def move(image, value, resample, fill):
        matrix = matrix_of(value, image.size)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)

    return move


def _rotate(image, degrees, resample, fill):
    return image.rotate(degrees, resample, fillcolor=fill)


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
    "Sharpness": (_factor, _enhance(ImageEnhance.Sharpness)),
    "SharpnessIncreasing": (_factor_from_1, _enhance(ImageEnhance.Sharpness)),
    "Rotate": (_signed(30), _rotate),  # degrees
    "ShearX": (_signed(0.3), _affine(lambda factor, size: (1, factor, 0, 0, 1, 0))),
    "ShearY": (_signed(0.3), _affine(lambda factor, size: (1, 0, 0, factor, 1, 0))),
    "TranslateXRel": (
        _signed(0.45),
        _affine(lambda share, size: (1, 0, share * size[0], 0, 1, 0)),
    ),
    "TranslateYRel": (
        _signed(0.45),
        _affine(lambda share, size: (1, 0, 0, 0, 1, share * size[1])),
    ),
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


def apply_op(image, name, level, sign=1, resample=BICUBIC, fill=GRAY):
    """Apply the operator `name` of OPERATORS to a PIL image (mode RGB) and return the result.

    Args:
        level: strength, 0 to 10.
        sign: +1 or -1, the direction of operators that have one; the others ignore it.
        resample: PIL's filter for geometric operators.
        fill: (red, green, blue) of what they uncover.
    """
    to_value, operator = OPERATORS[name]
    return operator(image, to_value(level / MAX_LEVEL, sign), resample, fill)


class RandAugment:
    """`num_layers` operators drawn with replacement, each applied with probability `prob`.

    Levels are normal(magnitude, magnitude_std), clipped to 0..10. Source: arXiv 1909.13719.

    Args:
        operators: names in OPERATORS; None for timm's, RAND_AUGMENT_OPERATORS.
        fill: see apply_op.
    """

    def __init__(
        self, num_layers=2, magnitude=9, magnitude_std=0.5, prob=0.5, operators=None, fill=GRAY
    ):
        self.num_layers, self.prob, self.fill = num_layers, prob, fill
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
                image = apply_op(image, name, level, rng.choice((1, -1)), fill=self.fill)
        return image


class AutoAugment:
    """One sub-policy drawn from `policy`, its operators applied with their probabilities."""

    def __init__(self, policy=AUTO_AUGMENT_POLICY, fill=GRAY):
        self.policy, self.fill = policy, fill

    def __call__(self, image, rng):
        """PIL image (mode RGB) and numpy Generator to PIL image of the same size."""
        for name, prob, level in self.policy[rng.integers(len(self.policy))]:
            if rng.random() < prob:
                image = apply_op(image, name, level, rng.choice((1, -1)), fill=self.fill)
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
