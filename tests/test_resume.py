"""Which checkpoint a run goes on from, in this process and with one rank."""

import json
import os

import pytest
from golden import config_of

from gmlp import build_gmlp
from training import resume
from training.resume import Start, find_start, is_outdated
from weights import WeightsError, pdparams


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
def write(tmp_path):
    """Writes a checkpoint of a run; each is older than the one before, as no copying program has
    to keep times."""
    model, files = build_gmlp(config_of("tiny")), []

    def write(name, epoch, batch=0, run="train-1"):
        path = tmp_path / run / f"{name}.pdparams"
        path.parent.mkdir(exist_ok=True)
        facts = {"model_name": "tiny", "images": 1000, "batch_size": 1, "ranks": 1}
        tree = {"model": model.state_dict(), "epoch": epoch, "batch": batch, "run": facts}
        pdparams.write(path, tree)
        files.append(path)
        os.utime(path, (1000 - len(files), 1000 - len(files)))
        return path

    return write


@pytest.fixture
def run(tmp_path, write):
    """(config, model) with three checkpoints in one run's folder, whose times say the opposite."""
    config = config_of("tiny")
    config.SAVE, config.MODEL.NAME, config.MODEL.RESUME = str(tmp_path), "tiny", "auto"
    for number, name in enumerate(("Epoch-1", "previous", "last")):
        write(name, number)
    return config, build_gmlp(config)


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def start_of(run, said):
    return find_start(*run, rank=0, warn=said.append)


def name_of(start):
    return os.path.basename(start.path)


def test_a_sound_run_costs_one_read_whatever_the_times_of_its_files(run, reads):
    said = []
    start = start_of(run, said)
    assert name_of(start) == "last.pdparams" and start.tree["epoch"] == 2
    assert reads == ["last.pdparams"] and said == []


def test_where_the_newest_is_damaged_the_furthest_of_the_others_counts(run, write, reads, tmp_path):
    damage(tmp_path / "train-1" / "last.pdparams")
    for name, *place in (("Epoch-9", 9), ("Epoch-10", 10), ("best", 8), ("previous", 18, 5)):
        write(name, *place)
    said = []
    assert name_of(start_of(run, said)) == "previous.pdparams"
    assert len(said) == 1 and "passed over" in said[0]
    assert reads == ["previous.pdparams", "best.pdparams", "Epoch-10.pdparams"]  # 10, not 9 or 1
    damage(tmp_path / "train-1" / "previous.pdparams")
    damage(tmp_path / "train-1" / "Epoch-10.pdparams")
    assert name_of(start_of(run, [])) == "Epoch-9.pdparams"
    write("best", 9, 1)
    assert name_of(start_of(run, [])) == "best.pdparams"
    for name in ("last", "previous", "best", "Epoch-9", "Epoch-10"):
        (tmp_path / "train-1" / f"{name}.pdparams").unlink()
    assert name_of(start_of(run, [])) == "Epoch-1.pdparams"


@pytest.mark.parametrize("place, name", [((2, 1), "new.pdparams"), ((1, 9), "last.pdparams")])
def test_what_a_kill_has_left_unnamed_counts_where_it_is_further(run, write, reads, place, name):
    write("new", *place)
    assert name_of(start_of(run, [])) == name
    assert reads == ["new.pdparams", "last.pdparams"]


@pytest.mark.parametrize("rows", [True, False])
def test_of_several_runs_the_one_that_wrote_last_is_taken_and_said(run, write, tmp_path, rows):
    path = write("last", 1, run="train-2")
    write("Epoch-300", 300, run="train-0")
    if rows:  # the times of the files are a copy's
        for number in (0, 1, 2):
            text = json.dumps({"time": 500.0 + (number == 2)}) + '\n{"time": 9e9, "ki'
            (tmp_path / f"train-{number}" / "metrics.jsonl").write_text(text)
    else:
        os.utime(path, (2000, 2000))
    said = []
    assert start_of(run, said).path == str(path)
    assert len(said) == 1 and "of 3 runs" in said[0] and "goes on with train-2, " in said[0]


def test_another_data_sets_run_in_the_same_folder_asks_for_an_output_of_its_own(run):
    run[0].MODEL.NUM_CLASSES = 12
    with pytest.raises(WeightsError, match=r"give this run an -output of its own .*last\."):
        find_start(run[0], build_gmlp(run[0]), rank=0, warn=print)


def test_another_models_checkpoints_do_not_count(run, tmp_path):
    run[0].MODEL.NAME, said = "other", []
    start = start_of(run, said)
    assert (start.path, start.tree) == (None, None)
    assert said == [f"-resume auto: no checkpoint of other under {tmp_path}, starting fresh"]


def test_what_came_since_the_search_is_noticed(run, tmp_path):
    start = start_of(run, [])
    assert not is_outdated(0, start)
    os.utime(tmp_path / "train-1" / "last.pdparams", (99, 99))
    assert is_outdated(0, start)
    assert not is_outdated(0, Start())


def test_what_another_run_saves_meanwhile_is_none_of_this_one(run, write, tmp_path):
    start = start_of(run, [])
    write("last", 9, run="train-2")
    os.utime(tmp_path / "train-2" / "last.pdparams", (2000, 2000))
    assert not is_outdated(0, start)
    # And where this one's has come too, only its own folder is looked into.
    newer = write("last", 3)
    assert is_outdated(0, start)
    folder = os.path.dirname(start.path)
    again = find_start(*run, rank=0, warn=print, folder=folder)
    assert again.path == str(newer) and again.tree["epoch"] == 3


def test_the_folder_of_a_run_goes_on_in_that_run_alone(run, write, tmp_path):
    write("last", 9, run="train-2")
    os.utime(tmp_path / "train-2" / "last.pdparams", (2000, 2000))
    assert start_of(run, []).tree["epoch"] == 9
    run[0].MODEL.RESUME, said = str(tmp_path / "train-1"), []
    start = start_of(run, said)
    assert start.tree["epoch"] == 2 and start.in_place and said == []
    run[0].MODEL.RESUME = str(tmp_path / "train-1" / "last.pdparams")
    assert not start_of(run, []).in_place
    (tmp_path / "empty").mkdir()
    run[0].MODEL.RESUME = str(tmp_path / "empty")
    with pytest.raises(WeightsError, match=r"-resume: no checkpoint of tiny under .*empty$"):
        start_of(run, [])


def test_only_checkpoints_of_trainings_are_candidates(run, tmp_path):
    (tmp_path / "train-1" / "best_weights.pdparams").touch()
    (tmp_path / "eval-1").mkdir()
    (tmp_path / "eval-1" / "last.pdparams").touch()
    (tmp_path / "train-1" / "Epoch-2.pdparams").symlink_to("/nowhere")
    (tmp_path / "train-1" / "mine.pdparams").touch()
    names = [os.path.basename(path) for path in resume.candidates([tmp_path / "train-1"])]
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
