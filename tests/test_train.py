"""The training loop, in this process and with one rank."""

import contextlib
import logging
import signal
import types

import numpy as np
import paddle
import pytest
from crossings import count_crossings
from golden import config_of
from paddle.nn import functional as F

from gmlp import build_gmlp
from ranks import stop
from training import advice, evaluate, optim
from training import train as training_module
from training.resume import Start
from training.state import NonFiniteLoss, Place
from training.train import Training
from transforms import BatchTransform

CLASSES = 10


def make_batches(count, size, seed=0):
    """`count` batches of (float images [size, 3, 32, 32], labels [size])."""
    rng = np.random.default_rng(seed)
    return [
        (
            paddle.to_tensor(rng.standard_normal((size, 3, 32, 32)).astype("float32")),
            paddle.to_tensor(rng.integers(0, CLASSES, size)),
        )
        for _ in range(count)
    ]


def make_model(seed=0):
    """The tiny model with a head that is not zero, so that every parameter has a gradient."""
    paddle.seed(seed)
    model = build_gmlp(config_of("tiny"))
    model.head.weight.set_value(0.1 * paddle.randn(model.head.weight.shape))
    return model


def one_hot(images, labels, rng):
    return images, F.one_hot(labels, CLASSES)


def make_training(
    batches, model=None, optimizer=None, accum_iter=1, seed=0, report_freq=1000,
    batch_transform=one_hot, no_sync=contextlib.nullcontext, **parts,
):  # fmt: skip
    """A Training of plain SGD on these batches; `parts` are those of its stand-in for a Run."""
    model = model or make_model()
    config = parts.setdefault("config", config_of("tiny"))
    config.DATA.BATCH_SIZE, config.TRAIN.ACCUM_ITER = len(batches[0][1]), accum_iter
    config.SEED, config.REPORT_FREQ = seed, report_freq
    run = {
        "model": model,
        "rank": 0,
        "world_size": 1,
        "on_gpu": False,
        "train_data": range(len(batches) * config.DATA.BATCH_SIZE),
        "val_data": (),
        "amp": False,
        "autocast": contextlib.nullcontext,
        "log": logging.getLogger("test"),
        "metrics": types.SimpleNamespace(write=lambda **row: None),
        "start": Start(),
    }
    training = Training(types.SimpleNamespace(**{**run, **parts}))
    training.batch_transform, training.no_sync = batch_transform, no_sync
    training.optimizer = optimizer or make_optimizer(model)
    schedule = training.optimizer._learning_rate
    ema = optim.NoEMA(model)
    training.updater = optim.Updater(training.optimizer, schedule, training.scaler, ema)
    return training


def make_optimizer(model, rate=0.1):
    schedule = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: rate)
    return paddle.optimizer.SGD(schedule, parameters=model.parameters())


def train(batches, accum_iter=1, **changes):
    """The model after one epoch of plain SGD."""
    training = make_training(batches, accum_iter=accum_iter, **changes)
    training.train_batches(batches, epoch=1)
    return training.run.model, training


def difference(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first.parameters(), second.parameters()))


def test_four_accumulated_batches_of_eight_are_one_of_32():
    small = make_batches(4, 8)
    large = [tuple(paddle.concat(parts) for parts in zip(*small))]
    accumulated, training = train(small, accum_iter=4)
    whole, _ = train(large)
    assert training.updater.step == 1
    assert difference(whole, make_model()) > 1e-3
    assert difference(accumulated, whole) < 1e-6


def test_an_epoch_is_kept_validated_and_the_best_as_often_as_asked(monkeypatch):
    training = make_training(make_batches(1, 4))
    config = training.config
    config.TRAIN.NUM_EPOCHS, config.VALIDATE_FREQ, config.SAVE_FREQ = 5, 2, 3
    validated, saved = [], []
    monkeypatch.setattr(training, "_train_epoch", lambda epoch: 1.0)
    monkeypatch.setattr(training, "_validate", lambda epoch: validated.append(epoch) or epoch != 4)
    monkeypatch.setattr(training, "_save", lambda keep, best: saved.append((keep, best)))
    training.run.folder = ""
    assert training.train() == 0
    assert validated == [2, 4, 5]
    keeps, bests = zip(*saved)
    assert keeps == (False, False, True, False, True)
    assert bests == (False, True, False, False, True)


