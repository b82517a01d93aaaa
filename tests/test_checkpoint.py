"""Weights into models, optimizer state under structured names, checkpoints on the disk."""

import contextlib
import os

import numpy as np
import paddle
import pytest
from golden import config_of

from gmlp import build_gmlp
from training import moments, optim, resume, state
from utils import remove_temporary_files, temporary_path
from weights import checkpoint, pdparams


def make_model(**changes):
    config = config_of("tiny")
    for key, value in changes.items():
        config.MODEL[key] = value
    return build_gmlp(config)


def make_weights(model, value=0.5):
    return {k: np.full(v.shape, value, "float32") for k, v in model.state_dict().items()}


def is_filled(model, value=0.5):
    return all((v.numpy() == value).all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    "tree, expected",
    [
        (lambda w: w, 0.5),
        (lambda w: {"model": w, "epoch": 3}, 0.5),
        (lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": w}, 0.5),
        (lambda w: {"model": w, "model_ema": {}}, 0.5),
    ],
    ids=["bare", "checkpoint", "checkpoint with EMA", "checkpoint with an empty EMA"],
)
def test_weights_come_from_a_bare_file_or_a_checkpoint_ema_first(tree, expected, tmp_path):
    model = make_model()
    path = tmp_path / "x.pdparams"
    paddle.save(tree(make_weights(model)), str(path))
    assert not checkpoint.assign_weights(model, checkpoint.load_weights(path), path)
    assert is_filled(model, expected)


@pytest.mark.parametrize(
    "tree",
    [{}, {"model": 3}, {"a": 1}, {"model": {}}, {"model": {}, "model_ema": np.zeros(2, "float32")}],
)
def test_a_file_without_weights_is_refused(tree, tmp_path):
    path = tmp_path / "x.pdparams"
    paddle.save(tree, str(path))
    with pytest.raises(checkpoint.WeightsError, match=r"x\.pdparams.*no weights"):
        checkpoint.load_weights(path)


def test_wrong_weights_change_nothing_and_are_listed_with_both_shapes(tmp_path):
    model = make_model()
    weights = make_weights(model)
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    weights["norm.weight"] = np.zeros(7, "float32")
    del weights["norm.bias"]
    weights["extra"] = np.zeros(1, "float32")
    with pytest.raises(checkpoint.NotThisModel) as error:
        checkpoint.assign_weights(model, weights, "w.pdparams", allow_new_head=True)
    message = str(error.value)
    for part in ("w.pdparams", "norm.weight is [7]", "wanted [16]", "norm.bias is not there",
                 "extra is [1], wanted nothing"):  # fmt: skip
        assert part in message
    assert all((model.state_dict()[k].numpy() == v).all() for k, v in before.items())


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_of_another_precision_are_cast(dtype):
    model = make_model()
    weights = {name: value.astype(dtype) for name, value in make_weights(model).items()}
    checkpoint.assign_weights(model, weights, "w")
    assert is_filled(model) and model.head.weight.dtype == paddle.float32


@pytest.mark.parametrize("dtype", ["int64", "uint16", "bool"])
def test_weights_that_are_no_floats_are_refused(dtype):
    model = make_model()
    weights = make_weights(model)
    weights["norm.bias"] = weights["norm.bias"].astype(dtype)
    with pytest.raises(checkpoint.NotThisModel, match=rf"norm\.bias is of {dtype}"):
        checkpoint.assign_weights(model, weights, "w")


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": "3"}, {"epoch": -1}, {"epoch": True}, {"step": 1.5}, {"run": 3},
        {"batch": -1}, {"loss": float("nan")}, {"batch": 3},
        {"batch": 3, "run": {"images": 20, "batch_size": 5, "ranks": 2}},
        {"loss": "1"}, {"run": {"ranks": -1}}, {"run": {"ranks": [1]}},
        {"run": {"batch_size": "ab"}},
        {"best": {"acc1": float("nan"), "epoch": 1}}, {"best": {"acc1": "x"}},
        {"best": {"acc1": "x", "epoch": 1}}, {"best": [1]},
        {"run": {"TRAIN.MIXUP_ALPHA": "a\x1b[31m"}}, {"run": {"TRAIN.CROP_SCALE": [[1.0]]}},
        {"run": {"TRAIN.CROP_SCALE": [0.5] * 101}}, {"run": {"AMP_DTYPE": {"a": 1}}},
        {"run": {"TRAIN.WEIGHT_DECAY": float("inf")}}, {"run": {"list": 3}},
        {"run": {"model_name": "a\x1b[31m"}}, {"model_ema": np.zeros(2, "float32")},
        {"amp_grad_scaler": 3}, {"model_ema": [1]}, {"model_ema": {"a": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_whose_numbers_cannot_be_is_refused(wrong, tmp_path):
    path = tmp_path / "x.pdparams"
    good = {"model": make_weights(make_model()), "epoch": 1, "step": 2}
    pdparams.write(path, good)
    assert state.read(path)["step"] == 2
    pdparams.write(path, {**good, **wrong})
    # The first key is the wrong one; what has no weights is none of the numbers.
    key = next(iter(wrong))
    what = "holds no weights " if key == "model_ema" else f"impossible values of {key}: "
    with pytest.raises(checkpoint.WeightsError, match=rf"x\.pdparams: {what}"):
        state.read(path)


@pytest.mark.parametrize(
    ("facts", "possible"),
    [
        ({"batch": 1, "run": {"images": 20, "batch_size": 1, "ranks": 1}}, True),
        ({"batch": 2, "run": {"images": 20, "batch_size": 5, "ranks": 2}}, True),
        ({"batch": 2, "run": {"images": 19, "batch_size": 5, "ranks": 2}}, False),
        ({"batch": 1, "run": {"images": 20, "batch_size": 0, "ranks": 1}}, False),
        ({"run": {"model_name": "n" * 200}}, True),
        ({"run": {"model_name": "n" * 201}}, False),
    ],
    ids=["one image", "a whole epoch", "more than that", "no image", "a long name", "longer"],
)
def test_a_checkpoint_is_taken_up_to_the_edge_of_what_can_be(facts, possible, tmp_path):
    path = tmp_path / "x.pdparams"
    pdparams.write(path, {"model": make_weights(make_model()), "epoch": 1, **facts})
    if possible:
        assert state.read(path)["run"] == facts["run"]
    else:
        wrong = "batch" if "batch" in facts else "run"
        with pytest.raises(checkpoint.WeightsError, match=f": impossible values of {wrong}: "):
            state.read(path)


def test_a_stale_temporary_link_does_not_reach_an_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path, {"epoch": 1}, ["Epoch-1"])
    os.link(tmp_path / "Epoch-1.pdparams", temporary_path(tmp_path / "best.pdparams"))
    checkpoint.save(tmp_path, {"epoch": 2}, ["Epoch-2", "best"])
    assert pdparams.read(tmp_path / "Epoch-1.pdparams", require_checksum=True)["epoch"] == 1
    assert pdparams.read(tmp_path / "best.pdparams", require_checksum=True)["epoch"] == 2


def test_a_new_head_is_only_made_where_it_is_allowed(tmp_path):
    weights = make_weights(make_model(NUM_CLASSES=7))
    model = make_model()
    with pytest.raises(checkpoint.NotThisModel, match=r"head\.weight"):
        checkpoint.assign_weights(model, weights, "w")
    assert checkpoint.assign_weights(model, weights, "w", allow_new_head=True)
    assert (model.norm.weight.numpy() == 0.5).all()
    assert (model.head.weight.numpy() == 0).all() and model.head.weight.shape == [16, 10]


def train_steps(model, optimizer, seeds):
    for seed in seeds:
        paddle.seed(seed)
        model(paddle.randn([4, 3, 32, 32])).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def make_optimizer(model, name="AdamW"):
    config = config_of("tiny")
    config.TRAIN.OPTIMIZER.NAME = name
    return optim.build_optimizer(config, model, 0.01)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_state_survives_other_parameter_names(tmp_path, name):
    model = make_model()
    paddle.seed(4)  # a head that lets gradients through
    model.head.weight.set_value(paddle.randn([16, 10]))
    start = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(model, name)
    train_steps(model, optimizer, [1, 2])
    tree = {
        "model": model.state_dict(),
        "optimizer": moments.optimizer_state(optimizer, model),
    }
    pdparams.write(tmp_path / "a.pdparams", tree)
    train_steps(model, optimizer, [3])

    # Layers made before this model give it other names, as in a process that does more.
    other = make_model()
    assert other.head.weight.name != model.head.weight.name
    tree = pdparams.read(tmp_path / "a.pdparams", require_checksum=True)
    checkpoint.assign_weights(other, tree["model"], "a")
    fresh = make_optimizer(other, name)
    assert moments.restore_optimizer(fresh, other, tree["optimizer"]) == ([], [])
    train_steps(other, fresh, [3])
    for param, value in other.state_dict().items():
        assert np.array_equal(value.numpy(), model.state_dict()[param].numpy()), param
        assert param == "head.bias" or not np.array_equal(value.numpy(), start[param]), param


def test_optimizer_state_goes_back_to_the_device_that_it_was_on(monkeypatch):
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, [1])
    tensors = {k: v.numpy() for k, v in moments.optimizer_state(optimizer, model).items()}
    real, places = paddle.to_tensor, []

    def to_tensor(value, dtype, place):
        places.append(place)
        return real(value, dtype, paddle.CPUPlace())

    monkeypatch.setattr(moments.paddle, "to_tensor", to_tensor)
    # Paddle has these on the host though the model is on a GPU: as if the rest were on one.
    kept = type("Place", (), {})()
    monkeypatch.setattr(
        paddle.Tensor, "place", property(lambda t: "host" if "beta" in t.name else kept)
    )
    assert moments.restore_optimizer(make_optimizer(model), model, tensors) == ([], [])
    assert places.count("host") == places.count(kept) == 2 * len(model.parameters())


def test_optimizer_state_has_structured_names_only(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, [1])
    tensors = moments.optimizer_state(optimizer, model)
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    assert set(tensors) == {f"{name}.{kind}" for name in model.state_dict() for kind in kinds}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: None,
        lambda state: {},
        lambda state: {"linear_0.w_0_moment1_0": np.zeros(3)},
        lambda state: {**state, "head.weight.moment1": np.zeros(3)},
    ],
    ids=["none", "empty", "Paddle's names", "a wrong shape"],
)
def test_optimizer_state_that_does_not_fit_is_not_used(damage):
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, [1])
    tensors = {k: v.numpy() for k, v in moments.optimizer_state(optimizer, model).items()}
    other = make_model()
    fresh = make_optimizer(other)
    missing, _ = moments.restore_optimizer(fresh, other, damage(tensors))
    assert "head.weight.moment1" in missing
    left = moments.optimizer_state(fresh, other)
    assert all((v.numpy() == 0).all() for k, v in left.items() if "moment" in k)


