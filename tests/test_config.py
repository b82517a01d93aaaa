"""Configuration: PaddleViT's keys and files, the order of what wins, errors in one sentence."""

import math
import operator
import subprocess
import sys
import warnings
from types import SimpleNamespace

import fuzz_inputs
import pytest
import yaml
from program import ROOT

import config as config_module
from config import ConfigError, get_config, update_config, value_of
from gmlp import build_gmlp
from training import optim

# PaddleViT's keys and defaults; the lines marked "ours" differ on purpose (docs/config.md).
PADDLEVIT_DEFAULTS = {
    "BASE": [""],
    "DATA.BATCH_SIZE": 256,
    "DATA.BATCH_SIZE_EVAL": None,
    "DATA.DATA_PATH": "/dataset/imagenet/",
    "DATA.DATASET": "imagenet2012",
    "DATA.IMAGE_SIZE": 224,
    "DATA.IMAGE_CHANNELS": 3,
    "DATA.CROP_PCT": 0.875,
    "DATA.NUM_WORKERS": -1,  # ours; PaddleViT has 1
    "DATA.IMAGENET_MEAN": [0.5, 0.5, 0.5],
    "DATA.IMAGENET_STD": [0.5, 0.5, 0.5],
    "MODEL.TYPE": "gmlp",
    "MODEL.NAME": "gmlp",
    "MODEL.RESUME": None,
    "MODEL.PRETRAINED": None,
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.DROPOUT": 0.0,
    "MODEL.ATTENTION_DROPOUT": 0.0,
    "MODEL.DROPPATH": 0.1,
    "MODEL.MIXER.PATCH_SIZE": 16,
    "MODEL.MIXER.EMBED_DIM": 768,
    "MODEL.MIXER.DEPTH": 12,
    "MODEL.MIXER.MLP_RATIO": 6.0,
    "TRAIN.LAST_EPOCH": 0,
    "TRAIN.NUM_EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.1,
    "TRAIN.BASE_LR": 1e-3,
    "TRAIN.WARMUP_START_LR": 1e-6,
    "TRAIN.END_LR": 1e-5,
    "TRAIN.GRAD_CLIP": None,
    "TRAIN.ACCUM_ITER": 1,
    "TRAIN.LINEAR_SCALED_LR": 512,
    "TRAIN.OPTIMIZER.NAME": "AdamW",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "TRAIN.MODEL_EMA": False,
    "TRAIN.MODEL_EMA_DECAY": 0.99996,
    "TRAIN.MODEL_EMA_FORCE_CPU": False,  # ours; PaddleViT has True
    "TRAIN.SMOOTHING": 0.1,
    "TRAIN.COLOR_JITTER": 0.4,
    "TRAIN.AUTO_AUGMENT": False,
    "TRAIN.RAND_AUGMENT": True,
    "TRAIN.RAND_AUGMENT_LAYERS": 2,
    "TRAIN.RAND_AUGMENT_MAGNITUDE": 9,
    "TRAIN.MIXUP_ALPHA": 0.8,
    "TRAIN.MIXUP_PROB": 1.0,
    "TRAIN.MIXUP_SWITCH_PROB": 0.5,
    "TRAIN.MIXUP_MODE": "batch",
    "TRAIN.CUTMIX_ALPHA": 1.0,
    "TRAIN.CUTMIX_MINMAX": None,
    "TRAIN.RANDOM_ERASE_PROB": 0.25,
    "TRAIN.RANDOM_ERASE_MODE": "pixel",
    "TRAIN.RANDOM_ERASE_COUNT": 1,
    "TRAIN.RANDOM_ERASE_SPLIT": False,
    "SAVE": "./output",
    "SAVE_FREQ": 10,
    "REPORT_FREQ": 20,
    "VALIDATE_FREQ": 1,
    "SEED": 0,
    "EVAL": False,
    "AMP": False,
}
# The paper's recipe and sizes (arXiv 2105.08050, table 1 and appendix).
PAPER_RECIPE = {
    "DATA.IMAGE_SIZE": 224,
    "DATA.CROP_PCT": 0.875,
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.DROPOUT": 0.0,
    "MODEL.MIXER.PATCH_SIZE": 16,
    "MODEL.MIXER.DEPTH": 30,
    "MODEL.MIXER.MLP_RATIO": 6.0,
    "TRAIN.NUM_EPOCHS": 300,
    "TRAIN.WARMUP_STEPS": 10000,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.GRAD_CLIP": 1.0,
    "TRAIN.OPTIMIZER.NAME": "AdamW",
    "TRAIN.OPTIMIZER.EPS": 1e-6,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "TRAIN.SMOOTHING": 0.1,
    "TRAIN.MIXUP_ALPHA": 0.8,
    "TRAIN.CUTMIX_ALPHA": 1.0,
    "TRAIN.CUTMIX_MINMAX": None,
    "TRAIN.MIXUP_PROB": 1.0,
    "TRAIN.MIXUP_SWITCH_PROB": 0.5,
    "TRAIN.AUTO_AUGMENT": True,
    "TRAIN.RAND_AUGMENT": False,
    "TRAIN.RANDOM_ERASE_PROB": 0.0,
    "TRAIN.MODEL_EMA": False,
}


