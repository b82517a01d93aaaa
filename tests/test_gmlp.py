"""The model: timm's numbers, PaddleViT's names, the paper's sizes."""

import functools
import sys
from types import SimpleNamespace
from unittest import mock

import golden
import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from program import ROOT, run

from gmlp import GMLP, SIZE_KEYS, DropPath, GMLPBlock, Sizes, build_gmlp, can_recompute
from tools.model_table import count_multiply_adds, count_parameters

VARIANTS = ("gmlp_ti16_224", "gmlp_s16_224", "gmlp_b16_224")
# timm 1.0.31: parameters, multiply-adds of convolution, linear and matmul at 224 pixels.
TIMM_COUNTS = {
    "gmlp_ti16_224": (5_867_328, 1_328_989_184),
    "gmlp_s16_224": (19_422_656, 4_392_060_928),
    "gmlp_b16_224": (73_075_392, 15_720_452_096),
}


@pytest.fixture(scope="module", params=("tiny", *VARIANTS))
def computed(request):
    """What one golden model computes and what timm computed; each model is built only once."""
    name = request.param
    model, size = golden.build(name), golden.config_of(name).DATA.IMAGE_SIZE
    images = golden.draw_images(size)
    features = []
    hook = model.head.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0]))
    with paddle.no_grad():
        logits = model(paddle.to_tensor(images))
        hook.remove()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        counts = count_parameters(model), count_multiply_adds(model, size)
        model.to(dtype="float64")
        logits_float64 = model(paddle.to_tensor(images.astype("float64")))
    return SimpleNamespace(
        name=name,
        golden=golden.load(name),
        features=features[0].numpy(),
        logits=logits.numpy(),
        logits_float64=logits_float64.numpy(),
        shapes=shapes,
        counts=counts,
    )


def largest_difference(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours.astype("float64") - theirs).max()


def tiny_config(**changes):
    """The tiny model's config with keys changed, such as MIXER__DEPTH=2 for MODEL.MIXER.DEPTH."""
    config = golden.config_of("tiny")
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        assert key in node
        node[key] = value
    return config


def test_float32_logits_are_timms(computed):
    assert largest_difference(computed.logits, computed.golden["logits_float64"]) < 1e-5


def test_float64_logits_are_timms(computed):
    assert largest_difference(computed.logits_float64, computed.golden["logits_float64"]) < 1e-10


def test_features_are_timms_pooled_features(computed):
    assert largest_difference(computed.features, computed.golden["features"]) < 1e-5


def test_forward_features_is_public_and_all_that_comes_before_the_head():
    model, images = golden.build("tiny"), paddle.to_tensor(golden.draw_images(32))
    features = model.forward_features(images)
    assert largest_difference(features.numpy(), golden.load("tiny")["features"]) < 1e-5
    assert np.array_equal(model.head(features).numpy(), model(images).numpy())


def test_loss_and_every_gradient_are_timms():
    golden_run, model = golden.load("tiny"), golden.build("tiny", "float64")
    images = paddle.to_tensor(golden.draw_images(32).astype("float64"))
    targets = paddle.to_tensor(golden_run["targets"].astype("float64"))
    # Not F.cross_entropy: its gradient takes targets to sum to 1, these float32 ones do to 3e-8.
    loss = -(targets * F.log_softmax(model(images))).sum(axis=-1).mean()
    loss.backward()
    assert abs(float(loss) - float(golden_run["loss_float64"])) < 1e-10

    prefix = "grad_float64/"
    gradients = golden.to_paddle(
        {k[len(prefix) :]: v for k, v in golden_run.items() if k.startswith(prefix)}
    )
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(gradients)
    for name, gradient in gradients.items():
        assert largest_difference(parameters[name].grad.numpy(), gradient) < 1e-10, name


def test_names_and_shapes_are_those_of_the_published_weights(computed):
    expected = {
        golden.paddle_name(name): shape[::-1] if len(shape) == 2 else shape
        for name, shape in golden.timm_shapes(computed.golden).items()
    }
    assert computed.shapes == expected
    assert len(computed.shapes) == (36 if computed.name == "tiny" else 306)


