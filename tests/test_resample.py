"""Spatial projections for another image size: what resampling keeps, how the program does it."""

import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from program import ROOT, SMALL, metrics, run, run_program

from tools import common
from config import get_config
from demo import resolution_study
from gmlp import build_gmlp
from weights import checkpoint
from weights.pdparams import WeightsError
from weights.resample import (
    interpolation_matrix,
    resample_projection,
    resample_weights,
    spread_matrix,
)

SIZES = [(8, 10), (8, 6), (14, 24), (14, 7), (7, 5), (1, 3), (3, 1), (2, 5), (24, 14)]
TOOL = ROOT / "demo" / "resolution_study.py"
CONFIG_32 = ROOT / "configs" / "gmlp_digits_32.yaml"


def noise(side, seed=0, dtype="float32"):
    """A random projection of side x side tokens; its sums over sources are small and large."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal([side**2, side**2])
    return weight.astype(dtype), rng.standard_normal(side**2).astype(dtype)


def centres(side):
    """Positions of one axis' tokens in an image from 0 to 1."""
    return (np.arange(side) + 0.5) / side


def inner(side, border=2):
    """Which tokens of a side x side grid are farther than `border` old tokens of 8 from it."""
    line = (centres(side) > border / 8) & (centres(side) < 1 - border / 8)
    return (line[:, None] & line).reshape(-1)


# --- the operators ---


def model_of(num_tokens):
    """What resample_weights asks of a model."""
    sizes = SimpleNamespace(num_tokens=num_tokens)
    return SimpleNamespace(sizes=sizes, gate_name="gate.proj")


