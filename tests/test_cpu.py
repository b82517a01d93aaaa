"""training/cpu.py: the same model, and the same gradients but for rounding."""

import collections
import copy

import numpy as np
import paddle
import pytest
import trajectory
from golden import config_of
from paddle import nn
from paddle.nn import functional as F

from gmlp import HalvedLinear, build_gmlp, can_recompute
from ranks import loader
from training import cpu, inference
from utils import DataError


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    paddle.set_default_dtype(request.param)
    yield request.param
    paddle.set_default_dtype("float32")


def nothing(name):
    return False


def step(fast, recompute=False, frozen=nothing):
    """(logits, gradients by name) of a model with random weights; of the images under "images".

    frozen: name -> whether that has no gradient.
    """
    paddle.seed(3)
    model = build_gmlp(config_of("tiny"))
    for name, param in model.named_parameters():
        param.set_value(0.3 * paddle.randn(param.shape) + (1 if param.ndim == 1 else 0))
        param.stop_gradient = frozen(name)
    model.train()
    model.recompute = recompute
    if fast:
        cpu.speed_up(model)
    images = paddle.randn([4, 3, 32, 32])
    images.stop_gradient = frozen("images")
    logits = model(images)
    F.cross_entropy(logits, paddle.to_tensor([1, 2, 3, 0])).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    gradients["images"] = images.grad
    return logits.numpy(), {k: g.numpy() for k, g in gradients.items() if g is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_paddles(dtype, recompute):
    if recompute and not can_recompute():
        pytest.skip("Paddle 2.6 recomputes on GPUs only")
    (logits, wanted), (own_logits, own) = step(False), step(True, recompute)
    assert np.array_equal(logits, own_logits) and wanted.keys() == own.keys()
    limit = {"float32": 3e-6, "float64": 1e-12}[dtype]
    gaps = {name: np.abs(own[name] - g).max() / np.abs(g).max() for name, g in wanted.items()}
    assert max(gaps.values()) < limit and len(gaps) > 20, gaps


@pytest.mark.parametrize("part", ["images", "patch_embed", "norm", "fc1", "bias", "head"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "alone"])
def test_whatever_is_frozen_the_rest_has_its_gradients(part, frozen):
    def stands_still(name):
        return (part in name) == frozen

    (_, wanted), (_, own) = (step(fast, frozen=stands_still) for fast in (False, True))
    assert own.keys() == wanted.keys() and own
    for name, gradient in wanted.items():
        assert np.abs(own[name] - gradient).max() < 3e-6 * np.abs(gradient).max()


def test_a_copy_computes_with_its_own_weights_and_a_program_with_paddles_layers(tmp_path):
    model = build_gmlp(config_of("tiny"))
    cpu.speed_up(model)
    copied = copy.deepcopy(model)
    images = paddle.randn([2, 3, 32, 32])
    for param in copied.parameters():
        param.set_value(0.3 * paddle.randn(param.shape))
    wanted = copied(images).numpy()
    assert np.abs(wanted).max() > 0.1 and not model(images).numpy().any()
    (copied(images) ** 2).sum().backward()
    assert all(param.grad is not None for param in copied.parameters())
    assert all(param.grad is None for param in model.parameters())
    program = inference.save(copied, paddle.static.InputSpec([None, 3, 32, 32]), tmp_path, "model")
    assert np.abs(inference.load(program)(images.numpy()) - wanted).max() < 1e-4


def gradients(layer, x):
    x.stop_gradient = False
    y = layer(x)
    (y * paddle.arange(y.size, dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [x.grad.numpy()] + [param.grad.numpy() for param in layer.parameters()]


@pytest.mark.parametrize(
    "shape, options",
    [
        ([5], {}),
        ([3, 5], {}),
        (5, {"bias_attr": False}),
        (5, {"weight_attr": False}),
    ],
)
def test_layer_norms_that_no_gmlp_has_keep_their_gradients(shape, options):
    layer, x = nn.LayerNorm(shape, **options), paddle.randn([2, 3, 5])
    wanted = gradients(layer, x.clone())
    layer.clear_gradients()
    cpu.speed_up(nn.Sequential(layer))
    for own, gradient in zip(gradients(layer, x.clone()), wanted):
        assert np.abs(own - gradient).max() < 1e-5 * np.abs(gradient).max()


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_is_changed_in_place_before_the_backward_pass_is_an_error(changed):
    layer = nn.LayerNorm(5)
    cpu.speed_up(nn.Sequential(layer))
    x = paddle.randn([2, 5])
    x.stop_gradient = False
    hidden = x * 2
    y = layer(hidden)
    with paddle.no_grad():
        (hidden if changed == "input" else layer.weight).add_(paddle.ones([5]))
    # Paddle 2.6 makes an OSError of it.
    with pytest.raises((RuntimeError, OSError), match="changed in place before backward"):
        y.sum().backward()


def test_a_loader_worker_that_dies_during_a_backward_pass_is_told(monkeypatch):
    def died(*args):  # what Paddle raises in its handler of SIGCHLD
        raise SystemError("(Fatal) DataLoader process (pid 7) exited. (at data_loader.cc:185)")

    monkeypatch.setitem(cpu._GRADIENTS, nn.LayerNorm, died)
    layer = nn.LayerNorm(5)
    cpu.speed_up(nn.Sequential(layer))
    told = r"died \(\(Fatal\) DataLoader process \(pid 7\) exited\): if the system"
    with pytest.raises(DataError, match=told), loader.explain_dead_workers():
        gradients(layer, paddle.randn([2, 5]))
    with pytest.raises(FileNotFoundError), loader.explain_dead_workers():
        raise FileNotFoundError("another error")


def test_paddles_compiler_trains_them():
    layer, x = nn.LayerNorm(5), paddle.randn([2, 3, 5])
    wanted = gradients(layer, x.clone())
    layer.clear_gradients()
    model = nn.Sequential(layer)
    cpu.speed_up(model)
    for own, gradient in zip(gradients(paddle.jit.to_static(model), x.clone()), wanted):
        assert np.abs(own - gradient).max() < 1e-5 * np.abs(gradient).max()


def test_every_layer_of_a_training_has_them(monkeypatch):
    model, counts = build_gmlp(config_of("tiny")), collections.Counter()

    def counted(kind, function):
        def count(*args):
            counts[kind] += 1
            return function(*args)

        return count

    for kind, function in list(cpu._GRADIENTS.items()):
        monkeypatch.setitem(cpu._GRADIENTS, kind, counted(kind, function))
    trajectory.training_of(config_of("tiny"), model, 1024)
    model(paddle.randn([2, 3, 32, 32])).sum().backward()
    depth = model.sizes.depth
    assert counts == {HalvedLinear: depth, nn.LayerNorm: 2 * depth + 1}


def test_a_gpu_has_paddles_own(monkeypatch):
    model = build_gmlp(config_of("tiny"))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    cpu.speed_up(model)
    assert not any("forward" in vars(layer) for layer in model.sublayers())
