"""What goes wrong in a run of days, really done to it: kills, signals, full disks, damaged files.

The promise: at most one save interval is lost, one sentence says what happened, and what goes on
ends with the same bits as a run that nothing happened to.
"""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple, Optional

import numpy as np
import pytest
from processes import (
    HANG_SECONDS,
    batches_in_shared_memory,
    children_of,
    is_stopped,
    kill_all,
    processes_of,
    session_exists,
    wait_for,
    wait_until_no_batches_but,
)
from program import (
    CONFIG,
    ROOT,
    SMALL,
    flatten,
    folder_of,
    log_of,
    metrics,
    run,
    run_preloaded,
    run_program,
    same,
    start_program,
)

from training import state
from weights import checkpoint, pdparams

LONG = {**SMALL, "TRAIN.NUM_EPOCHS": 8}  # 32 optimizer steps of two ranks
EVERY_STEP = {**LONG, "SAVE_FREQ_STEPS": 1}


def checkpoint_of(output, name="last"):
    """What has to be the same bit for bit."""
    tree = pdparams.read(folder_of(output) / f"{name}.pdparams", require_checksum=True)
    kept = ("model", "model_ema", "optimizer", "epoch", "batch", "step", "lr_scheduler", "best")
    return {key: tree[key] for key in kept}


@pytest.fixture(scope="module")
def straight(few_digits, tmp_path_factory):
    """The last checkpoint of a run of LONG that nothing happened to."""
    output = tmp_path_factory.mktemp("straight")
    run_program("-data_path", few_digits, "-output", output, "-nprocs", 2, opts=LONG).check()
    return checkpoint_of(output)


