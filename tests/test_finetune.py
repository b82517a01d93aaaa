"""Fine-tuning: pretrained weights help; layer decay and a frozen body, through a resume too."""

import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from program import ROOT, SMALL, metrics, run, run_program, same

from tools import common
from config import get_config
from demo import finetune_demo
from demo.make_digits import read_digits
from training import optim
from training.resume import Start
from training.run import Run, build_model
from weights import checkpoint, pdparams

TOOL = ROOT / "demo" / "finetune_demo.py"
# A run with all that is random, and no steps at a learning rate of 0.
OPTS = {**SMALL, "TRAIN.ACCUM_ITER": 1, "TRAIN.NUM_EPOCHS": 2, "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.LAYER_DECAY": 0.5}  # fmt: skip


def demo(*words):
    return common.run(finetune_demo.build_parser(), finetune_demo.work, list(map(str, words)))


def last(output):
    (folder,) = output.glob("train-*")
    return pdparams.read(folder / "last.pdparams")


@pytest.fixture
def weights(trained):
    return trained / "best_weights.pdparams"


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_fine_tuning_has_the_same_bits(few_digits, weights, tmp_path, frozen):
    opts = {**OPTS, "TRAIN.FREEZE_BACKBONE": frozen}
    words = ["-data_path", few_digits, "-pretrained", weights, "-num_classes", 11, "-nprocs", 2]
    whole = run_program(*words, "-output", tmp_path / "whole", opts=opts).check()
    assert "the head starts anew" in whole.out + whole.err
    (first,) = (tmp_path / "whole").glob("train-*/Epoch-1.pdparams")
    again = tmp_path / "again"
    run_program(*words, "-output", again, "-resume", first, opts=opts).check()
    expected, found = last(tmp_path / "whole"), last(again)
    for part in ("model", "model_ema", "optimizer", "step"):
        assert same(found[part], expected[part]), part
    start = pdparams.read(weights)
    moved = {name for name in start if not np.array_equal(start[name], expected["model"][name])}
    head = {"head.weight", "head.bias"}
    assert moved == (head if frozen else set(start))
    moments = {name for name in expected["optimizer"] if "moment1" in name}
    assert moments == {f"{name}.moment1" for name in moved}


def test_a_frozen_model_has_no_dropout_and_only_its_head_gets_gradients():
    config = get_config(ROOT / "configs" / "gmlp_digits.yaml")
    config.MODEL.DROPOUT, config.MODEL.DROPPATH = 0.5, 0.5
    config.TRAIN.FREEZE_BACKBONE = True
    model = build_model(config)
    model.train()
    images = paddle.randn([4, 3, 28, 28])
    features = model.forward_features(images).numpy()
    model(images).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "head.weight", "head.bias"}  # fmt: skip
    model.eval()
    assert np.array_equal(model.forward_features(images).numpy(), features)
    assert (config.MODEL.DROPOUT, config.MODEL.DROPPATH) == (0.5, 0.5)
    config.TRAIN.FREEZE_BACKBONE = False
    model = build_model(config)
    model.train()
    assert not any(param.stop_gradient for param in model.parameters())
    assert not np.array_equal(model.forward_features(images).numpy(),
                              model.forward_features(images).numpy())  # fmt: skip


def test_freezing_without_pretrained_weights_is_warned_of():
    config = get_config()
    for frozen, start, count in ((True, Start(), 1), (False, Start(), 0), (True, Start("a"), 0)):
        config.TRAIN.FREEZE_BACKBONE = frozen
        parts = SimpleNamespace(config=config, start=start, warnings=[])
        Run._load_pretrained(parts)
        assert len(parts.warnings) == count
        assert all("FREEZE_BACKBONE without -pretrained" in line for line in parts.warnings)