# The smallest and the largest value that each key of numbers takes: ints where it takes whole ones
# alone.
FINITE, ABOVE_0 = sys.float_info.max, 5e-324
LIMITS = {
    "DATA.BATCH_SIZE": (1, FINITE),
    "DATA.BATCH_SIZE_EVAL": (1, FINITE),
    "DATA.IMAGE_SIZE": (1, FINITE),
    "DATA.IMAGE_CHANNELS": (1, FINITE),
    "DATA.CROP_PCT": (0.01, 1.0),
    "DATA.NUM_WORKERS": (-1, 1024),
    "DATA.IMAGENET_MEAN": (-FINITE, FINITE),
    "DATA.IMAGENET_STD": (ABOVE_0, FINITE),
    "MODEL.NUM_CLASSES": (1, 2147483647),
    "MODEL.DROPOUT": (0.0, 0.999),
    "MODEL.ATTENTION_DROPOUT": (0.0, 0.999),
    "MODEL.DROPPATH": (0.0, 0.999),
    "MODEL.MIXER.PATCH_SIZE": (1, FINITE),
    "MODEL.MIXER.EMBED_DIM": (1, FINITE),
    "MODEL.MIXER.DEPTH": (1, FINITE),
    "MODEL.MIXER.MLP_RATIO": (ABOVE_0, FINITE),
    "TRAIN.LAST_EPOCH": (0, FINITE),
    "TRAIN.NUM_EPOCHS": (1, FINITE),
    "TRAIN.WARMUP_EPOCHS": (0.0, FINITE),
    "TRAIN.WARMUP_STEPS": (0, FINITE),
    "TRAIN.WEIGHT_DECAY": (0.0, FINITE),
    "TRAIN.BASE_LR": (0.0, FINITE),
    "TRAIN.WARMUP_START_LR": (0.0, FINITE),
    "TRAIN.END_LR": (0.0, FINITE),
    "TRAIN.GRAD_CLIP": (ABOVE_0, FINITE),
    "TRAIN.ACCUM_ITER": (1, FINITE),
    "TRAIN.LINEAR_SCALED_LR": (1.0, FINITE),
    "TRAIN.LAYER_DECAY": (ABOVE_0, 1.0),
    "TRAIN.OPTIMIZER.EPS": (ABOVE_0, FINITE),
    "TRAIN.OPTIMIZER.BETAS": (0.0, 0.999999999),
    "TRAIN.MODEL_EMA_DECAY": (0.0, 1.0),
    "TRAIN.SMOOTHING": (0.0, 1.0),
    "TRAIN.COLOR_JITTER": (0.0, FINITE),
    "TRAIN.RAND_AUGMENT_LAYERS": (0, 100),
    "TRAIN.RAND_AUGMENT_MAGNITUDE": (0.0, 10.0),
    "TRAIN.CROP_SCALE": (ABOVE_0, 1.0),
    "TRAIN.CROP_RATIO": (ABOVE_0, FINITE),
    "TRAIN.HFLIP": (0.0, 1.0),
    "TRAIN.MIXUP_ALPHA": (0.0, FINITE),
    "TRAIN.MIXUP_PROB": (0.0, 1.0),
    "TRAIN.MIXUP_SWITCH_PROB": (0.0, 1.0),
    "TRAIN.CUTMIX_ALPHA": (0.0, FINITE),
    "TRAIN.CUTMIX_MINMAX": (0.0, 1.0),
    "TRAIN.RANDOM_ERASE_PROB": (0.0, 1.0),
    "TRAIN.RANDOM_ERASE_COUNT": (1, 100),
    "SAVE_FREQ": (1, FINITE),
    "SAVE_FREQ_STEPS": (0, FINITE),
    "KEEP_LAST": (0, FINITE),
    "REPORT_FREQ": (1, FINITE),
    "HANG_MINUTES": (0.0, 10000),
    "VALIDATE_FREQ": (1, FINITE),
    "SEED": (0, 9223372036854775807),
}
LENGTHS = {
    "DATA.IMAGENET_MEAN": 3,
    "DATA.IMAGENET_STD": 3,
    "TRAIN.OPTIMIZER.BETAS": 2,
    "TRAIN.CROP_SCALE": 2,
    "TRAIN.CROP_RATIO": 2,
    "TRAIN.CUTMIX_MINMAX": 2,
}
MAY_BE_NONE = {
    "DATA.BATCH_SIZE_EVAL",
    "DATA.REAL_LABELS",
    "MODEL.RESUME",
    "MODEL.PRETRAINED",
    "TRAIN.WARMUP_STEPS",
    "TRAIN.GRAD_CLIP",
    "TRAIN.LINEAR_SCALED_LR",
    "TRAIN.LAYER_DECAY",
    "TRAIN.COLOR_JITTER",
    "TRAIN.RAND_AUGMENT_OPERATORS",
    "TRAIN.CUTMIX_MINMAX",
}