def start(data, output, opts, *args, ranks=2, stdout=subprocess.PIPE):
    """A run that goes on where an earlier one in the same folder ended, in a session of its own."""
    return start_program(
        data, output, "-nprocs", ranks, "-resume", "auto", *args, opts=opts,
        stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def freeze_while_writing(output, process):
    """Stops the rank that writes a checkpoint, in the middle of it.

    A write lasts milliseconds and may be over before the signal is there: then the rank goes on,
    and the next write is waited for.
    """
    limit = time.monotonic() + HANG_SECONDS
    while True:
        assert process.poll() is None, "the program ended early"
        assert time.monotonic() < limit, "the program hangs"
        for path in temporary_files(output):
            writer = int(path.name.rsplit("-", 1)[1])
            with contextlib.suppress(ProcessLookupError):  # left by a run killed before
                os.kill(writer, signal.SIGSTOP)
                wait_for(lambda writer=writer: is_stopped(writer))
                if path.exists():
                    return
                os.kill(writer, signal.SIGCONT)


def temporary_files(output):
    return list(output.glob("train-*/.*.tmp-*"))


# --- stop and go on ---


def kill_again_and_again(data, output, count, draw):
    """Kills a run `count` times, each time some steps further on, once while it writes."""
    while_writing = draw.randrange(count)
    for number in range(count):
        enough = log_of(output).count("saved") + draw.randrange(1, 3)
        # A kill at any step is one at any distance from the last save.
        opts = {**LONG, "SAVE_FREQ_STEPS": draw.choice([1, 1, 3])}
        process = start(data, output, opts, "-num_workers", number % 2)
        wait_for(lambda enough=enough: log_of(output).count("saved") >= enough, process)
        if number == while_writing:
            freeze_while_writing(output, process)
        else:
            time.sleep(draw.random() / 4)
        assert process.poll() is None, "the run was over before it could be killed"
        kill_all(process)
        if number == while_writing:
            newest = max(output.glob("train-*/*.pdparams"), key=lambda path: path.stat().st_mtime)
            pdparams.read(newest, require_checksum=True)
    return start(data, output, EVERY_STEP).communicate(timeout=HANG_SECONDS)[0]


def test_a_run_killed_at_any_step_ends_with_the_bits_of_one_never_killed(
    straight, few_digits, tmp_path
):
    out = kill_again_and_again(few_digits, tmp_path, 3, random.Random(0))
    assert re.search(r"going on with (the end of )?epoch \d+", out), out
    assert "not bit for bit" not in out
    assert same(checkpoint_of(tmp_path), straight)
    assert not temporary_files(tmp_path)  # what the kill in the middle of writing left


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_very_often_ends_with_the_bits_of_one_never_killed(
    straight, few_digits, tmp_path, seed
):
    kill_again_and_again(few_digits, tmp_path, 10, random.Random(seed))
    assert same(checkpoint_of(tmp_path), straight)


@pytest.mark.parametrize(
    "number, status",
    [
        (signal.SIGTERM, 143),
        (signal.SIGUSR1, 138),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          ((signal.SIGINT, 130), (signal.SIGUSR2, 140), (signal.SIGHUP, 129))),
    ],
)  # fmt: skip
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    number, status, straight, few_digits, tmp_path
):
    reports = random.Random(int(number)).randrange(40)  # of 80
    before = batches_in_shared_memory()
    process = start(few_digits, tmp_path, {**LONG, "REPORT_FREQ": 1}, "-num_workers", 1)
    wait_for(lambda: log_of(tmp_path).count("images/s") > reports, process)
    if number in (signal.SIGUSR1, signal.SIGUSR2):  # as a scheduler does, to loader workers too
        for pid in processes_of(process.pid):
            os.kill(pid, number)
    else:
        os.killpg(process.pid, number)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    *_, saved = re.findall(r"saved last\.pdparams.* \((.*)\)", out)
    assert f"stopped as asked after {saved}; to go on: cd " in out
    assert "Traceback" not in out and "rank 0" not in out
    assert not session_exists(process.pid)
    wait_until_no_batches_but(before)
    (command,) = re.findall("to go on: cd (.*)", out)
    folder, _, *words = shlex.split(command)
    words = [word for word in words if not re.match("[A-Z_]+=", word)]
    result = run_preloaded(words, cwd=folder).check()  # as pasted
    assert "going on with" in result.out and "not bit for bit" not in result.out
    assert same(checkpoint_of(tmp_path), straight)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_alone_ends_all_of_them_at_the_same_step(ranks, few_digits, tmp_path):
    process = start(few_digits, tmp_path, LONG, ranks=ranks)
    wait_for(lambda: "batch 4/" in log_of(tmp_path), process)
    os.kill(children_of(process.pid)[-1], signal.SIGTERM)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143, out
    assert "stopped as asked after" in out and "saved last.pdparams" in out


# --- when a part dies ---


class Moment(NamedTuple):
    """When to strike: at the log line `seen`, or in a write; `missing` is not logged after it."""

    seen: Optional[str]
    missing: Optional[str]

    def wait(self, output, process):
        if self.seen is None:
            freeze_while_writing(output, process)
        else:
            wait_for(lambda: self.seen in log_of(output), process)


MOMENTS = {
    "step": Moment("batch 4/", "epoch 1/8: loss"),
    "validation": Moment("epoch 1/8: loss", "epoch 1 ema: Acc@1"),
    "save": Moment(None, None),  # of whichever epoch's write could be frozen
}
# Hundreds of batches in an epoch and in a validation, so that a kill hits where it is meant to.
SLOW = {**LONG, "REPORT_FREQ": 1, "DATA.BATCH_SIZE_EVAL": 1}