def train_epoch(model, digits, labels):
    """One epoch on the training digits of some labels.  Returns Acc@1 in percent on the others."""
    images, numbers = digits
    split = {name: np.concatenate([np.flatnonzero(numbers == label)[part] for label in labels])
             for name, part in (("train", slice(100)), ("val", slice(400, None)))}  # fmt: skip
    config = get_config(ROOT / "configs" / "gmlp_digits_finetune.yaml")
    schedule = optim.build_schedule(lambda step: 4e-3)
    optimizer = optim.build_optimizer(config, model, schedule)
    model.train()
    for batch in np.random.default_rng(0).permutation(split["train"]).reshape(-1, 20):
        targets = paddle.to_tensor(numbers[batch])
        F.cross_entropy(model(paddle.to_tensor(images[batch])), targets).backward()
        optimizer.step()
        optimizer.clear_grad()
    model.eval()
    with paddle.no_grad():
        found = model(paddle.to_tensor(images[split["val"]])).argmax(1).numpy()
    return 100 * float(np.mean(found == numbers[split["val"]]))


def test_one_epoch_from_weights_for_other_digits_beats_one_from_scratch():
    images, labels = read_digits()
    gray = (images[:, None].astype("float32") / 255 - 0.5) / 0.5
    digits = np.repeat(gray, 3, 1), labels
    config = get_config(ROOT / "configs" / "gmlp_digits_finetune.yaml")
    paddle.seed(0)
    config.MODEL.NUM_CLASSES = 5
    config.MODEL.MIXER.EMBED_DIM, config.MODEL.MIXER.DEPTH = 48, 2
    pretrained = build_model(config)
    for _ in range(5):
        acc1 = train_epoch(pretrained, digits, range(5))
    assert acc1 > 85
    config.MODEL.NUM_CLASSES = 10
    weights = {name: value.numpy() for name, value in pretrained.state_dict().items()}
    scratch, finetuned = build_model(config), build_model(config)
    assert checkpoint.assign_weights(finetuned, weights, "0-4", allow_new_head=True)
    scores = [train_epoch(model, digits, range(5, 10)) for model in (scratch, finetuned)]
    assert scores[1] > scores[0] + 10, scores


# --- the demo ---


@pytest.mark.slow
def test_the_demos_fine_tuning_is_better_after_one_epoch_than_from_scratch(tmp_path, capsys):
    output = tmp_path / "a folder"
    assert demo("-output", output, "-epochs", 1, "-pretrain_epochs", 3) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].split() == ["epoch", "scratch", "finetuned", "frozen"]
    scratch, finetuned, frozen = map(float, printed[-1].split()[1:])
    assert finetuned >= scratch + 15, printed
    assert frozen >= scratch + 5, printed
    commands = [line for line in printed if line.startswith("python main_multi_gpu.py")]
    assert len(commands) == 4 and sum("-pretrained" in line for line in commands) == 2
    (folder,) = (output / "finetuned").glob("train-*")
    rows = metrics(folder, "eval")
    assert [(row["images"], f"{row['acc1']:.2f}") for row in rows] == [(500, f"{finetuned:.2f}")]
    for name, labels in (("digits_0-4", "01234"), ("digits_5-9", "56789")):
        for split, count in (("train", 2000), ("val", 500)):
            lines = (output / name / f"{split}_list.txt").read_text().splitlines()
            assert len(lines) == count and {line[-1] for line in lines} == set(labels)


def test_the_demo_is_asked_wrongly(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, part in (
        (["-output", tmp_path / "full"], "full: there are files in it already"),
        (["-output", tmp_path / "full" / "file"], "this is no folder"),
        (["-output", tmp_path / "new", "-epochs", 0], "-epochs is 0"),
        (["-output", tmp_path / "new", "-pretrain_epochs", -1], "-pretrain_epochs is -1"),
        (["-output", tmp_path / "new", "-seed", -1], "-seed is -1"),
        (["-output", tmp_path / "full" / "file" / "new"], "Not a directory"),
    ):
        assert demo(*words) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_a_run_that_fails_is_one_sentence_and_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_demo, "_CONFIG", "configs/gone.yaml")
    monkeypatch.setattr(finetune_demo, "make_lists", lambda output: output.mkdir())
    assert demo("-output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "pretrained.txt: the run ended with exit status 2" in error and error.count("\n") == 1


def test_the_demo_answers_help_and_wrong_flags_without_paddle(tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('Paddle was imported')")
    path = {"PYTHONPATH": str(tmp_path)}
    text = run([sys.executable, TOOL, "-h"], **path).check().out
    for flag in ("-output", "-epochs", "-pretrain_epochs", "-seed"):
        assert flag in text
    run([sys.executable, TOOL, "-rate", 3], **path).refused(2, "unrecognized arguments: -rate")
