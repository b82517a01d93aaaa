"""Weights from a file into a model, all or none, and checkpoints onto a disk that may fill up.

Files are read and written by pdparams.py; what a training checkpoint means is training/state.py's.
"""

import glob
import itertools
import math
import os
import re
import shutil
import warnings

import numpy as np

from utils import new_file
from weights import pdparams
from weights.pdparams import WeightsError
from weights.resample import resample_weights

# What DataParallel of Paddle and of PyTorch, compiling and sharding put into parameters' names,
# anywhere; what comes before all of them, such as "model.", is a wrapper's too.
_WRAPPERS = {"module", "_layers", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Names in the state_dict() of Paddle's optimizers, which PaddleViT saves as .pdopt.
_OF_OPTIMIZER = re.compile(r"^LR_Scheduler$|^master_weights$|_(moment[12]?|velocity)_0$")


class NotThisModel(WeightsError):
    """A sound file with the weights of another model."""


def load_weights(path, say=warnings.warn):
    """The weights in a file, without running code from it.

    Args:
        path: a state dict or a training checkpoint (`.pdparams`), or `.safetensors`.
        say: called with a sentence where names had what a wrapper adds, such as "module.".

    Returns:
        Parameter names to NumPy arrays, for `model.set_state_dict`; of a training checkpoint the
        averaged weights (EMA), where it has them.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything but weights.
    """
    return weights_of(pdparams.read(path), path, say)


def weights_of(tree, path, say=warnings.warn):
    """The weights of a read file; see load_weights."""
    if "model" in tree:
        tree = tree["model"] if is_empty(tree.get("model_ema")) else tree["model_ema"]
    arrays = isinstance(tree, dict) and all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in tree.items()
    )
    if isinstance(tree, dict) and any(_OF_OPTIMIZER.search(str(name)) for name in tree):
        raise WeightsError(f"{path}: holds an optimizer's state: give the .pdparams beside it")
    if not (arrays and tree):
        raise WeightsError(f"{path}: holds no weights (parameter names with arrays)")
    return without_wrappers(tree, path, say)


def without_wrappers(weights, path, say):
    """Weights under the names that they had before a wrapper put its own into them."""
    names = [name.split(".") for name in weights]
    left_out = _WRAPPERS.intersection(part for parts in names for part in parts[:-1])
    names = [[part for part in parts if part not in left_out] for parts in names]
    # What all share is what the first and the last in their order share.  A layer's weight and bias
    # share their layer's name: two parts stay.
    depths = [len(parts) for parts in names]
    most = max(0, min(min(depths) - 1, max(depths) - 2))
    pairs = zip(min(names)[:most], max(names))
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    names = [parts[len(shared) :] for parts in names]
    left_out = left_out.union(shared)
    own = dict(zip(map(".".join, names), weights.values()))
    # Two of one name: whoever compares them with a model says so.
    if not left_out or len(own) < len(weights):
        return weights
    say(f"{path}: its names are read without {', '.join(sorted(left_out))}, which wrappers add")
    return own


def is_empty(weights):
    """Whether a checkpoint's entry stands for no weights: None or an empty dict."""
    return isinstance(weights, (dict, type(None))) and not weights


def check_weights(model, weights, path, allow_new_head=False):
    """Raises NotThisModel, with the first few differences, where weights do not fit a model.

    A model with an attribute `whose`, a function of (weights, path), is asked for the end of the
    sentence: see training/whose.py.

    Returns:
        The head's parameter names where the head has another number of classes and
        allow_new_head is set, otherwise [].
    """
    refuse_timms_names(weights, path)
    wanted = {name: list(param.shape) for name, param in model.state_dict().items()}
    found = {name: list(array.shape) for name, array in weights.items()}
    head = [name for name in wanted if name.startswith(f"{model.head_name}.")]
    differences = {
        name: f"{name} is {found.get(name, 'not there')}, wanted {wanted.get(name, 'nothing')}"
        for name in (*wanted, *found)
        if found.get(name) != wanted.get(name)
    }
    new_head = head if allow_new_head and not differences.keys().isdisjoint(head) else []
    differences = {name: text for name, text in differences.items() if name not in new_head}
    for name, array in weights.items():
        if array.dtype.kind != "f":
            differences[name] = f"{name} is of {array.dtype}, wanted floating-point numbers"
    if not differences:
        return new_head
    why = "these are not this model's weights (wrong -cfg?)"
    classes = {tuple(found.get(name, ())[-1:]) for name in head}
    bodies_fit = all(found.get(name, ())[:-1] == wanted[name][:-1] for name in head)
    if differences.keys() == set(head) and bodies_fit and len(classes) == 1 and classes != {(0,)}:
        ((count,),) = classes
        why = f"these weights are for {count:,} classes: give -num_classes {count}"
    texts = list(differences.values())
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    advice = model.whose(weights, path) if hasattr(model, "whose") and "-cfg" in why else ""
    raise NotThisModel(f"{path}: {why}: {'; '.join(texts[:4])}{more}{advice}")


