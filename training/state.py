"""What a training checkpoint means: what is written, what a file may hold, how a run goes on.

A dict in PaddleViT's layout (model, model_ema, optimizer, epoch, lr_scheduler, amp_grad_scaler)
plus what an exact resume needs (step, batch, loss, best, run).  Random states are not in it: every
draw is a function of the place in the training.
"""

import math
import os
import warnings
from typing import NamedTuple

import paddle

from config import value_of
from ranks import host
from ranks.report import busy
from training import moments
from utils import show
from weights import WeightsError, assign_weights, checkpoint, pdparams
from weights.checkpoint import is_empty, weights_of


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number: going on, or saving, would only spoil the weights."""


class Place(NamedTuple):
    """How far training is: `epoch` epochs, and `batch` batches of the next with a mean loss."""

    epoch: int
    batch: int = 0
    loss: float = 0.0


def describe_place(training):
    """How far a training is, for the log."""
    epoch, batch, _ = training.place
    place = f"epoch {epoch + 1}, batch {batch}/{training.batches}" if batch else f"epoch {epoch}"
    return f"{place}, step {training.updater.step}"


# --- written ---


def save(training, keep=False, best=False):
    """Writes a checkpoint on rank 0; the other ranks note its path and go on.

    Args:
        training: a training.train.Training between two steps.
        keep: under the name of the epoch too.
        best: as the best model too.

    Raises:
        NonFiniteLoss: a weight is not finite, which the loss shows a step later; nothing is saved.
        OSError: the disk is full, the folder gone or read-only; the earlier files are as they were.
    """
    finite = [paddle.isfinite(param).all() for param in training.run.model.parameters()]
    if not bool(paddle.stack(finite).all()):
        raise NonFiniteLoss("a weight is not a finite number")
    if training.run.rank == 0:
        with busy():  # a slow disk is no hang
            _write(training, keep, best)
    training.saved = os.path.join(training.run.folder, "last.pdparams")
    training.saved_place = training.place


def _write(training, keep, best):
    folder, log, keep_last = training.run.folder, training.run.log, training.config.KEEP_LAST
    names = ["best"] if best else []
    names += [f"Epoch-{training.place.epoch}"] if keep else []
    # The best model first: no checkpoint that knows its score may be on disk without it.
    if best:
        path = os.path.join(folder, "best_weights.pdparams")
        pdparams.write(path, training.ema.average.state_dict())
    checkpoint.save(folder, collect(training), names, training.saved)
    names = ", ".join(f"{name}.pdparams" for name in ("last", *names))
    log.info(f"saved {names} ({describe_place(training)})")
    if keep and keep_last:
        for line in checkpoint.remove_old_epochs(folder, keep_last):
            log.info(line)


def collect(training):
    """Everything that going on from this place needs, a tree for weights/checkpoint.py."""
    tree = {
        "model": training.run.model.state_dict(),
        "optimizer": moments.optimizer_state(training.optimizer, training.run.model),
        "epoch": training.place.epoch,
        "lr_scheduler": {
            "last_epoch": training.updater.step,
            "last_lr": training.optimizer.get_lr(),
        },
        "amp_grad_scaler": training.scaler.state_dict(),
        "step": training.updater.step,
        "batch": training.place.batch,
        "loss": training.place.loss,
        "best": training.best,
        "run": run_facts(training),
    }
    if training.config.TRAIN.MODEL_EMA:
        tree["model_ema"] = training.ema.average.state_dict()
    return tree


# The keys that decide a run's numbers; a key stands here or in DOES_NOT_DECIDE.
DECIDES = (
    "DATA.IMAGE_SIZE", "DATA.IMAGE_CHANNELS", "DATA.IMAGENET_MEAN", "DATA.IMAGENET_STD",
    "MODEL.NUM_CLASSES", "MODEL.DROPOUT", "MODEL.DROPPATH",
    "MODEL.MIXER.PATCH_SIZE", "MODEL.MIXER.EMBED_DIM", "MODEL.MIXER.DEPTH",
    "MODEL.MIXER.MLP_RATIO",
    "TRAIN.NUM_EPOCHS", "TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_STEPS", "TRAIN.WEIGHT_DECAY",
    "TRAIN.BASE_LR", "TRAIN.WARMUP_START_LR", "TRAIN.END_LR", "TRAIN.GRAD_CLIP",
    "TRAIN.LINEAR_SCALED_LR", "TRAIN.LAYER_DECAY", "TRAIN.FREEZE_BACKBONE",
    "TRAIN.OPTIMIZER.EPS", "TRAIN.OPTIMIZER.BETAS",
    "TRAIN.MODEL_EMA", "TRAIN.MODEL_EMA_DECAY", "TRAIN.MODEL_EMA_FORCE_CPU",
    "TRAIN.SMOOTHING", "TRAIN.COLOR_JITTER", "TRAIN.AUTO_AUGMENT", "TRAIN.RAND_AUGMENT",
    "TRAIN.RAND_AUGMENT_LAYERS", "TRAIN.RAND_AUGMENT_MAGNITUDE", "TRAIN.RAND_AUGMENT_OPERATORS",
    "TRAIN.CROP_SCALE", "TRAIN.CROP_RATIO", "TRAIN.HFLIP",
    "TRAIN.MIXUP_ALPHA", "TRAIN.MIXUP_PROB", "TRAIN.MIXUP_SWITCH_PROB", "TRAIN.MIXUP_MODE",
    "TRAIN.CUTMIX_ALPHA", "TRAIN.CUTMIX_MINMAX",
    "TRAIN.RANDOM_ERASE_PROB", "TRAIN.RANDOM_ERASE_MODE", "TRAIN.RANDOM_ERASE_COUNT",
    "TRAIN.RANDOM_ERASE_SPLIT",
    "AMP_DTYPE", "AMP_LAYER_NORM", "DETERMINISTIC",
)  # fmt: skip
# Keys that a checkpoint has under names of its own, as PaddleViT's and earlier ones do.
OWN_NAMES = {
    "model_name": "MODEL.NAME",
    "batch_size": "DATA.BATCH_SIZE",
    "seed": "SEED",
    "optimizer": "TRAIN.OPTIMIZER.NAME",
    "lr_schedule": "TRAIN.LR_SCHEDULE",
    "accum_iter": "TRAIN.ACCUM_ITER",  # as an epoch allows it
    "amp": "AMP",  # as the device allows it
}
# Where data, weights and outputs are; how often something is written, validated or shown; how an
# evaluation computes; what gives the same bits either way, or has no effect.
DOES_NOT_DECIDE = (
    "DATA.DATA_PATH", "DATA.DATASET", "DATA.REAL_LABELS", "DATA.NUM_WORKERS",
    "DATA.BATCH_SIZE_EVAL", "DATA.CROP_PCT",
    "MODEL.TYPE", "MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.ATTENTION_DROPOUT",
    "TRAIN.LAST_EPOCH", "TRAIN.RECOMPUTE",
    "SAVE", "SAVE_FREQ", "SAVE_FREQ_STEPS", "KEEP_LAST", "REPORT_FREQ", "VALIDATE_FREQ",
    "HANG_MINUTES",
    "CPU_INFERENCE", "EVAL",
)  # fmt: skip


def run_facts(training):
    """The facts that must not change for a resumed run to be the same bit for bit."""
    config, run = training.config, training.run
    off = _without_effect(config.TRAIN, run)
    settings = {key: value_of(config, key) for key in DECIDES if key not in off}
    if run.amp:  # what "auto" has come to
        norm = "amp" if run.amp.layer_norm else "float32"
        settings.update(AMP_DTYPE=run.amp.dtype, AMP_LAYER_NORM=norm)
    return {
        "images": len(run.train_data),
        "list": run.list_digest,
        "ranks": run.world_size,
        "threads": host.threads(),
        "on_gpu": run.on_gpu,
        **{name: value_of(config, key) for name, key in OWN_NAMES.items()},
        "accum_iter": training.accum_iter,
        "amp": bool(run.amp),
        **{key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()},
    }


def _without_effect(train, run):
    """The keys of DECIDES that another key, or the device, has turned off."""
    off = {  # by the beginning of their names
        "AMP_": not run.amp,
        "DETERMINISTIC": not run.on_gpu,
        "TRAIN.WARMUP_EPOCHS": train.WARMUP_STEPS is not None,
        "TRAIN.AUTO_AUGMENT": train.RAND_AUGMENT,
        "TRAIN.COLOR_JITTER": train.RAND_AUGMENT or train.AUTO_AUGMENT,
        "TRAIN.RAND_AUGMENT_": not train.RAND_AUGMENT,
        "TRAIN.MODEL_EMA_": not train.MODEL_EMA,
    }
    begins = tuple(begin for begin, is_off in off.items() if is_off)
    return [key for key in DECIDES if key.startswith(begins)]


# What every run had before checkpoints said so.
_BEFORE_IT_WAS_WRITTEN = {
    "optimizer": "AdamW",
    "lr_schedule": "cosine",
    "AMP_LAYER_NORM": "float32",
    "DETERMINISTIC": False,
}


# --- checked ---


def _is_count(value):
    return type(value) is int and value >= 0


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_name(value):
    # It goes into a warning: no line ends or terminal escapes.
    return type(value) is str and value.isprintable() and len(value) <= 200


def _is_setting(value):
    """Whether it can be the value of a key: it goes into a warning."""
    if type(value) is list:
        return (
            len(value) <= 100
            and all(type(item) is not list for item in value)
            and all(map(_is_setting, value))
        )
    return value is None or type(value) is bool or _is_finite(value) or _is_name(value)


# What a file may hold beside weights and optimizer state, which are checked against the model.  Any
# key may be missing, as in PaddleViT's files.
_SCHEMA = {
    "epoch": _is_count,
    "step": _is_count,
    "batch": _is_count,
    "loss": _is_finite,
    "best": {"acc1": _is_finite, "epoch": _is_count},
    "run": {
        **dict.fromkeys(("model_name", "optimizer", "lr_schedule", "list"), _is_name),
        **dict.fromkeys(("images", "ranks", "threads", "batch_size"), _is_count),
        **dict.fromkeys(("accum_iter", "seed"), _is_count),
        **dict.fromkeys(("amp", "on_gpu", *DECIDES), _is_setting),
    },
    "amp_grad_scaler": {},
}


def read(path, require_checksum=False, say=warnings.warn):
    """A training checkpoint's tree, with its numbers checked; see weights.pdparams.read.

    A bare state dict comes back as {"model": state dict}.  An optimizer's state under Paddle's own
    names, as in PaddleViT's files, comes back under ours.  `say` gets sentences about the file.

    Raises:
        WeightsError: the file cannot be read, or a value in it is impossible.
    """
    tree, names = pdparams.read_with_names(path, require_checksum)
    if "model" not in tree:
        return {"model": weights_of(tree, path, say)}
    tree["model"] = weights_of({"model": tree["model"]}, path, say)
    parameters = {names.get(id(array)): name for name, array in tree["model"].items()}
    tree["optimizer"] = moments.under_structured_names(tree.get("optimizer"), parameters)
    if is_empty(tree.get("model_ema")):
        tree["model_ema"] = None
    else:
        tree["model_ema"] = weights_of({"model": tree["model_ema"]}, path, say)
    wrong = [key for key in _SCHEMA if key in tree and not _fits(tree[key], _SCHEMA[key])]
    if not wrong and not _has_that_batch(tree):
        wrong = ["batch"]
    if wrong:
        raise WeightsError(
            f"{path}: impossible values of {' and '.join(wrong)}: take another checkpoint"
        )
    return tree


def _fits(value, wanted):
    """Whether a value passes a check, or is a dict whose values pass those of a schema."""
    if callable(wanted):
        return wanted(value)
    return isinstance(value, dict) and all(
        _fits(value[key], check) for key, check in wanted.items() if key in value
    )


def _has_that_batch(tree):
    """Whether an epoch of the run that wrote a checkpoint has that many batches."""
    if not tree.get("batch"):
        return True
    run = tree.get("run", {})
    images, batch_size, ranks = (run.get(key, 0) for key in ("images", "batch_size", "ranks"))
    return 0 < batch_size * ranks * tree["batch"] <= images


# --- restored ---


def restore(training, tree, path):
    """Goes on from a checkpoint, PaddleViT's too; what it lacks starts fresh with a warning.

    The model has its weights already.

    Args:
        training: a training.train.Training before its first step, which is changed.
        tree: what read gave.
        path: where it is from.
    """
    log, config = training.run.log, training.config
    if "epoch" in tree:
        _move_to_place(training, tree, path)
        if os.path.dirname(path) == training.run.folder:  # where the best model's files are
            training.best = {**training.best, **tree.get("best", {})}
    else:
        epoch = training.place.epoch + 1
        log.warning(f"{path} has no epoch: its weights are used, training starts at epoch {epoch}")
    _restore_optimizer(training, tree, path)
    scaling = tree.get("amp_grad_scaler")
    if training.scaler.is_enable() and scaling:
        if training.scaler.state_dict().keys() <= scaling.keys():
            training.scaler.load_state_dict(scaling)
        else:
            log.warning(f"{path} has an incomplete loss scaling: the scale starts anew")
    if config.TRAIN.MODEL_EMA:
        if not tree.get("model_ema"):
            log.warning(
                f"{path} has no averaged weights (EMA): the average starts from the model's"
            )
        assign_weights(training.ema.average, tree.get("model_ema") or tree["model"], path)
    log.info(f"going on with {_describe_next(training)} from {path}")
    training.saved, training.saved_place = path, training.place


def _restore_optimizer(training, tree, path):
    log, model = training.run.log, training.run.model
    missing, unused = moments.restore_optimizer(training.optimizer, model, tree.get("optimizer"))
    if missing and not tree.get("optimizer"):
        log.warning(f"{path} has no optimizer state: the optimizer starts fresh")
    elif missing:
        others = f", and has {_some(unused)}" if unused else ""
        log.warning(
            f"{path} has no optimizer state that fits this model (it lacks {_some(missing)}"
            f"{others}): the optimizer starts fresh"
        )
    elif not tree.get("run"):  # another program's, whose names were matched
        trained = sum(not param.stop_gradient for param in model.parameters())
        others = f"; left out: {_some(unused)}" if unused else ""
        log.info(
            f"{training.config.TRAIN.OPTIMIZER.NAME}'s state of {trained} of "
            f"{len(model.parameters())} parameters is taken over from {path}{others}"
        )


def _some(names):
    """The first of some names, for a sentence."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(show, names[:2])) + more


