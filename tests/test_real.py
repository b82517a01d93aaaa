"""-eval -real_labels: the ReaL accuracies, against a direct computation."""

import contextlib
import json
import random

import numpy as np
import paddle
import pytest
from PIL import Image
from program import CONFIG, SMALL, flatten, metrics, run_as_rank, run_program
from test_train import make_batches, make_model

from config import get_config, update_config
from datasets import ImageSource, build_dataset
from gmlp import build_gmlp
from main_multi_gpu import build_parser
from training.evaluate import validate
from training.real import RealLabels
from transforms import BatchTransform
from utils import DataError


class Named(ImageSource):
    """Images of these names, whose labels do not matter."""

    name = "these"

    def __init__(self, names):
        self.names, self.labels = names, [0] * len(names)

    def image_path(self, index):
        return f"val/n01440764/{self.names[index]}"


def name_of(number):
    return f"ILSVRC2012_val_{number:08}.JPEG"


def direct(logits, lists):
    """(acc1, acc5, images) by the ReaL labels: the definition, image by image."""
    rows = [(np.argsort(-row)[:5], own) for row, own in zip(logits, lists) if own]
    top1 = sum(row[0] in own for row, own in rows)
    top5 = sum(any(label in own for label in row) for row, own in rows)
    return 100 * top1 / len(rows), 100 * top5 / len(rows), len(rows)


def real(result):
    return result["real_acc1"], result["real_acc5"], result["real_images"]


def draw_lists(count, classes, seed=0):
    rng = random.Random(seed)
    return [rng.sample(range(classes), rng.choice([0, 1, 1, 2, 3, 7])) for _ in range(count)]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_scores_are_those_of_a_direct_computation_for_any_batches_and_ranks(tmp_path):
    model, total = make_model(), 37
    images, labels = (paddle.concat(parts) for parts in zip(*make_batches(1, total)))
    logits = model(images).numpy()
    entries = draw_lists(50, logits.shape[1])
    numbers = random.Random(1).sample(range(1, 51), total)  # in the list's order, not the names'
    labelled = RealLabels(
        write(tmp_path / "real.json", entries), Named(list(map(name_of, numbers))), 10
    )
    lists = [entries[number - 1] for number in numbers]
    assert [] in lists and 0 < direct(logits, lists)[0] < direct(logits, lists)[1] < 100
    for size in (1, 5, total):
        for indices in (range(total), range(1, total, 2), [3]):  # all of them, a rank's share
            mine = list(indices)
            rows = [mine[i : i + size] for i in range(0, len(mine), size)]
            batches = [(paddle.to_tensor(images.numpy()[r]), labels[r]) for r in rows]
            if not any(lists[i] for i in mine):
                continue
            scores = validate(
                model, batches, lambda x, y: (x, y), contextlib.nullcontext, labelled.scores(mine)
            )
            assert real(scores) == direct(logits[mine], [lists[i] for i in mine])
            plain = validate(model, batches, lambda x, y: (x, y), contextlib.nullcontext)
            assert {**scores, **plain} == scores  # which are all there beside them
    labelled.scores([])  # of a rank that has no image


def test_a_line_of_many_labels_takes_no_more_memory_than_there_are_classes(tmp_path):
    path = write(tmp_path / "real.json", [[3, 1] * 100_000, [2]])
    labelled = RealLabels(path, Named([name_of(1), name_of(2)]), 10)
    assert labelled._labels == [[1, 3], [2]]


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """(folder, lists) of a data set with real.json, weights and what is right, image by image.

    The images have the names of validation images, in class folders.
    """
    root = tmp_path_factory.mktemp("validation images")
    rng, entries = np.random.default_rng(0), draw_lists(200, 10, seed=3)
    numbers, lines = random.Random(2).sample(range(1, 201), 101), []
    for number in numbers:
        path = root / "val" / str(number % 10) / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).save(path, "PNG")
        lines.append(f"{path.relative_to(root)} {number % 10}\n")
    (root / "val_list.txt").write_text("".join(lines))
    write(root / "real.json", entries)
    words = ["-cfg", str(CONFIG), "-eval", "-data_path", str(root), "-opts", *flatten(SMALL)]
    config = update_config(get_config(), build_parser().parse_args(words))
    model, data = build_gmlp(config), build_dataset(config, train=False)
    for param in model.parameters():
        param.set_value(paddle.to_tensor(rng.normal(0, 0.3, param.shape).astype("float32")))
    paddle.save(model.state_dict(), str(root / "weights.pdparams"))
    model.eval()
    transform, logits = BatchTransform(config, train=False), []
    for index in range(len(data)):
        pixels, _ = data[0, index]
        logits.append(model(transform(paddle.to_tensor(pixels[None]), None)[0]).numpy()[0])
    lists = [entries[number - 1] for number in numbers]
    return root, direct(np.array(logits), lists)


