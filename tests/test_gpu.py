"""The GPU check: what only a GPU can answer, asked of each machine that has one.

    sh run_tests.sh tests/test_gpu.py

It prints a block to paste into a report (gpu_report.py).  All of it runs on a CPU too, as far as a
CPU can (mixed precision is float32 there), and then the block answers nothing.  This process
computes float32 without TF32 (devices.py).
"""

import contextlib
import functools
import gc
import os
import signal
import statistics
import subprocess
import time

import devices
import gpu_report
import numpy as np
import paddle
import pytest
import trajectory
from crossings import count_crossings
from golden import build, config_of, draw_images, load
from paddle.nn import functional as F
from PIL import Image
from processes import children_of, ended, kill_all, session_exists, wait_for
from program import SMALL, folder_of, log_of, metrics, run_program, run_tool, same, start_program

from tools import export
from config import get_config
from datasets import EvalSampler, build_dataset
from gmlp import build_gmlp, can_recompute
from ranks.loader import build_loader
from tools.benchmark import plan as planner
from training import inference, optim
from training.run import build_model
from transforms import BatchTransform
from weights import load_into, pdparams

# A CPU has no mixed precision, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:.* can only be enabled on CUDAPlace")

TYPES = ("float32", "float16", "bfloat16")
END_SECONDS = 60  # in which a run has to end that cannot go on


def amp_of(dtype, **options):
    """The Amp of a type, None for float32; skips where the device or NumPy cannot."""
    if dtype == "float32":
        return None
    if paddle.get_device() != "cpu":
        if not getattr(paddle.amp, f"is_{dtype}_supported")():
            pytest.skip(f"this GPU has no {dtype}")
        if dtype == "float16" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            pytest.skip("Paddle's loss scaling fails with this NumPy (requirements.txt)")
    return optim.Amp(dtype, **options)


def synchronize():
    if paddle.get_device() != "cpu":
        paddle.device.synchronize()


@pytest.fixture
def note(record_property):
    """Puts a number or a text into the report."""

    def put(name, value):
        record_property(name, f"{value:.3g}" if isinstance(value, float) else str(value))

    return put


# --- numbers ---