def epochs_in(folder):
    """{name: epoch} of the files in a folder, all of which are whole."""
    return {
        path.stem: pdparams.read(path, require_checksum=True)["epoch"] for path in folder.iterdir()
    }


def test_a_checkpoint_has_all_its_names_and_the_one_before_has_one(tmp_path):
    checkpoint.save(tmp_path, {"epoch": 1}, ["Epoch-1", "best"])
    assert epochs_in(tmp_path) == {"last": 1, "best": 1, "Epoch-1": 1}
    last = str(tmp_path / "last.pdparams")
    checkpoint.save(tmp_path, {"epoch": 2}, ["Epoch-2"], last_good=last)
    checkpoint.save(tmp_path, {"epoch": 3}, last_good=last)
    assert epochs_in(tmp_path) == {"last": 3, "previous": 2, "best": 1, "Epoch-1": 1, "Epoch-2": 2}


def test_what_a_run_went_on_from_becomes_the_one_before(tmp_path):
    checkpoint.save(tmp_path, {"epoch": 1})
    checkpoint.save(tmp_path, {"epoch": 2}, last_good=str(tmp_path / "last.pdparams"))
    pdparams.write(tmp_path / "new.pdparams", {"epoch": 3})  # what a kill leaves
    checkpoint.save(tmp_path, {"epoch": 4}, last_good=str(tmp_path / "new.pdparams"))
    assert epochs_in(tmp_path) == {"last": 4, "previous": 3}