def refuse_timms_names(weights, path):
    """Raises NotThisModel for weights that have timm's names."""
    if any(name.startswith(("stem.proj.", "blocks.")) for name in weights):
        raise NotThisModel(
            f"{path}: these are weights in timm's names: tools/port_weights.py makes a .pdparams"
        )


def assign_weights(model, weights, path, allow_new_head=False):
    """Copies weights into a model, all or none; float16 and float64 ones are cast.

    Args:
        model: a GMLP, or another Layer with the attribute head_name.
        weights: parameter names to arrays, as load_weights returns.
        path: where they are from, for the message.
        allow_new_head: leave the head as it is where the file's has another number of classes.

    Returns:
        Whether the head was left as it is.

    Raises:
        NotThisModel: names, shapes or types differ; lists the first few with both shapes.
    """
    import paddle

    new_head = check_weights(model, weights, path, allow_new_head)
    state = {}
    for name, param in model.state_dict().items():
        keep = name in new_head
        state[name] = param if keep else paddle.to_tensor(weights[name]).astype(param.dtype)
    model.set_state_dict(state)
    return bool(new_head)


def load_into(model, path, allow_new_head=False):
    """Loads a file's weights into a GMLP, resampled where they are for images of another size.

    Args:
        model, path, allow_new_head: see assign_weights.

    Returns:
        Sentences about what was changed to fit (names, resampled projections, a new head); usually
        none.

    Raises:
        WeightsError: as load_weights and assign_weights.
    """
    sizes, sentences = model.sizes, []
    weights, side = load_weights(path, sentences.append), None
    if _has_body_of(model, weights):  # another model's are refused as they are
        weights, side = resample_weights(weights, model, path)
    if side:
        new_side = math.isqrt(sizes.num_tokens)
        sentences.append(
            f"{path} is for images of {side * sizes.patch_size} pixels: its spatial projections "
            f"are resampled from {side} x {side} to {new_side} x {new_side} tokens, for "
            f"{sizes.image_size} pixels"
        )
    if assign_weights(model, weights, path, allow_new_head):
        has_head = any(name.startswith(f"{model.head_name}.") for name in weights)
        why = f"its head is not for {sizes.num_classes} classes" if has_head else "it has no head"
        sentences.append(f"{path}: {why}: the head starts anew")
    return sentences


def _has_body_of(model, weights):
    """Whether all but head and spatial projections are there, in the shapes of a model's."""

    def body(state):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        gate, head = f".{model.gate_name}.", f"{model.head_name}."
        return {n: shape for n, shape in shapes.items() if gate not in n and not n.startswith(head)}

    return body(weights) == body(model.state_dict())


def save(folder, tree, names=(), last_good=None):
    """Writes a checkpoint as `last.pdparams`; the one before becomes `previous.pdparams`.

    A kill at any moment leaves the newest complete checkpoint and the one before it, each under
    some name; the newest may be `new.pdparams`, which `-resume auto` finds too.

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
    if last_good and os.path.abspath(last_good) == os.path.abspath(new):
        os.replace(new, last)  # a run goes on from what a kill has left without its other names
        last_good = last
    pdparams.write(new, tree)  # a name of its own until the others have it: links need one
    for other in others:
        _link(new, other)
    if last_good and os.path.dirname(last_good) == os.fspath(folder) and last_good != previous:
        _link(last_good, previous)
    os.replace(new, last)


def remove_old_epochs(folder, count):
    """Removes all `Epoch-<n>.pdparams` but the highest, once one that stays is read back whole.

    Args:
        folder: the run's folder.
        count: how many to keep.

    Returns:
        A sentence for the log for each file that was removed, or why none was.
    """
    paths = epochs_in(folder)
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
            shutil.copy2(source, temporary)


def number_of(path):
    """The n of an Epoch-<n>.pdparams; None for other files."""
    match = re.fullmatch(r"Epoch-(\d+)\.pdparams", os.path.basename(path))
    return int(match.group(1)) if match else None


def epochs_in(folder):
    """The Epoch-<n>.pdparams of a folder, highest first: a file's time may be that of a copy."""
    paths = glob.glob(os.path.join(glob.escape(folder), "Epoch-*.pdparams"))
    paths = [path for path in paths if number_of(path) is not None]
    return sorted(paths, key=number_of, reverse=True)
