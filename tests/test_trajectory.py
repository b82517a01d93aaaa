"""Sixty optimizer steps of timm's training, repeated by the parts that train here.

tests/data/trajectory.npz holds a run in float64 on a CPU of timm 1.0.31 and PyTorch 2.13.0, in the
order of timm's train.py: MlpMixer of SpatialGatingBlocks (image 16, patch 4, dim 8, depth 2, ratio
4, 10 classes), 2 micro-batches of 6 images a step, Mixup(0.8, 1.0, label_smoothing=0.1),
SoftTargetCrossEntropy, clip_grad_norm_(1.0), AdamW without decay of biases and norms, ModelEmaV2,
CosineLRScheduler(warmup_prefix=True).  Weights are drawn by golden.draw_weights; images, boxes and
shares of labels are in the file, and so are parameters (p/) and EMA (e/) after steps 10, 20, ... 60
under timm's names, and each micro-batch's loss.  The same run with the two things that Paddle does
otherwise is there as `*_maxnorm`: gradients are multiplied by clip / max(norm, clip), not by clip /
(norm + 1e-6), and the weight decay is a float32.

Another file of this layout can be named by the variable TRAJECTORY.
"""

import contextlib
import logging
import os
import types
from unittest import mock

import numpy as np
import paddle
import pytest
from golden import DATA, draw_weights, paddle_name, timm_shapes, to_paddle

import gmlp
import transforms
from config import get_config
from training import optim
from training import train as training_module
from training.resume import Start
from training.train import Training
from transforms import Mix

EPOCHS = 6  # of 10 steps
# Paddle 2.6 holds a number that a tensor is multiplied by as a float32, such as 1 - smoothing.
CLOSE = 1e-10 if int(paddle.__version__.split(".")[0]) >= 3 else 1e-7


def load():
    with np.load(os.environ.get("TRAJECTORY", DATA / "trajectory.npz")) as file:
        return dict(file)


def config_of(golden):
    config = get_config()
    image, patch, dim, depth, ratio = golden["model"].tolist()
    config.DATA.IMAGE_SIZE, config.DATA.BATCH_SIZE = int(image), golden["index"].shape[2]
    config.DATA.IMAGENET_MEAN = golden["mean"].tolist()
    config.DATA.IMAGENET_STD = golden["std"].tolist()
    config.MODEL.NUM_CLASSES, config.MODEL.DROPPATH = 10, 0.0
    mixer, train = config.MODEL.MIXER, config.TRAIN
    mixer.PATCH_SIZE, mixer.EMBED_DIM, mixer.DEPTH = int(patch), int(dim), int(depth)
    mixer.MLP_RATIO = ratio
    rate, start, end, warmup, total, decay, eps, *betas, clip, ema, smoothing, accum = (
        float(value) for value in golden["hyper"]
    )
    train.BASE_LR, train.WARMUP_START_LR, train.END_LR = rate, start, end
    train.LINEAR_SCALED_LR, train.WARMUP_STEPS = None, int(warmup)
    train.NUM_EPOCHS, train.ACCUM_ITER = int(total) // 10, int(accum)  # it stops before the end
    train.WEIGHT_DECAY, train.OPTIMIZER.EPS, train.OPTIMIZER.BETAS = decay, eps, betas
    train.GRAD_CLIP, train.MODEL_EMA, train.MODEL_EMA_DECAY = clip, True, ema
    train.SMOOTHING, train.RANDOM_ERASE_PROB = smoothing, 0.0
    return config


def repeat(dtype):
    """The golden run by this repository: (golden, losses [60, 2], parameters and EMA by epoch).

    Only what was drawn at random comes from the file.
    """
    golden = load()
    config = config_of(golden)
    paddle.set_default_dtype(dtype)
    try:
        model = gmlp.build_gmlp(config)
        weights = to_paddle(draw_weights(timm_shapes(golden), int(golden["seed"])))
        model.set_state_dict({name: value.astype(dtype) for name, value in weights.items()})
        batches = golden["index"].shape[1] * 10  # of an epoch
        run = types.SimpleNamespace(
            config=config, model=model, rank=0, world_size=1, val_data=(), amp=False,
            train_data=range(batches * config.DATA.BATCH_SIZE), autocast=contextlib.nullcontext,
            log=logging.getLogger("test"), start=Start(),
            metrics=types.SimpleNamespace(write=lambda **row: None),
        )  # fmt: skip
        training = Training(run)
        draws = zip(golden["lam"].reshape(-1, 1), golden["boxes"].reshape(-1, 1, 4).astype(int))
        losses, trees = [], []
        train_batch = training.train_batch

        def noting_the_loss(*args):
            losses.append(float(train_batch(*args)))
            return paddle.to_tensor(losses[-1])

        training.train_batch = noting_the_loss
        with mock.patch.object(transforms, "draw_mix", lambda *args, **options: Mix(*next(draws))):
            for epoch in range(EPOCHS):
                chosen = golden["index"][10 * epoch : 10 * (epoch + 1)]
                loader = [
                    (
                        paddle.to_tensor(golden["pool"][images]),
                        paddle.to_tensor(golden["pool_labels"][images].astype("int64")),
                    )
                    for images in chosen.reshape(-1, chosen.shape[-1])
                ]
                training.train_batches(loader, epoch + 1)
                training.place = training_module.Place(epoch + 1)
                trees.append([to_numpy(model), to_numpy(training.ema.average)])
        assert next(draws, None) is None
        return golden, np.array(losses).reshape(golden["loss"].shape), trees
    finally:
        paddle.set_default_dtype("float32")


def to_numpy(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def distances(golden, trees):
    """The largest difference of a parameter, and of an average, after any of the epochs."""
    largest = []
    for kind, prefix in enumerate(("p/", "e/")):
        names = [name for name in golden if name.startswith(prefix)]
        assert len(names) == len(trees[0][kind])
        off = []
        for epoch, pair in enumerate(trees):
            arrays = to_paddle({name[2:]: golden[name][epoch] for name in names})
            off += [np.abs(pair[kind][name] - array).max() for name, array in arrays.items()]
        largest.append(max(off))
    return largest


def fingerprint(array):
    array = np.asarray(array, "float64").ravel()
    noise = np.random.RandomState(5).standard_normal(array.size)
    return [array.sum(), np.sqrt(array @ array), array @ noise]


def test_training_in_float32_is_timms():
    golden, losses, trees = repeat("float32")
    assert max(distances(golden, trees)) < 3e-6
    assert np.abs(losses - golden["loss"]).max() < 3e-6


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