def write(folder, name="config.yaml", text=""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def update(config=None, **arguments):
    return update_config(config or get_config(), SimpleNamespace(**arguments))


def typed(values):
    """(is a bool, value) of each key, as 0 == False would hide a wrong type."""
    return {key: (isinstance(value, bool), value) for key, value in values.items()}


def values(config, keys):
    return {key: operator.attrgetter(key)(config) for key in keys}


def refusal(function, *arguments, **options):
    """The message of the ConfigError that the call raises: one short line."""
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


# --- defaults and files ---


def test_defaults_are_paddlevits():
    assert typed(values(get_config(), PADDLEVIT_DEFAULTS)) == typed(PADDLEVIT_DEFAULTS)


def test_a_config_may_be_changed_without_changing_the_defaults():
    config = get_config()
    config.DATA.BATCH_SIZE = 7
    config.DATA.IMAGENET_MEAN[0] = 7
    assert get_config().DATA.BATCH_SIZE == 256
    assert get_config().DATA.IMAGENET_MEAN == [0.5, 0.5, 0.5]


def test_a_yaml_file_in_paddlevits_style_with_all_its_keys_loads(tmp_path):
    tree = {}
    for key, value in PADDLEVIT_DEFAULTS.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = list(value) if isinstance(value, tuple) else value
    tree["TRAIN"].update(WEIGHT_DECAY=0, GRAD_CLIP=5, LINEAR_SCALED_LR=None, BASE_LR="1e-3")
    tree["TRAIN"]["CUTMIX_MINMAX"] = [0, 1]
    tree["DATA"]["BATCH_SIZE_EVAL"] = 8
    tree["MODEL"]["DROPOUT"] = 0
    config = get_config(write(tmp_path, text=yaml.safe_dump(tree)))
    changed = {
        "TRAIN.WEIGHT_DECAY": 0.0,
        "TRAIN.GRAD_CLIP": 5.0,
        "TRAIN.LINEAR_SCALED_LR": None,
        "TRAIN.BASE_LR": 0.001,
        "TRAIN.CUTMIX_MINMAX": [0.0, 1.0],
        "DATA.BATCH_SIZE_EVAL": 8,
    }
    expected = {**PADDLEVIT_DEFAULTS, **changed}
    assert typed(values(config, PADDLEVIT_DEFAULTS)) == typed(expected)


def test_python_literals_load_as_they_do_with_yacs(tmp_path):
    text = """
MODEL: {RESUME: None}
TRAIN:
  GRAD_CLIP: None
  BASE_LR: 1e-3
  OPTIMIZER:
    BETAS: (0.9, 0.95)
"""
    config = get_config(write(tmp_path, text=text))
    assert config.MODEL.RESUME is None and config.TRAIN.GRAD_CLIP is None
    assert config.TRAIN.BASE_LR == 1e-3
    assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffDATA:\n  BATCH_SIZE: 4\n",
        "DATA:\r\n  BATCH_SIZE: 4\r\nTRAIN:\r\n",
        "MODEL:\n  # NAME: all lines of this section are comments\nDATA: {BATCH_SIZE: 4.0}",
        "BASE: ['']\nDATA: {BATCH_SIZE: 4}",
    ],
)
def test_the_ways_people_write_yaml_are_read(tmp_path, text):
    assert get_config(write(tmp_path, text=text)).DATA.BATCH_SIZE == 4


