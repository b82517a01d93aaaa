"""What changes the weights: schedule, AdamW's parts, loss scaling, averaging."""

import contextlib
import itertools
import math
import re
from types import SimpleNamespace

import golden
import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.amp import grad_scaler
from program import ROOT

from config import ConfigError, get_config, update_config
from datasets import batches_per_epoch
from training import advice, optim
from training.optim import EMA, LearningRate, NoEMA, Updater, build_optimizer, decayed_parameters


class TwoLayers(nn.Layer):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)


@pytest.fixture
def model():
    """A small model none of whose parameters is zero."""
    paddle.seed(0)
    layers = TwoLayers()
    for param in layers.parameters():
        param.set_value(paddle.rand(param.shape) + 0.5)
    return layers


def config_of(**changes):
    config = get_config()
    config.TRAIN.merge_from_list([item for change in changes.items() for item in change])
    return config


def numpy_of(model):
    return {name: param.numpy().copy() for name, param in model.named_parameters()}


def loss_with_gradients(model, gradients):
    """A loss whose gradient for each parameter is the given array."""
    terms = [(p * paddle.to_tensor(gradients[n])).sum() for n, p in model.named_parameters()]
    return sum(terms)


def random_gradients(model, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(param.shape)).astype("float32")
        for name, param in model.named_parameters()
    }


# --- learning rate ---


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-6),
        (5, (1e-6 + 1e-3) / 2),
        (9, 1e-6 + 0.9 * (1e-3 - 1e-6)),
        (10, 1e-3),
        (35, 1e-5 + (1e-3 - 1e-5) * (1 + math.sqrt(0.5)) / 2),
        (60, (1e-3 + 1e-5) / 2),
        (110, 1e-5),
        (1000, 1e-5),
    ],
)
def test_the_rate_warms_up_linearly_then_follows_half_a_cosine(step, rate):
    train = config_of(
        WARMUP_START_LR=1e-6, BASE_LR=1e-3, END_LR=1e-5, WARMUP_EPOCHS=1, NUM_EPOCHS=11
    ).TRAIN
    schedule = LearningRate(train, images_per_step=512, steps_per_epoch=10)
    assert schedule(step) == pytest.approx(rate, rel=1e-12)


def test_a_single_step_after_warm_up_has_the_whole_curve():
    train = config_of(WARMUP_STEPS=9, NUM_EPOCHS=1, END_LR=1e-5).TRAIN
    schedule = LearningRate(train, images_per_step=512, steps_per_epoch=10)
    assert schedule(9) == train.BASE_LR and schedule(10) == pytest.approx(1e-5)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    train = config_of(
        WARMUP_START_LR=5.0, BASE_LR=1.0, END_LR=0.0, WARMUP_STEPS=0, NUM_EPOCHS=1
    ).TRAIN
    schedule = LearningRate(train, images_per_step=512, steps_per_epoch=10)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("images", "reference", "scale"), [(2048, 512, 4.0), (256, 1024, 0.25), (4096, None, 1.0)]
)
def test_rates_scale_with_the_images_of_a_step(images, reference, scale):
    train = config_of(LINEAR_SCALED_LR=reference, BASE_LR=1e-3).TRAIN
    expected = (1e-6 * scale, 1e-3 * scale, 1e-5 * scale)
    rate = LearningRate(train, images, steps_per_epoch=10)
    assert (rate.start, rate.base, rate.end) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("steps", "expected"), [(None, 20 * 625), (10000, 10000), (0, 0)])
def test_warm_up_steps_override_warm_up_epochs(steps, expected):
    assert LearningRate(config_of(WARMUP_STEPS=steps).TRAIN, 512, 625).warmup == expected


