"""Porting weights: timm's function under PaddleViT's names, and back with the same bits."""

import argparse
import json
import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from golden import build, draw_images, draw_weights, load, timm_shapes
from program import ROOT, run, run_tool, same
from safetensors.numpy import load_file, save_file

from tools import port_weights
from config import ConfigError, get_config, update_config
from gmlp import Sizes, build_gmlp
from training.whose import describe
from weights import checkpoint, pdparams

TOOL = ROOT / "tools" / "port_weights.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A .safetensors of timm's tiny model, as timm writes it."""
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(draw_weights(timm_shapes(load("tiny"))), path, metadata={"format": "pt"})
    return path


def port(*args):
    return run_tool(port_weights, *args)


def model_of(result, weights):
    """The model that the printed flags describe, with weights of a file, in float64."""
    words = shlex.split(result.out.split("the model: ")[1])
    flags = {"opts": words[words.index("-opts") + 1 :]} if "-opts" in words else {}
    for name in ("cfg", "image_size", "num_classes"):
        if f"-{name}" in words:
            value = words[words.index(f"-{name}") + 1]
            flags[name] = value if name == "cfg" else int(value)
    model = build_gmlp(update_config(get_config(), SimpleNamespace(**flags)))
    checkpoint.assign_weights(model, checkpoint.load_weights(weights), "")
    model.eval()
    return model.to(dtype="float64")