@pytest.mark.parametrize(
    ("size", "dim", "drop_path"), [("ti16", 128, 0.0), ("s16", 256, 0.05), ("b16", 512, 0.2)]
)
def test_the_papers_configs_hold_its_recipe_exactly(size, dim, drop_path):
    config = get_config(ROOT / "configs" / f"gmlp_{size}_224.yaml")
    own = {
        "MODEL.NAME": f"gmlp_{size}_224",
        "MODEL.MIXER.EMBED_DIM": dim,
        "MODEL.DROPPATH": drop_path,
    }
    expected = {**PAPER_RECIPE, **own}
    assert typed(values(config, expected)) == typed(expected)

    images_per_step = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER * 8
    assert images_per_step == 4096
    rate = optim.LearningRate(config.TRAIN, images_per_step, 1_281_167 // 4096)
    assert (rate.start, rate.base, rate.end) == (0.0, 1e-3, 0.0)
    assert rate.warmup == 10_000


@pytest.mark.parametrize("name", ["gmlp_digits", "gmlp_digits_32", "gmlp_digits_finetune"])
def test_the_digits_configs_load_and_make_a_model(name):
    config = get_config(ROOT / "configs" / f"{name}.yaml")
    assert (config.MODEL.NAME, build_gmlp(config).head.weight.shape) == (name, [96, 10])


def test_a_dumped_config_loads_as_the_same_config(tmp_path):
    config = get_config(ROOT / "configs" / "gmlp_s16_224.yaml")
    config.TRAIN.CUTMIX_MINMAX = [0.2, 0.8]
    assert get_config(write(tmp_path, text=config.dump())) == config


# --- what wins ---


def test_later_wins_defaults_base_file_flags_opts(tmp_path):
    write(tmp_path, "base.yaml", "DATA: {BATCH_SIZE: 1}\nTRAIN: {NUM_EPOCHS: 1}\nSEED: 1\nSAVE: a")
    child = write(
        tmp_path, "child.yaml", "BASE: [base.yaml]\nDATA: {BATCH_SIZE: 2}\nTRAIN: {NUM_EPOCHS: 2}"
    )
    config = update(cfg=str(child), batch_size=3, seed=3, opts=["SEED", "4"])
    assert config.DATA.BATCH_SIZE == 3
    assert config.TRAIN.NUM_EPOCHS == 2
    assert config.SEED == 4
    assert config.SAVE == "a"
    assert config.VALIDATE_FREQ == 1


def test_base_files_are_relative_to_their_own_file_and_may_be_nested_or_shared(tmp_path):
    write(tmp_path, "shared.yaml", "SEED: 1\nDATA: {BATCH_SIZE: 1, IMAGE_SIZE: 32}")
    write(tmp_path, "inner/one.yaml", "BASE: ['../shared.yaml']\nDATA: {BATCH_SIZE: 2}")
    write(tmp_path, "inner/two.yaml", "BASE: ../shared.yaml\nSEED: 2")
    child = write(tmp_path, "child.yaml", "BASE: [inner/one.yaml, inner/two.yaml]\nAMP: true")
    config = get_config(child)
    # two.yaml comes after one.yaml and brings shared.yaml's batch size again.
    assert (config.SEED, config.DATA.BATCH_SIZE, config.DATA.IMAGE_SIZE) == (2, 1, 32)
    assert config.AMP is True and config.BASE == [""]


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("dataset", "imagenet2012", "DATA.DATASET"),
        ("data_path", "/somewhere", "DATA.DATA_PATH"),
        ("output", "/elsewhere", "SAVE"),
        ("batch_size", 3, "DATA.BATCH_SIZE"),
        ("batch_size_eval", 3, "DATA.BATCH_SIZE_EVAL"),
        ("image_size", 64, "DATA.IMAGE_SIZE"),
        ("accum_iter", 3, "TRAIN.ACCUM_ITER"),
        ("pretrained", "w.pdparams", "MODEL.PRETRAINED"),
        ("real_labels", "real.json", "DATA.REAL_LABELS"),
        ("resume", "auto", "MODEL.RESUME"),
        ("last_epoch", 3, "TRAIN.LAST_EPOCH"),
        ("eval", True, "EVAL"),
        ("amp", True, "AMP"),
        ("num_workers", 0, "DATA.NUM_WORKERS"),
        ("num_classes", 7, "MODEL.NUM_CLASSES"),
        ("seed", 0, "SEED"),
    ],
)
def test_each_flag_sets_its_key_and_nothing_where_it_is_not_given(tmp_path, flag, value, key):
    other = {"SEED": 5, "EVAL": True, "AMP": True}.get(key, operator.attrgetter(key)(get_config()))
    path = write(tmp_path, text="SEED: 5\nEVAL: True\nAMP: True")
    assert operator.attrgetter(key)(update(cfg=str(path), **{flag: value})) == value
    assert operator.attrgetter(key)(update(cfg=str(path), **{flag: None})) == other
    if isinstance(value, bool):
        assert operator.attrgetter(key)(update(cfg=str(path), **{flag: False})) is other