@pytest.mark.parametrize(
    "ranks, batch, engine", [(1, 16, "layers"), (2, 7, "layers"), (1, 64, "float32")]
)
def test_eval_gives_the_real_accuracies_on_any_ranks_batches_and_engines(
    validation, tmp_path, ranks, batch, engine
):
    folder, expected = validation
    words = ["-eval", "-data_path", folder, "-pretrained", folder / "weights.pdparams",
             "-output", tmp_path, "-real_labels", folder / "real.json"]  # fmt: skip
    opts = {**SMALL, "DATA.BATCH_SIZE_EVAL": batch, "CPU_INFERENCE": engine}
    if ranks == 1:
        result = run_as_rank(*words, "-opts", *flatten(opts)).check()
    else:
        result = run_program(*words, "-nprocs", ranks, opts=opts).check()
    (output,) = tmp_path.glob("eval-*")
    found = json.loads((output / "eval.json").read_text())
    assert 0 < expected[0] < expected[1] < 100
    assert real(found) == expected and found["images"] == 101 and expected[2] < 101
    (row,) = metrics(output, "eval")
    assert real(row) == expected
    said = (
        f"; with the ReaL labels Acc@1 {expected[0]:.2f} Acc@5 {expected[1]:.2f} on {expected[2]}"
    )
    assert said in result.out and said in (output / "log.txt").read_text()


def refused(tmp_path, content, *parts, names=None):
    names, path = names or [name_of(1), name_of(2)], tmp_path / "real.json"
    if content is not None:
        write(path, content)
    with pytest.raises(DataError) as error:
        RealLabels(str(path), Named(names), 10)
    for part in parts:
        assert part in str(error.value), (part, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "real.json: cannot read these labels: No such file or directory"),
        ("[[1], [2]", "these labels are not JSON ("),
        ("<html>", "these labels are not JSON ("),
        ("[" * 100_000, "these labels are not JSON ("),
        ({"1": [2]}, "must hold a list of lists of labels, not {'1': [2]}"),
        ([], "must hold a list of lists of labels, not []"),
        ([[1], 2], "entry 2 must be a list of labels, whole numbers, not 2"),
        ([[1], [2.0]], "entry 2 must be a list of labels, whole numbers, not [2.0]"),
        ([[1], [True]], "entry 2 must be a list of labels"),
        ([[1], [3, 10]], "entry 2: label 10 is not in 0..9 (MODEL.NUM_CLASSES is 10)"),
        ([[-1], []], "entry 1: label -1 is not in 0..9"),
        ([[1]], "real.json has labels for images 1 to 1, and none for this one"),
        ([[], [], [3]], "has no label for any image of these"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_labels_is_refused_in_a_sentence(tmp_path, content, part):
    refused(tmp_path, content, part)


@pytest.mark.parametrize(
    "name", ["n01440764_1.JPEG", "ILSVRC2012_val_1.JPEG", "ILSVRC2012_test_00000001.JPEG",
             "xILSVRC2012_val_00000001.JPEG"]
)  # fmt: skip
def test_images_with_other_names_are_refused(tmp_path, name):
    part = f"val/n01440764/{name}: -real_labels needs ImageNet's validation images"
    refused(tmp_path, [[1]], part, names=[name])
    refused(tmp_path, [[1]], "images 1 to 1, and none for this one", names=[name_of(0)])


def test_the_flag_goes_with_eval_and_what_is_wrong_is_said_before_the_first_batch(
    validation, tmp_path
):
    folder, _ = validation
    output, other = tmp_path / "output", tmp_path / "other"
    words = ["-real_labels", folder / "real.json", "-output", output, "-data_path"]
    run_as_rank(*words, folder).refused(2, "-real_labels FILE goes with -eval")
    other.mkdir()
    (other / "val_list.txt").write_text("val/0/a.png 0\n")
    words += [other, "-eval", "-pretrained", folder / "weights.pdparams"]
    run_as_rank(*words, "-opts", *flatten(SMALL)).refused(
        2, f"{other}/val_list.txt:1: {other}/val/0/a.png: -real_labels needs"
    )
    assert not output.exists()
