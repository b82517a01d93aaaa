"""What is said where weights are another model's."""

import numpy as np
import pytest
from program import ROOT, run_as_rank, run_tool

from tools import predict
from config import get_config
from gmlp import GMLP, Sizes, build_gmlp
from training.whose import whose
from weights import pdparams


@pytest.fixture(scope="module")
def of_another_model(tmp_path_factory):
    """Weights of a gMLP-Ti/16 of two blocks for five classes and images of 32 pixels."""
    path = tmp_path_factory.mktemp("weights") / "w.pdparams"
    state = GMLP(Sizes(32, 3, 5, 16, dim=128, depth=2, mlp_ratio=6.0)).state_dict()
    pdparams.write(path, state)
    return path


FITS = "; the weights fit -cfg configs/gmlp_ti16_224.yaml -image_size 32 -num_classes 5 -opts MODEL.MIXER.DEPTH 2\n"  # noqa: E501


@pytest.mark.parametrize("flags", [["-eval", "-pretrained"], ["-pretrained"], ["-resume"]])
def test_a_wrong_cfg_is_answered_with_the_one_that_fits_before_the_data_are_looked_at(
    flags, of_another_model, few_digits, tmp_path
):
    args = ["-data_path", few_digits, "-output", tmp_path, "-num_classes", 2]  # there are ten
    result = run_as_rank(*args, *flags, of_another_model)
    result.refused(2, "w.pdparams: these are not this model's weights (wrong -cfg?)", FITS)
    assert "-num_classes 2" not in result.err


def test_the_tools_compare_weights_before_the_names_of_classes(of_another_model, few_digits):
    cfg = ROOT / "configs" / "gmlp_digits.yaml"
    (names,) = few_digits.glob("val_list.txt")  # not ten lines
    args = ["-cfg", cfg, "-pretrained", of_another_model, "-names", names, few_digits / "val"]
    run_tool(predict, *args).refused(2, FITS)


def test_the_config_beside_weights_is_the_one_that_fits(of_another_model, tmp_path):
    weights = {name: np.asarray(value) for name, value in pdparams.read(of_another_model).items()}
    path, own = str(tmp_path / "w.pdparams"), tmp_path / "config.yaml"
    config = get_config(str(ROOT / "configs" / "gmlp_ti16_224.yaml"))
    config.MODEL.NUM_CLASSES, config.DATA.IMAGE_SIZE, config.MODEL.MIXER.DEPTH = 5, 32, 2
    own.write_text(config.dump())
    assert whose(weights, path) == f"; the weights fit -cfg {own}"
    for text in ("- no config", "DATA: {IMAGE_SIZE: 33}", "MODEL: {NAME: x}"):
        own.write_text(text)
        assert whose(weights, path) + "\n" == FITS
    assert whose({"head.weight": np.zeros(3)}, path) == ""


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "gmlp_digits", "gmlp_digits_32"])
def test_a_model_with_a_config_of_its_own_is_known_by_it(name):
    config = get_config(str(ROOT / "configs" / f"{name}.yaml"))
    state = build_gmlp(config).state_dict()
    found = whose({key: value.numpy() for key, value in state.items()}, "w.pdparams")
    assert found == f"; the weights fit -cfg configs/{name}.yaml"