@pytest.mark.parametrize("side", [1, 2, 3, 8, 14, 24, 49])
def test_the_same_size_is_the_identity_to_the_bit(side):
    assert np.array_equal(interpolation_matrix(side, side), np.eye(side))
    assert np.array_equal(spread_matrix(side, side), np.eye(side))
    if side > 14:
        return
    weight, bias = noise(side)
    weight[0, 0] = -0.0
    new_weight, new_bias = resample_projection(weight, bias, side)
    assert new_weight.tobytes() == weight.tobytes() and new_bias.tobytes() == bias.tobytes()


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_sums_over_sources_are_the_interpolated_old_sums(old, new):
    weight, bias = noise(old, dtype="float64")
    weight[:, 0] -= weight[:, 0].mean()  # a sum of zero: no scaling could restore it
    new_weight, new_bias = resample_projection(weight, bias, new)
    target = np.kron(interpolation_matrix(old, new), interpolation_matrix(old, new))
    np.testing.assert_allclose(new_weight.sum(0), target @ weight.sum(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(new_bias, target @ bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_constant_projection_stays_constant(old, new):
    weight, bias = np.full([old**2] * 2, 3.0), np.full(old**2, -2.0)
    new_weight, new_bias = resample_projection(weight, bias, new)
    np.testing.assert_allclose(new_weight, 3.0 * old**2 / new**2, rtol=1e-12)
    np.testing.assert_allclose(new_bias, -2.0, rtol=1e-12)


@pytest.mark.parametrize("new", [6, 10, 16])
def test_linear_functions_of_the_positions_are_reproduced_inside(new):
    def linear(side):
        y = np.repeat(centres(side), side)
        x = np.tile(centres(side), side)
        weight = 1 + 2 * y[:, None] - 3 * x[:, None] + 5 * y + 7 * x
        return weight / side**2, 4 - y + 6 * x

    weight, bias = resample_projection(*linear(8), new)
    expected_weight, expected_bias = linear(new)
    keep = inner(new)
    assert 4 <= keep.sum() < new**2
    assert np.abs(weight - expected_weight)[np.ix_(keep, keep)].max() < 1e-12
    assert np.abs(bias - expected_bias)[keep].max() < 1e-12
    assert np.abs(weight - expected_weight).max() > 1e-4  # the borders are constant beyond


def test_up_and_down_again_is_nearly_the_same():
    y, x = np.repeat(centres(8), 8), np.tile(centres(8), 8)
    smooth = np.cos(3 * (y[:, None] - y)) * np.sin(1 + 2 * x[:, None] + x) / 64
    bias = np.cos(4 * y) + x
    there = resample_projection(smooth, bias, 12)
    weight, bias_again = resample_projection(*there, 8)
    assert np.abs(weight - smooth).max() < 0.03 * np.abs(smooth).max()
    assert np.abs(bias_again - bias).max() < 0.03


@pytest.mark.parametrize("new", [12, 20])
def test_a_convolution_stays_a_convolution(new):
    def gaussian(side):
        """Each token gets a Gaussian of the tokens around one up and to the left of it."""
        across = centres(side)[:, None] - centres(side) + 1 / 16
        line = np.exp(-0.5 * (across / 0.12) ** 2) / side
        return np.kron(line, line)

    weight, _ = resample_projection(gaussian(16), np.ones(256), new)
    keep = inner(new)
    expected = gaussian(new)
    difference = np.abs(weight - expected)[np.ix_(keep, keep)].max()
    assert difference < 0.04 * expected.max(), difference / expected.max()


def test_sources_and_targets_are_not_mixed_up():
    """A projection that reads one token and writes to all differs from the opposite one."""
    weight, bias = np.zeros([64, 64]), np.zeros(64)
    weight[8 * 2 + 5] = 1.0  # from row 2, column 5
    new_weight, _ = resample_projection(weight, bias, 10)
    np.testing.assert_allclose(new_weight.sum(0), 1.0, rtol=1e-12)
    assert np.ptp(new_weight, axis=1).max() < 1e-12  # the same for every target
    strongest = new_weight[:, 0].reshape(10, 10).argmax()
    assert divmod(int(strongest), 10) in {(2, 6), (3, 6)}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_type_stays(dtype):
    weight, bias = resample_projection(*noise(4, dtype=dtype), 5)
    assert (weight.dtype, bias.dtype) == (dtype, dtype)


def test_a_model_of_another_size_computes_the_resampled_function():
    """The whole way: images without detail look alike at both sizes, and so do the features."""
    paddle.seed(0)
    config = get_config(CONFIG_32)
    small = build_gmlp(config)
    weights = {name: value.numpy() for name, value in small.state_dict().items()}
    for name in weights:
        if name.endswith("gate.proj.weight"):
            across = np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
            weights[name] = (np.exp(-across / 20) / 20).astype("float32")
    weights["head.weight"] = np.eye(96, 10, dtype="float32")
    checkpoint.assign_weights(small, weights, "here")
    config.DATA.IMAGE_SIZE = 40
    large = build_gmlp(config)
    fitted, side = resample_weights(weights, large, "here")
    assert side == 8
    checkpoint.assign_weights(large, fitted, "here")
    shade = paddle.to_tensor([0.3, -0.5, 0.8]).reshape([1, 3, 1, 1])
    flat = [model(paddle.ones([1, 3, size, size]) * shade) for model, size in
            ((small, 32), (large, 40))]  # fmt: skip
    np.testing.assert_allclose(flat[1].numpy(), flat[0].numpy(), rtol=0.02, atol=0.01)


# --- weights ---


def model_weights(image_size=32, patch=4, depth=2):
    config = get_config(CONFIG_32)
    config.DATA.IMAGE_SIZE = image_size
    config.MODEL.MIXER.PATCH_SIZE, config.MODEL.MIXER.DEPTH = patch, depth
    model = build_gmlp(config)
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


def test_weights_that_fit_are_not_touched():
    _, weights = model_weights()
    same, side = resample_weights(weights, model_of(64), "file")
    assert same is weights and side is None


def test_only_spatial_projections_change_and_the_caller_keeps_his_own():
    _, weights = model_weights()
    before = dict(weights)
    model, _ = model_weights(image_size=24)
    fitted, side = resample_weights(weights, model_of(36), "file")
    assert side == 8 and fitted.keys() == weights.keys()
    changed = {name for name in weights if fitted[name] is not weights[name]}
    assert changed == {name for name in weights if ".gate.proj." in name} and len(changed) == 4
    assert all(weights[name] is before[name] for name in before)
    checkpoint.assign_weights(model, fitted, "file")


def test_weights_for_images_of_one_patch_are_resampled():
    name = "mixer_layers.0.mlp_channels.gate.proj"
    weights = {f"{name}.weight": np.full([1, 1], 9.0), f"{name}.bias": np.ones(1)}
    fitted, side = resample_weights(weights, model_of(9), "file")
    assert side == 1 and fitted[f"{name}.bias"].tolist() == [1.0] * 9
    np.testing.assert_allclose(fitted[f"{name}.weight"], np.ones([9, 9]), rtol=1e-12)


def test_tokens_that_are_no_square_are_refused():
    weight, bias = np.ones([60, 60], "float32"), np.ones(60, "float32")
    name = "mixer_layers.0.mlp_channels.gate.proj"
    with pytest.raises(WeightsError, match=rf"^file: {name}.weight is for 60 tokens, .* no square"):
        resample_weights({f"{name}.weight": weight, f"{name}.bias": bias}, model_of(64), "file")


def test_blocks_of_different_numbers_of_tokens_are_refused():
    _, weights = model_weights()
    name = "mixer_layers.1.mlp_channels.gate.proj"
    weights[f"{name}.weight"], weights[f"{name}.bias"] = noise(5)
    with pytest.raises(WeightsError, match=r"^file: .* different numbers of tokens"):
        resample_weights(weights, model_of(36), "file")


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (np.ones([16, 25], "float32"), np.ones(25, "float32")),
        (np.ones([16, 16], "float32"), np.ones(25, "float32")),
        (np.ones([16, 16], "int64"), np.ones(16, "float32")),
        (np.ones([16, 16], "float32"), None),
        (np.ones([0, 0], "float32"), np.ones(0, "float32")),
        (np.ones(16, "float32"), np.ones(16, "float32")),
        (np.ones([], "float32"), np.ones([], "float32")),
    ],
)
def test_what_is_no_projection_is_left_to_be_refused(weight, bias):
    model, weights = model_weights(image_size=24)
    name = "mixer_layers.1.mlp_channels.gate.proj"
    weights[f"{name}.weight"], weights[f"{name}.bias"] = weight, bias
    if bias is None:
        del weights[f"{name}.bias"]
    fitted, _ = resample_weights(weights, model_of(36), "file")
    with pytest.raises(checkpoint.NotThisModel, match=r"^file: .*mixer_layers.1.*proj"):
        checkpoint.assign_weights(model, fitted, "file")


def test_another_patch_size_is_refused_as_another_model():
    _, weights = model_weights(image_size=28, patch=7)  # 4 x 4 tokens
    model, _ = model_weights()
    fitted, _ = resample_weights(weights, model_of(64), "file")
    with pytest.raises(checkpoint.NotThisModel, match=r"patch_embed.patch_embed.weight"):
        checkpoint.assign_weights(model, fitted, "file")


# --- the program ---


def test_the_program_resamples_pretrained_weights_and_no_checkpoint(trained, few_digits, tmp_path):
    best = trained / "best_weights.pdparams"
    size = ["-data_path", few_digits, "-image_size", 35]
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 1, "TRAIN.BASE_LR": 0.0, "TRAIN.WARMUP_START_LR": 0.0,
            "TRAIN.END_LR": 0.0, "TRAIN.MODEL_EMA": False}  # fmt: skip
    result = run_program(*size, "-output", tmp_path, "-pretrained", best, opts=opts).check()
    said = (
        f"{best} is for images of 28 pixels: its spatial projections are resampled from 4 x 4 to "
        "5 x 5 tokens, for 35 pixels"
    )
    assert said in result.out + result.err
    (folder,) = tmp_path.glob("train-*")
    # At a learning rate of 0 the run saves what it started from.
    start, _ = resample_weights(checkpoint.load_weights(best), model_of(25), "file")
    saved = checkpoint.load_weights(folder / "last.pdparams")
    assert start.keys() == saved.keys()
    assert all(np.array_equal(start[name], saved[name]) for name in start)
    refused = run_program(*size, "-output", tmp_path, "-resume", trained / "last.pdparams",
                          opts=SMALL)  # fmt: skip
    refused.refused(2, "last.pdparams", "gate.proj.weight is [16, 16], wanted [25, 25]")