def test_the_shorter_last_group_is_scaled_by_its_own_length():
    batches = make_batches(5, 4)
    accumulated, training = train(batches, accum_iter=3)
    groups = [batches[:3], batches[3:]]
    whole, _ = train([tuple(paddle.concat(parts) for parts in zip(*group)) for group in groups])
    assert training.updater.step == 2
    assert difference(accumulated, whole) < 1e-6


def test_gradients_are_exchanged_once_a_step():
    entered = []

    @contextlib.contextmanager
    def no_sync():
        entered.append(True)
        yield

    train(make_batches(5, 2), accum_iter=3, no_sync=no_sync)
    assert len(entered) == 3  # batches 1 and 2 of the first group, batch 1 of the second


def test_the_model_runs_inside_autocast_and_the_loss_outside(monkeypatch):
    calls, inside = [], []

    @contextlib.contextmanager
    def auto_cast(**kwargs):
        calls.append(kwargs)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    losses = []
    real_loss = F.cross_entropy
    monkeypatch.setattr(
        training_module.F,
        "cross_entropy",
        lambda logits, *args, **kwargs: (
            losses.append((bool(inside), logits.dtype)) or real_loss(logits, *args, **kwargs)
        ),
    )
    autocast = optim.build_autocast(optim.Amp("bfloat16"))
    model, _ = train(make_batches(2, 2), autocast=autocast)
    evaluate.validate(model, make_batches(1, 2), lambda x, y: (x, y), autocast)
    assert calls == [{"level": "O1", "dtype": "bfloat16"}] * 3
    assert losses == [(False, paddle.float32)] * 3


def step_as_trained(changes, monkeypatch, scaler=None, amp=None):
    """What passes between host and device in the second step of a recipe's training."""
    config = config_of("tiny")
    for key, value in {"MODEL_EMA": True, "GRAD_CLIP": 1.0, "DROPPATH": 0.1, **changes}.items():
        setattr(config.MODEL if key == "DROPPATH" else config.TRAIN, key, value)
    model = make_model()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    batch = paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, CLASSES, 8))
    training = make_training([batch] * 2, model, config=config, autocast=optim.build_autocast(amp))
    optimizer = optim.build_optimizer(config, model, optim.build_schedule(lambda step: 1e-3))
    ema = optim.EMA(model, make_model(), 0.5)
    scaler = scaler or training.scaler
    training.updater = optim.Updater(optimizer, optimizer._learning_rate, scaler, ema)
    training.batch_transform = BatchTransform(config, train=True)
    training.model.train()
    training.train_batch(*batch, epoch=1, batch=0)
    with monkeypatch.context() as patch:
        seen = count_crossings(patch)
        training.train_batch(*batch, epoch=1, batch=1)
    assert training.updater.step == 2
    return seen


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_a_step_reads_nothing_and_copies_nothing_for_which_the_host_waits(
    mode, switch_prob, monkeypatch
):
    changes = {"MIXUP_MODE": mode, "MIXUP_SWITCH_PROB": switch_prob, "RANDOM_ERASE_PROB": 1.0}
    seen = step_as_trained(changes, monkeypatch)
    assert seen["read"] == seen["copied"] == []
    # Boxes to erase, boxes to mix, and each image's share for images and labels.
    assert len(seen["queued"]) <= 4 and max(seen["queued"]) == 8 * 4


def test_a_step_with_float16_reads_one_flag(scaler_on_cpu, monkeypatch):
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Paddle 3.3.1's GradScaler raises TypeError here (requirements.txt)")
    seen = step_as_trained({}, monkeypatch, scaler_on_cpu, optim.Amp("float16"))
    assert seen["read"] == ["__bool__", "__array__", "numpy"] and seen["copied"] == []


def test_the_host_reads_nothing_between_reports(monkeypatch):
    at_report, reads = [], []
    written = types.SimpleNamespace(write=lambda **row: at_report.append(reads.count("__float__")))
    training = make_training(make_batches(15, 2), report_freq=5, metrics=written)
    batches = make_batches(15, 2)
    reads = count_crossings(monkeypatch)["read"]
    training.train_batches(batches, epoch=1)
    # One read of the loss per report; then the epoch's mean, for a checkpoint and for the log.
    assert at_report == [1, 2, 3]
    assert reads.count("__float__") == at_report[-1] + 2


