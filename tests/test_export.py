"""Exported models: what Paddle Inference and ONNX Runtime make of them, and what is written."""

import hashlib
import json
import math
import os
import shutil
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from program import CONFIG, ROOT, SMALL, run, run_tool

from tools import export, predict
from config import ConfigError, get_config
from tools.common import new_folder
from training import inference
from training.run import build_model
from transforms import BatchTransform, build_transform
from weights import pdparams
from weights.checkpoint import assign_weights, load_weights

TOOL = ROOT / "tools" / "export.py"
FILES = ["inference.json", "inference.pdiparams", "signature.json"]


def can_export_onnx():
    try:
        export.import_paddle2onnx()
    except ConfigError:
        return False
    return True


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("some photos")
    for number, path in enumerate(sorted((digits / "val").glob("3/*.png"))[:5]):
        shutil.copy(path, folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config file of a small model."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    model = {key: value for key, value in SMALL.items() if key.startswith("MODEL.MIXER.")}
    config = get_config(str(CONFIG))
    config.merge_from_list([word for item in model.items() for word in item])
    path.write_text(config.dump())
    return path


@pytest.fixture(scope="module")
def weights(small, tmp_path_factory):
    """Weights of the small model that give each image probabilities of its own."""
    model = build_model(get_config(str(small)))
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal(value.shape).astype("float32")
        for name, value in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "w.pdparams"
    pdparams.write(path, state)
    return path


def exported(small, weights, output, *args):
    return run_tool(export, "-cfg", small, "-pretrained", weights, "-output", output, *args)


def expected(small, weights, photos):
    """Decoded images uint8 [5, size, size, 3], normalized ones, and the model's probabilities."""
    config = get_config(str(small))
    model = build_model(config)
    assign_weights(model, load_weights(weights), "")
    model.eval()
    transform = build_transform(config, train=False)
    paths = sorted(photos.glob("*.png"))
    pixels = np.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    images, _ = BatchTransform(config, train=False)(paddle.to_tensor(pixels), None)
    with paddle.no_grad():
        probabilities = paddle.nn.functional.softmax(model(images)).numpy()
    assert np.ptp(probabilities, axis=0).max() > 0.1  # so that a mix-up would show
    return pixels, images.numpy(), probabilities


def predict_with_paddle(folder, images):
    from paddle import inference

    programs = [path for path in folder.iterdir() if path.suffix in (".json", ".pdmodel")]
    (program,) = (path for path in programs if path.stem == "inference")
    options = inference.Config(str(program), str(folder / "inference.pdiparams"))
    options.disable_gpu()
    predictor = inference.create_predictor(options)
    predictor.get_input_handle("images").copy_from_cpu(images)
    predictor.run()
    (name,) = predictor.get_output_names()
    return predictor.get_output_handle(name).copy_to_cpu()


@pytest.mark.parametrize("preprocess", [False, True])
def test_an_export_gives_the_models_probabilities(small, weights, photos, tmp_path, preprocess):
    output = tmp_path / "out"
    args = ["-preprocess"] if preprocess else []
    result = exported(small, weights, output, *args, photos).check()
    assert "Paddle Inference: largest difference of a probability " in result.out
    assert ", on 5 images\n" in result.out
    pixels, normalized, probabilities = expected(small, weights, photos)
    images = pixels if preprocess else normalized
    for count in (1, 2, 5):
        found = predict_with_paddle(output, images[:count])
        assert found.shape == (count, 10)
        assert np.abs(found - probabilities[:count]).max() < 1e-5


def test_a_user_exports_onnx_and_the_signature_says_how_to_use_it(small, weights, photos, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if not can_export_onnx():
        pytest.skip("paddle2onnx does not work with this Paddle")
    output = tmp_path / "an export"
    names = tmp_path / "names.txt"
    names.write_text("".join(f"digit {number}\n" for number in range(10)))
    result = run(
        [sys.executable, TOOL, "-cfg", small, "-pretrained", weights, "-output", output, "-onnx",
         "-preprocess", "-names", names, photos]
    ).check()  # fmt: skip
    first, second, _ = result.out.splitlines()  # and nothing that C++ code prints
    assert first.startswith("Paddle Inference: ") and second.startswith("ONNX Runtime: ")
    assert sorted(path.name for path in output.iterdir()) == sorted([*FILES, "model.onnx"])
    signature = json.loads((output / "signature.json").read_text())
    assert signature["classes"] == [f"digit {number}" for number in range(10)]
    assert signature["before"]["center_crop"] == 28 and "normalize" not in signature["before"]
    assert signature["compared"]["images"] == 5
    assert signature["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for name, digest in signature["files_sha256"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    # The module's own: the package may be onnxruntime-gpu.
    assert signature["versions"]["onnxruntime"] == onnxruntime.__version__
    session = onnxruntime.InferenceSession(output / "model.onnx")
    for value, key in ((session.get_inputs()[0], "input"), (session.get_outputs()[0], "output")):
        assert (value.name, value.shape) == (signature[key]["name"], signature[key]["shape"])
    pixels, _, probabilities = expected(small, weights, photos)
    for count in (1, 5):
        (found,) = session.run(["probabilities"], {"images": pixels[:count]})
        assert np.abs(found - probabilities[:count]).max() < 1e-5


def follow(signature, path):
    """What the exported model takes for an image, by signature.json and Pillow alone."""
    before = signature["before"]
    image = Image.open(path).convert("RGB")
    names = {"floor": math.floor, "round": round, "width": image.width, "height": image.height}
    for key in ("resized_width", "resized_height", "crop_left", "crop_top"):
        names[key] = eval(before[key], {"min": min, "__builtins__": {}}, names)
    image = image.resize(
        (names["resized_width"], names["resized_height"]), Image.Resampling.BICUBIC
    )
    left, top, size = names["crop_left"], names["crop_top"], before["center_crop"]
    value = np.asarray(image.crop((left, top, left + size, top + size)))
    if "normalize" not in before:
        return value
    mean, std = (np.float32(before["normalize"][key]) for key in ("mean", "std"))
    assert signature["input"]["values"] == "(value / 255 - mean) / std"
    return ((value / np.float32(255) - mean) / std).transpose(2, 0, 1)


SHAPES = [(640, 427), (427, 640), (500, 375), (333, 500), (257, 300), (451, 130), (100, 80),
          (33, 32), (1001, 999), (20, 27), (300, 640), (131, 1000)]  # fmt: skip


@pytest.mark.parametrize("preprocess", [False, True])
def test_a_program_that_knows_the_signature_alone_gets_the_models_probabilities(
    weights, tmp_path, preprocess
):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number, (width, height) in enumerate(SHAPES):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(tmp_path / "photos" / f"{number}.png")
    cfg = tmp_path / "cropped.yaml"
    config = get_config(str(CONFIG))
    small = {key: value for key, value in SMALL.items() if key.startswith("MODEL.MIXER.")}
    small.update({"DATA.CROP_PCT": 0.83, "DATA.IMAGENET_STD": [0.2, 0.3, 0.4]})
    config.merge_from_list([word for item in small.items() for word in item])
    cfg.write_text(config.dump())
    args = ["-preprocess"] * preprocess + ["-onnx"] * can_export_onnx()
    exported(cfg, weights, tmp_path / "out", *args, tmp_path / "photos").check()
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    *_, probabilities = expected(cfg, weights, tmp_path / "photos")
    paths = sorted((tmp_path / "photos").iterdir())
    images = np.stack([follow(signature, path) for path in paths])
    found = [predict_with_paddle(tmp_path / "out", images)]
    if can_export_onnx():
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "out/model.onnx")
        found += session.run(["probabilities"], {"images": images})
    for each in found:
        assert np.abs(each - probabilities).max() < 1e-5
    moved = predict_with_paddle(tmp_path / "out", np.roll(images, 1, axis=-2 - preprocess))
    assert np.abs(moved - probabilities).max() > 1e-3  # so that a pixel too far would show


def test_onnx_is_exported_with_a_gpus_wheel(small, weights, photos, tmp_path, gpu_wheel):
    if not can_export_onnx():
        pytest.skip("paddle2onnx does not work with this Paddle")
    exported(small, weights, tmp_path / "out", "-onnx", photos).check()
    assert not any(paddle.get_flags("FLAGS_use_legacy_linear").values())
    program = (tmp_path / "out" / "inference.json").read_text()
    assert "matmul" in program and "linear_v2" not in program


def test_an_export_writes_nothing_outside_its_folder(small, weights, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc")  # where even root cannot make a folder
    exported(small, weights, tmp_path / "out", photos).check()
    names = {path.stem.split(".")[0] for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {"inference", "signature"} and len(list(tmp_path.iterdir())) == 1
    assert os.environ["HOME"] == "/proc"
    monkeypatch.delenv("HOME")
    exported(small, weights, tmp_path / "again", photos).check()
    assert "HOME" not in os.environ


def test_the_comparison_is_on_the_cpu_where_there_is_a_gpu_too(
    small, weights, photos, tmp_path, monkeypatch
):
    devices, own = [], paddle.set_device

    def take(device):
        devices.append(device)
        return own("cpu")

    monkeypatch.delenv("PADDLE_DISTRI_BACKEND", raising=False)  # an earlier test's
    monkeypatch.setattr(paddle, "set_device", take)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    exported(small, weights, tmp_path / "out", photos).check()
    assert devices == ["gpu:0", "cpu"]


@pytest.mark.parametrize("wrong", [2e-4, np.nan])
def test_an_export_that_differs_fails_and_leaves_nothing(
    small, weights, photos, tmp_path, monkeypatch, wrong
):
    own = inference.load

    def engine(program):
        right = own(program)
        return lambda images: right(images) + np.float32(wrong)

    monkeypatch.setattr(inference, "load", engine)
    exported(small, weights, tmp_path / "out", photos).refused(1, "more than 0.0001 off")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_replaced_while_they_are_loaded_are_loaded_again(
    small, weights, photos, tmp_path, monkeypatch
):
    path = shutil.copy(weights, tmp_path / "w.pdparams")
    loads, load_into = [], predict.load_into

    def load(model, path):
        loads.append(load_into(model, path))
        if len(loads) == 1:
            pdparams.write(path, {name: 2 * value for name, value in pdparams.read(path).items()})
        return loads[-1]

    monkeypatch.setattr(predict, "load_into", load)
    exported(small, path, tmp_path / "out", photos).check()
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    assert signature["weights_sha256"] == pdparams.sha256(path) and len(loads) == 2


def test_an_unreadable_image_is_named_and_the_others_are_compared(small, weights, photos, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    (images / "2.png").write_bytes(b"text")
    result = exported(small, weights, tmp_path / "out", images)
    assert result.status == 1 and "export.py: " in result.err and "2.png" in result.err
    assert ", on 4 images" in result.out and (tmp_path / "out" / "signature.json").exists()
    exported(small, weights, tmp_path / "none", images / "2.png").refused(1, "no image could be")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "args, parts",
    [
        (["-output", "{there}"], ["there: ", "is there already"]),
        (["-output", "no/out"], ["no/out: cannot be written: No such file"]),
        (["-output", "out", "-pretrained", "/nowhere"], ["/nowhere does not exist"]),
        (["-output", "out", "-num_classes", "3"], ["-num_classes 10"]),
        (["-output", "out", "-batch_size", "0"], ["BATCH_SIZE"]),
        (["-output", "out", "-names", "/nowhere.txt"], ["/nowhere.txt: cannot read"]),
    ],
)
def test_what_is_asked_wrongly_is_a_sentence(
    args, parts, small, weights, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    args = [arg.format(there=there) for arg in args]
    exported(small, weights, "out", *args, photos).refused(2, *parts)
    assert list(tmp_path.iterdir()) == [there] and list(there.iterdir()) == []


def test_a_paddle_that_paddle2onnx_refuses_is_said(small, weights, photos, tmp_path, monkeypatch):
    for name in ("paddle2onnx", "onnx", "onnxruntime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "paddle2onnx" / "__init__.py").write_text("raise ValueError('too old. Upgrade')")
    monkeypatch.syspath_prepend(tmp_path)
    result = exported(small, weights, tmp_path / "out", "-onnx", photos)
    result.refused(2, "paddle2onnx cannot be used: too old\n")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_said_before_anything_else(
    small, weights, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    result = exported(small, weights, tmp_path / "out", "-onnx", photos)
    result.refused(2, "needs the package paddle2onnx: pip install paddle2onnx")


def test_help_is_answered_without_paddle():
    result = run([sys.executable, "-X", "importtime", TOOL, "-h"]).check()
    assert "-preprocess" in result.out and "paddle" not in result.err.replace("paddle2onnx", "")


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        open(f"{folder}/file", "w").close()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    error = pytest.raises(FileExistsError, match="cannot be written")
    with error, new_folder(tmp_path / "a") as folder:
        (tmp_path / "a").mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    with new_folder(tmp_path / "b") as folder:
        open(f"{folder}/file", "w").close()
    assert (tmp_path / "b" / "file").exists()
