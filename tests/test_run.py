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


@pytest.mark.parametrize(
    "asked, on_gpu, supported, amp",
    [(True, True, True, True), (False, True, True, False), (True, True, False, False),
     (True, False, True, False)],
)  # fmt: skip
def test_mixed_precision_is_what_was_asked_for_and_the_device_can(
    monkeypatch, asked, on_gpu, supported, amp
):
    config, said = get_config(), []
    config.AMP, config.EVAL = asked, True
    monkeypatch.setattr(paddle.amp, "is_float16_supported", lambda: supported)
    rank = SimpleNamespace(config=config, on_gpu=on_gpu, warnings=said)
    assert Run._can_amp(rank) == amp
    assert bool(said) == (asked and not amp)


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
    config = get_config()
    config.AMP, config.EVAL = True, evaluates
    monkeypatch.setattr(paddle.amp, "is_float16_supported", lambda: True)
    monkeypatch.setattr(run.np, "__version__", numpy)
    rank = SimpleNamespace(config=config, on_gpu=True, warnings=[])
    if refused:
        with pytest.raises(ConfigError, match=r"AMP_DTYPE float16 cannot run with NumPy 2\.4\.0"):
            Run._can_amp(rank)
    else:
        assert Run._can_amp(rank)
