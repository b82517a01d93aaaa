"""The program as its users run it: real processes, real images, real files."""

import fcntl
import json
import os
import pickle
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import paddle
import pytest
from devices import GPUS
from processes import (
    HANG_SECONDS,
    batches_in_shared_memory,
    session_exists,
    wait_for,
    wait_until_no_batches_but,
)
from program import (
    CONFIG,
    ROOT,
    SMALL,
    flatten,
    metrics,
    run,
    run_as_rank,
    run_preloaded,
    run_program,
    same,
    start_program,
)

import main_multi_gpu
from config import get_config
from gmlp import build_gmlp
from ranks.report import REPORT_PIPE
from training import moments
from weights import checkpoint, pdparams


def evaluate(data, output, weights, *args, **kwargs):
    """eval.json of an evaluation of the small model."""
    opts = {**SMALL, **kwargs.pop("opts", {})}
    result = run_program(
        "-data_path",
        data,
        "-output",
        output,
        "-eval",
        "-pretrained",
        weights,
        *args,
        opts=opts,
        **kwargs,
    ).check()
    (path,) = output.glob("eval-*/eval.json")
    return json.loads(path.read_text()), result


def test_a_run_leaves_the_files_that_the_readme_names(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "log.txt", "log_0.txt", "log_1.txt", "metrics.jsonl",
        "Epoch-1.pdparams", "Epoch-2.pdparams", "last.pdparams", "best.pdparams",
        "best_weights.pdparams", "previous.pdparams",
    }  # fmt: skip
    assert get_config(trained / "config.yaml").MODEL.MIXER.EMBED_DIM == 16
    log = (trained / "log.txt").read_text()
    for part in (f"paddle {paddle.__version__}", "2 rank(s)", "60 images per step",
                 "4 steps per epoch", "parameters", "EMBED_DIM: 16", "git revision",
                 "learning rate"):  # fmt: skip
        assert part in log, part
    rows = metrics(trained, "eval")
    assert [(row["epoch"], row["weights"]) for row in rows] == [
        (1, "model"), (1, "ema"), (2, "model"), (2, "ema"),
    ]  # fmt: skip
    assert all(row["images"] == 101 for row in rows)


def test_every_rank_trains_on_full_batches_and_the_last_group_is_shorter(trained):
    rows = metrics(trained, "train")
    # 203 images / (2 ranks x 10) are 10 batches, in groups of 3, 3, 3 and 1: 4 steps an epoch.
    assert [(row["epoch"], row["batch"], row["step"]) for row in rows] == [
        (1, 4, 1), (1, 8, 2), (1, 10, 4), (2, 4, 5), (2, 8, 6), (2, 10, 8),
    ]  # fmt: skip
    config = get_config(trained / "config.yaml")
    base = config.TRAIN.BASE_LR * 60 / config.TRAIN.LINEAR_SCALED_LR
    assert rows[2]["lr"] == pytest.approx(base)  # one epoch of warm-up
    assert rows[-1]["lr"] == pytest.approx(config.TRAIN.END_LR * 60 / config.TRAIN.LINEAR_SCALED_LR)


def test_evaluation_gives_what_training_reported_on_any_number_of_ranks(
    trained, few_digits, tmp_path
):
    reported = max(metrics(trained, "eval"), key=lambda row: (row["weights"] == "ema", row["acc1"]))
    results = []
    for ranks, batch in ((1, 7), (3, 1)):
        scores, result = evaluate(
            few_digits, tmp_path / str(ranks), trained / "best.pdparams", "-nprocs", ranks,
            "-batch_size_eval", batch,
        )  # fmt: skip
        assert f"Acc@1 {reported['acc1']:.2f}" in result.out
        assert scores["images"] == 101
        assert scores["weights_sha256"] == pdparams.sha256(trained / "best.pdparams")
        results.append(scores)
    for scores in results:
        assert (scores["acc1"], scores["acc5"]) == (reported["acc1"], reported["acc5"])
        assert scores["loss"] == pytest.approx(reported["loss"], abs=1e-6)


