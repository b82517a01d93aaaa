"""Configuration: every key with its default and meaning, YAML files, command-line overrides.

    config = get_config("configs/gmlp_s16_224.yaml")

Later wins: the defaults below, YAML files (a file's `BASE` parents first), the program's flags,
`-opts KEY VALUE ...`.  The keys are PaddleViT's, so its YAML files load; keys that it does not have
are marked "new".
"""

import ast
import contextlib
import difflib
import functools
import glob
import os
import sys
import warnings
from typing import NamedTuple, Optional, Union

import yaml
from yacs.config import CfgNode

from utils import UserError, cause, show, show_path, wide_text

_NO_LIMIT = sys.float_info.max  # so that infinity and NaN are refused
_ABOVE_0 = 5e-324  # the smallest float
_ANY = "any"  # length of a list that is not empty


class _Key(NamedTuple):
    """A configuration key: its default, and what it takes besides."""

    default: object
    low: Optional[float] = None  # the smallest value
    high: float = _NO_LIMIT  # the largest value
    none: bool = False  # whether None is allowed
    choices: tuple = ()  # the only values, where there are any
    length: Union[int, str, None] = None  # of a list, or _ANY; None: one value
    kind: type = float  # of the value, or of a list's items


_real = _Key
_whole = functools.partial(_Key, kind=int)
_text = functools.partial(_Key, kind=str)
_switch = functools.partial(_Key, kind=bool)


def _reals(default, length, *limits, **options):
    return _Key(default, *limits, length=length, **options)


