"""What a model keeps at other image sizes than its own, before any fine-tuning.

    python demo/resolution_study.py -cfg configs/gmlp_digits_32.yaml -data_path data/digits \\
        -pretrained digits_32.pdparams -image_sizes 24 32 40

Prints a table: Acc@1 on val_list.txt at each size, in percent and as a share of that at the size of
-cfg, with the spatial projections

    resampled   by weights/resample.py, as -pretrained with another -image_size does it
    nearest     copied from the nearest token, as they are
    scaled      the same, with the sum over the source tokens corrected for their number
    new         initialized anew

Nothing is trained.  Exit status: 0, 2 for what was asked wrongly.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, get_config, update_config
from ranks import host
from utils import progress_bar

# Paddle comes in work(): -h and a wrong flag answer at once.

_METHODS = ("resampled", "nearest", "scaled", "new")


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-cfg", metavar="YAML", required=True, help="the model, at the size it was trained for")
    add("-pretrained", metavar="FILE", required=True, help="its weights")
    add("-data_path", metavar="DIR", help="folder with val_list.txt (default: as -cfg says)")
    add(
        "-image_sizes",
        metavar="N",
        type=int,
        nargs="+",
        help="pixels, multiples of the patch (default: the multiples nearest to 0.75, 1 and 1.25 "
        "of the size of -cfg)",
    )
    add("-batch_size", metavar="N", type=int, help="images per batch")
    add("-num_workers", metavar="N", type=int, help="loader processes (default: by the cores)")
    add("-num_classes", metavar="N", type=int, help="classes of the data set")
    add("-seed", metavar="N", type=int, help="of the new projections (default 0)")
    return parser


def work(args):
    """Prints the table that the arguments ask for."""
    config = update_config(get_config(), args)
    own, patch = config.DATA.IMAGE_SIZE, config.MODEL.MIXER.PATCH_SIZE
    sizes = args.image_sizes or [max(1, round(own * f / patch)) * patch for f in (0.75, 1, 1.25)]
    for size in sizes:
        if size < patch or size % patch:
            raise ConfigError(
                f"-image_sizes {size}: it must be a multiple of the patch size, {patch} pixels"
            )
    os.environ.setdefault("OMP_NUM_THREADS", str(host.available_cores()))
    common.import_paddle()
    from weights.checkpoint import check_weights, load_weights

    weights = load_weights(config.MODEL.PRETRAINED)
    check_weights(_build(config, own), weights, config.MODEL.PRETRAINED)
    own_accuracy = accuracy(config, own, weights, str(own))
    print(f"{'pixels':>8}{'tokens':>9}" + "".join(f"{name:>18}" for name in _METHODS))
    for size in dict.fromkeys(sizes):
        side = size // patch
        row = f"{size:>8}{f'{side} x {side}':>9}"
        if size == own:
            print(row + f"{own_accuracy:>9.2f} (as trained)")
            continue
        for name in _METHODS:
            title = f"{size} {name}"
            score = accuracy(config, size, convert(weights, config, size, name), title)
            row += f"{score:>9.2f} {_share(score, own_accuracy):>8}"
        print(row, flush=True)


def convert(weights, config, size, method):
    """The weights for images of `size` pixels, by one of _METHODS."""
    import paddle

    from weights import resample_weights

    paddle.seed(config.SEED)
    model = _build(config, size)
    if method == "resampled":
        return resample_weights(weights, model, "")[0]
    projections = [name for name in weights if f".{model.gate_name}." in name]
    if method == "new":
        fresh = model.state_dict()
        return {**weights, **{name: fresh[name].numpy() for name in projections}}
    side = size // config.MODEL.MIXER.PATCH_SIZE
    changed = {name: nearest(weights[name], side) for name in projections}
    if method == "scaled":
        factor = (config.DATA.IMAGE_SIZE / size) ** 2
        changed = {k: v * v.dtype.type(factor) if v.ndim == 2 else v for k, v in changed.items()}
    return {**weights, **changed}


def nearest(array, side):
    """A projection's weight or bias with each token's value copied from the nearest old token."""
    import numpy as np

    old = math.isqrt(array.shape[0])
    line = ((np.arange(side) + 0.5) * old / side).astype("int64")
    tokens = (line[:, None] * old + line).reshape(-1)
    return array[np.ix_(*[tokens] * array.ndim)]


def accuracy(config, size, weights, title):
    """Acc@1 in percent on the validation list, at `size` pixels with weights for that size."""
    from datasets import EvalSampler, build_dataset
    from ranks.loader import build_loader
    from training.evaluate import validate
    from transforms import BatchTransform
    from weights import assign_weights

    config = config.clone()
    config.DATA.IMAGE_SIZE = size
    model = _build(config, size)
    assign_weights(model, weights, title)
    images = build_dataset(config, train=False)
    sampler = EvalSampler(len(images), config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE, 0, 1)
    workers = host.choose_workers(config.DATA.NUM_WORKERS, on_gpu=False)
    transform = BatchTransform(config, train=False)
    with contextlib.closing(build_loader(images, sampler, workers, size)) as batches:
        bar = progress_bar(batches, len(sampler), title)
        return validate(model, bar, transform, contextlib.nullcontext)["acc1"]


def _build(config, size):
    from training.run import build_model

    config = config.clone()
    config.DATA.IMAGE_SIZE = size
    return build_model(config)


def _share(score, own):
    return f"({100 * score / own:.1f}%)" if own else ""


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