def test_bare_best_weights_load_with_paddle_load(trained, few_digits, tmp_path):
    config = get_config(trained / "config.yaml")
    model = build_gmlp(config)
    missing, unexpected = model.set_state_dict(paddle.load(str(trained / "best_weights.pdparams")))
    assert not missing and not unexpected
    weights = checkpoint.load_weights(trained / "best.pdparams")
    assert same(weights, {k: v.numpy() for k, v in model.state_dict().items()})


def test_a_resumed_run_ends_bit_identical_to_one_that_was_never_stopped(
    trained, few_digits, tmp_path
):
    run_program(
        "-data_path", few_digits, "-output", tmp_path, "-nprocs", 2,
        "-resume", trained / "Epoch-1.pdparams", opts=SMALL,
    ).check()  # fmt: skip
    (folder,) = tmp_path.glob("train-*")
    assert not (folder / "Epoch-1.pdparams").exists()
    straight, resumed = (pdparams.read(f / "Epoch-2.pdparams") for f in (trained, folder))
    assert straight["step"] == 8
    for key in ("model", "model_ema", "optimizer", "step", "lr_scheduler"):
        assert same(straight[key], resumed[key]), key


def test_resume_auto_goes_on_in_the_same_folder_or_starts_fresh(few_digits, tmp_path):
    args = ("-data_path", few_digits, "-output", tmp_path, "-resume", "auto")
    fresh = run_program(*args, opts={**SMALL, "TRAIN.NUM_EPOCHS": 1}).check()
    assert "starting fresh" in fresh.out
    again = run_program(*args, opts=SMALL).check()
    assert "going on with epoch 2" in again.out
    (folder,) = tmp_path.glob("train-*")
    assert (folder / "Epoch-2.pdparams").exists()
    assert (folder / "log.txt").read_text().count("parameters") == 2  # appended
    assert get_config(folder / "config.yaml").MODEL.RESUME is None  # so that it evaluates
    # A checkpoint that is cut off is passed over for the one before, with a warning.
    for name in ("Epoch-2.pdparams", "last.pdparams", "best.pdparams"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data[:-100])
    repeated = run_program(*args, opts=SMALL).check()
    assert "passed over" in repeated.out and "going on with epoch 2" in repeated.out


def test_two_ranks_that_accumulate_do_what_one_rank_does(few_digits, tmp_path):
    plain = {
        **SMALL, "TRAIN.NUM_EPOCHS": 1, "MODEL.DROPOUT": 0.0, "MODEL.DROPPATH": 0.0,
        "TRAIN.RAND_AUGMENT": False, "TRAIN.MIXUP_PROB": 0.0, "TRAIN.RANDOM_ERASE_PROB": 0.0,
        # Adam divides by the gradient's size: without a large epsilon rounding decides its signs.
        "TRAIN.OPTIMIZER.EPS": 1.0,
    }  # fmt: skip
    weights = []
    for ranks, batch in ((1, 20), (2, 10)):
        output = tmp_path / str(ranks)
        run_program(
            "-data_path", few_digits, "-output", output, "-nprocs", ranks, "-batch_size", batch,
            opts={**plain, "DATA.BATCH_SIZE": batch},
        ).check()  # fmt: skip
        (path,) = output.glob("train-*/last.pdparams")
        weights.append(pdparams.read(path)["model"])
    one, two = weights
    assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-6


def test_another_batch_size_goes_on_at_the_same_epoch_with_a_warning(trained, few_digits, tmp_path):
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path,
        "-resume", trained / "Epoch-1.pdparams",
        opts={**SMALL, "DATA.BATCH_SIZE": 50, "TRAIN.MIXUP_ALPHA": 0.2},
    ).check()  # fmt: skip
    assert "made with ranks 2 (now 1), threads 1 (now" in result.out
    assert (
        "batch_size 10 (now 50), TRAIN.MIXUP_ALPHA 0.8 (now 0.2): going on at the same"
        in result.out
    )
    (folder,) = tmp_path.glob("train-*")
    # 203 images in batches of 50 are 4 batches and, 3 accumulated, 2 steps an epoch.
    assert [row["step"] for row in metrics(folder, "train")] == [4]
    assert (folder / "best_weights.pdparams").exists()


