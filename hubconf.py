"""Entries for paddle.hub: the models by name, from a folder or from a repository.

    paddle.hub.list("/path/to/this/folder", source="local")
    model = paddle.hub.load("/path/to/this/folder", "gmlp_s16_224", source="local",
                            pretrained="gmlp_s16_224.pdparams")  # ready to predict

Every public name here that can be called is an entry, hence the underscores.
"""

import contextlib
import importlib
import os
import sys
import types
import warnings

dependencies = ["paddle", "numpy", "yaml", "yacs"]

_HERE = os.path.dirname(os.path.abspath(__file__))

_DOC = """
    Args:
        pretrained: path of a file with weights: .pdparams (bare, or a training checkpoint) or
            .safetensors in the same names; or of a run's folder, whose best weights are taken; None
            or False for a fresh initialization.
        num_classes: number of logits (default: the run's whose weights these are, else 1000); where
            the file has another, the head starts anew.
        image_size: height and width of the images in pixels, a multiple of 16 (default: the run's,
            else 224); where the file is for another, its spatial projections are resampled.

    Returns:
        A paddle.nn.Layer, ready to predict (call train() before you train it): float images
        [batch, 3, image_size, image_size], normalized with mean and std 0.5, to logits
        [batch, num_classes].  Save its state_dict(): the Layer itself cannot be pickled, as its
        modules are not the caller's.

    Raises:
        ValueError: these are not this model's weights, or there is no such model; says what to do.
    """


def gmlp_ti16_224(pretrained=None, num_classes=None, image_size=None):
    """gMLP-Ti/16, 5.9M parameters; no weights are public."""
    return _load("gmlp_ti16_224", pretrained, num_classes, image_size)


def gmlp_s16_224(pretrained=None, num_classes=None, image_size=None):
    """gMLP-S/16, 19.4M parameters; links to published weights are in the README's model zoo."""
    return _load("gmlp_s16_224", pretrained, num_classes, image_size)


def gmlp_b16_224(pretrained=None, num_classes=None, image_size=None):
    """gMLP-B/16, 73.1M parameters; no weights are public."""
    return _load("gmlp_b16_224", pretrained, num_classes, image_size)


for _entry in (gmlp_ti16_224, gmlp_s16_224, gmlp_b16_224):
    _entry.__doc__ = f"{_entry.__doc__}\n{_DOC}"  # what paddle.hub.help shows


def _load(name, pretrained, num_classes, image_size):
    if pretrained is True:
        raise ValueError(
            "pretrained=True has nothing to download from: give a path, such as "
            f"pretrained='{name}.pdparams' (the README's model zoo says which weights are public "
            "and tools/port_weights.py makes such a file of timm's)"
        )
    with _own_modules():
        config, gmlp, weights = map(importlib.import_module, ("config", "gmlp", "weights"))
    settings = config.get_config(os.path.join(_HERE, "configs", f"{name}.yaml"))
    own = config.run_file(pretrained, "config.yaml") if os.path.isdir(pretrained or "") else None
    if own:
        run = config.get_config(own)
        for key, wanted in settings.MODEL.MIXER.items():
            value = run.MODEL.MIXER[key]
            if value != wanted:
                raise ValueError(
                    f"{pretrained} is a run with MODEL.MIXER.{key} {value}, {name} has {wanted}: "
                    f"build_gmlp(get_config('{own}')) builds its model (README.md)"
                )
        settings.MODEL.NUM_CLASSES = run.MODEL.NUM_CLASSES
        settings.DATA.IMAGE_SIZE = run.DATA.IMAGE_SIZE
    asked = types.SimpleNamespace(num_classes=num_classes, image_size=image_size)
    model = gmlp.build_gmlp(config.update_config(settings, asked))
    if pretrained:
        pretrained = config.weights_in(pretrained)
        for sentence in weights.load_into(model, pretrained, allow_new_head=True):
            warnings.warn(sentence, stacklevel=4)
    model.eval()
    return model


@contextlib.contextmanager
def _own_modules():
    """Imports find the modules of this folder, whatever the caller's own are called.

    A caller's `config` or `utils` is put aside meanwhile, and ours are forgotten afterwards, so
    that the caller's later imports find what they would have found without us.
    """
    tops = {os.path.splitext(name)[0] for name in os.listdir(_HERE)}

    def of_these_names():
        return [name for name in sys.modules if name.split(".")[0] in tops]

    aside = {name: sys.modules.pop(name) for name in of_these_names()}
    sys.path.insert(0, _HERE)
    try:
        yield
    finally:
        sys.path.remove(_HERE)
        for name in of_these_names():
            del sys.modules[name]
        sys.modules.update(aside)
