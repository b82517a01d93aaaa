"""Every tool works with every variant of the model: whoever adds one, adds it to VARIANTS."""

import json

import paddle
import pytest
import yaml
from program import ROOT, run_tool

import main_multi_gpu
from tools import export, plot_gates, port_weights, predict
from config import get_config, update_config
from gmlp import Sizes, build_gmlp
from tools.model_table import count_multiply_adds
from weights import load_weights, pdparams

PHOTO = ROOT / "tests" / "data" / "images" / "small_100x80.jpg"

# What a config says of MODEL and DATA; MLP_RATIO 22/7 x 7 is rounded.
VARIANTS = {
    "square": {"MODEL": {"MIXER": {"PATCH_SIZE": 8, "EMBED_DIM": 8, "DEPTH": 2}}},
    "one block, one patch": {
        "DATA": {"IMAGE_SIZE": 16},
        "MODEL": {"NUM_CLASSES": 1, "MIXER": {"PATCH_SIZE": 16, "EMBED_DIM": 3, "DEPTH": 1}},
    },
    "odd sizes, dropout": {
        "DATA": {"IMAGE_SIZE": 15},
        "MODEL": {
            "DROPOUT": 0.5, "DROPPATH": 0.5,
            "MIXER": {"PATCH_SIZE": 5, "EMBED_DIM": 7, "DEPTH": 3, "MLP_RATIO": 22 / 7},
        },
    },
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """(config file, weight file) of a variant with random weights."""
    tree = {"DATA": {"IMAGE_SIZE": 32}, **VARIANTS[request.param]}
    tree["MODEL"] = {"NUM_CLASSES": 4, "NAME": "variant", **tree["MODEL"]}
    cfg, weights = tmp_path / "variant.yaml", tmp_path / "variant.pdparams"
    cfg.write_text(yaml.safe_dump(tree))
    paddle.seed(3)
    model = build_gmlp(get_config(cfg))
    state = {name: paddle.randn(param.shape) for name, param in model.state_dict().items()}
    pdparams.write(weights, state)
    return cfg, weights


def model_of(variant):
    cfg, weights = variant
    model = build_gmlp(get_config(cfg))
    model.set_state_dict({k: paddle.to_tensor(v) for k, v in load_weights(weights).items()})
    model.eval()
    return model


def shapes_of(model):
    return {name: param.shape for name, param in model.state_dict().items()}


def test_its_sizes_are_found_in_its_weights(variant):
    model = model_of(variant)
    found = Sizes.from_weights(load_weights(variant[1]))
    assert {k: v.shape for k, v in type(model)(found).state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_port_weights_takes_it_to_timm_and_back_bit_for_bit(variant, tmp_path):
    for source, target in (variant[1], "a.safetensors"), (tmp_path / "a.safetensors", "b.pdparams"):
        run_tool(port_weights, source, tmp_path / target).check()
    ours, back = load_weights(variant[1]), load_weights(tmp_path / "b.pdparams")
    assert ours.keys() == back.keys()
    assert all(ours[name].tobytes() == back[name].tobytes() for name in ours)


def test_the_flags_that_port_weights_prints_build_it(variant, tmp_path):
    result = run_tool(port_weights, variant[1], tmp_path / "a.safetensors").check()
    words = result.out.splitlines()[-1].removeprefix("the model: ").split()
    args = main_multi_gpu.build_parser().parse_args(["-cfg", str(ROOT / words[1]), *words[2:]])
    built, wanted = build_gmlp(update_config(get_config(), args)), model_of(variant)
    assert shapes_of(built) == shapes_of(wanted)


def test_plot_gates_draws_it(variant, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "gates.png"
    run_tool(plot_gates, "-cfg", variant[0], "-pretrained", variant[1], "-output", output).check()
    assert output.stat().st_size > 1000


def test_predict_and_export_give_its_probabilities(variant, tmp_path):
    flags = ["-cfg", variant[0], "-pretrained", variant[1]]
    result = run_tool(predict, *flags, "-format", "jsonl", "-topk", 9, PHOTO).check()
    assert len(json.loads(result.out)["top"]) == model_of(variant).sizes.num_classes
    run_tool(export, *flags, "-output", tmp_path / "exported", PHOTO).check()


def test_its_multiply_adds_are_those_of_its_layers(variant):
    model = model_of(variant)
    sizes = model.sizes
    block = sizes.num_tokens * sizes.dim * sizes.hidden_dim * 3 // 2
    block += sizes.num_tokens**2 * sizes.hidden_dim // 2
    stem = sizes.num_tokens * sizes.in_channels * sizes.patch_size**2 * sizes.dim
    head = sizes.dim * sizes.num_classes
    assert count_multiply_adds(model, sizes.image_size) == stem + sizes.depth * block + head