def test_the_batch_size_flag_also_sets_evaluations_unless_it_has_its_own():
    config = get_config()
    config.DATA.BATCH_SIZE_EVAL = 100
    assert update(config.clone(), batch_size=8).DATA.BATCH_SIZE_EVAL == 8
    assert update(config.clone(), batch_size=8, batch_size_eval=9).DATA.BATCH_SIZE_EVAL == 9


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "1e-3", 1e-3),
        ("TRAIN.WEIGHT_DECAY", "0", 0.0),
        ("TRAIN.GRAD_CLIP", "None", None),
        ("TRAIN.GRAD_CLIP", "5", 5.0),
        ("TRAIN.LINEAR_SCALED_LR", "null", None),
        ("TRAIN.CUTMIX_MINMAX", "[0.2, 0.8]", [0.2, 0.8]),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9, 0.95]", (0.9, 0.95)),
        ("TRAIN.AUTO_AUGMENT", "True", True),
        ("TRAIN.LAYER_DECAY", "None", None),
        ("TRAIN.LAYER_DECAY", "1", 1.0),
        ("TRAIN.FREEZE_BACKBONE", "True", True),
        ("MODEL.NAME", "123", "123"),
        ("DATA.DATA_PATH", "/data/[a b]: c", "/data/[a b]: c"),
        ("MODEL.PRETRAINED", "None", None),
    ],
)
def test_opts_are_read_in_the_keys_type(key, text, value):
    result = operator.attrgetter(key)(update(opts=[key, text]))
    assert (type(result), result) == (type(value), value)


