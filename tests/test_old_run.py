"""A run of an earlier version, with a checkpoint in the middle of an epoch, still goes on.

tests/data/run_568ab8a was written at that commit by two ranks with the settings in its config.yaml
on the digits of the fixture few_digits, and stopped by SIGTERM.  last.checkpoint is its
last.pdparams; in config.yaml only VISUALDL, a key that is gone since, was set to True.
"""

import shutil

import pytest
from program import ROOT, metrics, run_program

from config import ConfigWarning, get_config

OLD = ROOT / "tests" / "data" / "run_568ab8a"


@pytest.fixture
def old_run(tmp_path):
    """The folder of the run, under its own names."""
    folder = tmp_path / "train-old"
    folder.mkdir()
    shutil.copy(OLD / "config.yaml", folder)
    shutil.copy(OLD / "last.checkpoint", folder / "last.pdparams")
    return folder


def test_it_goes_on_in_the_middle_of_its_epoch_bit_for_bit(old_run, few_digits):
    result = run_program(
        "-data_path", few_digits, "-output", old_run.parent, "-nprocs", 2, "-resume", "auto",
        cfg=old_run / "config.yaml", OMP_NUM_THREADS="1",
    ).check()  # fmt: skip
    assert f"going on with epoch 2, batch 10/10 from {old_run / 'last.pdparams'}" in result.out
    assert "not bit for bit" not in result.out and "passed over" not in result.out
    assert [row["epoch"] for row in metrics(old_run, "epoch")] == [2, 3]


def test_its_config_evaluates_its_weights_and_names_the_tool_for_visualdl(old_run, few_digits):
    words = ["-data_path", few_digits, "-output", old_run.parent, "-eval", "-nprocs", 2]
    result = run_program(
        *words, "-pretrained", old_run / "last.pdparams", cfg=old_run / "config.yaml"
    ).check()
    assert " on 101 images" in result.out
    assert result.err.count("VISUALDL") == result.err.count("tools/to_visualdl.py RUN") == 1
    assert result.err.startswith("main_multi_gpu.py: ") and str(old_run) in result.err


def test_a_key_that_is_gone_is_silent_at_its_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("VISUALDL: False\n")
    with pytest.warns() as warned:
        get_config(path)
        path.write_text("VISUALDL: True\n")
        config = get_config(path)
    assert [warning.category for warning in warned] == [ConfigWarning]
    assert "VISUALDL" not in config