# --- the study ---


def study(*words):
    return common.run(resolution_study.build_parser(), resolution_study.work, list(map(str, words)))


def test_nearest_copying_takes_the_nearest_token():
    weight, bias = noise(5)
    for side in (4, 5, 8):
        line = np.abs(centres(side)[:, None] - centres(5)).argmin(1)
        tokens = [y * 5 + x for y in line for x in line]
        assert np.array_equal(resolution_study.nearest(bias, side), bias[tokens])
        expected = weight[np.ix_(tokens, tokens)]
        assert np.array_equal(resolution_study.nearest(weight, side), expected)


def test_the_study_evaluates_as_the_program_does(trained, few_digits, tmp_path, capsys):
    config = tmp_path / "small.yaml"
    lines = [f"{key}: {value}" for key, value in SMALL.items() if key.startswith("MODEL.MIXER")]
    mixer = ", ".join(line.removeprefix("MODEL.MIXER.") for line in lines)
    config.write_text(f"BASE: [{CONFIG_32.parent / 'gmlp_digits.yaml'}]\n"
                      f"MODEL: {{MIXER: {{{mixer}}}}}\n")  # fmt: skip
    weights = trained / "best_weights.pdparams"
    words = ["-cfg", config, "-pretrained", weights, "-data_path", few_digits, "-num_workers", 0]
    assert study(*words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["pixels", "tokens", "resampled", "nearest", "scaled", "new"]
    assert [row[0] for row in rows[1:]] == ["21", "28", "35"]
    assert [row[1:4] for row in rows[1:]] == [[n, "x", n] for n in "345"]
    ours = metrics(trained, "eval")[-1]["acc1"]
    assert rows[2][4] == f"{ours:.2f}"
    result = run_program("-eval", "-image_size", 35, "-pretrained", weights, "-data_path",
                         few_digits, "-output", tmp_path, cfg=config)  # fmt: skip
    assert f"Acc@1 {rows[3][4]} " in result.check().out + result.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-image_sizes", 30], ["-image_sizes 30", "multiple of the patch size, 4"]),
        (["-image_sizes", 0], ["-image_sizes 0"]),
        (["-image_sizes", -4], ["-image_sizes -4"]),
        (["-pretrained", "gone.pdparams"], ["gone.pdparams does not exist"]),
        (["-pretrained", str(ROOT)], [f"{ROOT}: there is no best_weights.pdparams"]),
        (["-cfg", "gone.yaml"], ["gone.yaml: cannot read this config file"]),
        (["-cfg", ROOT / "configs" / "gmlp_digits.yaml"], ["these are not this model's weights"]),
        (["-data_path", "/gone"], ["/gone/val_list.txt"]),
    ],
)
def test_what_the_study_is_asked_wrongly_is_one_sentence(tmp_path, capsys, words, parts):
    path = tmp_path / "weights.pdparams"
    paddle.save(model_weights(depth=4)[0].state_dict(), str(path))
    status = study("-cfg", CONFIG_32, "-pretrained", path, "-num_workers", 0, *words)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    for part in parts:
        assert part in error


def test_the_study_answers_help_and_wrong_flags_without_paddle(tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('Paddle was imported')")
    path = {"PYTHONPATH": str(tmp_path)}
    text = run([sys.executable, TOOL, "-h"], **path).check().out
    for flag in ("-cfg", "-pretrained", "-data_path", "-image_sizes", "-seed"):
        assert flag in text
    run([sys.executable, TOOL, "-cfg", CONFIG_32], **path).refused(2, "required: -pretrained")


@pytest.mark.slow
def test_the_digits_model_keeps_nine_tenths_of_its_accuracy(digits, tmp_path, capsys):
    run_program("-data_path", digits, "-output", tmp_path, "-nprocs", 2, cfg=CONFIG_32).check()
    (weights,) = tmp_path.glob("train-*/best_weights.pdparams")
    capsys.readouterr()
    assert study("-cfg", CONFIG_32, "-pretrained", weights, "-data_path", digits) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    own = float(rows[1][4])
    for row in (rows[0], rows[2]):
        ours, *others = (float(number) for number in row[4::2])
        assert len(others) == 3 and ours >= 0.9 * own, row
        assert ours > max(others), row
