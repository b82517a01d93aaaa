"""Image transforms: timm's pixels where nothing is random, its distributions where something is."""

import json
import math
import pickle
import random
from types import SimpleNamespace

import golden
import numpy as np
import pytest
from PIL import Image, ImageEnhance

import augment
import transforms
from augment import RAND_AUGMENT_OPERATORS, AutoAugment, ColorJitter, RandAugment
from config import get_config
from transforms import EvalTransform, TrainTransform

AUGMENTED = golden.load("augment_ops")
KEYS = [key for key in AUGMENTED if key != "image" and not key.startswith("arg/")]
EVALUATED = golden.load("eval_transform")
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
POLICIES = json.loads((golden.DATA / "augment_policies.json").read_text())


def read_image(name):
    return Image.open(golden.DATA / "images" / name).convert("RGB")


def small_image(width=40, height=30):
    return Image.fromarray(AUGMENTED["image"]).resize((width, height))


def pixels(image):
    return np.asarray(image).astype(int)


class Recorder:
    """Stands in for an operator table entry: notes what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, image, name, level, sign=1, fill=None):
        self.calls.append((name, level, sign))
        return image


@pytest.fixture
def applied(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(augment, "apply_op", recorder)
    return recorder.calls


# --- evaluation ---


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_the_evaluation_crop_has_timms_pixels(name):
    crop = EvalTransform(224, 0.875)(read_image(name))
    assert crop.dtype == np.uint8 and crop.shape == (224, 224, 3)
    difference = np.abs(crop.astype(int) - EVALUATED[name])
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999


def some_sizes(count, longest=400):
    """So many (width, height), from 1:20 to 20:1."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        long = int(rng.integers(20, longest + 1))
        short = max(1, round(long * 20 ** -rng.random()))
        yield (long, short) if rng.random() < 0.5 else (short, long)


def photograph_or_noise(size, rng):
    """A part of a photograph of that size, or noise."""
    if rng.random() < 0.5:
        return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    photograph = PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]
    left, top = (int(rng.integers(full - part + 1)) for full, part in zip(photograph.size, size))
    return photograph.crop((left, top, left + size[0], top + size[1]))


PHOTOGRAPHS = [
    read_image(name).resize((400, 400))
    for name in ("landscape_500x375.jpg", "portrait_333x500.jpg")
]


def test_the_evaluation_crop_is_that_of_the_whole_image_resized_for_any_shape():
    """As torchvision's Resize and CenterCrop have it, with the Pillow that is installed."""
    rng = np.random.default_rng(0)
    for number, size in enumerate(some_sizes(1000)):
        image = photograph_or_noise(size, rng)
        side, crop_pct = [(32, 0.875), (24, 1.0), (48, 0.9), (56, 0.95), (32, 0.5)][number % 5]
        short = math.floor(side / crop_pct)
        width, height = size
        if width <= height:
            whole = image.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
        else:
            whole = image.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
        top = round((whole.height - side) / 2.0)
        left = round((whole.width - side) / 2.0)
        expected = pixels(whole)[top : top + side, left : left + side]
        assert np.array_equal(EvalTransform(side, crop_pct)(image), expected), (size, side)


def test_an_image_that_already_has_the_size_is_only_cropped():
    image = read_image("landscape_500x375.jpg").resize((50, 32))
    assert np.array_equal(EvalTransform(28, 0.875)(image), pixels(image)[2:30, 11:39])


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (1, 500), (3, 2)])
def test_images_of_any_shape_can_be_evaluated_and_trained_on(size):
    image = Image.new("RGB", size, (10, 200, 30))
    assert (EvalTransform(32, 0.875)(image) == [10, 200, 30]).all()
    for seed in range(20):
        crop = TrainTransform(32, None)(image, np.random.default_rng(seed))
        assert (crop == [10, 200, 30]).all() and crop.shape == (32, 32, 3)


def test_a_very_wide_image_is_evaluated_without_resizing_all_of_it(monkeypatch):
    pixels_of = np.random.default_rng(0).integers(0, 256, (3, 3000, 3), dtype=np.uint8)
    image = Image.fromarray(pixels_of)
    whole = image.resize((1000 * 36, 36), Image.Resampling.BICUBIC)  # short side floor(32 / 0.875)
    expected = pixels(whole.crop((17984, 2, 18016, 34)))
    resize, sizes = Image.Image.resize, []
    record = lambda self, size, *args, **kwargs: (  # noqa: E731
        sizes.append(size) or resize(self, size, *args, **kwargs)
    )
    monkeypatch.setattr(Image.Image, "resize", record)
    assert np.array_equal(EvalTransform(32, 0.875)(image), expected)
    for size in ((200_000, 1), (1, 200_000), (1001, 2)):
        EvalTransform(32, 0.875)(Image.new("RGB", size))
    assert max(width * height for width, height in sizes) <= 65 * 36 * 36


