"""training/cpu.py: the same model, and the same gradients but for rounding."""

import numpy as np
import paddle
import pytest
from golden import config_of
from paddle.nn import functional as F

from gmlp import build_gmlp, can_recompute
from training import cpu


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    paddle.set_default_dtype(request.param)
    yield request.param
    paddle.set_default_dtype("float32")


def step(fast, recompute=False, frozen=False):
    """(logits, gradients by name) of a model with random weights; of the images under "images"."""
    paddle.seed(3)
    model = build_gmlp(config_of("tiny"))
    for param in model.parameters():
        param.set_value(0.3 * paddle.randn(param.shape) + (1 if param.ndim == 1 else 0))
    model.train()
    model.recompute = recompute
    if frozen:
        model.freeze_backbone()
    if fast:
        cpu.speed_up(model)
    images = paddle.randn([4, 3, 32, 32])
    images.stop_gradient = frozen
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
    assert max(gaps.values()) > 0  # it is not Paddle's own


def test_a_frozen_backbone_has_no_gradients():
    (_, wanted), (_, own) = step(False, frozen=True), step(True, frozen=True)
    assert own.keys() == wanted.keys() == {"head.weight", "head.bias"}


def test_a_gpu_has_paddles_own(monkeypatch):
    model = build_gmlp(config_of("tiny"))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    cpu.speed_up(model)
    assert not any("forward" in vars(layer) for layer in model.sublayers())
