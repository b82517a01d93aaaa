"""What a resumed run is compared by: everything that decides its numbers, and nothing else."""

import types

import numpy as np
import pytest
from golden import config_of

from config import KEYS, value_of
from datasets import ImageList, ImageSource
from training import optim, state
from weights import pdparams

LINES = ["train/a.png 0", "train/b.png 1", "train/c.png 1"]


def write_list(folder, lines=LINES):
    folder.mkdir(exist_ok=True)
    (folder / "train_list.txt").write_text("\n".join(lines))
    return ImageList(str(folder), "train_list.txt", 10)


def make_training(config, images="an id", warnings=None):
    """What state reads of a Training, at the start of its second epoch."""
    amp = optim.Amp(config.AMP_DTYPE, config.AMP_LAYER_NORM == "amp") if config.AMP else None
    run = types.SimpleNamespace(
        train_data=range(24), world_size=1, amp=amp, on_gpu=config.AMP, list_digest=images,
        log=types.SimpleNamespace(warning=(warnings if warnings is not None else []).append),
    )  # fmt: skip
    updater = types.SimpleNamespace(move_to=lambda step: None)
    return types.SimpleNamespace(
        config=config, run=run, accum_iter=1, batches=6, steps_per_epoch=6, updater=updater
    )


def warnings_of(old, new):
    """What a run says that goes on from another's checkpoint."""
    said = []
    new.run.log.warning = said.append
    state._move_to_place(new, {"epoch": 1, "run": state.run_facts(old)}, "last.pdparams")
    return said


def test_every_key_decides_the_numbers_or_does_not():
    named = [*state.DECIDES, *state.OWN_NAMES.values(), *state.DOES_NOT_DECIDE]
    assert sorted(named) == sorted(KEYS), (
        "a new key belongs in one of the lists of training/state.py"
    )


def another(key):
    """Another value of a key than the tiny model's."""
    spec, value = KEYS[key], value_of(config_of("tiny"), key)
    if spec.length:
        return ["Rotate"] if spec.kind is str else [0.5, 0.75, 0.25][: len(value or (1, 1))]
    if spec.kind is bool:
        return not value
    if spec.kind is str:
        return next((choice for choice in spec.choices if choice != value), "other")
    return 1 if value is None else value / 2 if isinstance(value, float) and value else value + 1


@pytest.mark.parametrize("key", [*state.DECIDES, "SEED", "DATA.BATCH_SIZE", "MODEL.NAME"])
def test_a_key_that_decides_is_named_with_both_values_where_it_differs(key, tmp_path):
    before, after = with_effect(key), with_effect(key)
    _set(after, key, another(key))
    said = warnings_of(make_training(before), make_training(after))
    name = next((own for own, full in state.OWN_NAMES.items() if full == key), key)
    new = another(key)
    assert len(said) == 1 and f"was made with {name} " in said[0], said
    assert f"(now {new}): going on at the same place in the epoch, not bit for bit" in said[0]
    # And what is written is what is read, and fits the schema.
    path = tmp_path / "x.pdparams"
    tree = {"model": {"a": np.zeros(1, "float32")}, "run": state.run_facts(make_training(after))}
    pdparams.write(path, tree)
    assert state.read(path)["run"] == tree["run"]


def with_effect(key):
    """The tiny config, with the switch on that a key needs to have an effect."""
    config = config_of("tiny")
    config.TRAIN.MODEL_EMA = key.startswith("TRAIN.MODEL_EMA_")
    config.TRAIN.RAND_AUGMENT = key not in ("TRAIN.AUTO_AUGMENT", "TRAIN.COLOR_JITTER")
    config.AMP = key in ("AMP_DTYPE", "AMP_LAYER_NORM", "DETERMINISTIC")
    config.AMP_LAYER_NORM = "amp"
    return config


@pytest.mark.parametrize(
    "key",
    [
        "AMP_DTYPE",
        "AMP_LAYER_NORM",
        "DETERMINISTIC",
        "TRAIN.MODEL_EMA_DECAY",
        "TRAIN.COLOR_JITTER",
        "TRAIN.AUTO_AUGMENT",
    ],
)
def test_a_key_that_has_no_effect_is_not_compared(key):
    after = config_of("tiny")
    _set(after, key, another(key))
    assert warnings_of(make_training(config_of("tiny")), make_training(after)) == []


def _set(config, key, value):
    *sections, name = key.split(".")
    setattr(value_of(config, ".".join(sections)) if sections else config, name, value)


@pytest.mark.parametrize("key", state.DOES_NOT_DECIDE)
def test_a_key_that_does_not_decide_changes_nothing(key):
    after = config_of("tiny")
    _set(after, key, another(key))
    assert warnings_of(make_training(config_of("tiny")), make_training(after)) == []


def test_what_an_older_checkpoint_does_not_say_is_not_compared():
    said = []
    facts = {"ranks": 1, "batch_size": 256, "images": 24, "accum_iter": 1}
    training = make_training(config_of("tiny"), warnings=said)
    state._move_to_place(training, {"epoch": 1, "run": facts}, "last.pdparams")
    assert said == []


@pytest.mark.parametrize(
    "batch, words", [(0, "epoch 3"), (4, "epoch 3, batch 5/6"), (6, "the end of epoch 3")]
)
def test_what_comes_next_is_said(batch, words):
    training = make_training(config_of("tiny"))
    training.place = state.Place(2, batch)
    assert state._describe_next(training) == words


@pytest.mark.parametrize(
    "lines",
    [LINES[::-1], [*LINES[:2], "train/c.png 0"], [*LINES[:2], "train/d.png 1"], LINES[:2]],
    ids=["shuffled", "relabelled", "another image", "shorter"],
)
def test_another_list_of_training_images_is_said(tmp_path, lines):
    config = config_of("tiny")
    lists = [write_list(tmp_path / "a"), write_list(tmp_path / "b", lines)]
    digests = [images.digest(str(tmp_path)) for images in lists]
    said = warnings_of(*(make_training(config, digest) for digest in digests))
    assert len(said) == 1 and "another list of training images, labels or their order" in said[0]


class Folder(ImageSource):
    """A data set of a user's, without a digest."""

    def __init__(self, root, names, labels):
        self.root, self.names, self.labels = root, names, labels

    def image_path(self, index):
        return self.root / self.names[index]


def test_the_same_list_in_another_folder_is_the_same(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    digests = [write_list(folder).digest(str(folder)) for folder in (here, there)]
    assert digests[0] == digests[1]
    sources = [Folder(folder, ["a/1", "a/2"], [0, 1]) for folder in (here, there)]
    first, second = (each.digest(str(each.root)) for each in sources)
    assert first == second
    for names, labels in (("a/2 a/1", [0, 1]), ("a/1 a/2", [1, 1]), ("b/1 b/2", [0, 1])):
        assert Folder(here, names.split(), labels).digest(str(here)) != first