# What a key means stands beside it, or in the lines above it: tools/config_table.py makes the table
# in docs/config.md of that.
# fmt: off
KEYS = {
    "DATA.BATCH_SIZE": _whole(256, 1),  # training images per device and batch
    "DATA.BATCH_SIZE_EVAL": _whole(None, 1, none=True),  # the same in evaluation; None: BATCH_SIZE
    "DATA.DATA_PATH": _text("/dataset/imagenet/"),  # folder of train_list.txt and val_list.txt
    "DATA.DATASET": _text("imagenet2012"),  # the layout of that folder, one of datasets.DATASETS
    # new: ImageNet's reassessed labels, real.json, with -eval: their accuracy as well
    "DATA.REAL_LABELS": _text(None, none=True),
    "DATA.IMAGE_SIZE": _whole(224, 1),  # height and width that the model sees, pixels
    "DATA.IMAGE_CHANNELS": _whole(3, 1),  # the loader gives RGB: only 3 can be trained or evaluated
    "DATA.CROP_PCT": _real(0.875, 0.01, 1),  # evaluation: what the crop keeps of the short side
    "DATA.NUM_WORKERS": _whole(-1, -1, 1024),  # loader processes per device; -1: by the cores
    "DATA.IMAGENET_MEAN": _reals([0.5] * 3, 3, -_NO_LIMIT),  # per channel, of pixels scaled to 0..1
    "DATA.IMAGENET_STD": _reals([0.5] * 3, 3, _ABOVE_0),  # per channel, of pixels scaled to 0..1

    "MODEL.TYPE": _text("gmlp"),  # the model family; only a label
    # the variant; -resume auto looks for checkpoints of this name
    "MODEL.NAME": _text("gmlp", high=200),
    "MODEL.RESUME": _text(None, none=True),  # checkpoint to go on from; "auto": newest under SAVE
    "MODEL.PRETRAINED": _text(None, none=True),  # weights to start or to evaluate with
    "MODEL.NUM_CLASSES": _whole(1000, 1, 2**31 - 1),  # labels are 0 .. NUM_CLASSES - 1
    "MODEL.DROPOUT": _real(0.0, 0, 0.999),  # rate after each channel projection
    "MODEL.ATTENTION_DROPOUT": _real(0.0, 0, 0.999),  # no effect: gMLP has no attention
    "MODEL.DROPPATH": _real(0.1, 0, 0.999),  # stochastic-depth rate, the same for every block

    "MODEL.MIXER.PATCH_SIZE": _whole(16, 1),  # height and width of a patch, pixels
    "MODEL.MIXER.EMBED_DIM": _whole(768, 1),  # channels of a token
    "MODEL.MIXER.DEPTH": _whole(12, 1),  # blocks
    "MODEL.MIXER.MLP_RATIO": _real(6.0, _ABOVE_0),  # channels inside a block / EMBED_DIM

    "TRAIN.LAST_EPOCH": _whole(0, 0),  # epochs that count as already done
    "TRAIN.NUM_EPOCHS": _whole(300, 1),  # epochs of the whole run, those of LAST_EPOCH included
    "TRAIN.WARMUP_EPOCHS": _real(20, 0),  # epochs of linear warm-up; fractions count
    # new: warm-up in optimizer steps, instead of in epochs where it is not None
    "TRAIN.WARMUP_STEPS": _whole(None, 0, none=True),
    "TRAIN.WEIGHT_DECAY": _real(0.1, 0),  # AdamW's; not on biases and norms
    "TRAIN.BASE_LR": _real(1e-3, 0),  # learning rate after warm-up, before linear scaling
    "TRAIN.WARMUP_START_LR": _real(1e-6, 0),  # learning rate of the first step, before scaling
    "TRAIN.END_LR": _real(1e-5, 0),  # learning rate at the run's end, before scaling
    # new: the learning rate's curve after warm-up, of training/optim.py's SCHEDULES
    "TRAIN.LR_SCHEDULE": _text("cosine", choices=["cosine"]),
    "TRAIN.GRAD_CLIP": _real(None, _ABOVE_0, none=True),  # largest global norm of the gradients
    "TRAIN.ACCUM_ITER": _whole(1, 1),  # batches whose gradients make one optimizer step
    # BASE_LR, WARMUP_START_LR and END_LR are multiplied by images per optimizer step / this; None:
    # they are taken as they are
    "TRAIN.LINEAR_SCALED_LR": _real(512, 1, none=True),
    # new: learning rate of a block / that of the next; the head has the whole, the patch embedding
    # the lowest (for fine-tuning; BEiT and MAE take 0.65 to 0.9); None: the same everywhere
    "TRAIN.LAYER_DECAY": _real(None, _ABOVE_0, 1, none=True),
    "TRAIN.RECOMPUTE": _switch(False),  # new: less memory, a third more computation
    "TRAIN.FREEZE_BACKBONE": _switch(False),  # new: train the head alone

    "TRAIN.OPTIMIZER.NAME": _text("AdamW", choices=["AdamW"]),  # in training/optim.py's OPTIMIZERS
    "TRAIN.OPTIMIZER.EPS": _real(1e-8, _ABOVE_0),  # added to the root of the second moment
    "TRAIN.OPTIMIZER.BETAS": _reals((0.9, 0.999), 2, 0, 0.999999999),  # of the two moments

    "TRAIN.MODEL_EMA": _switch(False),  # average the weights exponentially, validate the average
    "TRAIN.MODEL_EMA_DECAY": _real(0.99996, 0, 1),  # share of the average kept at each step
    "TRAIN.MODEL_EMA_FORCE_CPU": _switch(False),  # average in host memory: slow, saves the device's

    "TRAIN.SMOOTHING": _real(0.1, 0, 1),  # label smoothing: the share that all classes get evenly
    "TRAIN.COLOR_JITTER": _real(0.4, 0, none=True),  # strength; only without the two policies below
    "TRAIN.AUTO_AUGMENT": _switch(False),  # AutoAugment's ImageNet policy
    "TRAIN.RAND_AUGMENT": _switch(True),  # RandAugment; wins where AUTO_AUGMENT is on as well
    "TRAIN.RAND_AUGMENT_LAYERS": _whole(2, 0, 100),  # operators drawn per image
    "TRAIN.RAND_AUGMENT_MAGNITUDE": _real(9, 0, 10),  # strength of those, 10 is the most
    # new: the operators that it draws from, names of augment.py's OPERATORS; None: timm's 15
    "TRAIN.RAND_AUGMENT_OPERATORS": _text(None, none=True, length=_ANY),
    "TRAIN.CROP_SCALE": _reals([0.08, 1.0], 2, _ABOVE_0, 1),  # new: random crop / image, by area
    "TRAIN.CROP_RATIO": _reals([3 / 4, 4 / 3], 2, _ABOVE_0),  # new: random crop, width / height
    "TRAIN.HFLIP": _real(0.5, 0, 1),  # new: probability of a horizontal flip

    "TRAIN.MIXUP_ALPHA": _real(0.8, 0),  # Beta(alpha, alpha) of mixup's weight; 0: no mixup
    "TRAIN.MIXUP_PROB": _real(1.0, 0, 1),  # probability that mixup or cutmix is applied
    "TRAIN.MIXUP_SWITCH_PROB": _real(0.5, 0, 1),  # probability of cutmix where both are on
    # what shares a draw: the batch, an image and its partner (pair), or nothing (elem)
    "TRAIN.MIXUP_MODE": _text("batch", choices=["batch", "pair", "elem"]),
    "TRAIN.CUTMIX_ALPHA": _real(1.0, 0),  # Beta(alpha, alpha) of cutmix's area; 0: no cutmix
    "TRAIN.CUTMIX_MINMAX": _reals(None, 2, 0, 1, none=True),  # box side / image side, not by alpha

    "TRAIN.RANDOM_ERASE_PROB": _real(0.25, 0, 1),  # probability per image
    # what fills the boxes: noise (pixel), one random colour (rand) or zeros (const)
    "TRAIN.RANDOM_ERASE_MODE": _text("pixel", choices=["pixel", "rand", "const"]),
    "TRAIN.RANDOM_ERASE_COUNT": _whole(1, 1, 100),  # most boxes per image
    "TRAIN.RANDOM_ERASE_SPLIT": _switch(False),  # leave the first half of each batch as it is

    "SAVE": _text("./output"),  # folder of the runs; each makes a folder of its own in it
    "SAVE_FREQ": _whole(10, 1),  # epochs between the checkpoints that are kept, Epoch-<n>
    # new: optimizer steps between checkpoints, beside those at the epochs' ends; 0: none
    "SAVE_FREQ_STEPS": _whole(0, 0),
    "KEEP_LAST": _whole(0, 0),  # new: how many Epoch-<n> files to keep, the highest; 0: all
    "REPORT_FREQ": _whole(20, 1),  # batches between reports
    "VALIDATE_FREQ": _whole(1, 1),  # epochs between validations
    # new: what computes -eval on a CPU: the model's layers, or Paddle Inference in a type; auto:
    # Paddle Inference in float32 for more than 1,000 images a rank, as it takes seconds to start
    "CPU_INFERENCE": _text("auto", choices=["auto", "layers", "float32", "bfloat16"]),
    # new: minutes without a finished batch or checkpoint after which a rank counts as hanging and
    # ends, where there are several; a step and REPORT_FREQ batches have to take less; 0: never
    "HANG_MINUTES": _real(30, 0, 10000),
    "SEED": _whole(0, 0, 2**63 - 1),  # of every random draw
    "EVAL": _switch(False),  # evaluate only
    "AMP": _switch(False),  # mixed precision on GPU, in training and evaluation
    # new: the type of mixed precision; auto: in training bfloat16 where the GPU has it (compute
    # capability 8.0), else float16, whose loss is scaled; in evaluation float16
    "AMP_DTYPE": _text("auto", choices=["auto", "float16", "bfloat16"]),
    # new: what LayerNorm gives under mixed precision: float32, or the type of mixed precision (amp;
    # its sums stay float32), which is faster; auto: amp for bfloat16, float32 for float16
    "AMP_LAYER_NORM": _text("auto", choices=["auto", "float32", "amp"]),
    # new: on a GPU, algorithms of cuDNN that give the same bits each time
    "DETERMINISTIC": _switch(True),
}
# fmt: on
_PATHS = ("DATA.DATA_PATH", "DATA.REAL_LABELS", "MODEL.PRETRAINED", "MODEL.RESUME", "SAVE")
_RUNS_OWN = ("MODEL.PRETRAINED", "MODEL.RESUME")  # what a run began with
_ORDERED = ("TRAIN.CROP_SCALE", "TRAIN.CROP_RATIO", "TRAIN.CUTMIX_MINMAX")  # [min, max]
# Keys that are gone: YAML files that have them still load, with this sentence for any other value.
_GONE = {
    "VISUALDL": (False, "no longer does anything: tools/to_visualdl.py RUN shows a run in VisualDL")
}
_YAML_LIMIT = 1 << 15  # characters of a file; a few thousand are normal, and PyYAML takes its time
_DEPTH_LIMIT = 50  # of lists and sections in each other; a configuration has four
_NAMES_LIMIT = 100  # of a list; what a checkpoint holds of it is checked when it is read
_LITERAL_LIMIT = 200  # characters of a Python literal, such as (0.9, 0.999)