def test_resume_auto_refuses_another_number_of_classes(trained, few_digits, tmp_path):
    (tmp_path / "train-other").mkdir()
    (tmp_path / "train-other" / "last.pdparams").symlink_to(trained / "last.pdparams")
    (tmp_path / "train-other" / "gone.pdparams").symlink_to("/nowhere")
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path, "-resume", "auto", "-num_classes", 11,
        opts={**SMALL, "TRAIN.NUM_EPOCHS": 1},
    )  # fmt: skip
    result.refused(2, "last.pdparams", "head.weight is [16, 10], wanted [16, 11]")


def test_evaluation_of_weights_with_a_nan_says_so(trained, few_digits, tmp_path):
    weights = {**pdparams.read(trained / "best_weights.pdparams")}
    weights["norm.weight"] = np.full(16, np.nan, "float32")
    pdparams.write(tmp_path / "nan.pdparams", weights)
    scores, result = evaluate(few_digits, tmp_path, tmp_path / "nan.pdparams")
    assert scores["acc1"] == 0 and scores["loss"] is None and "loss nan" in result.out


def as_paddlevit_saves_it(path, source):
    """A checkpoint as PaddleViT's program would have written it; the names are this process's."""
    model, average = (build_gmlp(get_config(source.parent / "config.yaml")) for _ in "ab")
    tree = pdparams.read(source)
    checkpoint.assign_weights(model, tree["model"], source)
    checkpoint.assign_weights(average, tree["model_ema"], source)
    scheduler = paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10)
    optimizer = paddle.optimizer.AdamW(scheduler, parameters=model.parameters())
    assert moments.restore_optimizer(optimizer, model, tree["optimizer"]) == ([], [])
    assert f"{model.head.weight.name}_moment1_0" in optimizer.state_dict()
    tree = {
        "model": model.state_dict(),
        "model_ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": tree["epoch"],
        "lr_scheduler": scheduler.state_dict(),
        "amp_grad_scaler": {},
    }
    paddle.save(tree, str(path))


def test_a_run_of_paddlevit_that_goes_on_here_ends_with_the_bits_of_one_that_was_always_here(
    trained, few_digits, tmp_path
):
    as_paddlevit_saves_it(tmp_path / "vit.pdparams", trained / "Epoch-1.pdparams")
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path, "-nprocs", 2,
        "-resume", tmp_path / "vit.pdparams", opts=SMALL,
    ).check()  # fmt: skip
    assert "AdamW's state of 26 of 26 parameters is taken over" in result.out
    assert "starts fresh" not in result.out and "no averaged weights" not in result.out
    assert "epoch 2/2" in result.out and "epoch 1/2" not in result.out
    (folder,) = tmp_path.glob("train-*")
    straight, resumed = (pdparams.read(f / "Epoch-2.pdparams") for f in (trained, folder))
    for key in ("model", "model_ema", "optimizer", "step", "lr_scheduler"):
        assert same(straight[key], resumed[key]), key


def test_last_epoch_counts_epochs_as_done(trained, few_digits, tmp_path):
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path, "-last_epoch", 1, "-pretrained",
        trained / "best_weights.pdparams", opts=SMALL,
    ).check()  # fmt: skip
    assert "epoch 2/2" in result.out and "epoch 1/2" not in result.out


def test_training_takes_weights_with_another_head_and_evaluation_refuses_them(
    trained, few_digits, tmp_path
):
    weights = ("-pretrained", trained / "best_weights.pdparams", "-num_classes", 12)
    args = ("-data_path", few_digits, "-output", tmp_path, *weights)
    result = run_program(*args, opts={**SMALL, "TRAIN.NUM_EPOCHS": 1}).check()
    assert "the head starts anew" in result.out
    refused = run_program(*args, "-eval", opts=SMALL)
    refused.refused(2, "head.weight", "[16, 10]", "[16, 12]", "best_weights.pdparams")