def test_parameters_and_multiply_adds_are_exactly_timms(computed):
    if computed.name == "tiny":
        # 8 x 8 tokens of 4 x 4 x 3 values, dim 16, hidden 96, 3 blocks, 10 classes; by hand.
        block = 64 * 16 * 96 + 48 * 64 * 64 + 64 * 48 * 16
        assert computed.counts[1] == 64 * 48 * 16 + 3 * block + 16 * 10
    else:
        assert computed.counts == TIMM_COUNTS[computed.name]


def test_a_saved_state_dict_gives_the_same_logits(tmp_path):
    model = golden.build("tiny")
    paddle.save(model.state_dict(), str(tmp_path / "tiny.pdparams"))
    fresh = build_gmlp(tiny_config())
    fresh.set_state_dict(paddle.load(str(tmp_path / "tiny.pdparams")))
    fresh.eval()
    images = paddle.to_tensor(golden.draw_images(32))
    assert np.array_equal(fresh(images).numpy(), model(images).numpy())
    assert np.abs(model(images).numpy()).max() > 0.1


@pytest.fixture(scope="module")
def fresh_model():
    """Two blocks of S/16's sizes as they are before training: large enough for statistics."""
    paddle.seed(0)
    config = golden.config_of("gmlp_s16_224")
    config.MODEL.MIXER.DEPTH = 2
    return build_gmlp(config)


def test_patch_projection_starts_lecun_normal_truncated_at_two_deviations(fresh_model):
    weight = fresh_model.patch_embed.patch_embed.weight.numpy()
    variance = 1 / (3 * 16 * 16)
    assert weight.std() == pytest.approx(np.sqrt(variance), rel=0.01)
    cut = 2 * np.sqrt(variance) / 0.87962566
    assert 0.99 * cut < np.abs(weight).max() <= cut * (1 + 1e-6)
    # Of a normal cut at two deviations, 71.5% lies within one (0.6827 / 0.9545).
    assert np.mean(np.abs(weight) < cut / 2) == pytest.approx(0.7152, abs=0.005)
    assert not fresh_model.patch_embed.patch_embed.bias.numpy().any()


def test_channel_projections_start_xavier_uniform_with_tiny_biases(fresh_model):
    for block in fresh_model.mixer_layers:
        for layer in (block.mlp_channels.fc1, block.mlp_channels.fc2):
            weight, bias = layer.weight.numpy(), layer.bias.numpy()
            bound = np.sqrt(6 / sum(weight.shape))
            assert 0.999 * bound < np.abs(weight).max() <= bound * (1 + 1e-6)
            assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
            assert bias.std() == pytest.approx(1e-6, rel=0.2)


def test_spatial_gates_start_open(fresh_model):
    for block in fresh_model.mixer_layers:
        projection = block.mlp_channels.gate.proj
        assert projection.weight.numpy().std() == pytest.approx(1e-6, rel=0.05)
        assert np.abs(projection.weight.numpy().mean()) < 1e-7
        assert (projection.bias.numpy() == 1).all()


def test_norms_start_as_the_identity_with_timms_epsilons(fresh_model):
    norms = {
        name: layer
        for name, layer in fresh_model.named_sublayers()
        if isinstance(layer, nn.LayerNorm)
    }
    assert len(norms) == 2 * 2 + 1
    for name, norm in norms.items():
        assert (norm.weight.numpy() == 1).all() and not norm.bias.numpy().any()
        assert norm._epsilon == (1e-5 if "gate" in name else 1e-6), name


