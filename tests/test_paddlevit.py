"""A run of PaddleViT's own program goes on here: tests/data/pdparams/make.py wrote its files."""

import pickle
import time
import types
from pathlib import Path

import numpy as np
import paddle
import pytest
from golden import config_of

from gmlp import GMLP, Sizes
from training import moments, optim, state
from weights import assign_weights, pdparams

DATA = Path(__file__).resolve().parent / "data" / "pdparams"
RATE = 0.01  # of the step that make.py took after it saved


class Log:
    def __init__(self):
        self.infos, self.warnings = [], []
        self.info, self.warning = self.infos.append, self.warnings.append


def make_training(config=None, scaler=None, frozen=False):
    """What state.restore reads of a Training, before its first step."""
    config = config or config_of("tiny")
    config.TRAIN.MODEL_EMA = True
    config.TRAIN.GRAD_CLIP, config.TRAIN.WEIGHT_DECAY = 1.0, 0.05
    model, average = (
        GMLP(Sizes(8, 3, 3, patch_size=4, dim=8, depth=1, mlp_ratio=2.0)) for _ in "ab"
    )
    for name, param in model.named_parameters():
        param.stop_gradient = frozen and not name.startswith("head.")
    schedule = optim.build_schedule(lambda step: RATE)
    optimizer = optim.build_optimizer(config, model, schedule)
    scaler = scaler or optim.build_scaler(None)
    ema = optim.EMA(model, average, 0.9)
    run = types.SimpleNamespace(
        model=model, log=Log(), folder="here", train_data=range(24), world_size=1, amp=None,
        on_gpu=False, list_digest="an id",
    )  # fmt: skip
    return types.SimpleNamespace(
        config=config, run=run, optimizer=optimizer, scaler=scaler, ema=ema, accum_iter=1,
        batches=6, steps_per_epoch=6, updater=optim.Updater(optimizer, schedule, scaler, ema),
    )  # fmt: skip


def resume(path, **kwargs):
    """A training that has gone on from a file, with its weights."""
    training = make_training(**kwargs)
    tree = state.read(path)
    assign_weights(training.run.model, tree["model"], path)
    state.restore(training, tree, str(path))
    return training


def said_of_optimizer(lines):
    return [line for line in lines if "optimizer state" in line or "AdamW's state" in line]


def moments_of(training):
    state = moments.optimizer_state(training.optimizer, training.run.model)
    return {name: tensor.numpy() for name, tensor in state.items()}


def is_fresh(training):
    return all(not v.any() for k, v in moments_of(training).items() if "moment" in k)


def take_step(training):
    images = np.random.RandomState(3).standard_normal((4, 3, 8, 8)).astype("float32")
    training.run.model(paddle.to_tensor(images)).square().mean().backward()
    training.updater.update()
    return {name: value.numpy() for name, value in training.run.model.state_dict().items()}


def test_the_next_step_is_the_one_that_its_own_process_took():
    with np.load(DATA / "paddlevit.npz") as file:
        expected = dict(file)
    training = resume(DATA / "paddlevit.pickle")
    (line,) = said_of_optimizer(training.run.log.infos)
    assert (
        "AdamW's state of 16 of 16 parameters is taken over from" in line and "left out" not in line
    )
    assert not said_of_optimizer(training.run.log.warnings)
    for name, value in take_step(training).items():
        assert np.allclose(value, expected[name], rtol=0, atol=1e-6), name
    fresh = resume(DATA / "paddlevit_fewer.pickle")
    assert np.abs(take_step(fresh)["norm.weight"] - expected["norm.weight"]).max() > 1e-3


def test_epoch_step_and_averaged_weights_are_taken_over():
    training = resume(DATA / "paddlevit.pickle")
    assert training.place == state.Place(2) and training.updater.step == 2 * 6
    average = pdparams.read(DATA / "paddlevit.pickle")["model_ema"]
    for name, value in training.ema.average.state_dict().items():
        assert np.array_equal(value.numpy(), average[name]), name
    assert not any("EMA" in line for line in training.run.log.warnings)


def test_a_tensor_too_many_is_named_and_the_others_are_taken_over():
    whole, more = (resume(DATA / f"{name}.pickle") for name in ("paddlevit", "paddlevit_more"))
    (line,) = said_of_optimizer(more.run.log.infos)
    assert line.endswith("paddlevit_more.pickle; left out: 'linear_99.w_0_moment1_0'")
    expected = moments_of(whole)
    assert all(np.array_equal(value, expected[name]) for name, value in moments_of(more).items())
    assert not is_fresh(more)


