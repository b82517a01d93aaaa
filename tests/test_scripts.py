"""The shell scripts: what they run, what they say where something is missing."""

import json
import os
import shutil
import sys

import pytest
from program import ROOT, SMALL, flatten, run

CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": None}


def scripted(name, *args, shell="sh", **env):
    """Runs a script from another folder."""
    return run([shell, ROOT / name, *args], **{"PYTHON": sys.executable, **CPU, **env})


@pytest.fixture
def recorder(tmp_path):
    """A stand-in for Python that prints its arguments and devices, one a line."""
    path = tmp_path / "a python"
    path.write_text('#!/bin/sh\necho "devices $CUDA_VISIBLE_DEVICES"\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return path


def test_training_and_evaluation_scripts_are_the_readmes_commands(recorder, tmp_path):
    data = tmp_path / "image net"
    data.mkdir()
    for name in ("train_list.txt", "val_list.txt"):
        (data / name).touch()
    weights = tmp_path / "w.pdparams"
    weights.touch()
    env = {"PYTHON": str(recorder), "DATA_PATH": str(data), "CUDA_VISIBLE_DEVICES": None}
    train = scripted("run_train_multi.sh", "-seed", "3", **env).check().out.splitlines()
    assert train == [
        "devices 0,1,2,3,4,5,6,7",
        str(ROOT / "main_multi_gpu.py"),
        f"-cfg={ROOT}/configs/gmlp_s16_224.yaml",
        f"-data_path={data}",
        "-amp",
        "-seed",
        "3",
    ]
    evaluation = scripted("run_eval_multi.sh", PRETRAINED=str(weights), **env).check()
    assert evaluation.out.splitlines() == [
        "devices 0,1,2,3,4,5,6,7",
        str(ROOT / "main_multi_gpu.py"),
        f"-cfg={ROOT}/configs/gmlp_s16_224.yaml",
        f"-data_path={data}",
        "-eval",
        f"-pretrained={weights}",
        "-amp",
    ]


def test_what_no_variable_says_is_as_in_the_yaml(recorder):
    env = {"PYTHON": str(recorder), "CFG": "my.yaml", "CUDA_VISIBLE_DEVICES": None}
    program = ["devices 0,1,2,3,4,5,6,7", str(ROOT / "main_multi_gpu.py"), "-cfg=my.yaml"]
    assert scripted("run_train_multi.sh", **env).check().out.splitlines() == [*program, "-amp"]
    evaluation = scripted("run_eval_multi.sh", **env).check().out.splitlines()
    assert evaluation == [*program, "-eval", "-amp"]


def test_every_part_can_be_set_from_the_environment(recorder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train_list.txt").touch()
    weights = tmp_path / "my weights.pdparams"
    weights.touch()
    result = scripted(
        "run_train_multi.sh",
        PYTHON=str(recorder),
        DATA_PATH=str(data),
        CFG="my cfg.yaml",
        DATASET="other",
        BATCH_SIZE="7",
        PRETRAINED=str(weights),
        OUTPUT="my output",
        NPROCS="3",
        CUDA_VISIBLE_DEVICES="5",
    ).check()
    lines = result.out.splitlines()
    assert lines[0] == "devices 5"
    for part in ("-cfg=my cfg.yaml", "-dataset=other", "-batch_size=7", f"-pretrained={weights}",
                 "-output=my output", "-nprocs=3"):  # fmt: skip
        assert part in lines


@pytest.mark.parametrize(
    "script, variable, value, parts",
    [
        ("run_train_multi.sh", "DATA_PATH", "/nowhere", ["/nowhere/val_list.txt", "DATA_PATH"]),
        ("run_eval_multi.sh", "DATA_PATH", "/nowhere", ["/nowhere/val_list.txt", "DATA_PATH"]),
        ("run_train_multi.sh", "PRETRAINED", "/nowhere/x", ["/nowhere/x does not exist"]),
        ("run_eval_multi.sh", "PRETRAINED", "/nowhere/x", ["/nowhere/x does not exist"]),
        ("run_train_multi.sh", "DATASET", "cifar10", ["DATA.DATASET", "must be", "imagenet2012"]),
    ],
)
def test_what_is_missing_is_said_with_the_cure(script, variable, value, parts, few_digits):
    env = {"CFG": str(ROOT / "configs" / "gmlp_digits.yaml"), "DATA_PATH": str(few_digits)}
    scripted(script, **{**env, variable: value}).refused(2, *parts)


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_arguments_win_over_the_variables_and_help_needs_no_data(script):
    assert "usage:" in scripted(script, "-h").check().out
    scripted(script, "-data_path", "/elsewhere").refused(2, "/elsewhere/")


def test_the_scripts_train_and_evaluate(few_digits, tmp_path):
    env = {
        "CFG": str(ROOT / "configs" / "gmlp_digits.yaml"),
        "DATA_PATH": str(few_digits),
        "OUTPUT": str(tmp_path / "my runs"),
        "BATCH_SIZE": "10",
        "NPROCS": "2",
    }
    opts = ["-opts", *flatten({**SMALL, "TRAIN.NUM_EPOCHS": 1})]
    scripted("run_train_multi.sh", *opts, **env).check()
    (weights,) = tmp_path.glob("my runs/train-*/best.pdparams")
    scripted("run_eval_multi.sh", *opts, PRETRAINED=str(weights), **env).check()
    (result,) = tmp_path.glob("my runs/eval-*/eval.json")
    assert json.loads(result.read_text())["images"] == 101


def test_the_demo_in_a_folder_that_cannot_be_written_offers_a_copy(tmp_path):
    folder = tmp_path / "read only"
    folder.mkdir()
    script = ROOT / "run_demo.sh"
    mount = f"mount -t tmpfs none '{folder}' && cp '{script}' '{folder}'"
    mounted = run(["unshare", "-m", "sh", "-c", f"{mount} && mount -o remount,ro '{folder}'"])
    if mounted.status:
        pytest.skip("no mounts here: " + mounted.err)
    command = f"{mount} && mount -o remount,ro '{folder}' && sh '{folder}/run_demo.sh'"
    result = run(["unshare", "-m", "sh", "-c", command])
    result.refused(2, f"{folder} cannot be written", f"cp -r '{folder}' \"$HOME/gmlp\"")


def test_an_unsupported_python_is_named(tmp_path):
    result = scripted("run_tests.sh", PYTHON="/bin/false", VENV=str(tmp_path / "venv"))
    result.refused(1, "PYTHON is /bin/false", "3.9 to 3.13")


def copy_of_the_project(folder):
    """A fresh copy, as a clone would be, in a folder with a space."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "output", "data", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for room in ("tools", "demo"):
        shutil.copytree(ROOT / room / "data", folder / room / "data")
    return folder


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy_twice_in_a_row(tmp_path):
    folder = copy_of_the_project(tmp_path / "my clone")
    for _ in range(2):
        result = run(["sh", folder / "run_demo.sh"], **{"PYTHON": sys.executable, **CPU}).check()
        acc1, outputs, following = result.out.splitlines()[-3:]
        assert acc1.startswith("Acc@1 ") and float(acc1.split()[1]) >= 95.0
        assert outputs.startswith("outputs: ") and "run_eval_multi.sh" in following
    assert len(os.listdir(folder / "output")) == 2


@pytest.mark.parametrize("version, fits", [("3.3.1", True), ("2.6.2", False), (None, True)])
def test_the_paddle_that_is_asked_for_is_the_one_that_is_used(tmp_path, version, fits):
    site = tmp_path / "site" / "paddlepaddle-3.3.1.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: paddlepaddle\nVersion: 3.3.1\n")
    (tmp_path / "site" / "paddle.py").touch()
    code = f'. "{ROOT}/tools/setup_env.sh"; has_paddle "{sys.executable}"'
    paddle = version and f"paddlepaddle=={version}"
    result = run(["sh", "-c", code], PADDLE=paddle, PYTHONPATH=str(tmp_path / "site"))
    assert (result.status == 0) == fits, result