def test_warm_up_may_be_a_fraction_of_an_epoch():
    config = update(opts=["TRAIN.WARMUP_EPOCHS", "0.5"])
    assert optim.LearningRate(config.TRAIN, 512, steps_per_epoch=100).warmup == 50


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("DATA: {BATCH_SIZE: 1.5}", ["DATA.BATCH_SIZE", "whole number", "1.5"]),
        ("DATA: {BATCH_SIZE: True}", ["DATA.BATCH_SIZE", "whole number", "True"]),
        ("DATA: {BATCH_SIZE: eight}", ["DATA.BATCH_SIZE", "whole number", "'eight'"]),
        ("DATA: {BATCH_SIZE: null}", ["DATA.BATCH_SIZE", "whole number", "None"]),
        ("DATA: {BATCH_SIZE: [8]}", ["DATA.BATCH_SIZE", "whole number"]),
        ("TRAIN: {BASE_LR: fast}", ["TRAIN.BASE_LR", "a number", "fast"]),
        ("TRAIN: {BASE_LR: true}", ["TRAIN.BASE_LR", "a number", "True"]),
        ("TRAIN: {BASE_LR: .nan}", ["TRAIN.BASE_LR is nan, it must be at least 0"]),
        ("TRAIN: {BASE_LR: .inf}", ["TRAIN.BASE_LR is inf, it must be at least 0"]),
        ("TRAIN: {BASE_LR: 'nan'}", ["TRAIN.BASE_LR must be a number, not 'nan'"]),
        ("TRAIN: {BASE_LR: 1e999}", ["TRAIN.BASE_LR", "inf"]),
        ("TRAIN: {GRAD_CLIP: text}", ["TRAIN.GRAD_CLIP", "a number"]),
        ("TRAIN: {OPTIMIZER: {BETAS: [0.9]}}", ["TRAIN.OPTIMIZER.BETAS", "2 numbers"]),
        ("TRAIN: {OPTIMIZER: {BETAS: 0.9}}", ["TRAIN.OPTIMIZER.BETAS", "list"]),
        ("TRAIN: {CUTMIX_MINMAX: [0.8, 0.2]}", ["TRAIN.CUTMIX_MINMAX", "smaller"]),
        ("DATA: {CROP_PCT: 1.5}", ["DATA.CROP_PCT", "1.5", "at most 1"]),
        ("MODEL: {DROPPATH: 1}", ["MODEL.DROPPATH", "1.0", "at most 0.999"]),
        ("MODEL: {NUM_CLASSES: 3000000000}", ["MODEL.NUM_CLASSES", "at most 2147483647"]),
        ("TRAIN: {MODEL_EMA: 1}", ["TRAIN.MODEL_EMA", "True or False"]),
        ("TRAIN: {LAYER_DECAY: 0}", ["TRAIN.LAYER_DECAY", "above 0"]),
        ("TRAIN: {FREEZE_BACKBONE: 1}", ["TRAIN.FREEZE_BACKBONE", "True or False"]),
        ("MODEL: {NAME: 3}", ["MODEL.NAME", "text"]),
        ("MODEL: {RESUME: 3}", ["MODEL.RESUME", "text"]),
        ("TRAIN: {OPTIMIZER: {NAME: none}}", ["TRAIN.OPTIMIZER.NAME", "AdamW", "none"]),
        ("TRAIN: {LR_SCHEDULE: none}", ["TRAIN.LR_SCHEDULE", "cosine", "none"]),
        ("TRAIN: {RAND_AUGMENT_OPERATORS: []}", ["TRAIN.RAND_AUGMENT_OPERATORS", "names"]),
        ("TRAIN: {RAND_AUGMENT_OPERATORS: [1]}", ["TRAIN.RAND_AUGMENT_OPERATORS", "text"]),
        ("AMP_DTYPE: float32", ["AMP_DTYPE", "bfloat16"]),
        ("DATA: 3", ["DATA", "section"]),
        ("DATA: {BATCH_SIZ: 3}", ["DATA.BATCH_SIZ", "did you mean DATA.BATCH_SIZE?"]),
        ("BATCH_SIZE: 3", ["did you mean DATA.BATCH_SIZE?"]),
        ("TRAIN: {EPS: 1}", ["TRAIN.EPS", "did you mean TRAIN.OPTIMIZER.EPS?"]),
        ("model: {num_classes: 3}", ["no key 'model'"]),
        ("QQQQ: 3", ["QQQQ", "config.py"]),
        ("1: 2", ["no key '1'"]),
        ('"DATA.BATCH\\nSIZE": 2', ["did you mean DATA.BATCH_SIZE?"]),
        ("just words", ["KEY: value"]),
        ("- DATA\n- MODEL", ["KEY: value"]),
        ("DATA: {BATCH_SIZE: 1\n", ["not valid YAML", "line"]),
        ("DATA: {BATCH_SIZE: 2021-13-45}", ["not valid YAML"]),
        ("SAVE: !!python/object/apply:os.system ['exit 1']", ["not valid YAML"]),
        ("? [1, 2]\n: 3", ["not valid YAML"]),
        ("SEED: !!int ''", ["not valid YAML"]),
        ("SEED: !!bool x", ["not valid YAML"]),
        ("SEED: !!timestamp x", ["not valid YAML"]),
        ("SEED: 1" + ":1" * 400 + ".5", ["not valid YAML"]),
        ('SEED: "\\UFFFFFFFF"', ["not valid YAML"]),
        ('SAVE: "a\\0b"', ["SAVE", "no path can hold"]),
        ('SAVE: "\\ud800"', ["SAVE", "no path can hold"]),
        ('BASE: "\\ud800"', ["cannot read", "surrogates"]),
        ('BASE: "a\\nb"', [r"a\nb': cannot read", "No such file"]),
        ("BASE: " + "x" * 9000, ["cannot read", "too long"]),
        ("[" * 10000, ["not valid YAML"]),
        ("{a: " * 8000, ["not valid YAML"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ["not UTF-8"]),
        (b"\x00\x01\x02", ["not valid YAML"]),
        (b"# " + b"x" * (1 << 20), ["larger than"]),
        ("BASE: 3", ["BASE must be a list of YAML files"]),
        ("BASE: [{a: 1}]", ["BASE must be a list of YAML files"]),
        ("BASE: &b [*b]", ["BASE must be a list of YAML files"]),
        ('BASE: ["a\\0b"]', [r"a\x00b': cannot read"]),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence_naming_file_and_key(tmp_path, text, parts):
    path = write(tmp_path, text=text)
    message = refusal(get_config, path)
    assert str(tmp_path) in message
    assert all(part in message for part in parts), message


BOMB = "&a [1,1,1,1,1,1,1,1]"
for new, old in zip("bcdefgh", "abcdefg"):
    BOMB += f", &{new} [{','.join(['*' + old] * 8)}]"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (f"DATA: {{BATCH_SIZE: [{BOMB}]}}", "DATA.BATCH_SIZE"),
        (f"MODEL: {{NAME: [{BOMB}]}}", "MODEL.NAME"),
        (f"BASE: [{BOMB}]", "BASE"),
        ("TRAIN: {CUTMIX_MINMAX: &a [*a, *a]}", "TRAIN.CUTMIX_MINMAX"),
        ("DATA: &d {IMAGE_SIZE: *d}", "DATA.IMAGE_SIZE"),
        ("DATA: {IMAGE_SIZE: &d {a: *d}}", "DATA.IMAGE_SIZE"),
        ("SEED: " + "9" * 3000, "SEED"),
        ("SEED: 0x" + "f" * 9000, "SEED"),
        ("TRAIN: {BASE_LR: " + "9" * 3000 + "}", "TRAIN.BASE_LR"),
        ("AMP_DTYPE: " + "x" * 10000, "AMP_DTYPE"),
        ('AMP_DTYPE: "a\\nb"', "AMP_DTYPE"),
        ("x" * 1000 + ": 1", "no key"),
    ],
)
def test_messages_stay_short_whatever_the_file_holds(tmp_path, text, part):
    assert part in refusal(get_config, write(tmp_path, text=text))