def test_weights_of_another_model_are_refused_with_both_shapes(trained, few_digits, tmp_path):
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path, "-nprocs", 2, "-eval", "-pretrained",
        trained / "best_weights.pdparams",
    )  # fmt: skip
    result.refused(2, "patch_embed.patch_embed.weight", "[16, 3, 7, 7]", "[96, 3, 7, 7]")
    assert result.err.count("these are not this model's weights") == 1  # not once a rank


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("flags", [["-eval", "-pretrained"], ["-pretrained"], ["-resume"]])
def test_a_hostile_weight_file_runs_nothing(flags, few_digits, tmp_path):
    hostile, marker = tmp_path / "hostile.pdparams", tmp_path / "was here"
    hostile.write_bytes(pickle.dumps({"model": Shell(f"touch '{marker}'")}))
    result = run_program("-data_path", few_digits, "-output", tmp_path, *flags, hostile, opts=SMALL)
    result.refused(2, "hostile.pdparams", "system")
    assert not marker.exists()


def test_it_runs_under_paddles_own_launcher(trained, few_digits, tmp_path):
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", 2, "--backend", "gloo",
                "--log_dir", tmp_path / "launch"]  # fmt: skip
    scores, _ = evaluate(few_digits, tmp_path, trained / "best.pdparams", launcher=launcher)
    reported = max(metrics(trained, "eval"), key=lambda row: (row["weights"] == "ema", row["acc1"]))
    assert scores["acc1"] == reported["acc1"]


@pytest.mark.skipif(GPUS > 0, reason="this machine has GPUs")
def test_a_cpu_says_that_it_has_no_amp_and_no_gpu(trained, few_digits, tmp_path):
    _, result = evaluate(
        few_digits, tmp_path, trained / "best.pdparams", "-amp", CUDA_VISIBLE_DEVICES="0,1"
    )
    assert "CUDA_VISIBLE_DEVICES names 0,1" in result.out + result.err
    assert "running float32" in result.out


def test_without_a_model_it_is_asked_for_with_the_files_there_are(monkeypatch, capsys):
    monkeypatch.setattr(main_multi_gpu.launch, "run", lambda *args: 0)
    assert main_multi_gpu.main(["-data_path", "x"]) == 2
    assert "configs/gmlp_s16_224.yaml, " in capsys.readouterr().err
    sizes = ["MODEL.MIXER.EMBED_DIM", "64", "MODEL.MIXER.DEPTH", "2"]
    assert main_multi_gpu.main(["-data_path", "x", "-opts", *sizes]) == 0


def test_a_config_that_can_be_read_only_once_is_refused(capsys):
    reader, writer = os.pipe()
    os.write(writer, b"SEED: 1\n")
    os.close(writer)
    assert main_multi_gpu.main(["-cfg", f"/dev/fd/{reader}"]) == 2
    assert f"-cfg /dev/fd/{reader} can be read once" in capsys.readouterr().err
    os.close(reader)


def test_nprocs_under_another_launcher_is_said_not_to_count(environment, monkeypatch, capsys):
    monkeypatch.setattr(main_multi_gpu, "run_rank", lambda config: 0)
    monkeypatch.setattr(main_multi_gpu.launch, "run", lambda *args: 5)
    args, name = ["-cfg", str(CONFIG), "-nprocs", "1"], "PADDLE_TRAINER_ID"
    for value, status, said in (("0", 0, True), ("1", 0, False), ("", 5, False), ("x", 2, False)):
        environment(**{name: value}, PADDLE_TRAINERS_NUM="")
        assert main_multi_gpu.main(args) == status
        err = capsys.readouterr().err
        assert ("-nprocs 1 does not count" in err) == said
        assert (name in err) == (value in ("0", "x"))
    environment(**{name: "0", REPORT_PIPE: "9"})  # our launcher hands its flags on
    assert main_multi_gpu.main(args) == 0
    assert capsys.readouterr().err == ""


def test_the_console_gets_what_differs_and_the_log_has_every_setting(trained, few_digits, tmp_path):
    result = run_as_rank(
        "-data_path", few_digits, "-output", tmp_path, "-eval",
        "-pretrained", trained / "best_weights.pdparams",
        "-opts", *flatten({**SMALL, "MODEL.RESUME": "auto"}),  # of a file: it is for training
    ).check()  # fmt: skip
    (log,) = tmp_path.glob("eval-*/log.txt")
    assert "MODEL.MIXER.EMBED_DIM 16, " in result.out and "VALIDATE_FREQ" not in result.out
    assert "VALIDATE_FREQ: 1" in log.read_text()
    assert "HFLIP 0.0" in result.out and len(result.out.splitlines()) < 15


