"""The parts of a run before its first batch: here, which source tree it is of."""

import os
import subprocess

import pytest

from training import run


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