def test_merge_keys_cannot_blow_up_memory(tmp_path):
    text, last = "a: &a {k: 1}\n", "a"
    for name in "bcdefghij":
        text += f"{name}: &{name} {{<<: [{','.join(['*' + last] * 9)}]}}\n"
        last = name
    path = write(tmp_path, text=text)
    code = f"from config import get_config; get_config({str(path)!r})"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert "ConfigError" in answer.stderr


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        assert str(path) in refusal(get_config, path)
    child = write(tmp_path, text="BASE: [parent.yaml]")
    assert str(tmp_path / "parent.yaml") in refusal(get_config, child)


def test_a_mistake_in_a_parent_file_names_the_parent(tmp_path):
    child = write(tmp_path, "child.yaml", "BASE: [parent.yaml]")
    for text in ("DATA: {BATCH_SIZE: text}", "DATA: {BATCH_SIZE: 0}", "DATA: {BATCH_SIZ: 1}"):
        write(tmp_path, "parent.yaml", text)
        assert str(tmp_path / "parent.yaml") in refusal(get_config, child)


@pytest.mark.parametrize(
    "key", ["SAVE", "DATA.DATA_PATH", "DATA.REAL_LABELS", "MODEL.PRETRAINED", "MODEL.RESUME"]
)
def test_a_path_may_begin_with_the_home_folder(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    *sections, name = key.split(".")
    tree = {name: "~/a b"}
    for section in sections:
        tree = {section: tree}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    for config in (get_config(tmp_path / "a.yaml"), update(opts=[key, "~/a b"])):
        assert value_of(config, key) == "/home/me/a b"


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"MODEL: {{NAME: {'a' * 201}}}", "has 201 characters, it may have 200"),
        ('MODEL: {NAME: "a\\tb"}', "it must be printable"),
        (f"TRAIN: {{RAND_AUGMENT_OPERATORS: [{', '.join(['Invert'] * 101)}]}}", "has 101 values"),
    ],
)
def test_what_a_checkpoint_could_not_hold_is_refused_before_the_run(tmp_path, text, reason):
    assert reason in refusal(get_config, write(tmp_path, text=text))


def test_numbers_with_an_exponent_are_numbers_in_lists_too(tmp_path):
    (tmp_path / "a.yaml").write_text("TRAIN: {CROP_SCALE: [5e-2, 1], BASE_LR: 1e-3}\n")
    config = get_config(tmp_path / "a.yaml")
    assert config.TRAIN.CROP_SCALE == [0.05, 1.0] and config.TRAIN.BASE_LR == 0.001


@pytest.mark.parametrize("parents", [["a.yaml"], ["b.yaml", "a.yaml"], ["b.yaml", "./x/../a.yaml"]])
def test_a_cycle_of_base_files_is_refused(tmp_path, parents):
    (tmp_path / "x").mkdir()
    for name, parent in zip(["a.yaml", "b.yaml"], parents):
        write(tmp_path, name, f"BASE: [{parent}]")
    assert refusal(get_config, tmp_path / "a.yaml").endswith(": a cycle")