def test_names_are_copies_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    folder = tmp_path / "train-1"
    folder.mkdir()

    def refuse(*args):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(folder, {"epoch": 1}, ["best"])
    checkpoint.save(folder, {"epoch": 2}, ["Epoch-2"], last_good=str(folder / "last.pdparams"))
    assert epochs_in(folder) == {"last": 2, "previous": 1, "best": 1, "Epoch-2": 2}
    assert len(resume.candidates([folder])) == 4


def test_a_damaged_checkpoint_that_was_passed_over_does_not_replace_the_one_before(tmp_path):
    last, previous, epoch = (
        str(tmp_path / f"{n}.pdparams") for n in ("last", "previous", "Epoch-2")
    )
    checkpoint.save(tmp_path, {"epoch": 2}, ["Epoch-2"])
    checkpoint.save(tmp_path, {"epoch": 3}, last_good=last)
    with open(last, "r+b") as file:
        file.truncate(100)
    checkpoint.save(tmp_path, {"epoch": 4}, last_good=previous)
    assert epochs_in(tmp_path) == {"last": 4, "previous": 2, "Epoch-2": 2}
    checkpoint.save(tmp_path, {"epoch": 5}, last_good=last)
    checkpoint.save(tmp_path, {"epoch": 6}, last_good=epoch)
    assert epochs_in(tmp_path) == {"last": 6, "previous": 2, "Epoch-2": 2}


