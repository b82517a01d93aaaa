"""The demo's model learns real digits, and every one of its parameters takes part."""

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from program import ROOT, metrics, run_program

from config import get_config
from gmlp import build_gmlp
from weights import pdparams

CONFIG = ROOT / "configs" / "gmlp_digits.yaml"


def build(seed=0):
    paddle.seed(seed)
    return build_gmlp(get_config(CONFIG))


def unmoved(start, end):
    """Names of the parameters that are the same, to the bit, in both states."""
    return [name for name in start if np.array_equal(start[name], end[name])]


def state_of(model):
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def test_the_demo_model_reaches_90_percent_and_every_parameter_learns(digits, tmp_path):
    # Without weight decay a parameter without a gradient stays where it started, to the bit.
    opts = {"TRAIN.NUM_EPOCHS": 4, "TRAIN.WEIGHT_DECAY": 0.0}
    run_program("-data_path", digits, "-output", tmp_path, "-nprocs", 2, opts=opts).check()
    (folder,) = tmp_path.glob("train-*")
    scores = metrics(folder, "eval")[-1]
    assert scores["images"] == 1000
    assert scores["acc1"] >= 90.0, scores
    trained = pdparams.read(folder / "last.pdparams")["model"]
    assert unmoved(state_of(build()), trained) == []


@pytest.mark.parametrize("name", [name for name, _ in build().named_parameters()])
def test_a_zeroed_gradient_would_be_noticed(name):
    """The check above can fail: a parameter whose gradient is zeroed is found, and only it."""
    model = build()
    # From a head of zeros nothing below it has a gradient.
    model.head.weight.set_value(0.1 * paddle.ones_like(model.head.weight).cumsum(1))
    start = state_of(model)
    dict(model.named_parameters())[name].register_hook(lambda grad: grad * 0)
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters(), weight_decay=0.0)
    paddle.seed(1)
    images, labels = paddle.randn([8, 3, 28, 28]), paddle.arange(8)
    for _ in range(3):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.clear_grad()
    assert unmoved(start, state_of(model)) == [name]