def test_reports_give_the_mean_loss_since_the_last():
    rows, batches, model = [], make_batches(5, 4), make_model()
    written = types.SimpleNamespace(write=lambda **row: rows.append(row))
    optimizer = make_optimizer(model, rate=0.0)
    training = make_training(batches, model, optimizer, report_freq=2, metrics=written)
    mean = training.train_batches(batches, epoch=1)
    losses = [float(F.cross_entropy(model(x), y)) for x, y in batches]
    assert [(row["epoch"], row["batch"]) for row in rows] == [(1, 2), (1, 4), (1, 5)]
    expected = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert mean == pytest.approx(np.mean(losses), abs=1e-6)


def test_reports_give_the_images_of_all_ranks_in_a_second_since_the_last(monkeypatch):
    now, seconds, rows = [0.0], iter([1, 3, 1]), []

    def transform(images, labels, rng):
        now[0] += next(seconds)
        return one_hot(images, labels, rng)

    def write(**row):
        now[0] += 100  # what a report takes counts for none
        rows.append(row)

    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(training_module, "time", clock)
    batches, written = make_batches(3, 4), types.SimpleNamespace(write=write)
    training = make_training(batches, report_freq=2, batch_transform=transform, metrics=written)
    training.run.world_size = 3
    training.train_batches(batches, epoch=1)
    assert [row["images_per_second"] for row in rows] == [3 * 8 / 4, 3 * 4 / 1]


@pytest.mark.parametrize("asked, signs", [(False, 0), (True, 3)])
def test_each_batch_is_a_sign_of_life_once_the_run_was_asked_to_end(monkeypatch, asked, signs):
    seen = []
    monkeypatch.setattr(stop, "request", stop.StopRequest())
    monkeypatch.setattr(stop, "report_alive", lambda: seen.append(True))
    if asked:
        stop.request.take(signal.SIGTERM)
    with pytest.raises(stop.Stopped) if asked else contextlib.nullcontext():
        train(make_batches(5, 2), accum_iter=3)  # it ends after its first step
    assert len(seen) == signs


@pytest.mark.parametrize("steps, warned", [(10, False), (11, True)])
def test_a_warm_up_beyond_the_whole_run_is_warned_of(steps, warned):
    config, said = config_of("tiny"), []
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_STEPS = 2, steps
    log = types.SimpleNamespace(info=lambda text: None, warning=said.append)
    make_training(make_batches(5, 2), config=config, log=log)
    assert [text.split(":")[0] for text in said] == (
        ["warm-up is longer than the whole run of 10 steps"] if warned else []
    )
    assert all("TRAIN.WARMUP_STEPS None and TRAIN.WARMUP_EPOCHS 0.13" in text for text in said)


def test_a_loss_that_is_not_finite_stops_training():
    batches = make_batches(3, 2)
    batches[1][0][0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="nan in epoch 1, at batch 2"):
        train(batches, report_freq=1)


@pytest.fixture
def scaler_on_cpu(monkeypatch):
    """Paddle's own loss scaler at work on a CPU, where it would switch itself off."""
    place = types.SimpleNamespace(
        is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False
    )
    tracer = types.SimpleNamespace(_expected_place=place)
    monkeypatch.setattr(paddle.amp.grad_scaler, "_dygraph_tracer", lambda: tracer)
    return optim.build_scaler(optim.Amp("float16"))


def test_an_overflow_skips_the_step_the_ema_and_the_learning_rate(scaler_on_cpu):
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Paddle 3.3.1's GradScaler raises TypeError here (requirements.txt)")
    assert scaler_on_cpu.is_enable()
    model, average = make_model(), make_model()
    schedule = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: 0.1 / (1 + step))
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.SGD(schedule, parameters=model.parameters(), grad_clip=clip)
    ema = optim.EMA(model, average, 0.5)
    updater = optim.Updater(optimizer, schedule, scaler_on_cpu, ema)
    seen = []

    def transform(images, labels, rng):
        seen.append((updater.step, optimizer.get_lr(), difference(model, start), difference(
            average, start)))  # fmt: skip
        return one_hot(images, labels, rng)

    start = make_model()
    batches = make_batches(3, 4)
    batches[1][0][0] = 1e38  # its gradients overflow
    training = make_training(
        batches, model, optimizer, batch_transform=transform,
        autocast=optim.build_autocast(optim.Amp("float16")),
    )  # fmt: skip
    training.updater = updater
    with pytest.raises(NonFiniteLoss):
        training.train_batches(batches, epoch=1)
    before, after_good, after_bad = seen
    assert before == (0, pytest.approx(0.1), 0, 0)
    assert after_good[0] == 1 and after_good[1] == pytest.approx(0.05)
    assert 0 < after_good[3] < after_good[2] <= 0.1 + 1e-6  # clipped at norm 1 after unscaling
    assert after_bad == after_good
    assert updater.step == 2
    assert float(scaler_on_cpu.state_dict()["scale"][0]) == 2.0**15