def _describe_next(training):
    epoch, batch, _ = training.place
    if batch == training.batches:
        return f"the end of epoch {epoch + 1}"
    return f"epoch {epoch + 1}" + (f", batch {batch + 1}/{training.batches}" if batch else "")


def _move_to_place(training, tree, path):
    """Sets epoch, batch and step; with other ranks, batches or images, after as many images."""
    facts, old = run_facts(training), tree.get("run", {})
    if old:
        old = {**_BEFORE_IT_WAS_WRITTEN, **old}
    layout = ("images", "ranks", "batch_size", "accum_iter")
    batch = tree.get("batch", 0)
    step = tree.get("step", tree["epoch"] * training.steps_per_epoch)
    if any(facts[key] != old.get(key) for key in layout):
        images = batch * old.get("batch_size", 0) * old.get("ranks", 0)
        batch = min(images // (facts["batch_size"] * facts["ranks"]), training.batches)
        if batch < training.batches:
            batch -= batch % training.accum_iter
        step = tree["epoch"] * training.steps_per_epoch + -(-batch // training.accum_iter)
    training.place = Place(tree["epoch"], batch, tree.get("loss", 0.0))
    training.updater.move_to(step)
    changes = [
        _describe_change(key, old[key], value)
        for key, value in facts.items()
        if key in old and old[key] != value
    ]
    if changes or not old:
        made = "made with " + ", ".join(changes) if changes else "made by another program"
        training.run.log.warning(
            f"{path} was {made}: going on at the same place in the epoch, not bit for bit"
        )


def _describe_change(key, old, new):
    if key == "list":
        return "another list of training images, labels or their order"
    return f"{key} {old} (now {new})"