def test_a_missing_tensor_is_named_and_the_optimizer_starts_fresh():
    training = resume(DATA / "paddlevit_fewer.pickle")
    (line,) = said_of_optimizer(training.run.log.warnings)
    assert "(it lacks 'head.weight.moment2'): the optimizer starts fresh" in line
    assert is_fresh(training) and not said_of_optimizer(training.run.log.infos)


def test_frozen_parameters_need_no_state_and_get_none():
    training = resume(DATA / "paddlevit.pickle", frozen=True)
    (line,) = said_of_optimizer(training.run.log.infos)
    assert "state of 2 of 16 parameters" in line and "and 54 more" in line
    assert len(moments_of(training)) == 2 * 4 and not is_fresh(training)


def rewritten(tmp_path, change):
    """A copy of the whole file as arrays, whose names in `model` are gone, after a change."""
    tree = pdparams.read(DATA / "paddlevit.pickle")
    change(tree)
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps(tree))
    return path


def test_a_state_is_never_matched_by_its_order(tmp_path):
    training = resume(rewritten(tmp_path, lambda tree: None))
    (line,) = said_of_optimizer(training.run.log.warnings)
    assert "it lacks 'patch_embed.patch_embed.weight.moment1'" in line
    assert "and 62 more, and has 'conv2d_6.w_0_moment1_0'" in line
    assert is_fresh(training)


def test_a_file_that_was_loaded_and_saved_again_from_a_wrapped_model_is_matched_too(tmp_path):
    tree, path = paddle.load(str(DATA / "paddlevit.pickle")), tmp_path / "again.pdparams"
    for part, wrapper in (("model", "_layers."), ("model_ema", "module.")):
        tree[part] = {wrapper + name: tensor for name, tensor in tree[part].items()}
    paddle.save(tree, str(path))
    with pytest.warns(match="its names are read without"):
        training = resume(path)
    (line,) = said_of_optimizer(training.run.log.infos)
    assert line.endswith("again.pdparams") and not is_fresh(training)


def test_a_file_without_a_state_says_so(tmp_path):
    training = resume(rewritten(tmp_path, lambda tree: tree.pop("optimizer")))
    (line,) = said_of_optimizer(training.run.log.warnings)
    assert line.endswith("x.pdparams has no optimizer state: the optimizer starts fresh")


def test_tensors_get_their_parameters_names_whatever_their_order():
    parameters = {"linear_9.w_0": "head.weight", "linear_9.w_01": "x", "linear_12.b_0": "head.bias"}
    state = {
        "linear_12.b_0_moment1_0": 1,
        "linear_9.w_0_beta1_pow_acc_3": 2,
        "linear_9.w_01_moment1_0": 3,
        "linear_99.w_0_moment1_0": 4,
        "linear_9.w_0": 5,
        "norm.weight.moment1": 6,
        "LR_Scheduler": {},
        7: 7,
    }
    assert moments.under_structured_names(state, parameters) == {
        "head.bias.moment1": 1,
        "head.weight.beta1_pow_acc": 2,
        "x.moment1": 3,
        "linear_99.w_0_moment1_0": 4,
        "linear_9.w_0": 5,
        "norm.weight.moment1": 6,
        "LR_Scheduler": {},
        7: 7,
    }


def test_of_two_tensors_for_one_place_none_is_taken():
    state = {f"linear_0.w_0_moment1_{number}": number for number in range(2)}
    assert moments.under_structured_names(state, {"linear_0.w_0": "head.weight"}) == state


def test_hostile_names_take_no_time():
    state = {"a.w_1_" * 160 + f"{number}x": 0 for number in range(10_000)}
    start = time.process_time()
    assert moments.under_structured_names(state, {}) == state
    assert time.process_time() - start < 3


def test_loss_scaling_goes_on_where_float16_runs(monkeypatch):
    wanted = pdparams.read(DATA / "paddlevit.pickle")["amp_grad_scaler"]
    place = types.SimpleNamespace(
        is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False
    )
    tracer = types.SimpleNamespace(_expected_place=place)
    with monkeypatch.context() as patch:  # on a CPU it would switch itself off
        patch.setattr(paddle.amp.grad_scaler, "_dygraph_tracer", lambda: tracer)
        scaler = optim.build_scaler(optim.Amp("float16"))
    assert scaler.is_enable()
    assert resume(DATA / "paddlevit.pickle", scaler=scaler).scaler.state_dict() == wanted
    assert resume(DATA / "paddlevit.pickle").scaler.state_dict() == {}
    tree = {**state.read(DATA / "paddlevit.pickle"), "amp_grad_scaler": {"scale": [8.0]}}
    training = make_training(scaler=scaler)
    state.restore(training, tree, "x.pdparams")
    assert any("incomplete loss scaling" in line for line in training.run.log.warnings)
    assert training.scaler.state_dict() == wanted  # as it was