@pytest.mark.parametrize("device", ["cpu", "gpu"])  # no fixture: without a GPU it asks too
def test_a_gpu_that_nvidia_smi_sees_is_seen_by_paddle(device, note, monkeypatch, tmp_path):
    found, visible = devices.GPUS, devices.GPU.visible
    if device == "cpu":  # as if there were two
        (tmp_path / "nvidia-smi").write_text(
            "#!/bin/sh\necho 'GPU 0: one (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: two'"
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        found, visible = 2, None
    listed = len(gpu_report.list_gpus())
    note("nvidia-smi lists", listed)
    note("Paddle finds", found)
    why = devices.why_cpu() or ("" if listed else "nvidia-smi lists none")
    if device == "gpu" and why:
        pytest.skip(why)
    assert found == (listed if visible is None else len(visible.split(",")))


def test_float32_logits_are_timms(device, note):
    names = ["tiny"] if device.name == "cpu" else ["gmlp_ti16_224", "gmlp_s16_224"]
    gaps = []
    for name in names:
        size = config_of(name).DATA.IMAGE_SIZE
        logits = build(name)(paddle.to_tensor(draw_images(size))).numpy()
        gaps.append(float(np.abs(logits - load(name)["logits_float64"]).max()))
        note(f"{name}'s largest difference", gaps[-1])
    # On a CPU it is 1e-5; with TF32 it would be a hundred times as much.
    assert max(gaps) < 1e-4


@functools.lru_cache
def gradients(name, device, amp=None, recompute=False):
    """One step's gradients of a golden model, by parameter."""
    paddle.set_device(device)
    model = build(name)
    model.train()
    model.recompute = recompute
    images = paddle.to_tensor(draw_images(model.sizes.image_size, batch=4))
    with optim.build_autocast(amp)():
        logits = model(images)
    loss = F.cross_entropy(logits.astype("float32"), paddle.arange(4))
    scale = 2.0**16 if amp and amp.dtype == "float16" else 1.0  # as GradScaler begins
    (scale * loss).backward()
    return {n: p.grad.numpy().astype("float64") / scale for n, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_are_those_of_a_cpu(device, dtype, recompute, note):
    name = "tiny" if device.name == "cpu" else "gmlp_ti16_224"
    if recompute and not can_recompute():
        pytest.skip("Paddle 2.6 recomputes on GPUs only")
    amp = amp_of(dtype, layer_norm=dtype == "bfloat16")  # as AMP_LAYER_NORM auto has it
    found, expected = gradients(name, device.name, amp, recompute), gradients(name, "cpu")
    paddle.set_device(device.name)
    off = {
        key: float(np.linalg.norm(found[key] - value) / np.linalg.norm(value))
        for key, value in expected.items()
    }
    worst = max(off, key=off.get)
    note("largest relative difference", off[worst])
    note("of", worst)
    # PyTorch's autocast on a CPU is up to 0.005 (float16) and 0.04 (bfloat16: eight times as
    # coarse) off for Ti/16, each parameter by its own norm, but for the last norm's bias: 0.03 and
    # 0.24, as its sum over tokens is in 16 bits there.  A factor that is wrong would be 0.5 off.
    assert off[worst] < {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}[dtype]


@pytest.mark.parametrize("layer_norm", [False, True], ids=["norm in float32", "norm too"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_computes_in_its_type_and_keeps_residuals_in_float32(
    device, dtype, layer_norm, note
):
    if device.name == "gpu" and paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 computes in float32 after a Linear (docs/install.md)")
    model, amp, found = build("tiny"), amp_of(dtype, layer_norm=layer_norm), {}
    block, norm = model.mixer_layers[1], dtype if layer_norm else "float32"
    mlp = block.mlp_channels
    expected = {  # layer: (type of what it gives)
        "patch embedding": (model.patch_embed, "float32"),  # its bias is float32
        "norm": (block.norm, norm),
        "fc1": (mlp.fc1, dtype),
        "gate's norm": (mlp.gate.norm, norm),
        "gate's projection": (mlp.gate.proj, dtype),
        "gate": (mlp.gate, dtype),
        "fc2": (mlp.fc2, dtype),
        "residual stream": (block, "float32"),
        "last norm": (model.norm, norm),
        "head": (model.head, dtype),
    }
    for name, (layer, _) in expected.items():

        def keep(layer, inputs, output, name=name):
            output = output[0] if isinstance(output, tuple) else output
            found[name] = str(output.dtype).split(".")[-1]

        layer.register_forward_post_hook(keep)
    with optim.build_autocast(amp)():
        model(paddle.to_tensor(draw_images(32)))
    expected = {name: kind for name, (_, kind) in expected.items()}
    if device.name == "cpu":  # which has no mixed precision
        expected = dict.fromkeys(expected, "float32")
    wrong = {name: kind for name, kind in found.items() if kind != expected[name]}
    note("other than expected", wrong or "none")
    assert found == expected


def test_sixty_steps_in_float32_are_timms(device, note):
    golden, losses, trees = trajectory.repeat("float32")
    gap = float(max(trajectory.distances(golden, trees)))
    note("largest difference of a parameter or its average", gap)
    note("of a loss", float(np.abs(losses - golden["loss"]).max()))
    # timm's run is float64; a planted fault gives 6e-6 or more (test_trajectory.py).
    limit = 3e-6 if device.name == "cpu" else 1e-5
    assert gap < limit and np.abs(losses - golden["loss"]).max() < limit


def test_a_batch_is_normalized(device):
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    config = get_config()
    config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD = mean, std
    result, _ = BatchTransform(config, train=False)(paddle.to_tensor(images), None)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)


def test_an_overflow_skips_the_step_and_halves_the_scale(device):
    amp = amp_of("float16")
    model, schedule = build("tiny"), optim.build_schedule(lambda step: 0.1)
    optimizer = optim.build_optimizer(get_config(), model, schedule)
    scaler = optim.build_scaler(amp)
    updater = optim.Updater(optimizer, schedule, scaler, optim.NoEMA(model))
    before = model.head.bias.numpy().copy()
    with optim.build_autocast(amp)():
        loss = model(paddle.to_tensor(draw_images(32))).sum()
    updater.scale(loss * float("inf")).backward()
    updater.update()
    if device.name == "gpu":  # on a CPU the scaler is off
        assert float(scaler.state_dict()["scale"][0]) == 2.0**15
        assert updater.step == 0 and np.array_equal(model.head.bias.numpy(), before)


def test_the_average_of_the_weights_can_live_in_host_memory(device):
    model, average = build("tiny"), build("tiny")
    ema = optim.EMA(model, average, 0.5, on_cpu=True)
    model.head.bias.set_value(model.head.bias + 1)
    expected = average.head.bias.numpy() + 0.5
    ema.update()
    assert average.head.bias.place.is_cpu_place()
    assert np.allclose(average.head.bias.numpy(), expected)
    with ema.on_device() as on_device:
        assert on_device.head.bias.place.is_gpu_place() == (device.name == "gpu")


# --- runs of the program ---


@pytest.fixture(scope="module")
def data(few_digits, tmp_path_factory):
    """A folder of 41 digits to train and 20 to validate."""
    folder = tmp_path_factory.mktemp("fewer digits")
    for name, count in (("train", 41), ("val", 20)):
        (folder / name).symlink_to(few_digits / name)
        lines = (few_digits / f"{name}_list.txt").read_text().splitlines(keepends=True)
        (folder / f"{name}_list.txt").write_text("".join(lines[:: len(lines) // count][:count]))
    return folder


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_a_batch_on_one_device_is_two_halves_on_two(device, accum_iter, data, tmp_path, note):
    if device.count < 2:
        pytest.skip("there is one GPU")
    # Nothing is drawn by rank; with a large epsilon AdamW's steps are not all of one size, that of
    # gradients which are rounding alone too.
    opts = {
        **SMALL, "MODEL.DROPOUT": 0.0, "MODEL.DROPPATH": 0.0, "TRAIN.MIXUP_PROB": 0.0,
        "TRAIN.RANDOM_ERASE_PROB": 0.0, "TRAIN.OPTIMIZER.EPS": 1e-3, "TRAIN.NUM_EPOCHS": 1,
        "TRAIN.ACCUM_ITER": accum_iter, "REPORT_FREQ": 1,
    }  # fmt: skip
    env = {"NVIDIA_TF32_OVERRIDE": "0"} if device.name == "gpu" else {}
    losses, weights = [], []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        run_program(
            "-data_path", data, "-output", output, "-nprocs", ranks, "-num_workers", 0,
            opts={**opts, "DATA.BATCH_SIZE": 8 // ranks}, CUDA_VISIBLE_DEVICES=device.visible,
            **env,
        ).check()  # fmt: skip
        folder = folder_of(output)
        losses.append([row["loss"] for row in metrics(folder, "train")])
        weights.append(pdparams.read(folder / "last.pdparams")["model"])
    gap = max(float(np.abs(weights[0][n] - weights[1][n]).max()) for n in weights[0])
    note("largest difference of a weight", gap)
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gap < 1e-5


def words_and_opts(device, dtype):
    """A short run's flags and keys: five batches an epoch, on two GPUs where there are two."""
    ranks = min(2, device.count) if device.name == "gpu" else 1
    words = ["-nprocs", ranks, "-num_workers", 0, *([] if dtype == "float32" else ["-amp"])]
    opts = {**SMALL, "DATA.BATCH_SIZE": max(1, 8 // ranks), "TRAIN.NUM_EPOCHS": 8}
    return words, opts if dtype == "float32" else {**opts, "AMP_DTYPE": dtype}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A function of a device and a type: the folder of a run that nothing happens to."""

    @functools.lru_cache
    def run(device, dtype):
        output, (words, opts) = tmp_path_factory.mktemp("straight"), words_and_opts(device, dtype)
        where = ("-data_path", data, "-output", output)
        visible = device.visible
        result = run_program(*where, *words, opts=opts, CUDA_VISIBLE_DEVICES=visible).check()
        assert f"{words[1]} rank(s)" in result.out and f"device {device.name}" in result.out
        if dtype != "float32":
            on_cpu = "a CPU has no AMP"
            assert (f"precision in {dtype}" if device.name == "gpu" else on_cpu) in result.out
        return folder_of(output)

    return run


def each_type(*types):
    """The types of a GPU; a CPU has one, whatever its name."""
    cases = [("cpu", "bfloat16"), *(("gpu", dtype) for dtype in types)]
    return pytest.mark.parametrize("device, dtype", cases, indirect=["device"])


@each_type(*TYPES)
def test_a_repeated_run_and_one_killed_and_resumed_have_the_same_bits(
    device, dtype, straight, data, tmp_path, note
):
    amp_of(dtype)  # or it is skipped
    expected, (words, opts) = straight(device, dtype), words_and_opts(device, dtype)
    first, last = "Epoch-1.pdparams", "last.pdparams"
    process = start_program(
        data, tmp_path, *words, opts={**opts, "SAVE_FREQ_STEPS": 1}, visible=device.visible,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    with ended(process):
        # In the middle of an epoch, one step after its last checkpoint.
        wait_for(lambda: "epoch 2/8 batch 4/5" in log_of(tmp_path), process)
        assert process.poll() is None, "the run was over before it could be killed"
    kill_all(process)
    repeated = _same_bits(expected / first, folder_of(tmp_path) / first)
    where = ("-data_path", data, "-output", tmp_path, "-resume", "auto")
    result = run_program(*where, *words, opts=opts, CUDA_VISIBLE_DEVICES=device.visible).check()
    resumed = _same_bits(expected / last, folder_of(tmp_path) / last)
    note("twice the same", repeated)
    note("after a kill and a resume", resumed)
    assert "going on with" in result.out and "not bit for bit" not in result.out
    assert repeated and resumed


def _same_bits(*paths):
    trees = [pdparams.read(path, require_checksum=True) for path in paths]
    return all(
        same(trees[0][key], trees[1][key])
        for key in ("model", "model_ema", "optimizer", "best", "step")
    )


@each_type("float16", "bfloat16")
def test_evaluation_repeats_the_scores_that_training_reports(
    device, dtype, straight, data, tmp_path, note
):
    amp_of(dtype)
    folder, (words, opts) = straight(device, dtype), words_and_opts(device, dtype)
    run_program(
        "-data_path", data, "-output", tmp_path, *words, "-eval", "-pretrained",
        folder / "last.pdparams", opts=opts, CUDA_VISIBLE_DEVICES=device.visible,
    ).check()  # fmt: skip
    (scores,) = metrics(next(tmp_path.glob("eval-*")), "eval")
    expected = metrics(folder, "eval")[-1]
    note("Acc@1 and loss", f"{scores['acc1']:.2f}, {scores['loss']:.6f}")
    assert expected["weights"] == "ema" and scores["acc1"] == expected["acc1"]
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-6)


# --- the host's lead ---


def make_training(amp, batch_size, **sizes):
    """A Training of these sizes with mixing, clipping and EMA, and one of its batches."""
    config = config_of("tiny")
    for key, value in sizes.items():
        setattr(config.DATA if key == "IMAGE_SIZE" else config.MODEL.MIXER, key, value)
    config.DATA.BATCH_SIZE, config.TRAIN.MODEL_EMA = batch_size, True
    config.TRAIN.ACCUM_ITER, config.TRAIN.GRAD_CLIP = 1, 1.0
    return training_and_batch(config, amp)


def training_and_batch(config, amp):
    size, batch_size = config.DATA.IMAGE_SIZE, config.DATA.BATCH_SIZE
    training = trajectory.training_of(config, build_gmlp(config), 1000 * batch_size, amp)
    training.model.train()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, config.MODEL.NUM_CLASSES, batch_size)
    return training, (paddle.to_tensor(images), paddle.to_tensor(labels))


def largest_that_fits(attempt, batch_sizes):
    """(the first batch size with which `attempt` does not run out of memory, what it returned)."""
    for batch_size in batch_sizes:
        # Paddle's BadAlloc is a MemoryError (pybind/exception.cc); where a library of CUDA's lacks
        # memory, only the message says so.
        with contextlib.suppress(MemoryError):
            try:
                return batch_size, attempt(batch_size)
            except (RuntimeError, OSError, SystemError) as error:
                if "out of memory" not in str(error).lower():
                    raise
        gc.collect()
        paddle.device.cuda.empty_cache()
    raise MemoryError(f"not even a batch of {batch_size} fits")


def test_a_batch_size_that_does_not_fit_is_halved_and_other_errors_are_raised():
    errors = {
        128: MemoryError("ResourceExhaustedError: ..."),
        64: OSError("(External) CUDA error(2), out of memory."),
        16: RuntimeError("another"),
    }

    def attempt(batch_size):
        if batch_size in errors:
            raise errors[batch_size]
        return "done"

    assert largest_that_fits(attempt, (128, 64, 32)) == (32, "done")
    with pytest.raises(RuntimeError, match="another"):
        largest_that_fits(attempt, (16, 8))
    with pytest.raises(MemoryError, match="not even a batch of 64 fits"):
        largest_that_fits(attempt, (128, 64))


def test_a_step_returns_while_the_device_still_works(device, note):
    # Few operators that take long: the host may be no more than a thousand or so launches ahead.
    sizes = {"IMAGE_SIZE": 224, "PATCH_SIZE": 16, "EMBED_DIM": 512, "DEPTH": 4}
    sizes, most = ({}, 8) if device.name == "cpu" else (sizes, 128)

    def measure(batch_size):
        training, batch = make_training(None, batch_size, **sizes)
        seconds = []
        for number in range(0, 16, 2):
            synchronize()
            start = time.perf_counter()
            # The second begins while the device works: a copy that waits would show.
            training.train_batch(*batch, epoch=1, batch=number)
            training.train_batch(*batch, epoch=1, batch=number + 1)
            returned = time.perf_counter() - start
            synchronize()
            seconds.append((returned, time.perf_counter() - start))
        return [statistics.median(each) for each in zip(*seconds[3:])]

    batch_size, (returned, done) = largest_that_fits(measure, (most, most // 2, most // 4))
    note("batch", batch_size)
    note("ms until two steps return", 1000 * returned)
    note("ms until the device is done", 1000 * done)
    assert device.name == "cpu" or returned < 0.5 * done


@pytest.mark.parametrize("dtype", TYPES)
def test_a_step_waits_for_no_copy_and_reads_one_flag_of_float16_alone(
    device, dtype, note, monkeypatch
):
    training, batch = make_training(amp_of(dtype, layer_norm=dtype == "bfloat16"), 8)
    with monkeypatch.context() as patch:
        training.train_batch(*batch, epoch=1, batch=0)
        seen = count_crossings(patch)
        training.train_batch(*batch, epoch=1, batch=1)
    flags = int(device.name == "gpu" and dtype == "float16")
    note("reads", ", ".join(seen["read"]) or "none")
    note("copies", len(seen["copied"]))
    assert seen["copied"] == [] and seen["read"] == ["__bool__", "__array__", "numpy"] * flags


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_on_the_device_when_the_loop_gets_them(device, workers, few_digits, note):
    config = get_config()
    config.DATA.DATA_PATH, config.DATA.IMAGE_SIZE, config.MODEL.NUM_CLASSES = (
        str(few_digits),
        28,
        10,
    )
    dataset, sampler = build_dataset(config, train=False), EvalSampler(101, 16, 0, 1)
    places = set()
    with contextlib.closing(build_loader(dataset, sampler, workers, 28)) as batches:
        for tensors in batches:
            places |= {str(tensor.place) for tensor in tensors}
    note("place", ", ".join(places))
    assert places == {str(paddle.to_tensor([1, 2]).place)}


# --- ends ---


@pytest.fixture
def some_broken(few_digits, tmp_path):
    """A folder of data of which an image in ten is broken."""
    folder = tmp_path / "some broken"
    folder.mkdir()
    for name in ("train", "val", "val_list.txt"):
        (folder / name).symlink_to(few_digits / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    lines = (few_digits / "train_list.txt").read_text().splitlines(keepends=True)
    lines[::10] = ["broken.png 0\n"] * len(lines[::10])
    (folder / "train_list.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def nothing_left(note):
    """Checks that processes of a session are gone, and GPU memory as before."""
    before = gpu_report.used_memory()

    def check(session, what_it_took):
        assert not session_exists(session)
        note("seconds", what_it_took)
        if before is not None:
            # Another program's may come and go: some MB more are no process of ours.
            wait_for(lambda: gpu_report.used_memory() <= before + 100, seconds=20)
            note("MB in use before and after", f"{before}, {gpu_report.used_memory()}")

    return check


@pytest.mark.parametrize(
    "device, end, status, said",
    [
        pytest.param(device, *case, marks=marks, id=f"{device}-{case[0]}")
        for device in ("cpu", "gpu")
        for case, marks in [
            (("a killed rank", 137, "failed (SIGKILL)"), ()),
            (("SIGTERM", 143, "stopped as asked after"), ()),
            (("a broken image", 1, "broken.png"), ()),
            # On a CPU it takes 15 s, and test_watchdog.py does it in less.
            (
                ("a rank that hangs", 142, "HANG_MINUTES"),
                [pytest.mark.slow] if device == "cpu" else (),
            ),
        ]
    ],
    indirect=["device"],
)
def test_what_ends_a_run_does_so_in_time_and_leaves_nothing_on_the_device(
    device, end, status, said, few_digits, some_broken, tmp_path, nothing_left
):
    hangs, ranks = end == "a rank that hangs", min(2, device.count)
    if hangs and ranks < 2:
        pytest.skip("there is one GPU")
    data, output = some_broken if end == "a broken image" else few_digits, tmp_path / "output"
    opts = {"HANG_MINUTES": 0.25 if device.name == "cpu" else 0.5} if hangs else {}
    process = start_program(
        data, output, "-nprocs", ranks, "-num_workers", 1, opts=opts, visible=device.visible,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    with ended(process):
        if end != "a broken image":
            wait_for(lambda: "batch 4/" in log_of(output), process)
        start = time.monotonic()
        if end == "SIGTERM":
            process.terminate()
        elif end != "a broken image":
            victim = children_of(process.pid)[-1]
            os.kill(victim, signal.SIGSTOP if hangs else signal.SIGKILL)
        out, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode == status and said in out, out
    nothing_left(process.pid, time.monotonic() - start)


# --- export, speed ---


def test_an_export_on_this_machine_gives_the_devices_probabilities_on_a_cpu(
    device, straight, few_digits, tmp_path, note
):
    dtype = "float32" if device.name == "gpu" else "bfloat16"  # runs that other tests have made
    folder, output = straight(device, dtype), tmp_path / "exported"
    weights = folder / "best_weights.pdparams"
    result = run_tool(
        export, "-cfg", folder / "config.yaml", "-pretrained", weights, "-output", output,
        few_digits / "val" / "3",
    ).check()  # fmt: skip
    note("the tool", result.out.split("\n")[0].rpartition("largest ")[2])
    paddle.set_device(device.name)  # the tool has taken the CPU
    config = get_config(str(folder / "config.yaml"))
    model = build_model(config)
    load_into(model, weights)
    model.eval()
    paths = sorted((few_digits / "val" / "3").iterdir())[:4]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    images, _ = BatchTransform(config, train=False)(paddle.to_tensor(pixels), None)
    expected = F.softmax(model(images)).numpy()
    (program,) = [*output.glob("inference.json"), *output.glob("inference.pdmodel")]
    found = inference.load(str(program))(images.numpy())
    gap = float(np.abs(found - expected).max())
    note("largest difference of a probability", gap)
    assert gap < 1e-4


def planned(device_name):
    """The name in the plan's DEVICES of the device that Paddle calls `device_name`, or None."""
    plain = "".join(character for character in device_name.lower() if character.isalnum())
    return next((name for name in planner.DEVICES if name in plain), None)


def test_the_plans_devices_are_found_by_the_names_that_cards_have():
    names = {
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": None,
        "Tesla V100-SXM2-32GB": "v100", "NVIDIA GeForce RTX 4090": "rtx4090",
    }  # fmt: skip
    assert {name: planned(name) for name in names} == names


def test_s16_trains_in_batches_of_16_or_more(device, note):
    on_gpu, steps = device.name == "gpu", 20 if device.name == "gpu" else 2
    dtype = "bfloat16" if not on_gpu or paddle.amp.is_bfloat16_supported() else "float16"
    amp = amp_of(dtype, layer_norm=dtype == "bfloat16")
    config = config_of("gmlp_s16_224" if on_gpu else "tiny")
    config.TRAIN.ACCUM_ITER = 1

    def measure(batch_size):
        config.DATA.BATCH_SIZE = config.TRAIN.LINEAR_SCALED_LR = batch_size
        if hasattr(paddle.device.cuda, "reset_max_memory_allocated"):  # not in Paddle 2.6
            with contextlib.suppress(ValueError):  # on a CPU
                paddle.device.cuda.reset_max_memory_allocated()
        training, batch = training_and_batch(config, amp)
        for number in range(3 + steps):
            if number == 3:
                synchronize()
                start = time.perf_counter()
            loss = training.train_batch(*batch, epoch=1, batch=number)
        synchronize()
        seconds = time.perf_counter() - start
        assert np.isfinite(float(loss))
        return steps * batch_size / seconds

    most = 128 if on_gpu else 8
    batch_size, speed = largest_that_fits(measure, (most, most // 2, most // 4, most // 8))
    name = paddle.device.cuda.get_device_name() if on_gpu else "CPU as if an A100"
    peak = paddle.device.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    note(f"{dtype}, batch", batch_size)
    note("images/s", f"{speed:,.0f}")
    note("GB at the most", peak)
    key = planned(name)
    note("the plan's device", key or f"none is {name}")
    if key:
        facts = planner.facts(config, amp)
        plan = planner.plan(facts, config, planner.DEVICES[key], 1, 1e9, epoch_images=1)
        note("images/s by the plan", f"{plan['images_per_second']:,.0f}")
        note("GB by the plan", float(plan["memory"]))
        assert plan["batch_size"] == batch_size
