"""Which checkpoint a run goes on from, in this process and with one rank."""

import os

import pytest
from golden import config_of

from gmlp import build_gmlp
from training import resume
from training.resume import Start, find_start, is_outdated
from weights import pdparams


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read whole, in order."""
    names, real = [], pdparams._parse

    def parse(file, size, path):
        names.append(os.path.basename(path))
        return real(file, size, path)

    monkeypatch.setattr(pdparams, "_parse", parse)
    return names


@pytest.fixture
def run(tmp_path):
    """(config, model) with three checkpoints in one run's folder; last.pdparams is the newest."""
    config = config_of("tiny")
    config.SAVE, config.MODEL.NAME, config.MODEL.RESUME = str(tmp_path), "tiny", "auto"
    model = build_gmlp(config)
    (tmp_path / "train-1").mkdir()
    for number, name in enumerate(("Epoch-1", "previous", "last")):
        path = tmp_path / "train-1" / f"{name}.pdparams"
        facts = {"model_name": "tiny"}
        pdparams.write(path, {"model": model.state_dict(), "epoch": number, "run": facts})
        os.utime(path, (number, number))
    return config, model


def start_of(run, said):
    return find_start(*run, rank=0, warn=said.append)


def test_a_sound_run_costs_one_read(run, reads):
    said = []
    start = start_of(run, said)
    assert os.path.basename(start.path) == "last.pdparams" and start.tree["epoch"] == 2
    assert reads == ["last.pdparams"] and said == []


def test_a_damaged_checkpoint_is_passed_over_with_a_word(run, reads, tmp_path):
    last = tmp_path / "train-1" / "last.pdparams"
    last.write_bytes(last.read_bytes()[:-100])
    os.utime(last, (9, 9))
    said = []
    assert start_of(run, said).tree["epoch"] == 1
    assert reads == ["previous.pdparams"] and len(said) == 1 and "passed over" in said[0]


def test_another_models_checkpoints_do_not_count(run, tmp_path):
    run[0].MODEL.NAME, said = "other", []
    start = start_of(run, said)
    assert (start.path, start.tree) == (None, None)
    assert said == [f"-resume auto: no checkpoint of other under {tmp_path}, starting fresh"]


def test_what_came_since_the_search_is_noticed(run, tmp_path):
    start = start_of(run, [])
    assert not is_outdated(run[0], 0, start)
    os.utime(tmp_path / "train-1" / "last.pdparams", (99, 99))
    assert is_outdated(run[0], 0, start)
    run[0].MODEL.RESUME = "some file"
    assert not is_outdated(run[0], 0, Start())


def test_only_checkpoints_of_trainings_are_candidates(run, tmp_path):
    (tmp_path / "train-1" / "best_weights.pdparams").touch()
    (tmp_path / "eval-1").mkdir()
    (tmp_path / "eval-1" / "last.pdparams").touch()
    names = [os.path.basename(path) for path in resume.candidates(str(tmp_path))]
    assert names == ["last.pdparams", "previous.pdparams", "Epoch-1.pdparams"]


def test_a_damaged_copy_on_another_host_is_replaced_by_rank_0s(run, monkeypatch, tmp_path):
    path, said, sent = str(tmp_path / "train-1" / "last.pdparams"), [], {"model": {}}
    answers = iter([pdparams.checksum(path), sent])  # of rank 0: its checksum, then its tree
    monkeypatch.setattr(resume.paddle.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(resume, "broadcast_object", lambda value: next(answers))
    monkeypatch.setattr(resume, "all_reduce_sum", lambda tensor: tensor + 1)
    monkeypatch.setattr(resume.stop, "barrier", lambda: None)
    with open(path, "r+b") as file:  # its checksum at the end stays
        file.seek(1000)
        file.write(b"XXXX")
    assert resume._read_everywhere(path, None, True, 1, said.append) is sent
    assert len(said) == 1 and "rank 0 has sent its own" in said[0]
