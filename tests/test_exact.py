"""The same numbers however the work is shared out: ranks, batches, loader workers."""

import json
import sys

import paddle
import pytest
from program import CONFIG, ROOT, SMALL, flatten, run_preloaded, run_program, same

from weights import pdparams

# Runs in every rank: one evaluation for each list length, batch size and number of workers.
EVALUATIONS = """
import itertools, json, sys
from types import SimpleNamespace
from ranks import host
host.prepare_cpu(host.local_ranks())
from config import get_config, update_config
from datasets import build_dataset
from training.evaluate import validate_run
from training.run import Run

cfg, weights, output, combinations, *opts = sys.argv[1:]
flags = SimpleNamespace(
    cfg=cfg, eval=True, pretrained=weights, output=output, opts=opts,
    data_path=json.loads(combinations)[0][0],
)
config = update_config(get_config(), flags)
run = Run(config)
results = []
for folder, batch, workers in json.loads(combinations):
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE_EVAL, config.DATA.NUM_WORKERS = (
        folder, batch, workers
    )
    run.val_data = build_dataset(config, train=False)
    results.append(validate_run(run, run.model, ""))
if run.rank == 0:
    json.dump(results, open(output + "/results.json", "w"))
"""


@pytest.fixture(scope="module")
def lists(few_digits, tmp_path_factory):
    """Folders whose validation list has the first 1, 2, 10 and all 101 images."""
    lines = (few_digits / "val_list.txt").read_text().splitlines(keepends=True)
    folders = []
    for length in (1, 2, 10, 101):
        folder = tmp_path_factory.mktemp(f"list of {length}")
        (folder / "val").symlink_to(few_digits / "val")
        (folder / "val_list.txt").write_text("".join(lines[:length]))
        folders.append(folder)
    return folders


def evaluate(ranks, weights, combinations, output):
    """The scores of each (folder, batch size, workers), by a run of so many ranks."""
    code = f"import sys; from ranks import launch; sys.exit(launch.run({ranks}, 0, sys.argv[1:]))"
    words = [CONFIG, weights, output, json.dumps(combinations), *flatten(SMALL)]
    ranks_command = [sys.executable, "-c", EVALUATIONS, *words]
    run_preloaded([sys.executable, "-c", code, *ranks_command], cwd=ROOT).check()
    return json.loads((output / "results.json").read_text())


def test_evaluation_is_the_same_for_any_ranks_batches_and_workers(lists, trained, tmp_path):
    combinations = [
        (str(folder), batch, workers)
        for folder in lists
        for batch, workers in ((1, 0), (7, 1), (64, 3), (64, 0), (7, 2))
    ]
    expected = None
    for ranks in (1, 2, 3):  # three ranks are more than there are images in two of the lists
        output = tmp_path / str(ranks)
        output.mkdir()
        scores = evaluate(ranks, trained / "best.pdparams", combinations, output)
        expected = expected or scores
        for (folder, *_), score, reference in zip(combinations, scores, expected):
            one_batch = expected[combinations.index((folder, 64, 0))]
            for key in ("acc1", "acc5", "images"):
                assert score[key] == reference[key] == one_batch[key], (ranks, folder, key)
            assert score["loss"] == pytest.approx(one_batch["loss"], abs=1e-6)
    assert [score["images"] for score in expected[::5]] == [1, 2, 10, 101]


def test_training_is_bit_identical_with_any_number_of_workers_and_when_repeated(
    few_digits, tmp_path
):
    trees = []
    for number, workers in enumerate((0, 0, 1, 3)):
        output = tmp_path / str(number)
        run_program(
            "-data_path", few_digits, "-output", output, "-num_workers", workers,
            opts={**SMALL, "TRAIN.NUM_EPOCHS": 1},
        ).check()  # fmt: skip
        (path,) = output.glob("train-*/last.pdparams")
        trees.append(pdparams.read(path, require_checksum=True))
    for tree in trees[1:]:
        for key in ("model", "model_ema", "optimizer", "best", "step"):
            assert same(tree[key], trees[0][key]), key


def test_recomputation_on_two_ranks_gives_the_same_bits(trained, few_digits, tmp_path):
    opts = {**SMALL, "TRAIN.RECOMPUTE": True}
    result = run_program("-data_path", few_digits, "-output", tmp_path, "-nprocs", 2, opts=opts)
    if paddle.__version__.startswith("2."):
        result.refused(2, "TRAIN.RECOMPUTE", "take Paddle 3")
        return
    result.check()
    (folder,) = tmp_path.glob("train-*")
    states = [pdparams.read(path / "last.pdparams") for path in (trained, folder)]
    assert same(states[0]["model"], states[1]["model"])
    assert same(states[0]["optimizer"], states[1]["optimizer"])