@pytest.mark.parametrize("name", ["gmlp_s16_finetune", "gmlp_ti16_scratch"])
@pytest.mark.parametrize("images", [200, 1000, 10_000, 100_000])
def test_recipes_for_photographs_reach_their_rate_in_a_tenth_of_the_run(name, images):
    train = get_config(ROOT / "configs" / f"{name}.yaml").TRAIN
    for ranks, batch_size in itertools.product(range(1, 9), (16, 32, 64, 128, 256)):
        batches = batches_per_epoch(images, batch_size, ranks)
        if batches == 0:  # told which batch fits, which then does
            word = advice.about_batch_size(images, ranks)
            batch_size = int(word.split()[-1])
            batches = batches_per_epoch(images, batch_size, ranks)
        rate = optim.LearningRate(train, batch_size * ranks, batches)
        peak = train.BASE_LR * batch_size * ranks / 256
        tenth = [rate(step) for step in range(0, rate.total // 10 + 1, 1 + rate.total // 1000)]
        assert max(*tenth, rate(rate.warmup)) == pytest.approx(peak, rel=0.03)
        assert max(tenth) > 0.97 * peak and rate(rate.total) == 0


def test_a_data_set_smaller_than_the_ranks_is_told_how_many_there_may_be():
    assert advice.about_batch_size(3, 8) == "-nprocs 3, and -batch_size 1"


def test_the_optimizer_takes_each_steps_rate_and_that_of_a_resumed_step(model):
    schedule = optim.build_schedule(lambda step: 0.5 / (1 + step))
    optimizer = build_optimizer(get_config(), model, schedule)
    updater = Updater(optimizer, schedule, optim.build_scaler(None), NoEMA(model))
    rates = []
    for _ in range(3):
        rates.append(optimizer.get_lr())
        loss_with_gradients(model, random_gradients(model, 0)).backward()
        updater.update()
    assert rates == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert updater.step == 3
    updater.move_to(99)
    assert (updater.step, optimizer.get_lr()) == (99, pytest.approx(0.005))


def test_every_schedule_goes_from_the_whole_rate_to_the_last_and_names_itself():
    for name, curve in optim.SCHEDULES.items():
        assert (curve(0.0), curve(1.0)) == pytest.approx((1.0, 0.0)), name
        train = config_of(LR_SCHEDULE=name, WARMUP_STEPS=3, LINEAR_SCALED_LR=None).TRAIN
        assert str(LearningRate(train, 512, 10)) == (
            f"learning rate 1e-06 to 0.001 in 3 steps, then to 1e-05 ({name})"
        )


def test_the_configs_choices_are_the_tables():
    for key, table in (("OPTIMIZER.NAME", optim.OPTIMIZERS), ("LR_SCHEDULE", optim.SCHEDULES)):
        for name in table:
            config_of_text(f"TRAIN.{key}", name)
        with pytest.raises(ConfigError) as error:
            config_of_text(f"TRAIN.{key}", "no such")
        assert re.findall(r"'([^']+)'", str(error.value).split(", not ")[0]) == list(table)


def config_of_text(key, value):
    return update_config(get_config(), SimpleNamespace(opts=[key, value]))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_takes_the_rate_clips_and_spares_biases_the_decay(model, name):
    train = {"OPTIMIZER.NAME": name, "GRAD_CLIP": 1e-9, "WEIGHT_DECAY": 0.5}
    optimizer = build_optimizer(config_of(**train), model, optim.build_schedule(lambda step: 0.1))
    before = numpy_of(model)
    zero = {name: 0 * value for name, value in before.items()}
    loss_with_gradients(model, zero).backward()
    optimizer.step()
    moved = {n: not np.array_equal(v, before[n]) for n, v in numpy_of(model).items()}
    assert moved == {"fc.weight": True, "fc.bias": False, "norm.weight": False, "norm.bias": False}
    assert optimizer.get_lr() == 0.1


# --- AdamW ---


def test_weight_decay_shrinks_matrices_and_convolutions_and_nothing_else():
    model = golden.build("tiny")
    schedule = optim.build_schedule(lambda step: 0.1)
    optimizer = build_optimizer(config_of(WEIGHT_DECAY=0.5), model, schedule)
    before = numpy_of(model)
    shapes = {param.name: param.ndim for param in optimizer._parameter_list}
    assert decayed_parameters(model) == {name for name, axes in shapes.items() if axes > 1}
    zeros = {name: np.zeros_like(value) for name, value in before.items()}
    loss_with_gradients(model, zeros).backward()
    optimizer.step()
    for name, value in numpy_of(model).items():
        decayed = "norm" not in name and name.endswith("weight")
        factor = 1 - 0.1 * 0.5 if decayed else 1.0
        np.testing.assert_allclose(value, before[name] * factor, rtol=1e-6, err_msg=name)


def test_steps_are_adamws_by_hand(model):
    train = {"WEIGHT_DECAY": 0.1, "OPTIMIZER.EPS": 1e-3, "OPTIMIZER.BETAS": (0.8, 0.95)}
    rates = [0.1, 0.05, 0.02]
    schedule = optim.build_schedule(lambda step: rates[min(step, 2)])
    optimizer = build_optimizer(config_of(**train), model, schedule)
    updater = Updater(optimizer, schedule, optim.build_scaler(None), NoEMA(model))
    weights = {name: value.astype("float64") for name, value in numpy_of(model).items()}
    first, second = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for step, rate in enumerate(rates, 1):
        gradients = random_gradients(model, step)
        loss_with_gradients(model, gradients).backward()
        updater.update()
        for name, g in gradients.items():
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g.astype("float64") ** 2
            mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
            decay = 0.1 if name == "fc.weight" else 0.0
            weights[name] -= rate * (decay * weights[name] + mean / (np.sqrt(square) + 1e-3))
    for name, value in numpy_of(model).items():
        np.testing.assert_allclose(value, weights[name], rtol=1e-5, err_msg=name)


def test_layer_decay_scales_the_rate_of_each_layer():
    model = golden.build("tiny")
    scales = optim.layer_scales(model, 0.5)
    assert scales.keys() == numpy_of(model).keys()
    expected = {"patch_embed": 1 / 16, "mixer_layers.0": 1 / 8, "mixer_layers.1": 1 / 4,
                "mixer_layers.2": 1 / 2, "norm": 1.0, "head": 1.0}  # fmt: skip
    for name, scale in scales.items():
        (layer,) = [layer for layer in expected if name.startswith(f"{layer}.")]
        assert scale == expected[layer], name


@pytest.mark.parametrize("decay", [0.5, 1.0, None])
def test_layer_decay_scales_steps_and_decay_but_not_the_clipping(decay):
    model = golden.build("tiny")
    # With so large an epsilon AdamW's first step is proportional to the clipped gradient.
    train = {"LAYER_DECAY": decay, "WEIGHT_DECAY": 0.5, "OPTIMIZER.EPS": 1e3, "GRAD_CLIP": 2.0}
    schedule = optim.build_schedule(lambda step: 0.1)
    optimizer = build_optimizer(config_of(**train), model, schedule)
    before, gradients = numpy_of(model), random_gradients(model, 0)
    norm = math.sqrt(sum((g.astype("float64") ** 2).sum() for g in gradients.values()))
    loss_with_gradients(model, gradients).backward()
    optimizer.step()
    scales = optim.layer_scales(model, decay or 1.0)
    for name, value in numpy_of(model).items():
        share = 0.5 if gradients[name].ndim > 1 else 0.0
        step = 0.1 * scales[name] * (share * before[name] + gradients[name] * 2 / norm / 1e3)
        np.testing.assert_allclose(value, before[name] - step, rtol=1e-5, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(("clip", "scaled_by"), [(0.5, 0.5 / 10), (20.0, 1.0), (None, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(model, clip, scaled_by):
    # With so large an epsilon AdamW's first step is proportional to the gradient.
    train = {"GRAD_CLIP": clip, "WEIGHT_DECAY": 0.0, "OPTIMIZER.EPS": 1e3}
    schedule = optim.build_schedule(lambda step: 1e3)
    optimizer = build_optimizer(config_of(**train), model, schedule)
    before, gradients = numpy_of(model), random_gradients(model, 0)
    norm = math.sqrt(sum((g.astype("float64") ** 2).sum() for g in gradients.values()))
    gradients = {name: g * np.float32(10 / norm) for name, g in gradients.items()}
    loss_with_gradients(model, gradients).backward()
    optimizer.step()
    for name, value in numpy_of(model).items():
        step = scaled_by * gradients[name]
        np.testing.assert_allclose(before[name] - value, step, rtol=0.02, atol=1e-6, err_msg=name)


# --- loss scaling ---


class Recorder:
    """Records the calls of all its methods in one list."""

    def __init__(self, calls, prefix="", **attributes):
        self.__dict__.update(calls=calls, prefix=prefix, **attributes)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((self.prefix + name, *arguments))


@pytest.mark.parametrize("found_inf", [False, True])
@pytest.mark.parametrize("name", ["_cache_found_inf", "_cache_founf_inf"])  # Paddle 3's and 2.6's
def test_an_update_unscales_steps_and_only_then_moves_average_rate_and_counter(found_inf, name):
    calls = []
    schedule = Recorder(calls, "rate.")
    optimizer = Recorder(calls, "optimizer.")
    # What step() leaves; a tensor that is read again would wait for the device again.
    flag = {name: found_inf}
    scaler = Recorder(calls, "scaler.", is_enable=lambda: True, _found_inf=None, **flag)
    updater = Updater(optimizer, schedule, scaler, Recorder(calls, "ema."))
    updater.step = 6
    updater.update()
    expected = [
        ("scaler.unscale_", optimizer),
        ("scaler.step", optimizer),
        ("scaler.update",),
        ("optimizer.clear_grad",),
    ]
    if not found_inf:
        expected += [("ema.update",), ("rate.step", 7)]
    assert calls == expected
    assert updater.step == (6 if found_inf else 7)


@pytest.fixture
def real_scaler(monkeypatch):
    """Paddle's own loss scaling at work: it asks for a GPU, though its kernels run here too."""
    place = SimpleNamespace(is_gpu_place=lambda: True)
    tracer = SimpleNamespace(_expected_place=place)
    monkeypatch.setattr(grad_scaler, "_dygraph_tracer", lambda: tracer)
    # What auto_cast leaves behind on a GPU; without it the scaler turns itself off.
    monkeypatch.setattr(grad_scaler.amp_global_state(), "amp_dtype", "float16")
    scaler = optim.build_scaler(optim.Amp("float16"))
    assert scaler.is_enable()
    return scaler


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Paddle 3.3.1's GradScaler raises TypeError here (requirements.txt)",
)
def test_a_step_that_overflows_changes_nothing_and_the_next_one_counts(model, real_scaler):
    average = TwoLayers()
    ema = EMA(model, average, decay=0.5)
    schedule = optim.build_schedule(lambda step: 0.1 / (1 + step))
    optimizer = build_optimizer(config_of(GRAD_CLIP=1.0), model, schedule)
    updater = Updater(optimizer, schedule, real_scaler, ema)

    def update(gradients):
        updater.scale(loss_with_gradients(model, gradients)).backward()
        updater.update()

    update(random_gradients(model, 1))
    weights, averages = numpy_of(model), numpy_of(average)
    overflow = random_gradients(model, 2)
    overflow["fc.bias"][0] = 1e37  # above float32 once scaled
    update(overflow)
    for name, value in numpy_of(model).items():
        assert np.array_equal(value, weights[name]), name
        assert np.array_equal(average.state_dict()[name].numpy(), averages[name]), name
    assert (updater.step, optimizer.get_lr()) == (1, pytest.approx(0.05))

    update(random_gradients(model, 3))
    for name, value in numpy_of(model).items():
        assert np.isfinite(value).all() and not np.array_equal(value, weights[name]), name
    assert (updater.step, optimizer.get_lr()) == (2, pytest.approx(0.1 / 3))


def test_loss_scaling_does_not_change_a_clipped_step(model, real_scaler):
    start, results = numpy_of(model), []
    train = {"GRAD_CLIP": 0.5, "OPTIMIZER.EPS": 1e3}  # a large epsilon: the norm matters
    for scaler in (real_scaler, optim.build_scaler(None)):
        model.set_state_dict({name: paddle.to_tensor(value) for name, value in start.items()})
        schedule = optim.build_schedule(lambda step: 1e3)
        optimizer = build_optimizer(config_of(**train), model, schedule)
        updater = Updater(optimizer, schedule, scaler, NoEMA(model))
        loss = loss_with_gradients(model, random_gradients(model, 5))
        factor = 2**16 if scaler is real_scaler else 1
        assert updater.scale(loss).numpy().item() == pytest.approx(float(loss) * factor)
        updater.scale(loss).backward()
        updater.update()
        results.append(numpy_of(model))
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-5, err_msg=name)
        assert not np.array_equal(value, start[name])


@pytest.mark.parametrize(
    ("amp", "scaling"),
    [(optim.Amp("float16"), True), (optim.Amp("bfloat16"), False),
     (optim.Amp("bfloat16", layer_norm=True), False), (None, False)],
)  # fmt: skip
def test_only_float16_has_loss_scaling_and_only_amp_an_autocast(monkeypatch, amp, scaling):
    calls = []

    def record(**options):
        calls.append(options)
        return SimpleNamespace(is_enable=lambda: False)

    monkeypatch.setattr(paddle.amp, "GradScaler", record)
    monkeypatch.setattr(paddle.amp, "auto_cast", record)
    optim.build_scaler(amp)
    assert calls.pop()["enable"] is scaling
    context = optim.build_autocast(amp)()
    if amp:
        norm = {"custom_white_list": {"layer_norm"}} if amp.layer_norm else {}
        assert calls == [{"level": "O1", "dtype": amp.dtype, **norm}]
    else:
        assert calls == [] and isinstance(context, contextlib.nullcontext)


# --- averaging ---


def test_the_average_is_the_one_computed_directly(model):
    average = TwoLayers()
    ema = EMA(model, average, decay=0.9)
    assert ema.average is average and not average.training
    expected = {name: value.astype("float64") for name, value in numpy_of(model).items()}
    for step in range(4):
        moved = random_gradients(model, step)
        model.set_state_dict({name: paddle.to_tensor(value) for name, value in moved.items()})
        ema.update()
        for name, value in moved.items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in numpy_of(average).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in numpy_of(model).items():
        assert np.array_equal(value, moved[name])
    assert all(param.stop_gradient for param in average.parameters())


@pytest.mark.parametrize(("on_cpu", "home"), [(True, "cpu"), (False, "gpu:0")])
def test_the_average_visits_the_device_for_validation_only(model, monkeypatch, on_cpu, home):
    places = []
    average = TwoLayers()
    monkeypatch.setattr(average, "to", lambda device: places.append(device))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    ema = EMA(model, average, decay=0.9, on_cpu=on_cpu)
    assert places == [home]
    with ema.on_device() as yielded:
        assert yielded is average and places[-1] == "gpu:0"
    assert places[-1] == home


def test_without_ema_the_average_is_the_model(model):
    before = [param.numpy().copy() for param in model.parameters()]
    ema = NoEMA(model)
    ema.update()
    assert ema.average is model
    assert all((a == b.numpy()).all() for a, b in zip(before, model.parameters()))