def test_a_user_ports_timms_weights_and_the_model_is_timms(tiny, tmp_path):
    target = tmp_path / "tiny.pdparams"
    result = run([sys.executable, TOOL, tiny, target], cwd=os.getcwd()).check()
    assert result.out.startswith(f"{target}: 36 tensors, 21,098 parameters, float32\n")
    model = model_of(result, target)
    with paddle.no_grad():
        logits = model(paddle.to_tensor(draw_images(32)).astype("float64"))
    assert np.abs(logits.numpy() - load("tiny")["logits_float64"]).max() < 1e-10
    assert [*paddle.load(str(target))] == [*build("tiny").state_dict()]
    back = tmp_path / "back.safetensors"
    port(target, back).check()
    assert back.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"DATA.IMAGE_SIZE": 30, "MODEL.MIXER.PATCH_SIZE": 6, "MODEL.MIXER.DEPTH": 1},
        {"DATA.IMAGE_CHANNELS": 1, "MODEL.NUM_CLASSES": 2, "MODEL.MIXER.MLP_RATIO": 2.5},
        # int(11 * (30 / 11)) is 29
        {"MODEL.MIXER.EMBED_DIM": 11, "MODEL.MIXER.MLP_RATIO": 2.73, "DATA.IMAGE_SIZE": 4},
    ],
    ids=["as timm's", "one block", "gray", "odd ratio"],
)
def test_there_and_back_has_the_same_bits(sizes, dtype, tmp_path):
    words = {
        "DATA.IMAGE_SIZE": 16, "MODEL.NUM_CLASSES": 10, "MODEL.MIXER.PATCH_SIZE": 4,
        "MODEL.MIXER.EMBED_DIM": 8, "MODEL.MIXER.DEPTH": 2, **sizes,
    }  # fmt: skip
    config = get_config()
    config.merge_from_list([word for item in words.items() for word in item])
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(param.shape).astype(dtype)
        for name, param in build_gmlp(config).state_dict().items()
    }
    start, middle, end = (tmp_path / name for name in ("a.pdparams", "b.safetensors", "c.pdparams"))
    pdparams.write(start, weights)
    port(start, middle).check()
    theirs = load_file(middle)
    assert theirs["stem.proj.weight"].shape == weights["patch_embed.patch_embed.weight"].shape
    assert same(theirs["head.weight"].T, weights["head.weight"])
    result = port(middle, end).check()
    back = pdparams.read(end)
    assert same(back, weights) and {array.dtype.name for array in back.values()} == {dtype}
    model_of(result, end)  # the printed flags are those of this model


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "gmlp_s16_224", "gmlp_b16_224"])
def test_a_model_that_has_a_config_is_described_by_it_alone(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = f"-cfg configs/{name}.yaml"
    config = get_config(shlex.split(words)[1])
    assert describe(Sizes.from_config(config), "w") == words
    config.DATA.IMAGE_SIZE, config.MODEL.NUM_CLASSES = 320, 7
    assert describe(Sizes.from_config(config), "w") == f"{words} -image_size 320 -num_classes 7"


def test_bfloat16_becomes_float32_with_the_same_values(tiny, tmp_path):
    source, target = tmp_path / "bf.safetensors", tmp_path / "bf.pdparams"
    bits = {name: array.view("uint32") >> 16 for name, array in load_file(tiny).items()}
    header, data = {}, b""  # of the format, as safetensors for NumPy has no bfloat16
    for name, array in bits.items():
        end = len(data) + 2 * array.size
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.astype("<u2").tobytes()
    text = json.dumps(header).encode()
    source.write_bytes(len(text).to_bytes(8, "little") + text + data)
    port(source, target).check()
    bias = pdparams.read(target)["head.bias"]
    assert same(bias, (bits["head.bias"] << 16).view("float32")) and bias.dtype == "float32"


def test_force_replaces_a_file_that_is_there(tiny, tmp_path):
    target = tmp_path / "x.pdparams"
    target.write_text("old")
    port("-force", tiny, target).check()
    assert len(pdparams.read(target)) == 36 and list(tmp_path.iterdir()) == [target]


def test_strip_keeps_the_averaged_weights_of_a_checkpoint_alone(trained, tmp_path):
    target = tmp_path / "weights.pdparams"
    port("-strip", trained / "last.pdparams", target).check()
    assert same(pdparams.read(target), pdparams.read(trained / "last.pdparams")["model_ema"])
    port("-strip", target, tmp_path / "again.pdparams").refused(2, "bare weights already")


def test_what_is_no_gmlp_is_refused_with_the_first_difference(tiny, tmp_path):
    weights = load_file(tiny)
    target = tmp_path / "x.pdparams"

    def refused(changes, *parts):
        changed = {**weights, **changes}
        changed = {name: array for name, array in changed.items() if array is not None}
        save_file(changed, tmp_path / "x.safetensors")
        port(tmp_path / "x.safetensors", target).refused(2, "x.safetensors: ", *parts)
        assert not target.exists()

    refused({"head.weight": None}, "head.weight is missing")
    refused({"blocks.1.norm.bias": None}, "mixer_layers.1.norm.bias is not there")
    refused({"cls_token": np.zeros(3, "float32")}, "cls_token is [3], wanted nothing")
    refused({"head.bias": np.zeros(9, "float32")}, "head.bias is [9], wanted [10]")
    refused({"norm.weight": np.zeros(16, "int32")}, "norm.weight is of int32")
    refused({"stem.proj.weight": np.zeros([16], "float32")}, "a shape has the wrong number of axes")
    wide = np.zeros(1000, "float32")
    refused({"blocks.0.mlp_channels.fc1.bias": wide}, "mixer_layers.0.mlp_channels.fc1.bias is")
    refused({"blocks.0.mlp_channels.gate.proj.bias": wide[:0]}, "gate.proj.bias is [0]")


@pytest.mark.parametrize(
    "args, parts",
    [
        (["{tiny}", "x.onnx"], ["x.onnx: ", ".pdparams or in .safetensors"]),
        (["{there}", "x.pdparams"], ["there.pdparams: ", "nothing to port", "-strip"]),
        (["{tiny}", "{there}"], ["there.pdparams: ", "-force"]),
        (["-force", "{tiny}", "{tiny}"], ["one file"]),
        (["-strip", "{tiny}", "x.pdparams"], ["-strip takes a .pdparams and writes"]),
        (["/nowhere.safetensors", "x.pdparams"], ["/nowhere.safetensors", "does not exist"]),
        (["{there}", "x.safetensors"], ["there.pdparams", "is empty"]),
        (["{tiny}", "no folder/x.pdparams"], ["no folder/x.pdparams: cannot be written"]),
    ],
)
def test_what_is_asked_wrongly_is_a_sentence(args, parts, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.pdparams"
    there.touch()
    port(*(arg.format(tiny=tiny, there=there) for arg in args)).refused(2, *parts)
    assert list(tmp_path.iterdir()) == [there] and there.read_bytes() == b""


def test_help_is_answered_without_paddle():
    result = run([sys.executable, "-X", "importtime", TOOL, "-h"]).check()
    assert "-verify" in result.out and "paddle" not in result.err


def test_verify_without_timm_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    port("-verify", tiny, tmp_path / "x.pdparams").refused(
        2, "timm cannot be imported", "pip install timm"
    )


@pytest.mark.parametrize("gap, status", [(1e-11, 0), (1e-9, 1), (np.nan, 1)])
def test_a_difference_from_timm_is_a_failure_and_writes_nothing(
    gap, status, tiny, tmp_path, monkeypatch
):
    logits, features = np.zeros([2, 10]), np.zeros([2, 16])
    monkeypatch.setattr(port_weights, "import_timm", lambda: None)
    monkeypatch.setattr(port_weights, "run_ours", lambda *args: (logits, features))
    monkeypatch.setattr(port_weights, "run_timm", lambda *args: (logits, features + gap))
    target = tmp_path / "x.pdparams"
    result = port("-verify", tiny, target)
    assert result.status == status and target.exists() == (status == 0)
    assert "largest difference from timm" in (result.err if status else result.out)


def test_verify_runs_timm_itself(tiny, tmp_path):
    pytest.importorskip("timm", exc_type=Exception)
    result = port("-verify", tiny, tmp_path / "x.pdparams").check()
    assert "largest difference from timm" in result.out


def test_pytorch_files_of_weights_are_read(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    weights = {name: torch.from_numpy(array) for name, array in load_file(tiny).items()}
    port(tiny, tmp_path / "x.pdparams").check()
    expected = pdparams.read(tmp_path / "x.pdparams")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    average = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    noted = "w.pth.tar: its names are read without _orig_mod, module, which wrappers add"
    arguments = argparse.Namespace(epochs=3)  # timm's train.py puts its own beside the weights
    for tree in (
        weights,
        {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()},
        {"state_dict": weights, "epoch": 3, "args": arguments},
        {"state_dict": zeros, "state_dict_ema": average},
    ):
        torch.save(tree, tmp_path / "w.pth.tar")
        result = port("-force", tmp_path / "w.pth.tar", tmp_path / "x.pdparams").check()
        assert same(pdparams.read(tmp_path / "x.pdparams"), expected)
        assert (noted in result.err) == ("state_dict_ema" in tree)
    torch.save(weights, tmp_path / "renamed.pdparams")  # what is in it counts
    port("-force", tmp_path / "renamed.pdparams", tmp_path / "x.pdparams").check()
    assert same(pdparams.read(tmp_path / "x.pdparams"), expected)
    torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "w.pt")
    port("-force", tmp_path / "w.pt", tmp_path / "x.pdparams").check()
    bias = pdparams.read(tmp_path / "x.pdparams")["head.bias"]
    assert same(bias, weights["head.bias"].bfloat16().float().numpy()) and bias.dtype == "float32"


def test_other_pytorch_files_are_refused_and_run_no_code(tiny, tmp_path):
    torch = pytest.importorskip("torch")

    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    for tree in (
        {"a": Hostile()},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(3, device="meta")},
        {"a": 3},
        {1: torch.zeros(3)},
        {},
        [torch.zeros(3)],
    ):
        torch.save(tree, tmp_path / "w.pth")
        port(tmp_path / "w.pth", tmp_path / "x.pdparams").refused(2, "w.pth: ")
    assert not (tmp_path / "opened").exists()
    weights = {name: torch.from_numpy(array) for name, array in load_file(tiny).items()}
    torch.save({**weights, "a": torch.zeros(1).expand(10**6)}, tmp_path / "w.pth")
    port(tmp_path / "w.pth", tmp_path / "x.pdparams").refused(2, "claims more than its size")
    torch.save(weights, tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    for size in (0, 4, len(data) // 2, len(data) - 1):
        (tmp_path / "w.pth").write_bytes(data[:size])
        port(tmp_path / "w.pth", tmp_path / "x.pdparams").refused(2, "no intact PyTorch file")
    port(tmp_path / "no.pth", tmp_path / "x.pdparams").refused(2, "no.pth: ", "No such file")


def test_a_pytorch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    port(tmp_path / "w.pth", tmp_path / "x.pdparams").refused(2, "w.pth: ", "pip install torch")


def test_a_timm_that_fails_without_a_word_is_said_by_its_errors_name(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise RuntimeError

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"timm cannot be imported \(RuntimeError\): pip install"):
        port_weights.import_timm()
