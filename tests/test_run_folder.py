"""A run's folder is its model: weights, sizes, how images are prepared, the classes' names."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from program import ROOT, SMALL, metrics, run_preloaded, run_tool, write_run

from tools import export, plot_gates, port_weights, predict
from config import ConfigError, get_config, require_model, update_config, value_of
from training import run as run_module
from training.run import Run, build_model
from weights import WeightsError, load_weights, pdparams

WORDS = ["zero", "un", "δύο", "three", "四", "five six", "シックス", "семь", "8", "nine"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of the small model of ten classes, on another machine."""
    return write_run(
        tmp_path_factory.mktemp("runs") / "train 1", WORDS, SAVE="/nowhere", MODEL__RESUME="auto",
        DATA__DATA_PATH="/another machine", DATA__CROP_PCT=0.5, TRAIN__BASE_LR=7.0,
    )  # fmt: skip


PHOTO = next((ROOT / "tests" / "data" / "images").glob("*.jpg"))


def asked(**args):
    return SimpleNamespace(**{"cfg": None, "opts": None, "pretrained": None, **args})


def test_the_models_and_the_images_keys_are_taken_and_no_others(small, tmp_path):
    args = asked(pretrained=str(small), image_size=56)
    config = update_config(get_config(), args)
    require_model(args)
    expected = {
        "MODEL.PRETRAINED": str(small / "best_weights.pdparams"),
        "MODEL.MIXER.EMBED_DIM": SMALL["MODEL.MIXER.EMBED_DIM"],
    }
    assert {key: value_of(config, key) for key in expected} == expected
    assert (config.DATA.CROP_PCT, config.DATA.IMAGE_SIZE) == (0.5, 56)  # a flag wins
    defaults = get_config()
    assert (config.SAVE, config.MODEL.RESUME) == (defaults.SAVE, None)
    assert config.TRAIN == defaults.TRAIN
    # The run's own is not here, which whoever reads it is told; never another data set's.
    assert config.DATA.DATA_PATH == "/another machine"


def test_the_data_set_of_a_run_is_taken_where_it_is_here(small, tmp_path):
    run = get_config(small / "config.yaml")
    run.DATA.DATA_PATH = str(tmp_path)
    (tmp_path / "config.yaml").write_text(run.dump())
    (tmp_path / "best_weights.pdparams").touch()
    config = update_config(get_config(), asked(pretrained=str(tmp_path)))
    assert value_of(config, "DATA.DATA_PATH") == str(tmp_path)


def test_a_training_needs_its_own_config_whatever_it_starts_from(small):
    args = asked(pretrained=str(small), eval=False)
    config = update_config(get_config(), args)
    assert config.MODEL.MIXER == get_config().MODEL.MIXER
    with pytest.raises(ConfigError, match="which model"):
        require_model(args)


def test_a_folder_without_its_best_weights_is_told(small, tmp_path):
    (tmp_path / "config.yaml").write_text((small / "config.yaml").read_text())
    result = run_tool(predict, "-pretrained", tmp_path, PHOTO)
    assert result.status == 2 and "there is no best_weights.pdparams in this folder" in result.err
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "best_weights.pdparams").touch()
    (tmp_path / "classes.txt").touch()
    for tool in (predict, export):
        extra = ["-output", tmp_path / "new"] if tool is export else []
        result = run_tool(tool, "-pretrained", tmp_path, *extra, PHOTO)
        assert result.status == 2 and "which model? Give its file with -cfg: " in result.err


def test_predictions_have_the_runs_names(small):
    flags = ["-topk", 10, "-format", "jsonl", PHOTO]
    result = run_tool(predict, "-pretrained", small, *flags).check()
    top = json.loads(result.out)["top"]
    assert [choice["name"] for choice in top] == [WORDS[choice["label"]] for choice in top]
    weights = small / "best_weights.pdparams"
    cfg = ["-cfg", small / "config.yaml", "-pretrained", weights]
    assert run_tool(predict, *cfg, "-names", small / "classes.txt", *flags).out == result.out
    assert run_tool(predict, "-pretrained", weights, *flags).out == result.out
    other = small.parent / "names.txt"
    other.write_text("\n".join(map(str, range(10, 20))))
    result = run_tool(predict, "-pretrained", small, "-names", other, *flags).check()
    assert json.loads(result.out)["top"][0]["name"] in map(str, range(10, 20))


def test_an_export_has_the_runs_names(small, tmp_path):
    run_tool(export, "-pretrained", small, "-output", tmp_path / "exported", PHOTO).check()
    signature = json.loads((tmp_path / "exported" / "signature.json").read_text("utf-8"))
    assert signature["classes"] == WORDS
    assert signature["weights_sha256"] == pdparams.sha256(small / "best_weights.pdparams")