class Killed(BaseException):
    """Stands for the end of the process."""


# fsync, replace, fsync of the folder; remove, link, replace for each of three names; replace.
@pytest.mark.parametrize("call", range(13))
def test_a_kill_at_any_file_operation_leaves_two_checkpoints(call, tmp_path):
    last = str(tmp_path / "last.pdparams")
    checkpoint.save(tmp_path, {"epoch": 1})
    checkpoint.save(tmp_path, {"epoch": 2}, last_good=last)
    calls = iter(range(1000))

    def dying(function):
        def die_or_call(*args, **kwargs):
            if next(calls) >= call:
                raise Killed
            return function(*args, **kwargs)

        return die_or_call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for name in ("fsync", "link", "remove", "replace"):
            patch.setattr(os, name, dying(getattr(os, name)))
        checkpoint.save(tmp_path, {"epoch": 3}, ["Epoch-3", "best"], last_good=last)
    remove_temporary_files(tmp_path)
    epochs = epochs_in(tmp_path)
    assert {1, 2} <= {*epochs.values()} or {2, 3} <= {*epochs.values()}
    assert epochs["last"] == 2 or epochs["previous"] == 2


@pytest.mark.parametrize("damaged, left", [(None, {10, 11}), ("Epoch-11", {8, 9, 10, 11})])
def test_old_epochs_go_once_a_newer_one_is_read_back_whole(tmp_path, damaged, left):
    for epoch in (8, 9, 10, 11):
        checkpoint.save(tmp_path, {"epoch": epoch}, [f"Epoch-{epoch}"])
        os.utime(tmp_path / f"Epoch-{epoch}.pdparams", (1000 - epoch, 1000 - epoch))  # a copy's
    if damaged:
        path = tmp_path / f"{damaged}.pdparams"
        path.write_bytes(path.read_bytes()[:-1])
    lines = checkpoint.remove_old_epochs(tmp_path, 2)
    assert {int(p.stem[6:]) for p in tmp_path.glob("Epoch-*")} == left
    if damaged:
        assert len(lines) == 1 and "no checkpoint is removed" in lines[0]
    else:
        assert len(lines) == 2 and "Epoch-8.pdparams" in lines[1]


def test_temporary_files_of_any_process_are_removed_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path, {"epoch": 1})
    temporary = temporary_path(tmp_path / "last.pdparams", 12345)
    with open(temporary, "wb"):
        pass
    remove_temporary_files(tmp_path)
    assert epochs_in(tmp_path) == {"last": 1}


def test_weights_in_timms_names_are_answered_with_the_tool_that_ports_them():
    weights = {"stem.proj.weight": np.zeros([16, 3, 4, 4], "float32")}
    with pytest.raises(checkpoint.NotThisModel, match=r"timm's names: tools/port_weights\.py"):
        checkpoint.assign_weights(make_model(), weights, "w")


def wrapped(weights, prefix):
    return {prefix + name: array for name, array in weights.items()}


