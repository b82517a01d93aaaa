"""Weights and checkpoints: into a model, into a run that goes on, and onto the disk.

A training checkpoint is a dict in PaddleViT's layout (model, model_ema, optimizer, epoch,
lr_scheduler, amp_grad_scaler) plus what an exact resume needs (step, best, run).  Files are read
and written by pdparams.py.
"""

import contextlib
import glob
import math
import os
import re
import shutil

import numpy as np
import paddle

from compat import create_accumulators
from files import new_file
from weights import pdparams
from weights.pdparams import WeightsError

_HEAD = ("head.weight", "head.bias")


class NotThisModel(WeightsError):
    """A sound file with the weights of another model."""


def load_weights(path):
    """The weights in a file, without running code from it.

    Args:
        path: a state dict or a training checkpoint (`.pdparams`), or `.safetensors`.

    Returns:
        Parameter names to NumPy arrays, for `model.set_state_dict`; of a training checkpoint the
        averaged weights (EMA), where it has them.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything but weights.
    """
    return weights_of(pdparams.read(path), path)


def weights_of(tree, path):
    """The weights of a read file; see load_weights."""
    if "model" in tree:
        tree = tree["model"] if _is_empty(tree.get("model_ema")) else tree["model_ema"]
    arrays = isinstance(tree, dict) and all(isinstance(v, np.ndarray) for v in tree.values())
    if not (arrays and tree):
        raise WeightsError(f"{path}: holds no weights (parameter names with arrays)")
    return tree


def read(path, require_checksum=False):
    """A training checkpoint's dict, with its numbers checked; see pdparams.read.

    A bare state dict comes back as {"model": state dict}.
    """
    tree = pdparams.read(path, require_checksum)
    if "model" not in tree:
        return {"model": weights_of(tree, path)}
    weights_of({"model": tree["model"]}, path)
    if _is_empty(tree.get("model_ema")):
        tree["model_ema"] = None
    else:
        weights_of({"model": tree["model_ema"]}, path)
    wrong = _wrong_keys(tree, _SCHEMA)
    if not wrong and not _has_that_batch(tree):
        wrong = ["batch"]
    if wrong:
        raise WeightsError(
            f"{path}: {' and '.join(wrong)} in it cannot be: take another checkpoint"
        )
    return tree


def _is_empty(weights):
    return weights is None or (isinstance(weights, dict) and not weights)


def _is_count(value):
    return type(value) is int and value >= 0


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_name(value):
    # It goes into a warning: no line ends or terminal escapes.
    return type(value) is str and value.isprintable() and len(value) <= 200


# What a training checkpoint may hold beside weights and optimizer state, which are checked against
# the model.  Any key may be missing, as in PaddleViT's files.
_SCHEMA = {
    "epoch": _is_count,
    "step": _is_count,
    "batch": _is_count,
    "loss": _is_finite,
    "best": {"acc1": _is_finite, "epoch": _is_count},
    "run": {
        "model_name": _is_name,
        **dict.fromkeys(("images", "ranks", "threads", "batch_size"), _is_count),
        **dict.fromkeys(("accum_iter", "seed"), _is_count),
    },
    "amp_grad_scaler": {},
}


def _wrong_keys(tree, schema):
    """The keys whose values are not what the schema says: a function that is true, or a dict."""
    return [
        key
        for key, wanted in schema.items()
        if key in tree and not (wanted(tree[key]) if callable(wanted) else _fits(tree[key], wanted))
    ]


def _fits(value, schema):
    return isinstance(value, dict) and not _wrong_keys(value, schema)


def _has_that_batch(tree):
    """Whether an epoch of the run that made a checkpoint has as many batches as it counts."""
    if not tree.get("batch"):
        return True
    run = tree.get("run", {})
    images, batch_size, ranks = (run.get(key, 0) for key in ("images", "batch_size", "ranks"))
    return 0 < batch_size * ranks * tree["batch"] <= images


def check_weights(model, weights, path, allow_new_head=False):
    """Raises NotThisModel, with the first few differences, where weights do not fit a model.

    Returns:
        Whether the head has another number of classes and is allowed to.
    """
    wanted = {name: list(param.shape) for name, param in model.state_dict().items()}
    found = {name: list(array.shape) for name, array in weights.items()}
    new_head = allow_new_head and any(found.get(name) != wanted[name] for name in _HEAD)
    ignored = _HEAD if new_head else ()
    differences = [
        f"{name} is {found.get(name, 'not there')}, wanted {wanted.get(name, 'nothing')}"
        for name in (*wanted, *(name for name in found if name not in wanted))
        if name not in ignored and found.get(name) != wanted.get(name)
    ]
    differences += [
        f"{name} is of {array.dtype}, wanted floating-point numbers"
        for name, array in weights.items()
        if array.dtype.kind != "f"
    ]
    if any(name.startswith(("stem.proj.", "blocks.")) for name in weights):
        raise NotThisModel(
            f"{path}: these are weights in timm's names: tools/port_weights.py makes a .pdparams"
        )
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise NotThisModel(
            f"{path}: these are not this model's weights (wrong -cfg?): "
            + "; ".join(differences[:4])
            + more
        )
    return new_head


