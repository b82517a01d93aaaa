"""Batch transforms, against the same thing written as loops over single images."""

import numpy as np
import paddle
import pytest
from crossings import count_crossings

import transforms
from config import get_config
from transforms import Mix

BATCH, HEIGHT, WIDTH, CLASSES = 5, 12, 16, 7  # odd: the middle image is its own partner
MODES = ("batch", "pair", "elem")


def draw_uint8(batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, HEIGHT, WIDTH, 3)).astype(np.uint8)
    return images, rng.integers(0, CLASSES, batch)


def draw_float(batch=BATCH, seed=0):
    shape = (batch, 3, HEIGHT, WIDTH)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw_mix(
    seed=0, batch=BATCH, size=(HEIGHT, WIDTH), mixup_alpha=0.8, cutmix_alpha=1.0, **kwargs
):
    rng = np.random.default_rng(seed)
    return transforms.draw_mix(rng, batch, size, mixup_alpha, cutmix_alpha, **kwargs)


def box_share(boxes, size=(HEIGHT, WIDTH)):
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    return (bottom - top) * (right - left) / (size[0] * size[1])


# --- normalize ---


@pytest.mark.parametrize("default", ["float32", "float64"])
def test_normalizing_puts_channels_first_and_scales_each(default):
    images, _ = draw_uint8()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    config = make_config()
    config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD = mean, std
    paddle.set_default_dtype(default)
    try:
        result, _ = transforms.BatchTransform(config, train=False)(paddle.to_tensor(images), None)
    finally:
        paddle.set_default_dtype("float32")
    assert result.dtype == getattr(paddle, default)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(
        result.numpy(), expected, atol=2e-6 if default == "float32" else 1e-14
    )


# --- random erasing ---


def test_erased_boxes_have_the_published_areas_aspects_and_places():
    boxes = transforms.draw_erasing(np.random.default_rng(0), 4000, (224, 224), prob=0.25)
    assert boxes.shape == (4000, 1, 4) and boxes.dtype == np.int64
    boxes = boxes[:, 0][box_share(boxes[:, 0]) > 0]
    assert abs(len(boxes) / 4000 - 0.25) < 0.02
    top, left, bottom, right = boxes.T
    assert (boxes >= 0).all() and (boxes <= 224).all()
    share, aspect = box_share(boxes, (224, 224)), (bottom - top) / (right - left)
    assert 0.019 < share.min() < 0.025 and 0.32 < share.max() < 0.34
    assert abs(np.median(share) - (0.02 + 1 / 3) / 2) < 0.012
    assert 0.29 < aspect.min() < 0.33 and 3.1 < aspect.max() < 3.45
    assert abs(np.median(np.log(aspect))) < 0.1
    assert top.min() <= 2 and left.min() <= 2 and bottom.max() >= 222 and right.max() >= 222


