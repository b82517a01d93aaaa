"""What only a GPU can show; skipped where Paddle finds none."""

import contextlib
import os

import numpy as np
import paddle
import pytest
from golden import build, draw_images, load
from program import SMALL, metrics, run_program

from config import get_config
from training import optim
from transforms import BatchTransform

pytestmark = pytest.mark.usefixtures("gpus")


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "gmlp_s16_224"])
def test_logits_agree_with_timm(name):
    model = build(name)
    logits = model(paddle.to_tensor(draw_images(224))).numpy()
    # TF32 matrix products, which cuDNN and cuBLAS may use, keep 10 bits.
    assert np.abs(logits - load(name)["logits_float64"]).max() < 2e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_computes_in_its_type(dtype):
    model = build("tiny")
    images = paddle.to_tensor(draw_images(32))
    seen = []
    for layer in (model.mixer_layers[0].mlp_channels.gate.proj, model.head):
        layer.register_forward_post_hook(lambda layer, inputs, output: seen.append(output.dtype))
    with optim.build_autocast(True, dtype)():
        model(images)
    assert seen == [getattr(paddle, dtype)] * 2


def test_a_batch_is_normalized():
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    config = get_config()
    config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD = mean, std
    result, _ = BatchTransform(config, train=False)(paddle.to_tensor(images), None)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model = build("tiny")
    schedule = optim.build_schedule(lambda step: 0.1)
    optimizer = optim.build_optimizer(_config(), model, schedule)
    scaler = optim.build_scaler(True, "float16")
    updater = optim.Updater(optimizer, schedule, scaler, optim.NoEMA(model))
    before = model.head.bias.numpy().copy()
    with optim.build_autocast(True, "float16")():
        loss = model(paddle.to_tensor(draw_images(32))).sum()
    updater.scale(loss * float("inf")).backward()
    updater.update()
    assert updater.step == 0
    assert np.array_equal(model.head.bias.numpy(), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_gpus_train_and_evaluate_with_amp(dtype, gpus, few_digits, tmp_path):
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    opts = {**SMALL, "AMP_DTYPE": dtype, "DATA.BATCH_SIZE": 4}
    args = ("-data_path", few_digits, "-output", tmp_path, "-amp")
    result = run_program(*args, opts=opts, **devices).check()
    assert f"{gpus} rank(s)" in result.out and "device gpu" in result.out
    (folder,) = tmp_path.glob("train-*")
    reported = max(metrics(folder, "eval"), key=lambda row: (row["weights"] == "ema", row["acc1"]))
    result = run_program(
        *args, "-eval", "-pretrained", folder / "best.pdparams", opts=opts, **devices
    ).check()
    assert f"Acc@1 {reported['acc1']:.2f}" in result.out


def test_the_average_of_the_weights_can_live_in_host_memory():
    model, average = build("tiny"), build("tiny")
    ema = optim.EMA(model, average, 0.5, on_cpu=True)
    model.head.bias.set_value(model.head.bias + 1)
    expected = average.head.bias.numpy() + 0.5
    ema.update()
    assert average.head.bias.place.is_cpu_place()
    assert np.allclose(average.head.bias.numpy(), expected)
    with ema.on_device() as on_device, contextlib.suppress(AttributeError):
        assert on_device.head.bias.place.is_gpu_place()


def _config():
    from config import get_config

    return get_config()
