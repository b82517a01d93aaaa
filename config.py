"""Configuration: every key with its default and meaning, YAML files, command-line overrides.

    config = get_config("configs/gmlp_s16_224.yaml")

Later wins: the defaults below, YAML files (a file's `BASE` parents first), the program's flags,
`-opts KEY VALUE ...`.  The keys are PaddleViT's, so its YAML files load; keys that it does not have
are marked "new".
"""

import contextlib
import difflib
import os
import reprlib
import sys

import yaml
from yacs.config import CfgNode

_C = CfgNode()
_C.BASE = [""]  # YAML files to load first, relative to this one; "" is none

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 256  # training images per device and batch
_C.DATA.BATCH_SIZE_EVAL = None  # evaluation images per device and batch; None: as BATCH_SIZE
_C.DATA.DATA_PATH = "/dataset/imagenet/"  # folder with train_list.txt and val_list.txt
_C.DATA.DATASET = "imagenet2012"  # the layout of DATA_PATH; there is only this one
_C.DATA.IMAGE_SIZE = 224  # height and width that the model sees, pixels
_C.DATA.IMAGE_CHANNELS = 3  # the loader gives RGB, so only 3 can be trained or evaluated
_C.DATA.CROP_PCT = 0.875  # evaluation: share of the resized short side that the centre crop keeps
_C.DATA.NUM_WORKERS = -1  # loader processes per device; -1: the cores shared out among the devices
_C.DATA.IMAGENET_MEAN = [0.5, 0.5, 0.5]  # per channel, of pixel values scaled to 0..1
_C.DATA.IMAGENET_STD = [0.5, 0.5, 0.5]  # per channel, of pixel values scaled to 0..1

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "gmlp"  # the model family; only a label
_C.MODEL.NAME = "gmlp"  # the variant; -resume auto looks for checkpoints of this name
_C.MODEL.RESUME = None  # checkpoint to go on from, or "auto": the newest valid one under SAVE
_C.MODEL.PRETRAINED = None  # weights to start or to evaluate with
_C.MODEL.NUM_CLASSES = 1000  # labels are 0 .. NUM_CLASSES - 1
_C.MODEL.DROPOUT = 0.0  # rate after each channel projection
_C.MODEL.ATTENTION_DROPOUT = 0.0  # accepted for PaddleViT's files; gMLP has no attention
_C.MODEL.DROPPATH = 0.1  # stochastic-depth rate, the same for every block

_C.MODEL.MIXER = CfgNode()
_C.MODEL.MIXER.PATCH_SIZE = 16  # height and width of a patch, pixels
_C.MODEL.MIXER.EMBED_DIM = 768  # channels of a token
_C.MODEL.MIXER.DEPTH = 12  # blocks
_C.MODEL.MIXER.MLP_RATIO = 6.0  # channels inside a block / EMBED_DIM

_C.TRAIN = CfgNode()
_C.TRAIN.LAST_EPOCH = 0  # epochs that count as already done
_C.TRAIN.NUM_EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20  # epochs of linear warm-up; fractions count
_C.TRAIN.WARMUP_STEPS = None  # new: optimizer steps of linear warm-up, instead of WARMUP_EPOCHS
_C.TRAIN.WEIGHT_DECAY = 0.1  # AdamW's, on matrices and convolutions only (no biases, no norms)
_C.TRAIN.BASE_LR = 0.001  # learning rate at the end of warm-up, before linear scaling
_C.TRAIN.WARMUP_START_LR = 1e-6  # learning rate at the first step, before linear scaling
_C.TRAIN.END_LR = 1e-5  # learning rate at the end of the cosine, before linear scaling
_C.TRAIN.GRAD_CLIP = None  # largest global norm of the gradients; None: no clipping
_C.TRAIN.ACCUM_ITER = 1  # batches whose gradients are averaged into one optimizer step
_C.TRAIN.LINEAR_SCALED_LR = 512  # learning rates x (images per step / this); None: as they are

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "AdamW"  # there is only this one
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)

_C.TRAIN.MODEL_EMA = False  # keep an exponential moving average of the weights, and validate it
_C.TRAIN.MODEL_EMA_DECAY = 0.99996  # share of the old average kept at each optimizer step
_C.TRAIN.MODEL_EMA_FORCE_CPU = False  # average in host memory (PaddleViT's default; slow)