def test_several_boxes_share_the_area_of_one():
    boxes = transforms.draw_erasing(np.random.default_rng(0), 3000, (224, 224), prob=1.0, count=3)
    share = box_share(boxes, (224, 224))
    number = (share > 0).sum(axis=1)
    assert np.allclose(np.bincount(number) / 3000, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    for n in (1, 2, 3):
        found = share[number == n][:, :n]
        assert found.max() < 0.34 / n and found.min() > 0.018 / n
        assert abs(np.median(found) - (0.02 + 1 / 3) / 2 / n) < 0.01


def test_a_box_that_would_span_a_side_is_left_out():
    boxes = transforms.draw_erasing(np.random.default_rng(0), 200, (4, 300), prob=1.0)[:, 0]
    assert (boxes[:, 2] - boxes[:, 0]).max() == 3
    assert 5 < (boxes == 0).all(axis=1).sum() < 195
    boxes = transforms.draw_erasing(np.random.default_rng(0), 50, (1, 300), prob=1.0)
    assert (box_share(boxes, (1, 300)) == 0).all()


def test_a_probability_of_zero_erases_nothing_and_split_keeps_half():
    assert not transforms.draw_erasing(np.random.default_rng(0), 50, (32, 32), prob=0.0).any()
    boxes = transforms.draw_erasing(np.random.default_rng(0), 51, (32, 32), prob=1.0, split=True)
    assert not boxes[:25].any() and boxes[25:].any(axis=(1, 2)).all()


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
def test_erasing_fills_its_boxes_and_nothing_else(mode, count):
    images = draw_float()
    boxes = transforms.draw_erasing(np.random.default_rng(1), BATCH, (HEIGHT, WIDTH), 0.8, count)
    boxes[0, 0] = 0, 0, HEIGHT, WIDTH  # to every edge
    boxes[1] = 0
    paddle.seed(3)
    result = transforms.erase(paddle.to_tensor(images), boxes, mode)
    assert result.dtype == paddle.float32

    expected = images.copy()
    paddle.seed(3)
    for k in range(count):
        if mode == "const":
            noise = np.zeros_like(images)
        else:
            shape = [BATCH, 3, HEIGHT, WIDTH] if mode == "pixel" else [BATCH, 3, 1, 1]
            noise = np.broadcast_to(paddle.randn(shape).numpy(), images.shape)
        for i, (top, left, bottom, right) in enumerate(boxes[:, k]):
            expected[i, :, top:bottom, left:right] = noise[i, :, top:bottom, left:right]
    assert np.array_equal(result.numpy(), expected)
    assert np.array_equal(result.numpy()[1], images[1])


def test_erasing_noise_is_one_colour_a_box_or_one_a_pixel():
    boxes = np.full((BATCH, 1, 4), [0, 0, HEIGHT, WIDTH])
    images = paddle.to_tensor(draw_float())
    colours = transforms.erase(images, boxes, "rand").numpy()
    assert len(np.unique(colours)) == 3 * BATCH
    noise = transforms.erase(images, boxes, "pixel").numpy()
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


# --- mixup and cutmix: the draw ---


@pytest.mark.parametrize(("mode", "rows"), [("batch", 1), ("pair", BATCH), ("elem", BATCH)])
def test_a_mix_has_one_row_for_the_batch_or_one_an_image(mode, rows):
    mix = draw_mix(mode=mode)
    assert mix.lam.shape == (rows,) and mix.lam.dtype == np.float64
    assert mix.boxes.shape == (rows, 4) and mix.boxes.dtype == np.int64
    again, other = draw_mix(mode=mode), draw_mix(seed=1, mode=mode)
    assert np.array_equal(mix.lam, again.lam) and np.array_equal(mix.boxes, again.boxes)
    assert not np.array_equal(mix.lam, other.lam)


def test_partners_of_a_pair_share_their_draw():
    mix = draw_mix(batch=9, mode="pair")
    assert np.array_equal(mix.lam, mix.lam[::-1])
    assert np.array_equal(mix.boxes, mix.boxes[::-1])
    assert len(np.unique(mix.lam)) > 3


def test_mixup_weights_follow_the_beta_distribution():
    lam = draw_mix(batch=20000, cutmix_alpha=0.0, mode="elem").lam
    assert abs(lam.mean() - 0.5) < 0.01
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.005  # of Beta(0.8, 0.8)


def test_cutmix_boxes_keep_the_drawn_share_or_more_where_they_are_clipped():
    size = (224, 192)
    mix = draw_mix(batch=20000, size=size, mixup_alpha=0.0, mode="elem")
    assert (mix.boxes >= 0).all() and (mix.boxes <= [224, 192, 224, 192]).all()
    np.testing.assert_allclose(mix.lam, 1 - box_share(mix.boxes, size), atol=1e-6)
    top, left, bottom, right = mix.boxes.T
    inner = (top > 0) & (left > 0) & (bottom < 224) & (right < 192)
    # Not clipped: the image's aspect. Clipped at a border: less than a Beta(1, 1) = uniform share.
    inner &= bottom - top > 40
    aspect = (bottom - top)[inner] / (right - left)[inner]
    assert np.abs(aspect / (224 / 192) - 1).max() < 0.05
    assert 0.65 < mix.lam.mean() < 0.75
    assert mix.lam.min() < 0.2 and mix.lam.max() == 1
    assert abs(((top + bottom) / 2)[inner].mean() - 112) < 3


def test_cutmix_boxes_are_centred_and_sized_by_lam():
    rng = np.random.default_rng(0)
    lam = np.full(2000, 0.75)
    boxes = transforms._cutmix_boxes(rng, lam, np.array([224, 192]), None)
    top, left, bottom, right = boxes.T
    assert (bottom - top).max() == 112 and (right - left).max() == 96
    clipped = (top == 0) | (bottom == 224)
    assert (bottom - top)[~clipped].min() == 112
    assert abs(clipped.mean() - 0.5) < 0.05  # a centre within 56 of an edge of 224


def test_minmax_boxes_have_sides_in_range_and_are_never_clipped():
    size = (200, 100)
    mix = draw_mix(
        batch=4000, size=size, mixup_alpha=0.0, cutmix_alpha=0.0, minmax=[0.2, 0.8], mode="elem"
    )
    top, left, bottom, right = mix.boxes.T
    height, width = bottom - top, right - left
    assert (height.min(), height.max()) == (40, 159) and (width.min(), width.max()) == (20, 79)
    assert top.min() == 0 and bottom.max() == 200 and left.min() == 0 and right.max() == 100
    assert abs(np.corrcoef(height, width)[0, 1]) < 0.05
    np.testing.assert_allclose(mix.lam, 1 - box_share(mix.boxes, size), atol=1e-6)


@pytest.mark.parametrize("minmax", [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
def test_minmax_may_be_one_size(minmax):
    boxes = draw_mix(mixup_alpha=0.0, minmax=minmax, mode="elem").boxes
    assert (boxes[:, 2] - boxes[:, 0] == int(HEIGHT * minmax[0])).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mixup", "cutmix", "share"), [(0.8, 1, 0.3), (0.8, 0, 0), (0, 1, 1)])
def test_cutmix_takes_its_share_of_draws(mode, mixup, cutmix, share):
    size = (1000, 1000)  # so that cutmix's box is hardly ever empty
    draws = [
        draw_mix(seed, 8, size, mixup, cutmix, switch_prob=0.3, mode=mode) for seed in range(500)
    ]
    has_box = np.concatenate([mix.boxes.any(axis=1) for mix in draws])
    assert abs(has_box.mean() - share) < (0.06 if 0 < share < 1 else 0.005)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("minmax", [None, [0.2, 0.8]])
def test_mixing_happens_with_its_probability(mode, prob, minmax):
    options = {"prob": prob, "mode": mode, "minmax": minmax}
    draws = [draw_mix(seed, 8, (500, 500), **options) for seed in range(500)]
    lam = np.concatenate([mix.lam for mix in draws])
    boxes = np.concatenate([mix.boxes for mix in draws])
    assert abs((lam < 1).mean() - prob) < 0.07
    assert (box_share(boxes[lam == 1]) == 0).all()


# --- mixup and cutmix: the arithmetic ---


def mix_by_loop(images, mix):
    mixed = images.copy()
    for i in range(len(images)):
        k = i if len(mix.lam) > 1 else 0
        partner = images[len(images) - 1 - i]
        top, left, bottom, right = mix.boxes[k]
        if mix.boxes[k].any():
            mixed[i, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
        else:
            mixed[i] = images[i] * mix.lam[k] + partner * (1 - mix.lam[k])
    return mixed


@pytest.mark.parametrize("batch", [1, 4, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switch_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("minmax", [None, [0.3, 0.9]])
def test_mixing_equals_a_loop_over_images(batch, mode, switch_prob, minmax):
    images = draw_float(batch)
    for seed in range(4):
        mix = draw_mix(seed, batch, mode=mode, switch_prob=switch_prob, minmax=minmax, prob=0.8)
        result = transforms.mix_images(paddle.to_tensor(images), mix)
        assert result.dtype == paddle.float32
        np.testing.assert_allclose(result.numpy(), mix_by_loop(images, mix), atol=1e-6)


def test_cutmix_copies_pixels_exactly():
    images = draw_float()
    mix = Mix(np.float32([0.5]), np.array([[2, 3, 8, 9]]))
    result = transforms.mix_images(paddle.to_tensor(images), mix).numpy()
    assert np.array_equal(result, mix_by_loop(images, mix))


# --- soft targets ---


def test_labels_are_smoothed_evenly():
    targets = transforms.soft_targets(paddle.to_tensor([2, 0]), 4, smoothing=0.1).numpy()
    on, off = 0.925, 0.025
    np.testing.assert_allclose(targets, [[off, off, on, off], [on, off, off, off]], atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_mixed_as_images_are(mode):
    labels = np.array([1, 2, 3, 3, 6])
    for seed in range(4):
        lam = draw_mix(seed, mode=mode).lam
        targets = transforms.soft_targets(paddle.to_tensor(labels), CLASSES, 0.1, lam)
        assert targets.dtype == paddle.float32 and targets.shape == [BATCH, CLASSES]
        own = np.eye(CLASSES)[labels] * 0.9 + 0.1 / CLASSES
        expected = own * lam[:, None] + own[::-1] * (1 - lam[:, None])
        np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(targets.numpy().sum(axis=1), 1, atol=1e-6)


# --- all together, from the configuration ---


def make_config(**train):
    config = get_config()
    config.defrost()
    config.MODEL.NUM_CLASSES = CLASSES
    for key, value in train.items():
        config.TRAIN[key] = value
    return config


def run(config, seed=0, train=True, batch=BATCH):
    images, labels = draw_uint8(batch)
    transform = transforms.BatchTransform(config, train)
    paddle.seed(seed)
    rng = np.random.default_rng(seed)
    return transform(paddle.to_tensor(images), paddle.to_tensor(labels), rng)


def test_evaluation_only_normalizes():
    images, labels = draw_uint8()
    result, result_labels = run(make_config(), train=False)
    expected = (images.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert np.array_equal(result_labels.numpy(), labels)


@pytest.mark.parametrize(
    "off",
    [
        {"MIXUP_PROB": 0.0},
        {"MIXUP_ALPHA": 0.0, "CUTMIX_ALPHA": 0.0},
    ],
)
def test_with_nothing_on_training_only_normalizes_and_smooths(off):
    result, targets = run(make_config(RANDOM_ERASE_PROB=0.0, SMOOTHING=0.2, **off))
    expected, labels = run(make_config(), train=False)
    assert np.array_equal(result.numpy(), expected.numpy())
    smooth = np.eye(CLASSES)[labels.numpy()] * 0.8 + 0.2 / CLASSES
    np.testing.assert_allclose(targets.numpy(), smooth, atol=1e-6)


def test_minmax_alone_turns_cutmix_on():
    config = make_config(MIXUP_ALPHA=0.0, CUTMIX_ALPHA=0.0, CUTMIX_MINMAX=[0.3, 0.8])
    config.TRAIN.RANDOM_ERASE_PROB = 0.0
    plain, _ = run(config, train=False)
    mixed, targets = run(config)
    assert 0 < (plain.numpy() != mixed.numpy()).mean() < 0.64
    assert (targets.numpy() > 0.15).sum(axis=1).max() == 2


def test_erasing_comes_after_normalizing_and_before_mixing():
    options = {
        "RANDOM_ERASE_PROB": 0.7,
        "RANDOM_ERASE_COUNT": 2,
        "RANDOM_ERASE_MODE": "const",
        "MIXUP_MODE": "elem",
        "MIXUP_SWITCH_PROB": 0.4,
        "MIXUP_PROB": 0.9,
        "MIXUP_ALPHA": 0.3,
        "CUTMIX_ALPHA": 0.7,
        "SMOOTHING": 0.2,
    }
    result, targets = run(make_config(**options))
    images, labels = draw_uint8()
    images = ((images / np.float32(255) - 0.5) / 0.5).transpose(0, 3, 1, 2).astype(np.float32)
    rng = np.random.default_rng(0)
    for i, boxes in enumerate(transforms.draw_erasing(rng, BATCH, (HEIGHT, WIDTH), 0.7, 2)):
        for top, left, bottom, right in boxes:
            images[i, :, top:bottom, left:right] = 0
    mix = transforms.draw_mix(rng, BATCH, (HEIGHT, WIDTH), 0.3, 0.7, None, 0.9, 0.4, "elem")
    np.testing.assert_allclose(result.numpy(), mix_by_loop(images, mix), atol=1e-6)
    expected = transforms.soft_targets(paddle.to_tensor(labels), CLASSES, 0.2, mix.lam)
    assert np.array_equal(targets.numpy(), expected.numpy())


def test_split_leaves_the_first_half_alone():
    config = make_config(MIXUP_PROB=0.0, RANDOM_ERASE_PROB=1.0, RANDOM_ERASE_SPLIT=True)
    plain, _ = run(config, train=False)
    erased, _ = run(config)
    changed = (plain.numpy() != erased.numpy()).any(axis=(1, 2, 3))
    assert changed.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("mode", MODES)
def test_the_seeds_alone_decide_what_happens_to_a_batch(mode):
    config = make_config(MIXUP_MODE=mode, RANDOM_ERASE_PROB=1.0)
    state = np.random.get_state()[1].tolist()
    first, again, other = run(config), run(config), run(config, seed=1)
    assert np.array_equal(first[0].numpy(), again[0].numpy())
    assert np.array_equal(first[1].numpy(), again[1].numpy())
    assert not np.array_equal(first[0].numpy(), other[0].numpy())
    assert state == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("erase_mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_nothing_is_read_back_from_the_device(monkeypatch, mode, erase_mode, switch_prob):
    config = make_config(
        MIXUP_MODE=mode,
        MIXUP_SWITCH_PROB=switch_prob,
        RANDOM_ERASE_PROB=1.0,
        RANDOM_ERASE_MODE=erase_mode,
        RANDOM_ERASE_COUNT=2,
    )

    with monkeypatch.context() as patch:
        seen = count_crossings(patch)
        images, targets = run(config)
    assert seen["read"] == []
    assert images.dtype == targets.dtype == paddle.float32


@pytest.mark.parametrize("alphas", [(0.8, 0.0, None), (0.0, 1.0, None), (0.0, 0.0, [0.3, 0.8])])
def test_any_kind_of_mixing_is_enough(alphas):
    mixup, cutmix, minmax = alphas
    options = {"MIXUP_ALPHA": mixup, "CUTMIX_ALPHA": cutmix, "CUTMIX_MINMAX": minmax}
    config = make_config(MIXUP_PROB=1.0, SMOOTHING=0.0, **options)
    targets = np.concatenate([run(config, seed)[1].numpy() for seed in range(4)])
    assert ((targets > 0) & (targets < 1)).any()


def test_training_is_in_paddles_default_type():
    config = make_config(MIXUP_MODE="elem", RANDOM_ERASE_PROB=1.0)
    paddle.set_default_dtype("float64")
    try:
        images, targets = run(config)
        config.TRAIN.RANDOM_ERASE_MODE = "rand"
        colours, _ = run(config)
    finally:
        paddle.set_default_dtype("float32")
    assert images.dtype == colours.dtype == targets.dtype == paddle.float64