def assign_weights(model, weights, path, allow_new_head=False):
    """Copies weights into a model, all or none; float16 and float64 ones are cast.

    Args:
        model: the model.
        weights: parameter names to arrays, as load_weights returns.
        path: where they are from, for the message.
        allow_new_head: leave the head as it is where the file's has another number of classes.

    Returns:
        Whether the head was left as it is.

    Raises:
        NotThisModel: names, shapes or types differ; lists the first few with both shapes.
    """
    new_head = check_weights(model, weights, path, allow_new_head)
    state = {}
    for name, param in model.state_dict().items():
        keep = new_head and name in _HEAD
        state[name] = param if keep else paddle.to_tensor(weights[name]).astype(param.dtype)
    model.set_state_dict(state)
    return new_head


def optimizer_state(optimizer, model):
    """The optimizer's tensors under structured names, such as `head.weight.moment1`.

    Paddle's own names ("linear_0.w_0_moment1_0") depend on what else the process has created.
    """
    state = optimizer.state_dict()
    return {
        structured: state[own] for structured, own in _state_names(optimizer, model, state).items()
    }


def restore_optimizer(optimizer, model, state):
    """Puts what optimizer_state gave back.  Returns whether every tensor was there and fits."""
    # Otherwise Paddle makes the moments at the first step and looks for them by its own names.
    create_accumulators(optimizer, [p for p in model.parameters() if not p.stop_gradient])
    current = optimizer.state_dict()
    names = _state_names(optimizer, model, current)
    if not isinstance(state, dict) or any(
        getattr(state.get(structured), "shape", None) != tuple(current[own].shape)
        or state[structured].dtype.kind != "f"
        for structured, own in names.items()
    ):
        return False
    for structured, own in names.items():
        current[own].set_value(paddle.to_tensor(state[structured]).astype(current[own].dtype))
    return True


def _state_names(optimizer, model, state):
    """Structured name of each tensor of the optimizer -> Paddle's own name."""
    structured = {param.name: name for name, param in model.named_parameters()}
    names = {}
    for own in state:
        match = re.match(r"(.+?\.[wb]_\d+)_(.+)_\d+$", own)
        if match:
            names[f"{structured[match.group(1)]}.{match.group(2)}"] = own
    return names


def save(folder, tree, names=(), last_good=None):
    """Writes a checkpoint as `last.pdparams`; the one before becomes `previous.pdparams`.

    Whenever the process is killed, the newest complete checkpoint has a name and so has another:
    in between that name is `new.pdparams`, which `-resume auto` finds like any other.

    Args:
        folder: the run's folder.
        tree: what to write, see pdparams.write.
        names: further names for the same file, without the suffix.
        last_good: path of the checkpoint that this run has saved last, or went on from; a damaged
            `last.pdparams` that was passed over is not it.

    Raises:
        OSError: the disk is full, the folder gone or read-only; the earlier files are as they were.
    """
    new, last, previous, *others = (
        os.path.join(folder, f"{name}.pdparams") for name in ("new", "last", "previous", *names)
    )
    pdparams.write(new, tree)  # a name of its own until the others have it: links need one
    for other in others:
        _link(new, other)
    if last_good and os.path.dirname(last_good) == os.fspath(folder) and last_good != previous:
        _link(last_good, previous)
    os.replace(new, last)


def remove_old_epochs(folder, count):
    """Removes all `Epoch-<n>.pdparams` but the newest, once one that stays is read back whole.

    Args:
        folder: the run's folder.
        count: how many to keep.

    Returns:
        A sentence for the log for each file that was removed, or why none was.
    """
    pattern = os.path.join(glob.escape(folder), "Epoch-*.pdparams")
    paths = list(_newest_first(pattern))
    old = paths[count:]
    if not old:
        return []
    try:
        pdparams.read(paths[0], require_checksum=True)
    except WeightsError as error:
        return [f"no checkpoint is removed: {error}"]
    for path in old:
        os.remove(path)
    return [f"removed {os.path.basename(path)} (KEEP_LAST {count})" for path in old]


def _link(source, target):
    """A second name for a file that is never changed in place; a copy where links are refused."""
    with new_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)  # with its time, by which the newest is found


def candidates(save_folder):
    """The training checkpoints of all runs in a folder: path to time (ns), newest first."""
    pattern = os.path.join(glob.escape(save_folder), "train-*", "*.pdparams")
    times = _newest_first(pattern)
    return {p: time for p, time in times.items() if os.path.basename(p) != "best_weights.pdparams"}


def _newest_first(pattern):
    times = {}
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError):  # a dangling link
            times[path] = os.stat(path).st_mtime_ns
    return dict(sorted(times.items(), key=lambda item: (item[1], _order(item[0])), reverse=True))


def _order(path):
    """Sorts files of the same moment, on file systems whose clock is coarse: by their numbers."""
    name = os.path.basename(path)
    return name != "previous.pdparams", [int(n) for n in re.findall(r"\d+", name)], name