_C.TRAIN.SMOOTHING = 0.1  # label smoothing: probability shared out evenly among all classes
_C.TRAIN.COLOR_JITTER = 0.4  # brightness, contrast, saturation; only without the two policies below
_C.TRAIN.AUTO_AUGMENT = False  # AutoAugment's ImageNet policy
_C.TRAIN.RAND_AUGMENT = True  # RandAugment; wins where AUTO_AUGMENT is on as well
_C.TRAIN.RAND_AUGMENT_LAYERS = 2  # operators drawn per image
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = 9  # 0 .. 10
_C.TRAIN.CROP_SCALE = [0.08, 1.0]  # new: random resized crop, share of the image's area
_C.TRAIN.CROP_RATIO = [3 / 4, 4 / 3]  # new: random resized crop, width / height
_C.TRAIN.HFLIP = 0.5  # new: probability of a horizontal flip

_C.TRAIN.MIXUP_ALPHA = 0.8  # Beta(alpha, alpha) of mixup's weight; 0: no mixup
_C.TRAIN.MIXUP_PROB = 1.0  # probability that mixup or cutmix is applied
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix where both are on
_C.TRAIN.MIXUP_MODE = "batch"  # one draw per "batch", per "pair" of images, or per image ("elem")
_C.TRAIN.CUTMIX_ALPHA = 1.0  # Beta(alpha, alpha) of cutmix's area; 0: no cutmix
_C.TRAIN.CUTMIX_MINMAX = None  # [min, max] side of cutmix's box / image side, instead of the alpha

_C.TRAIN.RANDOM_ERASE_PROB = 0.25  # probability per image
_C.TRAIN.RANDOM_ERASE_MODE = "pixel"  # fill: noise per "pixel", one "rand" colour, "const" zero
_C.TRAIN.RANDOM_ERASE_COUNT = 1  # most boxes per image
_C.TRAIN.RANDOM_ERASE_SPLIT = False  # leave the first half of each batch as it is

_C.SAVE = "./output"  # folder of the runs; each makes a folder of its own in it
_C.SAVE_FREQ = 10  # epochs between the checkpoints that are kept
_C.REPORT_FREQ = 20  # batches between reports
_C.VALIDATE_FREQ = 1  # epochs between validations
_C.SEED = 0  # of every random draw
_C.EVAL = False  # evaluate only
_C.AMP = False  # mixed precision on GPU, in training and evaluation
_C.AMP_DTYPE = "float16"  # new: "float16" (with loss scaling) or "bfloat16"

