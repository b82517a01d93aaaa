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

import logging
import os
import types
from unittest import mock

import numpy as np
import paddle
from golden import DATA, draw_weights, timm_shapes, to_paddle

import gmlp
import transforms
from config import get_config
from training import optim
from training.resume import Start
from training.train import Place, Training
from transforms import Mix

EPOCHS = 6  # of 10 steps


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


def training_of(config, model, images, amp=None):
    """A Training of `images` images an epoch, on one rank and without files."""
    run = types.SimpleNamespace(
        config=config, model=model, rank=0, world_size=1, on_gpu=False, train_data=range(images),
        amp=amp, autocast=optim.build_autocast(amp), log=logging.getLogger("test"), start=Start(),
        val_data=(), metrics=types.SimpleNamespace(write=lambda **row: None),
    )  # fmt: skip
    return Training(run)


def repeat(dtype):
    """The golden run by this repository: (golden, losses [60, 2], parameters and EMA by epoch).

    On the current device.  Only what was drawn at random comes from the file.
    """
    golden = load()
    config = config_of(golden)
    paddle.set_default_dtype(dtype)
    try:
        model = gmlp.build_gmlp(config)
        weights = to_paddle(draw_weights(timm_shapes(golden), int(golden["seed"])))
        model.set_state_dict({name: value.astype(dtype) for name, value in weights.items()})
        batches = golden["index"].shape[1] * 10  # of an epoch
        training = training_of(config, model, batches * config.DATA.BATCH_SIZE)
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
                training.place = Place(epoch + 1)
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