@pytest.mark.parametrize(
    "moment, victim",
    [
        ("step", 1),
        ("validation", 0),
        ("save", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          (("step", 0), ("validation", 1), ("save", 1))),
    ],
)  # fmt: skip
def test_a_killed_rank_ends_the_run_and_leaves_nothing(
    moment, victim, digits, few_digits, tmp_path
):
    data, before = few_digits if moment == "save" else digits, batches_in_shared_memory()
    process = start(data, tmp_path, SLOW, "-num_workers", 1)
    MOMENTS[moment].wait(tmp_path, process)
    saved = log_of(tmp_path).count("saved")
    os.kill(children_of(process.pid)[victim], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 137, out
    log = folder_of(tmp_path) / f"log_{victim}.txt"
    assert f"rank {victim} of 2 failed (SIGKILL); its log is {log}; the other" in out
    if moment == "save":
        assert log_of(tmp_path).count("saved") == saved
    else:
        assert MOMENTS[moment].missing not in out
    assert not session_exists(process.pid)
    assert not temporary_files(tmp_path)
    wait_until_no_batches_but(before)


@pytest.mark.parametrize("moment", ["step", pytest.param("validation", marks=pytest.mark.slow)])
def test_a_killed_loader_worker_ends_the_run_and_leaves_nothing(moment, digits, tmp_path):
    before = batches_in_shared_memory()
    process = start(digits, tmp_path, SLOW, "-num_workers", 2)
    MOMENTS[moment].wait(tmp_path, process)
    rank = children_of(process.pid)[1]
    wait_for(lambda: children_of(rank), process)  # rank 0 may be ahead
    os.kill(children_of(rank)[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "a loader worker died" in out and "Traceback" not in out
    assert f"rank 1 of 2 failed (exit status 1); its log is {folder_of(tmp_path)}/log_1.txt" in out
    assert "a loader worker died" in (folder_of(tmp_path) / "log_1.txt").read_text()
    assert not session_exists(process.pid)
    wait_until_no_batches_but(before)


@pytest.mark.parametrize(
    "rate, reason",
    [(1e30, "the loss is (nan|inf) in epoch 1, at batch 8"), (4e39, "a weight is not a finite")],
)
def test_numbers_that_are_not_finite_end_the_run_and_are_not_saved(
    rate, reason, few_digits, tmp_path
):
    opts = {**EVERY_STEP, "TRAIN.BASE_LR": rate, "TRAIN.GRAD_CLIP": None, "REPORT_FREQ": 4}
    opts["TRAIN.MIXUP_PROB"] = 0.0
    result = run_program("-data_path", few_digits, "-output", tmp_path, "-nprocs", 2, opts=opts)
    last = folder_of(tmp_path) / "last.pdparams"
    result.refused(1, "optimizer step ", "learning rate ", f"last good checkpoint: {last}")
    assert re.search(reason, result.err), result.err
    for path in folder_of(tmp_path).glob("*.pdparams"):
        weights = pdparams.read(path)["model"]
        assert all(np.isfinite(value).all() for value in weights.values()), path


def memory_and_files(pid):
    """(resident memory in MB, open files) of a process."""
    with open(f"/proc/{pid}/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("steps", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_and_open_files_stay_flat(steps, few_digits, tmp_path):
    epochs = steps // 20
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": epochs, "TRAIN.ACCUM_ITER": 1, "SAVE_FREQ_STEPS": 7}
    opts["KEEP_LAST"] = 2
    quiet = subprocess.DEVNULL  # it prints more than a pipe holds
    process = start(few_digits, tmp_path, opts, "-num_workers", 1, ranks=1, stdout=quiet)
    wait_for(lambda: "batch 4/" in log_of(tmp_path), process)
    (rank,) = children_of(process.pid)
    base = memory_and_files(rank)
    measured = []  # (seconds, epochs done, MB, open files)
    while process.poll() is None:
        done = len(re.findall(r"epoch \d+/\d+: loss", log_of(tmp_path)))
        with contextlib.suppress(OSError):
            measured.append((time.monotonic(), done, *memory_and_files(rank)))
        time.sleep(0.1)
    assert process.returncode == 0, log_of(tmp_path)
    for now, done, _, files in measured:
        # Paddle keeps a thread and 4 pipes of a loader, of which an epoch has 3, for 5 seconds.
        lately = done + 2 - min(epoch for then, epoch, *_ in measured if then > now - 6)
        assert files <= base[1] + 12 * lately, (done, lately, files)
    memory = [memory for _, done, memory, _ in measured if done > 5]
    half = len(memory) // 2
    assert max(memory[half:]) < max(memory[:half]) + 8, memory


# --- two runs at once ---


def test_a_second_run_does_not_go_on_in_the_folder_of_one_that_runs(few_digits, tmp_path):
    opts = {**EVERY_STEP, "TRAIN.NUM_EPOCHS": 300}
    first = start(few_digits, tmp_path, opts, ranks=1, stdout=subprocess.DEVNULL)
    wait_for(lambda: "saved" in log_of(tmp_path), first)
    folder = folder_of(tmp_path)
    before = (folder / "log.txt").read_text()
    data = ("-data_path", few_digits, "-output", tmp_path)
    second = run_program(*data, "-resume", "auto", opts=LONG)
    second.refused(2, f"{folder}: another run is writing there", "-output")
    assert first.poll() is None
    fresh = run_program(*data, opts={**LONG, "TRAIN.NUM_EPOCHS": 1}).check()
    assert not fresh.out.rstrip().endswith(str(folder))
    first.terminate()
    assert first.wait(HANG_SECONDS) == 143
    log = (folder / "log.txt").read_text()
    assert log.startswith(before) and log.count("parameters") == 1


# A run that ends saves once more between another one's search for checkpoints and its lock.
SAVED_MEANWHILE = """
import shutil, sys
import utils
own_lock, newer = utils.lock, sys.argv.pop()
def lock(path):
    shutil.copy2(newer, path.replace("log.txt", "last.pdparams"))
    return own_lock(path)
utils.lock = lock
import main_multi_gpu
sys.exit(main_multi_gpu.main(sys.argv[1:]))
"""


def test_a_checkpoint_that_came_while_the_folder_was_taken_is_the_one_to_go_on_from(
    few_digits, tmp_path
):
    out = tmp_path / "out"
    args = ["-cfg", CONFIG, "-data_path", few_digits, "-output", out]
    run_program(*args[2:], opts={**LONG, "TRAIN.NUM_EPOCHS": 2}).check()
    folder = folder_of(out)
    newer = shutil.move(folder / "last.pdparams", tmp_path / "newer")
    for name in ("Epoch-2", "best"):
        (folder / f"{name}.pdparams").unlink(missing_ok=True)
    shutil.copy(folder / "Epoch-1.pdparams", folder / "last.pdparams")
    result = run(
        [sys.executable, "-c", SAVED_MEANWHILE, *args, "-resume", "auto", "-opts",
         *flatten({**LONG, "TRAIN.NUM_EPOCHS": 2}), newer],
        cwd=ROOT, PADDLE_TRAINER_ID="0", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=None,
    ).check()  # fmt: skip
    assert "going on with epoch 3" in result.out and "epoch 2/2" not in result.out


# --- going on with something else ---


@pytest.fixture(scope="module")
def stopped(few_digits, tmp_path_factory):
    """The folder of a two-rank run that was killed after 6 of 10 batches of its second epoch."""
    output = tmp_path_factory.mktemp("stopped")
    process = start(few_digits, output, {**LONG, "SAVE_FREQ_STEPS": 6})
    wait_for(lambda: "saved last.pdparams (epoch 2, batch 6/10, step 6)" in log_of(output), process)
    kill_all(process)
    # Later ones may have been written before the kill came.
    for name in ("last", "previous"):
        tree = pdparams.read(folder_of(output) / f"{name}.pdparams")
        if (tree["epoch"], tree["batch"]) == (1, 6):
            return folder_of(output) / f"{name}.pdparams"
    raise AssertionError("the kill came too late")


@pytest.mark.parametrize(
    "ranks, env, changes, said, batch",
    [
        (2, {}, {}, None, 7),
        (1, {}, {}, "ranks 2 (now 1)", 13),  # 6 batches of 2 x 10 images are 12 of 10
        (2, {"OMP_NUM_THREADS": "2"}, {}, "threads 1 (now 2)", 7),
        (2, {}, {"DATA.BATCH_SIZE": 20}, "batch_size 10 (now 20)", 4),
        # A step's first batch.
        pytest.param(
            2, {}, {"TRAIN.ACCUM_ITER": 4}, "accum_iter 3 (now 4)", 5, marks=pytest.mark.slow
        ),
        pytest.param(2, {}, {"SEED": 1}, "seed 0 (now 1)", 7, marks=pytest.mark.slow),
    ],
)
def test_a_changed_run_goes_on_at_the_same_place_in_the_epoch_and_says_so(
    stopped, few_digits, tmp_path, ranks, env, changes, said, batch
):
    # An earlier end is another schedule; where nothing changes, the whole run goes on.
    opts = {**LONG, **({"TRAIN.NUM_EPOCHS": 2} if said else {}), **changes}
    result = run_program(
        "-data_path", few_digits, "-output", tmp_path, "-nprocs", ranks, "-resume", stopped,
        opts=opts, **{"OMP_NUM_THREADS": "1", **env},
    ).check()  # fmt: skip
    assert re.search(rf"going on with epoch 2, batch {batch}/\d+ from", result.out), result.out
    if said:
        words = f"was made with {said}, TRAIN.NUM_EPOCHS 8 (now 2): going on at the same place"
        assert words in result.out
    else:
        assert "not bit for bit" not in result.out
    total = 203 // (opts["DATA.BATCH_SIZE"] * ranks)
    assert metrics(folder_of(tmp_path), "train")[-1]["batch"] == total
    # The learning rate is where an uninterrupted run of this kind would have it.
    steps = -(-total // min(total, opts["TRAIN.ACCUM_ITER"]))
    epochs = opts["TRAIN.NUM_EPOCHS"]
    assert metrics(folder_of(tmp_path), "epoch")[-1]["step"] == epochs * steps


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"MODEL.NUM_CLASSES": 12},
            ["give -num_classes 10", "head.weight is [16, 10], wanted [16, 12]"],
        ),
        ({"MODEL.MIXER.DEPTH": 3}, ["not this model's weights", "mixer_layers.2."]),
    ],
)
def test_another_model_is_refused(stopped, few_digits, tmp_path, changes, parts):
    args = ("-data_path", few_digits, "-output", tmp_path, "-resume", stopped)
    run_program(*args, opts={**LONG, **changes}).refused(2, *parts)
    assert not list(tmp_path.iterdir())


# --- disks ---


def in_mount_namespace(script):
    """Runs a shell script in which mounts are its own; skips where that is not allowed."""
    if os.geteuid() != 0 or run(["unshare", "-m", "true"]).status:
        pytest.skip("mounting a small disk needs root and a sandbox that allows it")
    return run(["unshare", "-m", "sh", "-ec", script], CUDA_VISIBLE_DEVICES="")


def command(data, output, opts, *args):
    words = [sys.executable, ROOT / "main_multi_gpu.py", "-cfg", CONFIG, "-data_path", data,
             "-output", output, *args, "-opts", *flatten(opts)]  # fmt: skip
    return " ".join(shlex.quote(str(word)) for word in words)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(few_digits, tmp_path, ranks):
    # A checkpoint is 120 kB, and each epoch keeps another one: the fourth or so finds no room.
    small, saved = tmp_path / "small disk", tmp_path / "saved"
    small.mkdir()
    result = in_mount_namespace(
        f"mount -t tmpfs -o size=560k tmpfs '{small}'; status=0\n"
        f"{command(few_digits, small, LONG, '-nprocs', ranks)} || status=$?\n"
        f"cp -a '{small}' '{saved}'; exit $status"
    )
    result.refused(1, "No space left on device", str(small))
    intact = list(saved.glob("train-*/*.pdparams"))
    assert {path.name for path in intact} >= {"Epoch-1.pdparams", "best.pdparams", "last.pdparams"}
    trees = [pdparams.read(path, require_checksum=path.stem != "best_weights") for path in intact]
    assert len(trees) >= 4
    assert not temporary_files(saved)
    result = run_program(
        "-data_path", few_digits, "-output", saved, "-nprocs", ranks, "-resume", "auto",
        opts={**LONG, "TRAIN.NUM_EPOCHS": 4},
    ).check()  # fmt: skip
    assert "going on with epoch" in result.out


def test_a_folder_that_turns_read_only_ends_the_run(few_digits, tmp_path):
    out, ro = (shlex.quote(str(tmp_path / name)) for name in ("out", "read only"))
    result = in_mount_namespace(
        f"mkdir {out} {ro}; mount --bind {out} {ro}; mount -o remount,ro,bind {ro}\n"
        f"{command(few_digits, tmp_path / 'out', LONG)} & run=$!\n"
        f"until ls {out}/train-*/Epoch-1.pdparams 2> /dev/null; do sleep 0.05; done\n"
        f"mount --move {ro} {out}; wait $run"
    )
    result.refused(1, "Read-only file system", str(tmp_path / "out"))
    assert pdparams.read(folder_of(tmp_path / "out") / "last.pdparams", True)["epoch"] >= 1


def test_a_read_only_output_folder_is_said_before_training(few_digits, tmp_path):
    out = shlex.quote(str(tmp_path))
    result = in_mount_namespace(
        f"mount --bind {out} {out}; mount -o remount,ro,bind {out}\n"
        + command(few_digits, tmp_path, LONG)
    )
    result.refused(2, "cannot make the output folder", "Read-only file system")


def test_a_folder_that_is_removed_ends_the_run_with_its_name(few_digits, tmp_path):
    process = start(few_digits, tmp_path, EVERY_STEP)
    wait_for(lambda: "saved" in log_of(tmp_path), process)
    folder = folder_of(tmp_path)
    shutil.move(folder, tmp_path / "moved away")
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, out
    assert re.search(rf"{folder}/\S+(: |: cannot be written: )No such file or directory", out), out
    assert "Traceback" not in out
    assert pdparams.read(tmp_path / "moved away" / "last.pdparams", require_checksum=True)


def test_only_the_newest_epochs_are_kept_where_asked(few_digits, tmp_path):
    opts = {**LONG, "TRAIN.NUM_EPOCHS": 5, "KEEP_LAST": 2}
    run_program("-data_path", few_digits, "-output", tmp_path, opts=opts).check()
    names = {path.name for path in folder_of(tmp_path).glob("*.pdparams")}
    assert names == {
        "Epoch-4.pdparams", "Epoch-5.pdparams", "last.pdparams", "previous.pdparams",
        "best.pdparams", "best_weights.pdparams",
    }  # fmt: skip


# --- damaged checkpoints ---


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def test_damaged_checkpoints_are_passed_over_or_refused(straight, few_digits, tmp_path):
    process = start(few_digits, tmp_path, EVERY_STEP)
    wait_for(lambda: "epoch 2, batch" in log_of(tmp_path), process)
    process.terminate()
    process.communicate(timeout=HANG_SECONDS)
    folder = folder_of(tmp_path)
    damages = {"best": empty, "previous": flip_a_bit, "last": truncate}
    for name, damage in damages.items():
        path = folder / f"{name}.pdparams"
        shutil.copy(path, tmp_path / "copy")  # other names of the file stay as they are
        os.replace(tmp_path / "copy", path)
        damage(path)
        with pytest.raises(checkpoint.WeightsError, match=str(path)):
            state.read(path)
    refused = run_program("-data_path", few_digits, "-output", tmp_path, "-resume", path, opts=LONG)
    refused.refused(2, str(path))
    assert list(tmp_path.iterdir()) == [folder]  # not even a folder was made
    out, _ = start(few_digits, tmp_path, LONG).communicate(timeout=HANG_SECONDS)
    for name in damages:
        assert f"passed over {folder / name}.pdparams" in out
    assert re.search(rf"going on with epoch \d from {folder}/Epoch-\d\.pdparams", out), out
    assert same(checkpoint_of(tmp_path), straight)