# The types of keys whose default is None; None stays allowed.
_TYPE_WHERE_NONE = {
    "DATA.BATCH_SIZE_EVAL": int,
    "MODEL.RESUME": str,
    "MODEL.PRETRAINED": str,
    "TRAIN.WARMUP_STEPS": int,
    "TRAIN.GRAD_CLIP": float,
    "TRAIN.CUTMIX_MINMAX": list,
}
# Keys with a default whose None means "off".
_NONE_ALLOWED = {"TRAIN.LINEAR_SCALED_LR", "TRAIN.COLOR_JITTER", *_TYPE_WHERE_NONE}
# The number of values in a list; other lists may have any length.
_LENGTHS = {
    "DATA.IMAGENET_MEAN": 3,
    "DATA.IMAGENET_STD": 3,
    "TRAIN.OPTIMIZER.BETAS": 2,
    "TRAIN.CUTMIX_MINMAX": 2,
    "TRAIN.CROP_SCALE": 2,
    "TRAIN.CROP_RATIO": 2,
}
_CHOICES = {
    "DATA.DATASET": ("imagenet2012",),
    "TRAIN.OPTIMIZER.NAME": ("AdamW",),
    "TRAIN.MIXUP_MODE": ("batch", "pair", "elem"),
    "TRAIN.RANDOM_ERASE_MODE": ("pixel", "rand", "const"),
    "AMP_DTYPE": ("float16", "bfloat16"),
}
_HINTS = {
    "DATA.DATASET": "any data set works in that layout: a folder with images, train_list.txt and "
    "val_list.txt, see the README's data preparation",
}
# Smallest and largest value, both allowed; every value of a list is checked.
_NO_LIMIT = sys.float_info.max  # so that infinity and NaN are refused
_POSITIVE = (5e-324, _NO_LIMIT)
_RANGES = {
    "DATA.BATCH_SIZE": (1, _NO_LIMIT),
    "DATA.BATCH_SIZE_EVAL": (1, _NO_LIMIT),
    "DATA.IMAGE_SIZE": (1, _NO_LIMIT),
    "DATA.IMAGE_CHANNELS": (1, _NO_LIMIT),
    "DATA.CROP_PCT": (0.01, 1),
    "DATA.NUM_WORKERS": (-1, 1024),
    "DATA.IMAGENET_STD": _POSITIVE,
    "MODEL.NUM_CLASSES": (1, 2**31 - 1),
    "MODEL.DROPOUT": (0, 0.999),
    "MODEL.ATTENTION_DROPOUT": (0, 0.999),
    "MODEL.DROPPATH": (0, 0.999),
    "MODEL.MIXER.PATCH_SIZE": (1, _NO_LIMIT),
    "MODEL.MIXER.EMBED_DIM": (1, _NO_LIMIT),
    "MODEL.MIXER.DEPTH": (1, _NO_LIMIT),
    "MODEL.MIXER.MLP_RATIO": _POSITIVE,
    "TRAIN.LAST_EPOCH": (0, _NO_LIMIT),
    "TRAIN.NUM_EPOCHS": (1, _NO_LIMIT),
    "TRAIN.WARMUP_EPOCHS": (0, _NO_LIMIT),
    "TRAIN.WARMUP_STEPS": (0, _NO_LIMIT),
    "TRAIN.WEIGHT_DECAY": (0, _NO_LIMIT),
    "TRAIN.BASE_LR": (0, _NO_LIMIT),
    "TRAIN.WARMUP_START_LR": (0, _NO_LIMIT),
    "TRAIN.END_LR": (0, _NO_LIMIT),
    "TRAIN.GRAD_CLIP": _POSITIVE,
    "TRAIN.ACCUM_ITER": (1, _NO_LIMIT),
    "TRAIN.LINEAR_SCALED_LR": (1, _NO_LIMIT),
    "TRAIN.OPTIMIZER.EPS": _POSITIVE,
    "TRAIN.OPTIMIZER.BETAS": (0, 0.999999999),
    "TRAIN.MODEL_EMA_DECAY": (0, 1),
    "TRAIN.SMOOTHING": (0, 1),
    "TRAIN.COLOR_JITTER": (0, _NO_LIMIT),
    "TRAIN.RAND_AUGMENT_LAYERS": (0, 100),
    "TRAIN.RAND_AUGMENT_MAGNITUDE": (0, 10),
    "TRAIN.CROP_SCALE": (5e-324, 1),
    "TRAIN.CROP_RATIO": _POSITIVE,
    "TRAIN.HFLIP": (0, 1),
    "TRAIN.MIXUP_ALPHA": (0, _NO_LIMIT),
    "TRAIN.MIXUP_PROB": (0, 1),
    "TRAIN.MIXUP_SWITCH_PROB": (0, 1),
    "TRAIN.CUTMIX_ALPHA": (0, _NO_LIMIT),
    "TRAIN.CUTMIX_MINMAX": (0, 1),
    "TRAIN.RANDOM_ERASE_PROB": (0, 1),
    "TRAIN.RANDOM_ERASE_COUNT": (1, 100),
    "SAVE_FREQ": (1, _NO_LIMIT),
    "REPORT_FREQ": (1, _NO_LIMIT),
    "VALIDATE_FREQ": (1, _NO_LIMIT),
    "SEED": (0, 2**63 - 1),
}
_ORDERED = ("TRAIN.CROP_SCALE", "TRAIN.CROP_RATIO", "TRAIN.CUTMIX_MINMAX")  # [min, max]
_YAML_LIMIT = 1 << 20  # bytes; a configuration is a few kilobytes