def test_a_fresh_model_gives_zero_logits(fresh_model):
    fresh_model.eval()
    images = paddle.to_tensor(golden.draw_images(224))
    assert fresh_model.forward_features(images).abs().max() > 0.1
    assert not fresh_model(images).numpy().any()


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_drop_path_drops_whole_branches_of_a_share_of_the_samples(rate):
    paddle.seed(1)
    block = GMLPBlock(Sizes(4, 3, 1, 2, dim=8, depth=1, mlp_ratio=2, drop_path=rate))
    x = paddle.randn([4000, 4, 8])
    block.eval()
    branch = (block(x) - x).numpy()
    block.train()
    kept_branch = (block(x) - x).numpy()
    kept = np.abs(kept_branch).max(axis=(1, 2)) > 0
    assert np.mean(kept) == pytest.approx(1 - rate, abs=0.03)
    np.testing.assert_allclose(kept_branch[kept], branch[kept] / (1 - rate), atol=1e-5)
    assert np.abs(branch).max(axis=(1, 2)).min() > 1e-3  # so that "kept" means something


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # a CPU multiplies no float16
def test_drop_path_keeps_the_expectation_in_the_type_that_it_is_used_in(monkeypatch, dtype, rate):
    drawn = []
    monkeypatch.setattr(paddle, "bernoulli", lambda p: drawn.append(p) or paddle.ones_like(p))
    path = DropPath(rate)
    scale = path(paddle.ones([3, 2, 2]).astype(dtype))
    assert scale.dtype == getattr(paddle, dtype) and drawn[0].dtype == paddle.float32
    expectation = scale.astype("float64").numpy() * drawn[0].astype("float64").numpy()
    np.testing.assert_allclose(expectation, 1.0, atol=2e-7)
    # A step of bfloat16, as Paddle 2.6 cuts off where 3 rounds.
    np.testing.assert_allclose(drawn[0].numpy(), 1 - rate, rtol=8e-3)


def test_drop_path_rate_is_the_same_in_every_block_and_off_in_evaluation():
    model = build_gmlp(tiny_config(MODEL__DROPPATH=0.3))
    layers = [layer for layer in model.sublayers() if isinstance(layer, DropPath)]
    assert [layer.rate for layer in layers] == [0.3] * 3
    x = paddle.randn([50, 2, 3])
    layers[0].eval()
    assert np.array_equal(layers[0](x).numpy(), x.numpy())


def test_dropout_acts_after_both_channel_projections_in_training_only():
    paddle.seed(2)
    model = build_gmlp(tiny_config(MODEL__DROPOUT=0.5))
    mlp = model.mixer_layers[1].mlp_channels
    seen = {}
    mlp.gate.register_forward_pre_hook(
        lambda layer, inputs: seen.update(u=inputs[0].numpy(), v=inputs[1].numpy())
    )
    mlp.register_forward_post_hook(lambda layer, inputs, output: seen.update(out=output.numpy()))
    for training, share in ((True, 0.5), (False, 0.0)):
        model.train() if training else model.eval()
        model(paddle.to_tensor(golden.draw_images(32, batch=8)))
        for place in ("u", "v", "out"):
            assert np.mean(seen[place] == 0) == pytest.approx(share, abs=0.05), place


def test_patch_size_and_channels_of_the_config_are_honoured():
    model = build_gmlp(tiny_config(MODEL__MIXER__PATCH_SIZE=8, DATA__IMAGE_CHANNELS=1))
    assert model.patch_embed.patch_embed.weight.shape == [16, 1, 8, 8]
    assert model.mixer_layers[0].mlp_channels.gate.proj.weight.shape == [16, 16]
    assert model(paddle.zeros([2, 1, 32, 32])).shape == [2, 10]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("DATA.IMAGE_SIZE", {"DATA__IMAGE_SIZE": 30}),
        ("MODEL.MIXER.PATCH_SIZE", {"MODEL__MIXER__PATCH_SIZE": 5}),
        ("MODEL.MIXER.MLP_RATIO", {"MODEL__MIXER__EMBED_DIM": 15, "MODEL__MIXER__MLP_RATIO": 3.0}),
        ("MODEL.MIXER.MLP_RATIO", {"MODEL__MIXER__MLP_RATIO": 0.05}),
        ("DATA.IMAGE_SIZE", {"DATA__IMAGE_SIZE": 0}),
        ("DATA.IMAGE_CHANNELS", {"DATA__IMAGE_CHANNELS": 0}),
        ("MODEL.NUM_CLASSES", {"MODEL__NUM_CLASSES": 0}),
        ("MODEL.MIXER.PATCH_SIZE", {"MODEL__MIXER__PATCH_SIZE": 0}),
        ("MODEL.MIXER.EMBED_DIM", {"MODEL__MIXER__EMBED_DIM": -16}),
        ("MODEL.MIXER.DEPTH", {"MODEL__MIXER__DEPTH": 0}),
        ("MODEL.DROPOUT", {"MODEL__DROPOUT": 1.0}),
        ("MODEL.DROPPATH", {"MODEL__DROPPATH": -0.1}),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_key(key, changes):
    with pytest.raises(ValueError) as error:
        build_gmlp(tiny_config(**changes))
    value = list(changes.values())[-1]
    assert key in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("shape", [[1, 3, 28, 32], [1, 3, 64, 64], [1, 3, 32, 36]])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"DATA\.IMAGE_SIZE 32"):
        build_gmlp(tiny_config())(paddle.zeros(shape))


