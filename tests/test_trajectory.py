"""Sixty steps of timm's training (trajectory.py) in float64; in float32: test_gpu.py."""

from unittest import mock

import numpy as np
import paddle
import pytest
from golden import paddle_name
from trajectory import distances, repeat

import gmlp
import transforms
from training import optim

# Paddle 2.6 holds a number that a tensor is multiplied by as a float32, such as 1 - smoothing.
CLOSE = 1e-10 if int(paddle.__version__.split(".")[0]) >= 3 else 1e-7


def fingerprint(array):
    array = np.asarray(array, "float64").ravel()
    noise = np.random.RandomState(5).standard_normal(array.size)
    return [array.sum(), np.sqrt(array @ array), array @ noise]


def test_training_in_float64_is_timms_but_for_paddles_clipping_and_decay():
    golden, losses, trees = repeat("float64")
    assert all(array.dtype == "float64" for tree in trees[-1] for array in tree.values())
    assert max(distances(golden, trees)) < 1e-6
    assert np.abs(losses - golden["loss_maxnorm"]).max() < CLOSE
    for prefix, tree in zip(("p60_maxnorm/", "e60_maxnorm/"), trees[-1]):
        names = [name for name in golden if name.startswith(prefix)]
        assert len(names) == len(tree)
        for name in names:
            value = tree[paddle_name(name[len(prefix) :])]
            value = value.T if value.ndim == 2 else value  # to PyTorch's layout
            assert np.abs(np.array(fingerprint(value)) - golden[name]).max() < CLOSE, name


def over_the_other_classes(labels, num_classes, smoothing, lam):
    """soft_targets with the smoothed share on the classes that are not the label alone."""
    own = paddle.nn.functional.one_hot(labels, num_classes).astype("float32")
    targets = own * (1 - smoothing) + (1 - own) * smoothing / (num_classes - 1)
    lam = paddle.to_tensor(lam, targets.dtype).reshape([-1, 1])
    return targets * lam + targets.flip(0) * (1 - lam)


def average_before_the_step(updater):
    updater.ema.update()
    with mock.patch.object(updater, "ema"):
        UPDATE(updater)


def from_the_first_step(rate, step):
    """A cosine over the whole run, as timm has it by default."""
    if step < rate.warmup:
        return RATE(rate, step)
    return rate.end + (rate.base - rate.end) * optim.SCHEDULES["cosine"](step / rate.total)


UPDATE, RATE, GELU = optim.Updater.update, optim.LearningRate.__call__, gmlp.F.gelu
FAULTS = {
    "a norm's epsilon": (gmlp, "NORM_EPSILON", 1e-5),
    "the gate's epsilon": (gmlp, "GATE_NORM_EPSILON", 1e-6),
    "tanh in GELU": (gmlp.F, "gelu", lambda x: GELU(x, approximate=True)),
    "smoothing over the other classes": (transforms, "soft_targets", over_the_other_classes),
    "decayed biases": (optim, "decayed_parameters", lambda m: {p.name for p in m.parameters()}),
    "a rate one step late": (optim.LearningRate, "__call__", lambda r, n: RATE(r, max(0, n - 1))),
    "a cosine over all steps": (optim.LearningRate, "__call__", from_the_first_step),
    "an average before the step": (optim.Updater, "update", average_before_the_step),
    "no clipping": (paddle.nn, "ClipGradByGlobalNorm", lambda norm: None),
}


@pytest.mark.slow  # it shows that the tests above see something
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    with mock.patch.object(*FAULTS[fault]):
        golden, _, trees = repeat("float32")
    assert max(distances(golden, trees)) > 6e-6  # twice what is allowed