# The program's flag -> the keys that it sets.
_FLAGS = {
    "dataset": ["DATA.DATASET"],
    "data_path": ["DATA.DATA_PATH"],
    "output": ["SAVE"],
    "batch_size": ["DATA.BATCH_SIZE", "DATA.BATCH_SIZE_EVAL"],
    "batch_size_eval": ["DATA.BATCH_SIZE_EVAL"],
    "image_size": ["DATA.IMAGE_SIZE"],
    "num_workers": ["DATA.NUM_WORKERS"],
    "num_classes": ["MODEL.NUM_CLASSES"],
    "pretrained": ["MODEL.PRETRAINED"],
    "resume": ["MODEL.RESUME"],
    "accum_iter": ["TRAIN.ACCUM_ITER"],
    "last_epoch": ["TRAIN.LAST_EPOCH"],
    "seed": ["SEED"],
    "eval": ["EVAL"],
    "amp": ["AMP"],
}


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the person who wrote it."""


def get_config(path=None):
    """The configuration: the defaults, changed by the YAML file at `path` where one is given.

    Returns:
        A yacs CfgNode that may be changed freely.

    Raises:
        ConfigError: the file is missing or not YAML, or it has an unknown key or a bad value.
    """
    config = _C.clone()
    if path:
        _merge_file(config, path)
        _check_ranges(config, path)
    return config


def update_config(config, args):
    """Changes `config` by the program's arguments and returns it.

    Args:
        config: a CfgNode of get_config.
        args: an object with any of the attributes cfg (a YAML file), the flags of
            main_multi_gpu.py, and opts (a list KEY, VALUE, KEY, VALUE, ...); None is "not given".

    Raises:
        ConfigError: as get_config, naming the flag or the key.
    """
    config.defrost()
    if getattr(args, "cfg", None):
        _merge_file(config, args.cfg)
        _check_ranges(config, args.cfg)
    for flag, keys in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is None or value is False:  # a switch that is not given leaves the file's value
            continue
        for key in keys:
            _set(config, key, value, f"-{flag}")
    opts = getattr(args, "opts", None) or []
    if len(opts) % 2:
        raise ConfigError(f"-opts needs pairs of KEY VALUE; {opts[-1]!r} has no value")
    for key, text in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse_value(key, text), "-opts")
    _check_ranges(config, "the command line")
    return config


def known_keys(config=_C, prefix=""):
    """Every key's full name, such as `DATA.BATCH_SIZE`."""
    keys = []
    for name, value in config.items():
        is_node = isinstance(value, CfgNode)
        keys += known_keys(value, f"{prefix}{name}.") if is_node else [prefix + name]
    return keys


def get_value(config, key):
    """The value of a full key such as `DATA.BATCH_SIZE`."""
    for name in key.split("."):
        config = config[name]
    return config