def test_model_table_prints_counts_and_answers_a_wrong_file_in_one_sentence(tmp_path):
    tool = [sys.executable, ROOT / "tools" / "model_table.py"]
    small = tmp_path / "small.yaml"
    small.write_text(
        "DATA: {IMAGE_SIZE: 8}\n"
        "MODEL: {NAME: small, NUM_CLASSES: 2, MIXER: {PATCH_SIZE: 4, EMBED_DIM: 4, DEPTH: 1}}\n"
    )
    answer = run([*tool, small]).check()
    # 4 tokens of 48 values, dim 4, hidden 24 halved to 12, 2 classes; by hand:
    # parameters (48*4 + 4) + 8 + (4*24 + 24) + 24 + (4*4 + 4) + (12*4 + 4) + 8 + (4*2 + 2),
    # multiply-adds 4*48*4 + 4*4*24 + 12*4*4 + 4*12*4 + 4*2.
    assert answer.out.splitlines()[-1] == "| small | 438 | 1,544 | 4 | 8 |"
    small.write_text("MODEL: {NUM_CLASSES: 0}\n")
    run([*tool, small]).refused(2, "MODEL.NUM_CLASSES is 0")


IS_PADDLE_3 = paddle.__version__.startswith("3.")


def test_paddle_3_recomputes_on_a_cpu():
    assert can_recompute() == IS_PADDLE_3