@pytest.mark.parametrize("text", ["'1if 2'", r'"\d"', "'{[]: 1}'"])
def test_text_that_is_no_literal_is_refused_without_pythons_remarks(tmp_path, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refusal(get_config, write(tmp_path, text=f"SEED: {text}"))
    assert not caught


def test_wild_yaml_and_opts_load_or_are_refused_in_a_sentence(tmp_path):
    fuzz_inputs.run("yaml", tmp_path, seed=0, count=300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_wild_yaml_files_load_or_are_refused_in_a_sentence(tmp_path, seed):
    fuzz_inputs.run("yaml", tmp_path, seed, count=5000)


def test_lists_may_be_nested_as_deeply_as_fifty_and_no_deeper(tmp_path):
    # The file and SEED's value are two of them.
    text = "SEED: {0}1{1}"
    deep, deeper = (
        refusal(get_config, write(tmp_path, text=text.format("[" * n, "]" * n))) for n in (48, 49)
    )
    assert "a whole number" in deep and "nested too deeply" in deeper


def test_every_key_of_numbers_has_a_limit_that_is_tested():
    numbers = {key for key, spec in config_module.KEYS.items() if spec.kind in (int, float)}
    assert numbers == set(LIMITS)


@pytest.mark.parametrize("key", LIMITS)
def test_every_key_of_numbers_takes_its_limits_and_refuses_what_is_beyond(key):
    def opts(value):
        value = [value] * LENGTHS[key] if key in LENGTHS else value
        return [key, yaml.safe_dump(value, default_flow_style=True, width=200).split("\n")[0]]

    low, high = LIMITS[key]
    for limit in (low, high):
        taken = operator.attrgetter(key)(update(opts=opts(limit)))
        taken = list(taken) if key in LENGTHS else [taken]
        assert taken == [limit] * len(taken) and {type(item) for item in taken} == {type(low)}
    wrong = [math.inf, -math.inf, math.nan]
    for limit, direction in ((low, -1), (high, 1)):
        whole = isinstance(limit, int)
        wrong.append(limit + direction if whole else math.nextafter(limit, direction * math.inf))
    for value in wrong:
        assert f"-opts: {key} " in refusal(update, opts=opts(value)), value


@pytest.mark.parametrize("key", sorted(config_module.KEYS))
def test_null_is_taken_where_none_has_a_meaning_and_refused_elsewhere(tmp_path, key):
    text = "null"
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    path = write(tmp_path, text=text)
    ways = [(get_config, (path,), {}), (update, (), {"opts": [key, "null"]})]
    for function, arguments, options in ways:
        if key in MAY_BE_NONE:
            assert operator.attrgetter(key)(function(*arguments, **options)) is None
        else:
            message = refusal(function, *arguments, **options)
            assert f": {key} must be " in message and message.endswith(", not None")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"opts": ["SEED"]}, ["-opts", "SEED", "no value"]),
        ({"opts": ["SEED", "1", "SED", "2"]}, ["-opts", "'SED'", "did you mean SEED?"]),
        ({"opts": ["train.base_lr", "1"]}, ["did you mean TRAIN.BASE_LR?"]),
        ({"opts": ["MODEL.MIXER", "1"]}, ["MODEL.MIXER", "section"]),
        ({"opts": ["DATA.BATCH_SIZE", "[1"]}, ["-opts", "DATA.BATCH_SIZE", "whole number"]),
        ({"opts": ["TRAIN.OPTIMIZER.BETAS", "0.9"]}, ["TRAIN.OPTIMIZER.BETAS", "list"]),
        ({"opts": ["BASE", "[other.yaml]"]}, ["BASE can only be set in a YAML file"]),
        ({"opts": ["BASE", "other.yaml"]}, ["BASE can only be set in a YAML file"]),
        ({"opts": ["SEED", "[" * 10000]}, ["SEED must be a whole number"]),
        ({"batch_size": 0}, ["DATA.BATCH_SIZE", "at least 1"]),
        ({"last_epoch": -1}, ["TRAIN.LAST_EPOCH", "at least 0"]),
        ({"cfg": "missing.yaml"}, ["missing.yaml: cannot read this config file: No such"]),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_sentence(arguments, parts):
    message = refusal(update, **arguments)
    assert all(part in message for part in parts), message