# The program's flag -> the keys that it sets.
FLAGS = {
    "dataset": ["DATA.DATASET"],
    "data_path": ["DATA.DATA_PATH"],
    "real_labels": ["DATA.REAL_LABELS"],
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


class ConfigWarning(UserWarning):
    """A setting without effect; the message is one sentence for the person who wrote it."""


_format_warning = warnings.formatwarning


def show_warnings_of(program):
    """Has a ConfigWarning printed as one sentence of a program, others as Python does."""

    def one_sentence(message, category, *where, **line):
        if issubclass(category, ConfigWarning):
            return f"{program}: {message}\n"
        return _format_warning(message, category, *where, **line)

    warnings.formatwarning = one_sentence


class ConfigError(UserError):
    """A setting that cannot be used; the message names the file, the flag or the key."""


def recipes():
    """The config files that come with the program, as paths from the current folder."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
    return [os.path.relpath(path) for path in sorted(glob.glob(f"{glob.escape(folder)}/*.yaml"))]


def get_config(path=None):
    """The configuration: the defaults, changed by the YAML file at `path` where one is given.

    Returns:
        A yacs CfgNode that may be changed freely.

    Raises:
        ConfigError: the file is missing or not YAML, or it has an unknown key or a bad value.
    """
    config = _defaults()
    if path:
        _merge_file(config, path)
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
    elif own := _own_config(args):
        _take_model(config, get_config(own))
    for flag, keys in FLAGS.items():
        value = getattr(args, flag, None)
        if value is None or value is False:  # a switch that is not given leaves the file's value
            continue
        for key in keys:
            _set(config, key, value, f"-{flag}")
    opts = getattr(args, "opts", None) or []
    for word in opts:
        key, equals, value = word.partition("=")
        if equals and key in KEYS:
            raise ConfigError(f"-opts: {show(word)} is one word: write {key} {value}")
    for word in opts[::2]:
        if word.startswith("-"):
            raise ConfigError(f"{show_path(word)} has to stand before -opts, which takes the rest")
    if len(opts) % 2:
        raise ConfigError(f"-opts needs pairs of KEY VALUE; {opts[-1]!r} has no value")
    for key, text in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse(key, text), "-opts")
    if config.MODEL.PRETRAINED:
        try:
            config.MODEL.PRETRAINED = weights_in(config.MODEL.PRETRAINED)
        except ConfigError as error:
            raise ConfigError(f"MODEL.PRETRAINED: {error}") from None
    return config


# --- a run's folder is its model ---


def weights_in(path):
    """The weights that a path means: of a run's folder its best, of anything else itself.

    Raises:
        ConfigError: a folder has none.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return path
    weights = os.path.join(path, "best_weights.pdparams")
    if not os.path.isfile(weights):
        raise ConfigError(
            f"{show_path(path)}: there is no best_weights.pdparams in this folder: give a run's, "
            "after its first validation, or a file"
        )
    return weights


def run_file(weights, name):
    """The path of a file beside a run's weights; None where there is none.

    Args:
        weights: a path of weights, a run's folder, or None.
        name: "config.yaml" or "classes.txt"; only what stands beside a config.yaml is a run's.
    """
    if not weights:
        return None
    weights = os.path.expanduser(weights)
    folder = weights if os.path.isdir(weights) else os.path.dirname(weights)
    paths = [os.path.join(folder, each) for each in (name, "config.yaml")]
    return paths[0] if all(map(os.path.isfile, paths)) else None


def require_model(args):
    """Raises ConfigError where no argument, as for update_config, says which model it is about."""
    keys = (getattr(args, "opts", None) or [])[::2]
    if args.cfg or {"MODEL.MIXER.EMBED_DIM", "MODEL.MIXER.DEPTH"} <= set(keys):
        return
    if not _own_config(args):
        path = args.pretrained
        if path and not os.path.exists(os.path.expanduser(path)):
            raise ConfigError(f"{show_path(path)} does not exist: check the path")
        raise ConfigError(
            f"which model? Give its file with -cfg: {', '.join(recipes())}; or a run's folder with "
            "-pretrained, to evaluate and to predict"
        )


def _own_config(args):
    """The config.yaml of the run whose weights are to be used; None for a training."""
    trains = hasattr(args, "eval") and not args.eval  # of the tools none trains
    return None if trains else run_file(getattr(args, "pretrained", None), "config.yaml")


def _take_model(config, run):
    """Takes over what a run's configuration says of its model and of images, and nothing else.

    The data set's path too: where the run was on another machine, whoever reads it is told.
    """
    of_model = ("MODEL.", "DATA.IMAGE", "DATA.CROP_PCT", "DATA.DATASET", "DATA.DATA_PATH")
    for key in (key for key in KEYS if key.startswith(of_model) and key not in _RUNS_OWN):
        _set(config, key, value_of(run, key), "config.yaml")


def changed(config):
    """The keys of a configuration that do not have their defaults: name to value."""
    defaults = _defaults()
    values = {key: (value_of(config, key), value_of(defaults, key)) for key in KEYS}
    return {key: value for key, (value, default) in values.items() if value != default}


def value_of(config, key):
    """The value of a key such as "TRAIN.BASE_LR"."""
    return functools.reduce(getattr, key.split("."), config)


def _defaults():
    config = CfgNode({"BASE": [""]})  # YAML files to load first, relative to this one; "" is none
    for key, spec in KEYS.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = list(spec.default) if isinstance(spec.default, list) else spec.default
    return config


def _merge_file(config, path, children=()):
    """Merges a YAML file after its BASE parents; `children` are the files that led here."""
    name = show_path(path)
    tree = _read_yaml(path, name)
    real_path = os.path.realpath(path)
    if real_path in children:
        raise ConfigError(f"{name}: BASE leads back to this file: a cycle")
    parents = tree.pop("BASE", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not (isinstance(parents, list) and all(isinstance(p, str) for p in parents)):
        raise ConfigError(f"{name}: BASE must be a list of YAML files")
    for parent in filter(None, parents):
        parent_path = os.path.join(os.path.dirname(path), parent)
        _merge_file(config, parent_path, (*children, real_path))
    _merge_tree(config, tree, "", name)


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML, not deep and without merge keys, a few lines of which can grow without bound."""

    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > _DEPTH_LIMIT:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not supported")


def _read_yaml(path, name):
    """The dict that a YAML file holds; `name` is what messages call the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_YAML_LIMIT + 1)
    except UnicodeDecodeError as error:
        what = wide_text(error.object) or "not UTF-8 text"
        raise ConfigError(f"{name}: this config file is {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        sentence = f"{name}: cannot read this config file: {cause(error)}"
        raise ConfigError(sentence + _suggest_recipe(path)) from error
    if len(text) > _YAML_LIMIT:
        raise ConfigError(f"{name}: this config file is larger than {_YAML_LIMIT:,} characters")
    try:
        tree = yaml.load(text, _YamlLoader)
    except Exception as error:  # such as ValueError for a wrong date, RecursionError for depth
        raise ConfigError(f"{name}: this is not valid YAML: {cause(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: this config file must hold KEY: value lines")
    return tree


def _suggest_recipe(path):
    """The recipe whose name is like that of a file that cannot be read, as a question."""
    by_name = {os.path.basename(recipe): recipe for recipe in recipes()}
    wanted = os.path.splitext(os.path.basename(path))[0][:200] + ".yaml"
    similar = difflib.get_close_matches(wanted, by_name, 1, 0.7)
    return f"; did you mean {by_name[similar[0]]}?" if similar else ""


def _merge_tree(config, tree, prefix, source):
    for name, value in tree.items():
        key = prefix + (name if isinstance(name, str) else show(name))
        if _is_section(key) and isinstance(value, dict):
            _merge_tree(config, value, f"{key}.", source)
        elif _is_section(key) and value is None:
            pass  # a section whose lines are all commented out
        else:
            _set(config, key, value, source)


def _is_section(key):
    return any(known.startswith(f"{key}.") for known in KEYS)


def _set(config, key, value, source):
    """Sets one full key of the configuration."""
    if key == "BASE":
        raise ConfigError(f"{source}: BASE can only be set in a YAML file")
    if key in _GONE:
        default, sentence = _GONE[key]
        if value != default:
            warnings.warn(f"{source}: {key} {sentence}", ConfigWarning, stacklevel=2)
        return
    if key not in KEYS:
        raise ConfigError(f"{source}: there is no key {show(key)}{_suggest(key)}")
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    if key in _PATHS and isinstance(value, str):  # in a file, or in -output=~/out, no shell does it
        value = os.path.expanduser(value)
    try:
        config[name] = _convert(key, value)
    except ValueError as error:
        raise ConfigError(f"{source}: {key} {error}") from None


def _suggest(key):
    """What to write instead of an unknown key."""
    if _is_section(key):
        return " that takes a value: it is a section, write its keys below it"
    last_name = key[-200:].split(".")[-1].upper()
    by_last_name = {known.split(".")[-1]: known for known in KEYS}
    similar = difflib.get_close_matches(key[:200].upper(), KEYS, 1, 0.7)
    similar_last = difflib.get_close_matches(last_name, by_last_name, 1, 0.7)
    if last_name in by_last_name:
        return f"; did you mean {by_last_name[last_name]}?"
    if similar or similar_last:
        return f"; did you mean {similar[0] if similar else by_last_name[similar_last[0]]}?"
    return " (config.py lists them all)"


def _convert(key, value):
    """`value` in the key's type; ValueError says what is wrong with it."""
    spec = KEYS[key]
    # As yacs does: PaddleViT's files write None and (0.9, 0.999), which are text in YAML.
    if isinstance(value, str) and (spec.kind is not str or spec.length or value == "None"):
        value = _literal(value)
    if value is None and spec.none:
        return None
    if spec.length:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0
        if is_list and len(value) > _NAMES_LIMIT:
            raise ValueError(f"has {len(value):,} values, it may have {_NAMES_LIMIT}")
        if not is_list or spec.length not in (_ANY, len(value)):
            what = "names" if spec.length == _ANY else f"{spec.length} numbers"
            raise ValueError(f"must be a list of {what}, not {show(value)}")
        if spec.kind is not str:  # 5e-2 is text in YAML
            value = [_literal(item) if isinstance(item, str) else item for item in value]
        value = type(spec.default or [])(_convert_one(spec, item) for item in value)
        if key in _ORDERED and value[0] > value[1]:
            raise ValueError(f"is {show(value)}, the first value must be the smaller")
        return value
    value = _convert_one(spec, value)
    if spec.choices and value not in spec.choices:
        choices = " or ".join(map(repr, spec.choices))
        raise ValueError(f"must be {choices}, not {show(value)}")
    return value


def _literal(text):
    """The value of a Python literal; other text as it is."""
    if len(text) > _LITERAL_LIMIT:  # Python's parser takes long, or overflows its stack
        return text
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")  # Python's remarks on text such as "1if 2"
        return ast.literal_eval(text)
    return text


def _convert_one(spec, value):
    """One value of a key, or one item of its list.  An int passes for a float, 3.0 for an int."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if spec.kind is float and is_number:
        with contextlib.suppress(OverflowError):  # an int beyond any float stays: out of range
            value = float(value)
    elif spec.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not spec.kind and not (spec.kind is float and is_number):
        name = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
        raise ValueError(f"must be {name[spec.kind]}, not {show(value)}")
    if spec.kind is str and not _is_plain(value):
        raise ValueError(f"is {show(value)}, with a character that no path can hold")
    if spec.kind is str and not (spec.high == _NO_LIMIT or value.isprintable()):
        raise ValueError(f"is {show(value)}, it must be printable")
    if spec.kind is str and len(value) > spec.high:
        raise ValueError(f"has {len(value):,} characters, it may have {spec.high}")
    if spec.low is not None and not spec.low <= value <= spec.high:  # true for NaN
        raise ValueError(f"is {show(value)}, it must be {describe_range(spec)}")
    return value


def _is_plain(text):
    """Whether the system's calls take the text: it has no NUL and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def describe_range(spec):
    """The range of a number's key in words; it has a `low`."""
    low = "above 0" if spec.low == _ABOVE_0 else f"at least {spec.low}"
    high = f"at most {spec.high}"
    if spec.low == -_NO_LIMIT:
        return "finite"
    return low if spec.high == _NO_LIMIT else f"{low} and {high}"


def _parse(key, text):
    """A value of -opts, read as YAML would read it; text stays text where the key holds text."""
    if key in KEYS and KEYS[key].kind is str and not KEYS[key].length:
        return None if text == "null" else text
    try:
        return yaml.load(text, _YamlLoader)
    except Exception:  # as in _read_yaml
        return text  # _convert says what was expected instead