def test_no_arguments_print_the_usage():
    result = run([sys.executable, ROOT / "main_multi_gpu.py"])
    result.refused(2, "usage:", "-cfg")


@pytest.mark.parametrize(
    "args, parts",
    [
        (["-batchsize", "3"], ["unrecognized arguments: -batchsize"]),
        (["-cfg", "/nowhere.yaml"], ["/nowhere.yaml", "No such file"]),
        (["-data_path", "/nowhere"], ["/nowhere/val_list.txt", "cannot read"]),
        (["-dataset", "cifar10"], ["DATA.DATASET", "imagenet2012", "train_list.txt"]),
        (["-eval"], ["-eval needs -pretrained"]),
        (["-batch_size", "0"], ["DATA.BATCH_SIZE", "at least 1"]),
        (["-nprocs", "0"], ["-nprocs is 0, it must be at least 1"]),
        (["-opts", "TRAIN.BASELR", "1"], ["no key 'TRAIN.BASELR'; did you mean TRAIN.BASE_LR?"]),
        (["--data_path", "x"], ["--data_path x; did you mean -data_path?"]),
        (["--batch-size", "3"], ["did you mean -batch_size?"]),
        (["TRAIN.NUM_EPOCHS=3"], ["-opts TRAIN.NUM_EPOCHS 3"]),
        (["-opts", "TRAIN.NUM_EPOCHS=3"], ["write TRAIN.NUM_EPOCHS 3"]),
        (["-opts", "SEED", "1", "-resume", "auto"], ["-resume has to stand before -opts"]),
        (["-cfg", "gmlp_s16_224"], ["did you mean", "configs/gmlp_s16_224.yaml?"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_is_asked_wrongly_is_one_sentence_and_status_2(args, parts, few_digits, tmp_path):
    result = run_program("-data_path", few_digits, "-output", tmp_path, *args)
    result.refused(2, *parts)


@pytest.mark.parametrize(
    "args, parts",
    [
        (["-eval", "-pretrained", "/nowhere.pdparams"], ["/nowhere.pdparams does not exist"]),
        (["-eval", "-resume", "auto"], ["-eval goes with -pretrained FILE, not with -resume"]),
        (["-resume", "/nowhere.pdparams"], ["/nowhere.pdparams does not exist"]),
        (["-batch_size", "5000"], ["train_list.txt", "take -batch_size 203"]),
        (["-image_size", "30"], ["DATA.IMAGE_SIZE 30", "PATCH_SIZE 7"]),
        (["-num_classes", "3"], ["_list.txt:", "not in 0..2"]),
        (["-output", "/dev/null/x"], ["cannot make the output folder /dev/null/x/"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_only_a_rank_can_tell_is_one_sentence_and_status_2(args, parts, few_digits, tmp_path):
    run_as_rank("-data_path", few_digits, "-output", tmp_path, *args).refused(2, *parts)


def test_what_rank_0_refuses_is_one_sentence_without_what_the_others_say(few_digits):
    result = run_program("-data_path", few_digits, "-output", "/dev/null/x", "-nprocs", 2)
    result.refused(2, "cannot make the output folder /dev/null/x/", "rank 0 of 2 failed")
    assert result.err.count("\n") == 2


def test_an_unreadable_image_ends_the_run_with_its_list_line(trained, digits, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "val").symlink_to(digits / "val")
    first, *_ = (digits / "val_list.txt").read_text().splitlines()
    (tmp_path / "val_list.txt").write_text(f"{first}\na.png 1\n")
    for workers in (0, 1):
        result = run_program(
            "-data_path", tmp_path, "-output", tmp_path / "out", "-eval", "-nprocs", 2,
            "-num_workers", workers, "-pretrained", trained / "best_weights.pdparams", opts=SMALL,
        )  # fmt: skip
        result.refused(1, "val_list.txt:2", "a.png")


def test_flags_with_an_equals_sign_mean_the_same(trained, few_digits, tmp_path):
    result = run_program(
        f"-data_path={few_digits}", f"-output={tmp_path}", "-eval", "-batch_size=8", "-nprocs=1",
        f"-pretrained={trained / 'best_weights.pdparams'}", opts=SMALL,
    ).check()  # fmt: skip
    assert "on 101 images" in result.out


# Rank 0 comes to each barrier last, and rank 1 notices only long after rank 0 has gone on.
SLOW_RANK = """
import os, sys, time
from types import SimpleNamespace
sys.path.insert(0, {root!r})
from ranks import stop
barrier, sleep = stop.barrier, time.sleep
if os.environ["PADDLE_TRAINER_ID"] == "0":
    stop.barrier = lambda: (sleep(0.2), barrier())
else:
    stop.time = SimpleNamespace(sleep=lambda seconds: sleep(0.6))
import main_multi_gpu
sys.exit(main_multi_gpu.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_rank_that_is_slow_to_leave_is_waited_for(evaluates, trained, few_digits, tmp_path):
    words = ["-cfg", CONFIG, "-data_path", few_digits, "-output", tmp_path]
    words += ["-eval", "-pretrained", trained / "best.pdparams"] if evaluates else []
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 1, "TRAIN.MODEL_EMA": False, "VALIDATE_FREQ": 1}
    words += ["-opts", *flatten(opts)]
    rank = [sys.executable, "-c", SLOW_RANK.format(root=str(ROOT)), *words]
    code = "import sys; from ranks import launch; sys.exit(launch.run(2, 0, sys.argv[1:]))"
    run_preloaded([sys.executable, "-c", code, *rank], cwd=ROOT).check()


def test_ctrl_c_ends_every_process(few_digits, tmp_path):
    before = batches_in_shared_memory()
    process = start_program(
        few_digits, tmp_path, "-nprocs", 1, "-num_workers", 2, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("train-*/Epoch-1.pdparams")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in out
    wait_for(lambda: not session_exists(process.pid))
    wait_until_no_batches_but(before)


def test_a_terminal_shows_a_progress_bar(few_digits, tmp_path):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows, columns
    process = start_program(few_digits, tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""

    def bar_is_complete():
        nonlocal shown
        if select.select([main], [], [], 0)[0]:
            shown += os.read(main, 65536)
        return re.search(rb"epoch 2/300:.*\d+%.*loss \d.*lr \d.*images/s.*\d<", shown)

    def bar_fits():
        nonlocal shown
        if select.select([main], [], [], 0)[0]:
            shown += os.read(main, 65536)
        *_, last, _ = (shown.replace(b"\n", b"\r") + b"\r").rsplit(b"\r", 2)
        return (
            re.fullmatch(rb"epoch \d+/300: \d+%, loss \d\.\d+, lr \d.*", last) and len(last) <= 60
        )

    try:
        wait_for(bar_is_complete, process)
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        wait_for(bar_fits, process)  # what a person looks for is there in a narrow window too
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert b"batch 1/20: loss" not in shown  # those lines are in the log
    (log,) = tmp_path.glob("train-*/log.txt")
    assert "batch 1/20: loss" in log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
def test_a_small_shared_memory_is_said_with_its_cure(few_digits, tmp_path):
    mount = "mount -t tmpfs -o size=16k tmpfs /dev/shm"
    if run(["unshare", "-m", "sh", "-c", mount]).status:
        pytest.skip("this sandbox does not allow mounts")
    program = [sys.executable, ROOT / "main_multi_gpu.py", "-cfg", CONFIG,
               "-data_path", few_digits, "-output", tmp_path, "-num_workers", 2]  # fmt: skip
    words = " ".join(shlex.quote(str(word)) for word in program)
    result = run(["unshare", "-m", "sh", "-c", f"{mount} && exec {words}"], CUDA_VISIBLE_DEVICES="")
    result.refused(1, "/dev/shm", "--shm-size", "-num_workers 0")