def test_filters_and_ported_weights_are_the_runs_best(small, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_tool(plot_gates, "-pretrained", small, "-output", tmp_path / "gates.png").check()
    assert "gmlp_digits" in result.out
    run_tool(port_weights, small, tmp_path / "timm.safetensors").check()
    run_tool(port_weights, tmp_path / "timm.safetensors", tmp_path / "back.pdparams").check()
    weights = load_weights(small / "best_weights.pdparams")
    back = load_weights(tmp_path / "back.pdparams")
    assert all(np.array_equal(weights[name], back[name]) for name in weights)


@pytest.mark.parametrize(
    "names, said",
    [(WORDS, None), (WORDS[1:], "has 9 names, and the model 10 classes: give -num_classes 9"),
     (["", *WORDS], "classes.txt:1: this line is empty")],
)  # fmt: skip
def test_a_run_takes_the_names_of_its_data_set_where_there_are_as_many(names, said, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    folder.mkdir()
    (data / "classes.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    config = get_config()
    config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES = str(data), len(WORDS)
    run = SimpleNamespace(config=config, folder=str(folder), warnings=[])
    Run._copy_class_names(run)
    assert [path.name for path in folder.iterdir()] == ["classes.txt"] * (said is None)
    if said:
        (warning,) = run.warnings
        assert said in warning
    else:
        assert predict.read_classes(folder / "classes.txt", 10)[4].name == "四"


def test_a_hub_model_has_the_runs_classes_and_size(tmp_path):
    config = get_config(ROOT / "configs" / "gmlp_ti16_224.yaml")
    config.MODEL.NUM_CLASSES, config.DATA.IMAGE_SIZE = 7, 32
    (tmp_path / "config.yaml").write_text(config.dump())
    state = build_model(config).state_dict()
    pdparams.write(tmp_path / "best_weights.pdparams", state)
    model = paddle.hub.load(str(ROOT), "gmlp_ti16_224", source="local", pretrained=str(tmp_path))
    assert (model.sizes.num_classes, model.sizes.image_size) == (7, 32)
    assert np.array_equal(model.norm.weight.numpy(), state["norm.weight"].numpy())


def test_a_hub_model_of_another_run_is_refused_and_a_files_neighbours_do_not_count(small, tmp_path):
    said = "is a run with MODEL.MIXER.PATCH_SIZE 7, gmlp_ti16_224 has 16: build_gmlp"
    with pytest.raises(ValueError, match=said):
        paddle.hub.load(str(ROOT), "gmlp_ti16_224", source="local", pretrained=str(small))
    # A project's own files beside published weights.
    (tmp_path / "config.yaml").write_text("learning_rate: 3")
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    weights = tmp_path / "weights.pdparams"
    weights.write_bytes((small / "best_weights.pdparams").read_bytes())
    result = run_tool(predict, "-cfg", small / "config.yaml", "-pretrained", weights, PHOTO)
    assert "three" not in result.check().out
    with pytest.raises(ValueError, match="not this model's weights"):  # its config.yaml is no run's
        paddle.hub.load(str(ROOT), "gmlp_ti16_224", source="local", pretrained=str(weights))


def test_a_path_that_is_not_there_is_named(small):
    for path in (small.parent / "trian 1", "~/gone"):
        result = run_tool(predict, "-pretrained", path, PHOTO)
        assert result.status == 2 and f"{path} does not exist: check the path" in result.err


def test_a_run_can_be_named_from_the_home_folder(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.parent))
    result = run_tool(predict, f"-pretrained=~/{small.name}", PHOTO).check()
    assert "семь" in result.out or "8" in result.out


def test_weights_that_are_replaced_while_ranks_read_them_are_read_again(small, monkeypatch):
    run = SimpleNamespace(model=None, config=get_config())
    loaded, digests = [], iter("aabbbb")  # the first reading's two, after a replacement; then b's
    monkeypatch.setattr(run_module, "load_into", lambda model, path, **o: loaded.append(path) or [])
    monkeypatch.setattr(run_module.pdparams, "sha256", lambda path: next(digests))
    # Rank 0 has read the later file.
    monkeypatch.setattr(run_module, "broadcast_object", lambda own: {"a": "b"}.get(own, own))
    path = str(small / "best_weights.pdparams")
    assert Run._load_same_file(run, path) == [] and len(loaded) == 2 and run.weights_digest == "b"
    digests = iter("ab" * 10)
    monkeypatch.setattr(run_module.pdparams, "sha256", lambda path: next(digests))
    with pytest.raises(WeightsError, match="this file is replaced while it is read"):
        Run._load_same_file(run, path)


def test_a_run_is_evaluated_without_its_config(trained, tmp_path):
    program = [sys.executable, ROOT / "main_multi_gpu.py"]
    result = run_preloaded([*program, "-eval", "-pretrained", trained, "-output", tmp_path]).check()
    rows = [row for row in metrics(trained, "eval") if row["weights"] == "ema"]
    assert f"Acc@1 {max(row['acc1'] for row in rows):.2f}" in result.out
    (folder,) = tmp_path.iterdir()
    assert not list(trained.glob("eval*")) and folder.name.startswith("eval-")