@pytest.mark.skipif(not IS_PADDLE_3, reason="Paddle 2.6 cannot recompute on a CPU")
def test_recomputation_runs_each_block_twice_and_has_the_same_gradients():
    config = golden.config_of("tiny")
    config.MODEL.DROPOUT, config.MODEL.DROPPATH = 0.2, 0.3
    model = build_gmlp(config)
    model.head.weight.set_value(paddle.ones_like(model.head.weight).cumsum(1) / 100)
    model.train()
    images, runs = paddle.to_tensor(golden.draw_images(32)), []
    for block in model.mixer_layers:
        block.register_forward_post_hook(lambda *_: runs.append(1))
    gradients = []
    for model.recompute in (False, True):
        paddle.seed(3)
        (model(images) ** 2).mean().backward()
        gradients.append({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
        model.clear_gradients()
    assert len(runs) == 3 + 2 * 3
    for name, expected in gradients[0].items():
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(gradients[1][name], expected, name)
    model.eval()
    runs.clear()
    model(images)
    assert len(runs) == 3


@pytest.fixture(params=["CPU's", "GPU's"])
def wheel(request):
    """The operators of both wheels, on the CPU."""
    if request.param == "GPU's":
        request.getfixturevalue("gpu_wheel")


def gradients_of(model, images):
    model(images).square().mean().backward()
    found = {name: param.grad.numpy() for name, param in model.named_parameters()}
    model.clear_gradients()
    return found


def test_it_is_compiled_by_to_static_with_its_defaults(wheel):
    model = golden.build("tiny")
    images = paddle.to_tensor(golden.draw_images(32))
    expected, gradients = model(images).numpy(), gradients_of(model, images)
    compiled = paddle.jit.to_static(model)
    np.testing.assert_allclose(compiled(images).numpy(), expected, atol=1e-6)
    compiled.train()
    np.testing.assert_allclose(compiled(images).numpy(), expected, atol=1e-6)
    for name, gradient in gradients_of(compiled, images).items():
        np.testing.assert_allclose(gradient, gradients[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_is_compiled_with_its_random_parts_too(recompute):
    if recompute and not IS_PADDLE_3:
        pytest.skip("Paddle 2.6 cannot recompute on a CPU")
    model = build_gmlp(tiny_config(MODEL__DROPOUT=0.2, MODEL__DROPPATH=0.3))
    model.head.weight.set_value(paddle.randn(model.head.weight.shape))
    model.recompute = recompute
    images = paddle.to_tensor(golden.draw_images(32, batch=8))
    compiled = paddle.jit.to_static(model)
    outputs = [compiled(images).numpy() for _ in range(2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert all(np.abs(gradient).max() > 0 for gradient in gradients_of(compiled, images).values())
    compiled.eval()
    outputs = [compiled(images).numpy() for _ in range(2)]
    assert np.array_equal(*outputs)


def test_a_gpus_wheel_has_the_same_function_and_gradients(gpu_wheel):
    assert paddle.is_compiled_with_cuda()
    golden_run, model = golden.load("tiny"), golden.build("tiny")
    images = paddle.to_tensor(golden.draw_images(32))
    with mock.patch.object(paddle._C_ops, "linear_v2", wraps=paddle._C_ops.linear_v2) as operator:
        assert largest_difference(model(images).numpy(), golden_run["logits_float64"]) < 1e-5
    assert operator.call_count == 3 * 3 + 1
    model.train()
    found = gradients_of(model, images)
    model.recompute = True
    again = gradients_of(model, images)
    with mock.patch.object(paddle, "is_compiled_with_cuda", lambda: False):
        expected = gradients_of(model, images)
    for name, gradient in expected.items():
        assert np.array_equal(again[name], found[name]), name
        np.testing.assert_allclose(found[name], gradient, atol=1e-6, err_msg=name)


SIZES = [
    Sizes(32, 3, 10, 4, dim=16, depth=3, mlp_ratio=6.0),
    Sizes(15, 1, 1, 5, dim=3, depth=1, mlp_ratio=4 / 3),
    Sizes(8, 4, 2, 8, dim=7, depth=2, mlp_ratio=22 / 7),  # 7 * (22 / 7) is 21.999...
]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_are_found_again_from_weights_and_from_a_config(sizes):
    weights = {name: value.numpy() for name, value in GMLP(sizes).state_dict().items()}
    found = Sizes.from_weights(weights)
    assert found._replace(mlp_ratio=0) == sizes._replace(mlp_ratio=0)
    assert found.hidden_dim == sizes.hidden_dim
    config = tiny_config()
    for key, value in zip(SIZE_KEYS, found):
        *sections, name = key.split(".")
        functools.reduce(getattr, sections, config)[name] = value
    assert Sizes.from_config(config) == found


def changed(name, shape):
    weights = {name: value.numpy() for name, value in GMLP(SIZES[0]).state_dict().items()}
    if shape is None:
        del weights[name]
    else:
        weights[name] = np.broadcast_to(np.float32(0), shape)
    return weights


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("head.weight", None, "head.weight is missing"),
        ("mixer_layers.0.mlp_channels.gate.proj.weight", None, "gate.proj.weight is missing"),
        ("patch_embed.patch_embed.weight", (16, 3, 4), "a shape has the wrong number of axes"),
        ("patch_embed.patch_embed.weight", (16, 3, 4, 4000), "do not fit together"),
        ("patch_embed.patch_embed.weight", (160000, 3, 4, 4), "do not fit together"),
        ("mixer_layers.1.mlp_channels.fc1.weight", (16, 10**9), "not the same in all blocks"),
        ("mixer_layers.9.norm.weight", (16,), "mixer_layers.3.mlp_channels.fc1.weight is missing"),
        ("head.weight", (1, 10**9), "do not fit together"),
    ],
)
def test_weights_that_make_no_model_are_refused_before_memory_is_asked_for(name, shape, part):
    with pytest.raises(ValueError, match=part):
        Sizes.from_weights(changed(name, shape))


def test_a_frozen_backbone_has_no_dropout_and_leaves_the_head_to_train():
    model = build_gmlp(tiny_config(MODEL__DROPOUT=0.5, MODEL__DROPPATH=0.5))
    model.head.weight.set_value(paddle.ones_like(model.head.weight))
    model.freeze_backbone()
    model.train()
    images = paddle.to_tensor(golden.draw_images(32))
    assert np.array_equal(model(images).numpy(), model(images).numpy())
    trained = [name for name, param in model.named_parameters() if not param.stop_gradient]
    assert trained == ["head.weight", "head.bias"]


def test_a_ratio_beyond_any_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^MODEL\.MIXER\.MLP_RATIO 1e\+308 "):
        build_gmlp(tiny_config(MODEL__MIXER__MLP_RATIO=1e308))