def _merge_file(config, path, children=()):
    """Merges a YAML file after its BASE parents; `children` are the files that led here."""
    real_path = os.path.realpath(path)
    if real_path in children:
        raise ConfigError(f"{path}: BASE leads back to this file: a cycle")
    tree = _read_yaml(path)
    parents = tree.pop("BASE", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not (isinstance(parents, list) and all(isinstance(p, str) for p in parents)):
        raise ConfigError(f"{path}: BASE must be a list of YAML files")
    for parent in filter(None, parents):
        parent_path = os.path.join(os.path.dirname(path), parent)
        _merge_file(config, parent_path, (*children, real_path))
    _merge_tree(config, tree, "", path)


def _read_yaml(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_YAML_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this config file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this config file is not UTF-8 text") from error
    if len(text) > _YAML_LIMIT:
        raise ConfigError(f"{path}: this config file is larger than {_YAML_LIMIT:,} characters")
    try:
        tree = yaml.safe_load(text)
    # Deep nesting exhausts the parser's recursion; bad dates and numbers are ValueErrors.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: this is not valid YAML: {_one_line(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: this config file must hold KEY: value lines")
    return tree


def _merge_tree(config, tree, prefix, source):
    for name, value in tree.items():
        key = f"{prefix}{name}" if isinstance(name, str) else prefix + reprlib.repr(name)
        node = config.get(name) if isinstance(name, str) else None
        if isinstance(node, CfgNode) and isinstance(value, dict):
            _merge_tree(node, value, f"{key}.", source)
        elif isinstance(node, CfgNode) and value is None:
            pass  # a section whose lines are all commented out
        else:
            _set(config, key, value, source, relative_to=prefix)


def _set(config, key, value, source, relative_to=""):
    """Sets one full key; `config` is the node whose own full name is `relative_to`."""
    if key not in _ALL_KEYS:
        raise ConfigError(f"{source}: there is no key {reprlib.repr(key)}{_suggest(key)}")
    *sections, name = key[len(relative_to) :].split(".")
    for section in sections:
        config = config[section]
    try:
        config[name] = _convert(key, value)
    except ValueError as error:
        raise ConfigError(f"{source}: {key} {error}") from None


def _suggest(key):
    """ ", did you mean X?" for the known key nearest to a wrong one, or its section's keys."""
    if any(known.startswith(key + ".") for known in _ALL_KEYS):
        return " that takes a value: it is a section, write its keys below it"
    by_last_name = {known.split(".")[-1]: known for known in _ALL_KEYS}
    match = difflib.get_close_matches(key[:200].upper(), _ALL_KEYS, 1, 0.7)
    if not match:
        last = difflib.get_close_matches(key[-200:].split(".")[-1].upper(), by_last_name, 1, 0.7)
        match = [by_last_name[name] for name in last]
    return f"; did you mean {match[0]}?" if match else " (config.py lists them all)"


def _convert(key, value):
    """`value` in the type of the key's default; ValueError says what the type is."""
    default = get_value(_C, key)
    if value is None and key in _NONE_ALLOWED:
        return None
    kind = _TYPE_WHERE_NONE.get(key, type(default))
    if kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"must be a list of numbers, not {reprlib.repr(value)}")
        length = _LENGTHS[key]
        if len(value) != length:
            raise ValueError(f"must have {length} values, not {len(value)}")
        return kind(_to_number(float, item) for item in value)
    if kind in (int, float):
        return _to_number(kind, value)
    if not isinstance(value, kind):
        name = {bool: "True or False", str: "text"}[kind]
        raise ValueError(f"must be {name}, not {reprlib.repr(value)}")
    return value


def _to_number(kind, value):
    """An int passes for a float; so does text such as "1e-3", which YAML 1.1 reads as a string."""
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # what is not a number is refused below
            value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    allowed = (int, float) if kind is float else int
    if not isinstance(value, allowed) or isinstance(value, bool):
        name = "a number" if kind is float else "a whole number"
        raise ValueError(f"must be {name}, not {reprlib.repr(value)}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _parse_value(key, text):
    """A value of -opts, read as YAML would read it; text stays text where the key holds text."""
    if key in _ALL_KEYS:
        kind = _TYPE_WHERE_NONE.get(key, type(get_value(_C, key)))
        if kind is str and not (key in _NONE_ALLOWED and text in ("None", "null")):
            return text
    if text == "None":
        return None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text  # _convert says what was expected instead


def _check_ranges(config, source):
    for key in _ALL_KEYS:
        value = get_value(config, key)
        if value is None:
            continue
        if key in _CHOICES and value not in _CHOICES[key]:
            choices = " or ".join(map(repr, _CHOICES[key]))
            hint = f" ({_HINTS[key]})" if key in _HINTS else ""
            raise ConfigError(f"{source}: {key} must be {choices}, not {value!r}{hint}")
        if key in _RANGES:
            low, high = _RANGES[key]
            values = value if isinstance(value, (list, tuple)) else [value]
            if not all(low <= v <= high for v in values):  # also false for NaN
                raise ConfigError(f"{source}: {key} is {value!r}, {_describe_range(low, high)}")
        if key in _ORDERED and value[0] > value[1]:
            raise ConfigError(f"{source}: {key} is {value!r}, the first value must be the smaller")


def _describe_range(low, high):
    if (low, high) == _POSITIVE:
        return "it must be above 0"
    low_text = "above 0" if low == _POSITIVE[0] else f"at least {low}"
    return f"it must be {low_text}" + ("" if high == _NO_LIMIT else f" and at most {high}")


def _one_line(error):
    return " ".join(str(error).split())[:300]


_ALL_KEYS = known_keys()
