"""Whose weights these are: the flags that build the model which they fit."""

import contextlib
import os
import shlex
import warnings

from config import ConfigError, get_config, recipes
from gmlp import SIZE_KEYS, Sizes
from utils import show_path

_FLAGS = {"DATA.IMAGE_SIZE": "-image_size", "MODEL.NUM_CLASSES": "-num_classes"}
_NOT_OF_WEIGHTS = {"MODEL.DROPOUT", "MODEL.DROPPATH"}


def whose(weights, path):
    """The end of a sentence on weights that do not fit; nothing where they are no gMLP's."""
    try:
        return f"; the weights fit {describe(Sizes.from_weights(weights), path)}"
    except ValueError:
        return ""


def describe(sizes, path):
    """The flags that build a model of these sizes.

    Args:
        sizes: gmlp.Sizes.
        path: of the weights, beside which their run has left its config.yaml.
    """

    def differences(config):
        known = Sizes.from_config(config)
        changed = {key: own for key, own, other in zip(SIZE_KEYS, sizes, known) if own != other}
        return {key: own for key, own in changed.items() if key not in _NOT_OF_WEIGHTS}

    # The config that leaves fewest of the body's keys to say, then one for images of this size.
    def cost(name):
        keys = differences(configs[name]).keys()
        return sum(key not in _FLAGS for key in keys), "DATA.IMAGE_SIZE" in keys

    configs = {**_configs_beside(path), **{name: get_config(name) for name in recipes()}}
    name = min(configs, key=cost)
    words, opts = [f"-cfg {shlex.quote(name)}"], []
    for key, value in differences(configs[name]).items():
        if key in _FLAGS:
            words.append(f"{_FLAGS[key]} {value}")
        else:
            opts.append(f"{key} {value}")
    return " ".join(words + (["-opts", *opts] if opts else []))


def _configs_beside(path):
    own = os.path.join(os.path.dirname(path), "config.yaml")
    # ValueError: sizes that make no model; warnings: of keys that are gone.
    with contextlib.suppress(ConfigError, ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.path.isfile(own):
            config = get_config(own)
            Sizes.from_config(config)
            return {show_path(own): config}
    return {}
