"""Which checkpoint a run goes on from, the same one on all ranks and hosts, read once by each."""

import contextlib
import glob
import os
import time
from typing import NamedTuple, Optional

import paddle

from ranks import stop
from ranks.collective import all_reduce_sum, broadcast_object
from training import state
from utils import last_time
from weights import WeightsError, assign_weights, checkpoint, pdparams
from weights.checkpoint import NotThisModel, check_weights


class Start(NamedTuple):
    """Where a run goes on: a checkpoint's path and tree, or None for both.

    `in_place`: the run goes on in the checkpoint's folder; `seen`: on rank 0, the checkpoints that
    it was chosen from.
    """

    path: Optional[str] = None
    tree: Optional[dict] = None
    in_place: bool = False
    seen: Optional[dict] = None


def find_start(config, model, rank, warn, folder=None):
    """The checkpoint that MODEL.RESUME means, with its weights in the model; a collective.

    Args:
        config: the merged config.
        model: the run's model, which is changed where there is a checkpoint.
        rank: of this process.
        warn: called with sentences for the log.
        folder: of the one run to look in; None for what MODEL.RESUME means.

    Raises:
        WeightsError: the file cannot be used, or is another model's.
    """
    path, tree, seen = folder or config.MODEL.RESUME, None, None
    if not path or config.EVAL:  # a file's RESUME is for training
        return Start()
    is_folder = broadcast_object(rank == 0 and os.path.isdir(path))
    is_auto = is_folder or path == "auto"
    if is_auto:
        if rank == 0:
            runs = [path] if is_folder else _runs(config.SAVE)
            seen = candidates(runs)
            path, tree = _choose(runs, config.MODEL.NAME, warn)
        stop.barrier()  # reading large files may have taken rank 0 long
        path = broadcast_object(path)
        if path is None:
            nothing = f"no checkpoint of {config.MODEL.NAME} under"
            if is_folder:
                raise WeightsError(f"-resume: {nothing} {config.MODEL.RESUME}")
            warn(f"-resume auto: {nothing} {config.SAVE}, starting fresh")
            return Start(seen=seen)
    tree = _read_everywhere(path, tree, is_auto, rank, warn)
    try:
        if tree.get("model_ema"):  # before the model is changed
            check_weights(model, tree["model_ema"], path)
        assign_weights(model, tree["model"], path)
    except NotThisModel as error:
        if not is_auto:
            raise
        raise NotThisModel(
            f"-resume auto: the newest run of {config.MODEL.NAME} under {config.SAVE} is one of "
            f"another model or data set: give this run an -output of its own ({error})"
        ) from None
    return Start(path, tree, is_auto, seen)


def is_outdated(rank, start):
    """Whether the run's folder has other checkpoints than when `start` was chosen; a collective.

    The run that had the folder until now may have saved once more before it ended.  What other runs
    have saved does not count.
    """
    if not start.in_place:
        return False
    folder = os.path.dirname(start.path)
    seen = {p: time for p, time in (start.seen or {}).items() if os.path.dirname(p) == folder}
    return broadcast_object(rank == 0 and candidates([folder]) != seen)


def candidates(runs):
    """The training checkpoints in the folders of runs: path to time (ns)."""
    times = {}
    for folder in runs:
        for path in _newest(folder) + _others(folder):
            with contextlib.suppress(OSError):  # a dangling link
                times[path] = os.stat(path).st_mtime_ns
    return times


def _runs(save_folder):
    return glob.glob(os.path.join(glob.escape(save_folder), "train-*"))


def _named(folder, *names):
    paths = [os.path.join(folder, f"{name}.pdparams") for name in names]
    return [path for path in paths if os.path.isfile(path)]


def _newest(folder):
    """What a sound run's newest checkpoint is called; new.pdparams is there after a kill alone."""
    return _named(folder, "new", "last")


def _others(folder):
    """A run's other checkpoints, which count where the newest is damaged or gone."""
    return [*_named(folder, "previous", "best"), *checkpoint.epochs_in(folder)]


def _choose(runs, model_name, warn):
    """(path, tree) of the checkpoint to go on from, or (None, None).

    The newest of the runs of a model of this name, and of that the checkpoint which is furthest.  A
    checkpoint's name and contents say how far it is; the time of a file may be that of a copy.
    """
    times = {folder: _last_sign_of(folder) for folder in runs}
    runs = sorted((when, folder) for folder, when in times.items() if when is not None)
    for written, folder in reversed(runs):
        path, tree = _furthest(_newest(folder), warn)
        if tree is None:
            path, tree = _furthest(_others(folder), warn)
        if tree is not None and tree.get("run", {}).get("model_name") == model_name:
            if len(runs) > 1:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
                warn(
                    f"-resume auto: of {len(runs)} runs under {os.path.dirname(folder)} it goes on "
                    f"with {os.path.basename(folder)}, which wrote last, at {when} (another one: "
                    "-resume FOLDER)"
                )
            return path, tree  # where its weights do not fit, it will be refused
    return None, None


def _furthest(paths, warn):
    """(path, tree) of the sound checkpoint that is furthest in its training, or (None, None).

    Of the kept epochs, whose names say how far they are, the highest sound one alone is read.
    """
    best, found, done = (), (None, None), False
    for path in paths:
        is_epoch = checkpoint.number_of(path) is not None
        if is_epoch and done:
            continue
        try:
            tree = state.read(path, require_checksum=True, say=warn)
        except WeightsError as error:
            warn(f"-resume auto: passed over {error}")
            continue
        done = done or is_epoch
        place = (tree.get("epoch", 0), tree.get("batch", 0))
        if place > best:
            best, found = place, (path, tree)
    return found


def _last_sign_of(folder):
    """When a run wrote last, in seconds; None for one without checkpoints.

    Its metrics.jsonl says so, whose rows have their times: copying a run leaves them as they are.
    Where there is none, the time of its newest checkpoint's file.
    """
    paths = _newest(folder) or _others(folder)
    if not paths:
        return None
    written = last_time(os.path.join(folder, "metrics.jsonl"))
    return written or max(candidates([folder]).values(), default=0) / 1e9


def _read_everywhere(path, tree, require_checksum, rank, warn):
    """The checkpoint's tree on every rank.

    Each rank reads the file itself; where a host has none, or another, rank 0 sends its own to all.

    Args:
        tree: what is in it, where this rank has read it already.
    """
    ranks = paddle.distributed.get_world_size()
    if ranks == 1:
        return tree or state.read(path, require_checksum, warn)
    checksum = None
    if tree is not None or os.path.isfile(path):
        with contextlib.suppress(OSError):  # read says why
            checksum = pdparams.checksum(path)
    wanted = broadcast_object(checksum)
    if tree is None and (checksum == wanted or wanted is None):
        try:
            tree = state.read(path, require_checksum, warn)
        except WeightsError:
            if rank == 0 or wanted is None:  # otherwise rank 0 may have a whole copy
                raise
    stop.barrier()  # reading a large file may have taken some ranks long
    if int(all_reduce_sum(paddle.to_tensor(int(tree is not None)))) < ranks:
        warn(f"{path} is not the same file on every host: rank 0 has sent its own to all ranks")
        tree = broadcast_object(tree)
    return tree