@pytest.mark.parametrize("crop_pct", [0, -0.5, 1.01, 87.5])
def test_a_crop_share_that_cannot_be_is_refused(crop_pct):
    with pytest.raises(ValueError, match="crop_pct"):
        EvalTransform(224, crop_pct)


# --- random crop and flip ---


def test_random_crops_cover_the_whole_range_of_areas_aspects_and_places():
    rng = np.random.default_rng(0)
    boxes = [
        transforms.random_crop_box(1000, 800, rng, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)
    ]
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 1000).all() and (bottom <= 800).all()
    area = (right - left) * (bottom - top) / 800_000
    aspect = (right - left) / (bottom - top)
    assert 0.079 < area.min() < 0.085 and 0.98 < area.max() <= 1
    assert 0.745 < aspect.min() < 0.755 and 1.32 < aspect.max() < 1.34
    small = area < 0.4  # fits at any aspect: nothing is rejected, so these are uniform
    assert abs(np.median(area[small]) - 0.24) < 0.01
    assert abs(np.median(np.log(aspect[small]))) < 0.02
    place = left[small] / (1000 - (right - left)[small])
    assert np.allclose(np.quantile(place, [0, 0.5, 1]), [0, 0.5, 1], atol=0.03)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((20000, 1), (9999, 0, 10000, 1)),
        ((1, 500), (0, 249, 1, 250)),
        ((1000, 100), (433, 0, 566, 100)),
        ((90, 1000), (0, 440, 90, 560)),
    ],
)
def test_an_image_too_long_for_any_crop_gives_its_centre(size, box):
    rng = np.random.default_rng(0)
    assert transforms.random_crop_box(*size, rng, (0.9, 1), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize(
    ("too_large", "box"), [(9, (0, 0, 32, 32)), (10, (433, 0, 566, 100))], ids=["tenth", "none"]
)
def test_ten_draws_may_fail_before_a_crop_is_the_central_one(too_large, box):
    # A share of the area and log(width / height); squares of 316 pixels, then those of 32.
    draws = iter([1.0, 0.0] * too_large + [0.01, 0.0] * 2)
    rng = SimpleNamespace(uniform=lambda low, high: next(draws), integers=lambda count: 0)
    assert transforms.random_crop_box(1000, 100, rng, (0.01, 1), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize(
    "size, box", [((200, 100), (100, 0, 200, 100)), ((100, 200), (0, 100, 100, 200))]
)
def test_a_crop_may_be_as_wide_or_as_high_as_its_image(size, box):
    draws = iter([0.5, 0.0])  # half of the area, a square
    rng = SimpleNamespace(uniform=lambda low, high: next(draws), integers=lambda n: n - 1)
    assert transforms.random_crop_box(*size, rng, (0.08, 1), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_crop_of_an_image_of_a_few_pixels_has_one_at_least(size):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        box = transforms.random_crop_box(*size, rng, (0.08, 1), (3 / 4, 4 / 3))
        assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def test_a_crop_of_everything_keeps_an_image_of_allowed_aspect_whole():
    rng = np.random.default_rng(0)
    assert transforms.random_crop_box(100, 100, rng, (1, 1), (1, 1)) == (0, 0, 100, 100)
    # No draw fits (they are wider than the image), and the fallback keeps all of it.
    assert transforms.random_crop_box(120, 100, rng, (1, 1), (1.3, 1.3)) == (0, 4, 120, 96)


def test_a_training_crop_is_cut_out_and_then_resized_for_any_box_and_shape():
    rng = np.random.default_rng(0)
    for number, size in enumerate(some_sizes(1000)):
        image, side = photograph_or_noise(size, rng), (32, 56)[number % 2]
        box = transforms.random_crop_box(
            *size, np.random.default_rng(number), (0.08, 1), (3 / 4, 4 / 3)
        )
        expected = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
        crop = TrainTransform(side, None, flip=0)(image, np.random.default_rng(number))
        assert np.array_equal(crop, pixels(expected)), (size, box)


def test_flips_happen_always_never_or_half_of_the_time():
    image = small_image(32, 32)
    whole = {"scale": (1, 1), "ratio": (1, 1)}

    def flips(probability):
        transform = TrainTransform(32, None, flip=probability, **whole)
        crops = [transform(image, np.random.default_rng(seed)) for seed in range(200)]
        kept = [np.array_equal(crop, pixels(image)) for crop in crops]
        turned = [np.array_equal(crop, pixels(image)[:, ::-1]) for crop in crops]
        assert all(a != b for a, b in zip(kept, turned))
        return sum(turned)

    assert flips(0) == 0
    assert flips(1) == 200
    assert 75 < flips(0.5) < 125


@pytest.mark.parametrize("augment", [None, RandAugment(), AutoAugment(), ColorJitter()])
def test_the_generator_alone_decides_what_happens_to_an_image(augment):
    image = read_image("small_100x80.jpg")
    transform = TrainTransform(32, augment)
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = transform(image, np.random.default_rng([1, 2, 3]))
    again = pickle.loads(pickle.dumps(transform))(image, np.random.default_rng([1, 2, 3]))
    other = transform(image, np.random.default_rng([1, 2, 4]))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


# --- augmentation ---


@pytest.mark.parametrize("key", KEYS)
def test_operators_have_timms_pixels(key):
    name, level, sign, resample = key.split("/")
    image = Image.fromarray(AUGMENTED["image"])
    sign = 1 if sign == "+" else -1
    result = augment.apply_op(image, name, int(level), sign, RESAMPLE.get(resample))
    assert np.array_equal(pixels(result), AUGMENTED[key])


@pytest.mark.parametrize("name", sorted(augment.OPERATORS))
def test_operators_take_any_level_and_leave_the_original_alone(name):
    image = small_image()
    before = pixels(image)
    for level in (0, 0.0, 4.999, 9.97, 10):
        for sign in (1, -1):
            result = augment.apply_op(image, name, level, sign)
            assert result.size == image.size and result.mode == "RGB"
    assert np.array_equal(pixels(image), before)


def test_posterizing_to_no_bits_keeps_one():
    image = small_image()
    result = pixels(augment.apply_op(image, "PosterizeIncreasing", 10))
    assert np.array_equal(result, pixels(image) & 128)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_what_an_operator_uncovers_has_the_mean_colour(name):
    image = Image.new("RGB", (40, 30))
    colours = {tuple(row) for row in pixels(augment.apply_op(image, name, 10)).reshape(-1, 3)}
    assert (128, 128, 128) in colours
    moved = pixels(augment.apply_op(image, name, 10, fill=(124, 116, 104))).reshape(-1, 3)
    assert (124, 116, 104) in {tuple(row) for row in moved}
    assert (128, 128, 128) not in {tuple(row) for row in moved}


@pytest.mark.parametrize(
    "mean, fill",
    [
        ([0.5, 0.5, 0.5], (128, 128, 128)),
        ([0.485, 0.456, 0.406], (124, 116, 104)),
        ([0.0, 1.0, 1.5], (0, 255, 255)),
    ],
)
@pytest.mark.parametrize("policy", ["RAND_AUGMENT", "AUTO_AUGMENT"])
def test_the_colour_of_what_is_uncovered_is_the_configured_mean(policy, mean, fill):
    config = make_config(**{"RAND_AUGMENT": False, policy: True})
    config.DATA.IMAGENET_MEAN = mean
    assert transforms.build_transform(config, train=True).augment.fill == fill


def test_policies_are_timms():
    assert sorted(augment.RAND_AUGMENT_OPERATORS) == POLICIES["randaugment_increasing"]
    policy = [[list(op) for op in pair] for pair in augment.AUTO_AUGMENT_POLICY]
    assert policy == POLICIES["autoaugment_original"]


def test_randaugment_applies_half_of_its_layers_at_noisy_levels_in_both_directions(applied):
    rng, augment = np.random.default_rng(0), RandAugment(num_layers=2, magnitude=9)
    for _ in range(3000):
        augment(None, rng)
    names, levels, signs = zip(*applied)
    assert abs(len(applied) / 6000 - 0.5) < 0.02
    share = np.unique(names, return_counts=True)[1] / len(names)
    count = len(RAND_AUGMENT_OPERATORS)
    assert len(share) == count and np.abs(share - 1 / count).max() < 0.02
    assert max(levels) == 10 and abs(np.median(levels) - 9) < 0.05
    assert abs(np.quantile(levels, 0.1587) - 8.5) < 0.05  # one standard deviation below
    assert abs(np.mean(signs)) < 0.05 and set(signs) == {1, -1}


def test_randaugment_draws_with_replacement(applied):
    rng = np.random.default_rng(0)
    for _ in range(500):
        RandAugment(num_layers=2, prob=1.0)(None, rng)
    names = [name for name, _, _ in applied]
    same = np.mean([a == b for a, b in zip(names[::2], names[1::2])])
    assert len(names) == 1000 and abs(same - 1 / len(RAND_AUGMENT_OPERATORS)) < 0.04


@pytest.mark.parametrize(("magnitude", "level"), [(-5, 0), (50, 10)])
def test_randaugment_clips_levels_to_the_scale(applied, magnitude, level):
    RandAugment(num_layers=5, magnitude=magnitude, prob=1.0)(None, np.random.default_rng(0))
    assert [found for _, found, _ in applied] == [level] * 5


def test_autoaugment_applies_each_sub_policy_with_its_probabilities(applied):
    rng = np.random.default_rng(0)
    for _ in range(25 * 400):
        AutoAugment()(None, rng)
    expected = {}
    for name, prob, level in (op for pair in augment.AUTO_AUGMENT_POLICY for op in pair):
        expected[name, level] = expected.get((name, level), 0) + 400 * prob
    counts = {}
    for name, level, _ in applied:
        counts[name, level] = counts.get((name, level), 0) + 1
    assert set(counts) == {key for key, count in expected.items() if count > 0}
    for key, count in counts.items():
        assert abs(count - expected[key]) < 5 * math.sqrt(expected[key])
    assert abs(np.mean([sign for _, _, sign in applied])) < 0.05


def test_color_jitter_enhances_by_its_factors_in_its_order():
    image = small_image()
    orders = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        factors, order = rng.uniform(0.6, 1.4, 3), tuple(rng.permutation(3))
        expected = image
        for index in order:
            kind = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][index]
            expected = kind(expected).enhance(factors[index])
        result = ColorJitter(0.4)(image, np.random.default_rng(seed))
        assert np.array_equal(pixels(result), pixels(expected))
        orders.add(order)
    assert len(orders) == 6


def test_color_jitter_never_inverts():
    augment = ColorJitter(3.0)
    assert (augment.low, augment.high) == (0, 4)


# --- from the configuration ---


def make_config(**train):
    config = get_config()
    config.defrost()
    config.DATA.IMAGE_SIZE = 32
    for key, value in train.items():
        config.TRAIN[key] = value
    return config


@pytest.mark.parametrize(
    ("rand", "auto", "jitter", "kind"),
    [
        (True, True, 0.4, RandAugment),
        (False, True, 0.4, AutoAugment),
        (False, False, 0.4, ColorJitter),
        (False, False, 0.0, type(None)),
        (False, False, None, type(None)),
    ],
)
def test_the_configuration_chooses_the_augmentation(rand, auto, jitter, kind):
    config = make_config(RAND_AUGMENT=rand, AUTO_AUGMENT=auto, COLOR_JITTER=jitter)
    transform = transforms.build_transform(config, train=True)
    assert type(transform.augment) is kind
    image = read_image("small_100x80.jpg")
    assert transform(image, np.random.default_rng(0)).shape == (32, 32, 3)


def test_the_configuration_sets_strength_crop_and_flip():
    config = make_config(RAND_AUGMENT_LAYERS=3, RAND_AUGMENT_MAGNITUDE=7)
    augment = transforms.build_transform(config, train=True).augment
    assert (augment.num_layers, augment.magnitude) == (3, 7)
    assert augment.operators == RAND_AUGMENT_OPERATORS
    config = make_config(RAND_AUGMENT_OPERATORS=["Invert", "Rotate"])
    assert transforms.build_transform(config, train=True).augment.operators == ["Invert", "Rotate"]

    config = make_config(CROP_SCALE=[0.5, 0.5], CROP_RATIO=[2.0, 2.0], HFLIP=1.0)
    transform = transforms.build_transform(config, train=True)
    transform.augment = None
    image = small_image(32, 32)
    flipped = transform(image, np.random.default_rng(0))
    box = transforms.random_crop_box(32, 32, np.random.default_rng(0), (0.5, 0.5), (2, 2))
    assert (box[2] - box[0], box[3] - box[1]) == (32, 16)
    resized = pixels(image.crop(box).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(flipped, resized[:, ::-1])
    assert transform.flip == 1

    config = make_config(RAND_AUGMENT=False, AUTO_AUGMENT=False, COLOR_JITTER=0.25)
    jitter = transforms.build_transform(config, train=True).augment
    assert (jitter.low, jitter.high) == (0.75, 1.25)


def test_an_operator_that_is_unknown_is_named_with_those_there_are():
    config = make_config(RAND_AUGMENT_OPERATORS=["Invert", "Rotat"])
    with pytest.raises(ValueError, match=r"RAND_AUGMENT_OPERATORS: .*'Rotat'.* Rotate"):
        transforms.build_transform(config, train=True)


def test_the_configuration_sets_the_evaluation_crop():
    config = make_config()
    config.DATA.CROP_PCT = 0.5
    image = read_image("small_100x80.jpg")
    crop = transforms.build_transform(config, train=False)(image, None)
    assert np.array_equal(crop, EvalTransform(32, 0.5)(image))