def test_random_parts_are_a_function_of_seed_epoch_batch_and_rank():
    def draws(**changes):
        seen = []

        def transform(images, labels, rng):
            seen.append((rng.random(), float(paddle.rand([]))))
            return one_hot(images, labels, rng)

        train(make_batches(3, 2), batch_transform=transform, **changes)
        return seen

    assert draws() == draws()
    assert len({value for pair in draws() for value in pair}) == 6
    assert not set(draws()) & set(draws(rank=1))
    assert not set(draws()) & set(draws(seed=1))


def plan_of(decay, epochs, average=True):
    """The warnings of a run of 6 steps an epoch before its first step, and the run."""
    said = []
    log = types.SimpleNamespace(info=print, warning=said.append)
    training = make_training(make_batches(6, 1), log=log)
    train = training.config.TRAIN
    train.MODEL_EMA, train.MODEL_EMA_DECAY, train.NUM_EPOCHS = average, decay, epochs
    training.learning_rate = optim.LearningRate(train, 1, 6)
    said.clear()
    training._log_plan()
    return [sentence for sentence in said if "EMA" in sentence], training


def test_an_average_that_cannot_follow_in_a_short_run_is_said_with_a_decay_that_can():
    (sentence,), _ = plan_of(0.99996, 30)
    assert "TRAIN.MODEL_EMA_DECAY 0.99996 is slow for a run of 180 steps" in sentence
    assert "99% of the average" in sentence and "take about 0.946" in sentence
    for decay, epochs, average in ((0.946, 30, True), (0.99996, 15625, True), (1, 30, False)):
        assert plan_of(decay, epochs, average)[0] == []  # 93,750 steps are ImageNet's at 4,096


@pytest.mark.parametrize("images, said", [(12, "take -batch_size 6"), (9, None), (16, None)])
def test_images_that_an_epoch_leaves_out_are_told_with_a_batch_size_that_takes_them(images, said):
    training = make_training(make_batches(1, 8))
    training.run.train_data, training.batches = range(images), images // 8
    sentences = [text for text in advice.about_plan(training) if "leaves out" in text]
    assert [said in text for text in sentences] == [True] * bool(said)


def test_one_rank_of_several_cores_is_told_what_two_would_bring(monkeypatch):
    def said(threads=8, cores=8, batch=6, place=(0,), **of_run):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        monkeypatch.setattr(advice.host, "available_cores", lambda: cores)
        lines = []
        log = types.SimpleNamespace(info=lines.append, warning=lines.append)
        training = make_training(make_batches(1, batch), log=log)
        vars(training.run).update(of_run)
        training.place = Place(*place)
        lines.clear()
        training._log_plan()
        return [line for line in lines if "-nprocs" in line]

    (sentence,) = said()
    assert "one rank computes on 8 cores: -nprocs 2 -batch_size 3 makes steps" in sentence
    assert not said(threads=1, cores=1)
    assert not said(threads=4)  # as somebody chose
    assert not said(batch=7)
    assert not said(on_gpu=True) and not said(world_size=2)
    assert not said(place=(1,)) and not said(place=(0, 3))  # a run that goes on
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")  # another launcher's only rank
    assert not said()


def test_an_average_that_is_worse_than_its_model_is_said_at_the_end():
    _, training = plan_of(0.9999, 30)
    training.scores = {"model": 100.0, "ema": 75.0}
    (sentence,) = advice.about_average(training)
    for part in ("75.00", "100.00", "best_weights.pdparams", "TRAIN.MODEL_EMA_DECAY 0.9999"):
        assert part in sentence
    for scores in ({}, {"model": 9.0}, {"model": 9.0, "ema": 9.0}):
        training.scores = scores
        assert list(advice.about_average(training)) == []
