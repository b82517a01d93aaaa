"""paddle.hub: the models by name, from any folder and beside modules of the same names."""

import sys

import numpy as np
import paddle
import pytest
from golden import draw_images, draw_weights, load, timm_shapes, to_paddle
from program import ROOT, run

MODELS = ["gmlp_b16_224", "gmlp_s16_224", "gmlp_ti16_224"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights of gMLP-Ti/16, whose outputs timm's are known."""
    path = tmp_path_factory.mktemp("hub") / "gmlp_ti16_224.pdparams"
    weights = to_paddle(draw_weights(timm_shapes(load("gmlp_ti16_224"))))
    paddle.save({name: paddle.to_tensor(value) for name, value in weights.items()}, str(path))
    return path


def hub_load(name, **options):
    return paddle.hub.load(str(ROOT), name, source="local", **options)


def test_list_and_help_name_the_three_models():
    assert sorted(paddle.hub.list(str(ROOT), source="local")) == MODELS
    for name in MODELS:
        text = paddle.hub.help(str(ROOT), name, source="local")
        assert "pretrained:" in text and "image_size:" in text


def test_a_user_loads_it_from_a_folder_with_modules_of_the_same_names(published, tmp_path):
    for name in ("config", "utils", "gmlp", "training", "weights"):
        (tmp_path / f"{name}.py").write_text(f"own = {name!r}\n")
    code = f"""
import sys; sys.path.insert(0, ".")
import paddle, config
for attempt in range(2):
    model = paddle.hub.load({str(ROOT)!r}, "gmlp_ti16_224", source="local",
                            pretrained={str(published)!r})
import utils
assert (config.own, utils.own, sys.modules["config"]) == ("config", "utils", config)
assert [n for n in ("checkpoint", "gmlp", "hubconf") if n in sys.modules] == [], sys.modules.keys()
assert {str(ROOT)!r} not in sys.path, sys.path
print(float(model(paddle.ones([1, 3, 224, 224])).sum()))
"""
    out = run([sys.executable, "-c", code], cwd=tmp_path).check().out
    model = hub_load("gmlp_ti16_224", pretrained=str(published))
    with paddle.no_grad():
        expected = float(model(paddle.ones([1, 3, 224, 224])).sum())
    assert float(out.splitlines()[-1]) == pytest.approx(expected, rel=1e-4)


def test_it_is_timms_function(published):
    model = hub_load("gmlp_ti16_224", pretrained=str(published))
    with paddle.no_grad():  # ready to predict
        logits = model(paddle.to_tensor(draw_images(224))).numpy()
    assert not model.training
    assert np.abs(logits - load("gmlp_ti16_224")["logits_float64"]).max() < 1e-5


def test_other_classes_and_sizes(published):
    with pytest.warns(match="resampled"), pytest.warns(match="starts anew"):
        model = hub_load("gmlp_ti16_224", pretrained=str(published), num_classes=7, image_size=64)
    assert model(paddle.zeros([1, 3, 64, 64])).shape == [1, 7]


@pytest.mark.parametrize("name, dim", [*zip(MODELS, (512, 256, 128))])
def test_each_name_is_its_own_model(name, dim):
    model = hub_load(name, num_classes=2, image_size=32)
    assert model.head.weight.shape == [dim, 2] and not model.training


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pretrained": True}, "give a path"),
        ({"pretrained": "/nowhere.pdparams"}, "/nowhere.pdparams does not exist"),
        ({"image_size": 100}, "DATA.IMAGE_SIZE 100"),
        ({"num_classes": 0}, "MODEL.NUM_CLASSES"),
    ],
)
def test_what_is_asked_wrongly_is_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        hub_load("gmlp_ti16_224", **options)
