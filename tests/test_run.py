"""The parts of a run before its first batch: its source tree, device and precision."""

import os
import subprocess
from types import SimpleNamespace

import paddle
import pytest

from config import ConfigError, get_config
from ranks.collective import init_distributed
from training import run
from training.run import Run


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with one commit, whose file training/run.py is the module's."""
    (tmp_path / "training").mkdir()
    path = tmp_path / "training" / "run.py"
    path.touch()
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(run, "__file__", str(path))
    return tmp_path


def head(clone):
    words = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def test_the_revision_says_whether_files_differ_from_it(clone):
    revision = head(clone)
    assert len(revision) == 40 and run.git_revision() == revision
    (clone / "training" / "run.py").write_text("x = 1")
    assert run.git_revision() == revision + "+"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_clone_of_another_owner_has_its_revision(clone):
    revision = head(clone)
    for path in (clone, clone / ".git"):
        os.chown(path, 12345, 12345)
    assert run.git_revision() == revision


def test_variables_that_name_another_repository_do_not_count(clone, monkeypatch):
    revision = head(clone)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert run.git_revision() == revision


def test_without_a_revision_the_reason_is_said(clone, monkeypatch):
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/nothing")
    assert run.git_revision().startswith("unknown (fatal: ambiguous argument 'HEAD'")
    (clone / ".git").rename(clone / "not git")
    assert run.git_revision() == "unknown (not a git checkout)"
    (clone / ".git").write_text("gitdir: /nowhere")
    assert run.git_revision() == "unknown (fatal: not a git repository: /nowhere)"
    monkeypatch.setenv("PATH", "/nowhere")
    assert run.git_revision() == "unknown (git cannot be run: No such file or directory)"


def choose_amp(monkeypatch, has=("float16", "bfloat16"), on_gpu=True, said=None, **keys):
    """The Amp that a run chooses on a device that has these types."""
    config = get_config()
    config.AMP = True
    for key, value in keys.items():
        setattr(config, key, value)
    for name in ("float16", "bfloat16"):
        monkeypatch.setattr(paddle.amp, f"is_{name}_supported", lambda name=name: name in has)
    said = [] if said is None else said
    return Run._choose_amp(SimpleNamespace(config=config, on_gpu=on_gpu, warnings=said))


@pytest.mark.parametrize(
    "evaluates, has, dtype",
    [(False, ("float16", "bfloat16"), "bfloat16"), (False, ("float16",), "float16"),
     (True, ("float16", "bfloat16"), "float16")],
)  # fmt: skip
def test_training_takes_bfloat16_where_the_gpu_has_it_and_evaluation_float16(
    monkeypatch, evaluates, has, dtype
):
    monkeypatch.setattr(run.np, "__version__", "1.26.4")
    amp = choose_amp(monkeypatch, has, EVAL=evaluates)
    assert amp == (dtype, dtype == "bfloat16")  # and LayerNorm gives bfloat16, float16 not


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["float32", "amp"])
def test_the_types_of_mixed_precision_are_those_that_are_asked_for(monkeypatch, dtype, norm):
    amp = choose_amp(monkeypatch, EVAL=True, AMP_DTYPE=dtype, AMP_LAYER_NORM=norm)
    assert amp == (dtype, norm == "amp")


@pytest.mark.parametrize("version, said", [("2.6.2", True), ("3.3.1", False)])
def test_mixed_precision_of_paddle_2_is_warned_of(monkeypatch, version, said):
    warnings = []
    monkeypatch.setattr(paddle, "__version__", version)
    choose_amp(monkeypatch, EVAL=True, said=warnings)
    assert ["take Paddle 3" in warning for warning in warnings] == [True] * said


def test_without_mixed_precision_on_the_device_the_run_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(paddle, "__version__", "3.3.1")
    assert choose_amp(monkeypatch, AMP=False, said=said) is None and said == []
    assert choose_amp(monkeypatch, on_gpu=False, said=said) is None
    assert choose_amp(monkeypatch, ["float16"], AMP_DTYPE="bfloat16", said=said) is None
    assert ["a CPU has no AMP" in said[0], "this GPU has no bfloat16" in said[1]] == [True, True]


@pytest.mark.parametrize("on_gpu, asked", [(True, True), (True, False), (False, True)])
def test_a_gpu_gives_the_same_bits_each_time_unless_a_key_says_otherwise(
    monkeypatch, on_gpu, asked
):
    config, flags = get_config(), {}
    config.DETERMINISTIC = asked
    monkeypatch.setattr(paddle, "set_flags", flags.update)
    Run._choose_algorithms(SimpleNamespace(config=config, on_gpu=on_gpu))
    assert flags == ({"FLAGS_cudnn_deterministic": True} if on_gpu and asked else {})


@pytest.mark.parametrize("named, device", [(None, "gpu:0"), ("2", "gpu:2"), ("1,3", "gpu:1")])
def test_a_rank_takes_the_gpu_that_its_launcher_names(environment, monkeypatch, named, device):
    if named:
        environment(FLAGS_selected_gpus=named)
    else:
        monkeypatch.delenv("FLAGS_selected_gpus", raising=False)
    taken = []
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(paddle, "set_device", taken.append)
    monkeypatch.delenv("PADDLE_DISTRI_BACKEND", raising=False)
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    assert init_distributed() == (0, 1) and taken == [device]


@pytest.mark.parametrize("numpy, evaluates, refused", [
    ("2.4.0", False, True), ("2.3.5", False, False), ("2.4.0", True, False),
])  # fmt: skip
def test_float16_with_a_numpy_that_breaks_its_scaling_is_refused(
    monkeypatch, numpy, evaluates, refused
):
    monkeypatch.setattr(run.np, "__version__", numpy)
    if refused:
        with pytest.raises(ConfigError, match=r"AMP_DTYPE float16 cannot run with NumPy 2\.4\.0"):
            choose_amp(monkeypatch, AMP_DTYPE="float16", EVAL=evaluates)
    else:
        assert choose_amp(monkeypatch, AMP_DTYPE="float16", EVAL=evaluates).dtype == "float16"