def save_as(path, weights):
    """Writes weights in the format of the path's suffix."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(weights, str(path))
    else:
        paddle.save({k: paddle.to_tensor(v) for k, v in weights.items()}, str(path))


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_layers.", "_orig_mod.", "_layers.module._orig_mod.", "model.net."]
)
def test_what_wrappers_put_before_names_is_left_out_and_said(prefix, suffix, tmp_path):
    model, path = make_model(), tmp_path / f"w{suffix}"
    save_as(path, wrapped(make_weights(model), prefix))
    (sentence,) = checkpoint.load_into(model, str(path))
    assert is_filled(model) and sentence.startswith(f"{path}: its names are read without ")
    assert all(part in sentence for part in prefix.split("."))
    with pytest.warns(match="its names are read without"):
        assert checkpoint.load_weights(path).keys() == model.state_dict().keys()


def test_what_wrappers_put_inside_names_and_into_checkpoints_is_left_out_too(tmp_path):
    model = make_model()
    weights = make_weights(model)
    inside = {name.replace("layers.0", "layers.0._orig_mod"): a for name, a in weights.items()}
    assert inside.keys() != weights.keys()
    pdparams.write(tmp_path / "a.pdparams", inside)
    assert len(checkpoint.load_into(model, tmp_path / "a.pdparams")) == 1
    tree = {"model": wrapped(weights, "_layers."), "model_ema": wrapped(weights, "module.")}
    pdparams.write(tmp_path / "b.pdparams", tree)
    said = []
    read = state.read(tmp_path / "b.pdparams", say=said.append)
    assert read["model"].keys() == read["model_ema"].keys() == weights.keys() and len(said) == 2


@pytest.mark.parametrize("names", [["module", "module.a.b.c"], ["a.weight", "a.bias"], ["module"]])
def test_names_that_only_look_wrapped_are_left_alone_or_refused(names, tmp_path):
    pdparams.write(tmp_path / "w.pdparams", dict.fromkeys(names, np.zeros(1, "float32")))
    with pytest.raises(checkpoint.NotThisModel, match="not this model's weights"):
        checkpoint.load_into(make_model(), tmp_path / "w.pdparams")


def test_names_that_two_wrapped_names_would_share_are_refused(tmp_path):
    model = make_model()
    weights = make_weights(model)
    pdparams.write(tmp_path / "w.pdparams", {**weights, **wrapped(weights, "module.")})
    with pytest.raises(checkpoint.NotThisModel, match=r"module\.\S+ is .*, wanted nothing"):
        checkpoint.load_into(model, tmp_path / "w.pdparams")


def test_bfloat16_weights_go_into_a_model_with_their_values(tmp_path):
    model, path = make_model(), str(tmp_path / "w.pdparams")
    values = {
        k: paddle.to_tensor(v).astype("bfloat16") for k, v in make_weights(model, 0.375).items()
    }
    for tree in (values, {"model": values, "epoch": 1}):
        paddle.save(tree, path)
        assert checkpoint.load_into(model, path) == [] and is_filled(model, 0.375)
        assert state.read(path)["model"]["head.bias"].dtype == "float32"


def test_an_optimizers_state_is_answered_with_the_file_beside_it(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    train_steps(model, optimizer, [1])
    paddle.save(optimizer.state_dict(), str(tmp_path / "w.pdopt"))
    with pytest.raises(checkpoint.WeightsError, match=r"w\.pdopt: holds an optimizer's state"):
        checkpoint.load_into(model, tmp_path / "w.pdopt")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"head.weight": [16, 7], "head.bias": [7]}, True),
        ({"head.weight": [99, 7], "head.bias": [7]}, False),
        ({"head.weight": [16, 0], "head.bias": [0]}, False),
        ({"head.weight": [16, 7], "head.bias": [7], "norm.bias": [3]}, False),
        ({"head.bias": [7]}, False),
        ({"norm.bias": "int32"}, False),
    ],
)
def test_num_classes_is_advised_where_it_is_all_that_differs(changes, advice):
    model = make_model()
    weights = {name: param.numpy() for name, param in model.state_dict().items()}
    for name, change in changes.items():
        is_type = isinstance(change, str)
        weights[name] = weights[name].astype(change) if is_type else np.zeros(change, "float32")
    with pytest.raises(checkpoint.NotThisModel) as error:
        checkpoint.check_weights(model, weights, "file")
    assert ("give -num_classes 7" in str(error.value)) == advice
    assert ("wrong -cfg?" in str(error.value)) == (not advice)


def test_a_file_whose_names_are_numbers_holds_no_weights(tmp_path):
    pdparams.write(tmp_path / "w.pdparams", {1: np.zeros(3, "float32")})
    with pytest.raises(checkpoint.WeightsError, match="holds no weights"):
        checkpoint.load_weights(tmp_path / "w.pdparams")
