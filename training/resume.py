"""Which checkpoint a run goes on from, the same one on all ranks and hosts, read once by each."""

import contextlib
import glob
import os
from typing import NamedTuple, Optional

import paddle

from config import ConfigError
from ranks import stop
from ranks.collective import all_reduce_sum, broadcast_object
from training import state
from weights import WeightsError, assign_weights, pdparams
from weights.checkpoint import check_weights, newest_first


class Start(NamedTuple):
    """Where a run goes on: a checkpoint's path and tree, or None for both.

    `seen`: the candidates() that `-resume auto` chose from; {} on other ranks than 0.
    """

    path: Optional[str] = None
    tree: Optional[dict] = None
    seen: dict = {}  # noqa: RUF012


def find_start(config, model, rank, warn):
    """The checkpoint that MODEL.RESUME means, with its weights in the model; a collective.

    Args:
        config: the merged config.
        model: the run's model, which is changed where there is a checkpoint.
        rank: of this process.
        warn: called with sentences for the log.

    Raises:
        ConfigError: -resume beside -eval.
        WeightsError: the file cannot be used, or is another model's.
    """
    path, tree, seen = config.MODEL.RESUME, None, {}
    if not path:
        return Start()
    if config.EVAL:
        raise ConfigError("-eval goes with -pretrained FILE, not with -resume")
    is_auto = path == "auto"
    if is_auto:
        if rank == 0:
            seen = candidates(config.SAVE)
            path, tree = _newest_valid(seen, config.MODEL.NAME, warn)
        stop.barrier()  # reading large files may have taken rank 0 long
        path = broadcast_object(path)
        if path is None:
            warn(
                f"-resume auto: no checkpoint of {config.MODEL.NAME} under {config.SAVE}, "
                "starting fresh"
            )
            return Start(seen=seen)
    tree = _read_everywhere(path, tree, is_auto, rank, warn)
    if tree.get("model_ema"):  # before the model is changed
        check_weights(model, tree["model_ema"], path)
    assign_weights(model, tree["model"], path)
    return Start(path, tree, seen)


def is_outdated(config, rank, start):
    """Whether checkpoints have come since `-resume auto` looked; a collective.

    The run that had the folder until now may have saved once more before it ended.
    """
    if config.MODEL.RESUME != "auto":
        return False
    return broadcast_object(rank == 0 and candidates(config.SAVE) != start.seen)


def candidates(save_folder):
    """The training checkpoints of all runs in a folder: path to time (ns), newest first."""
    pattern = os.path.join(glob.escape(save_folder), "train-*", "*.pdparams")
    times = newest_first(pattern)
    return {p: time for p, time in times.items() if os.path.basename(p) != "best_weights.pdparams"}


def _newest_valid(paths, model_name, warn):
    """(path, tree) of the newest valid checkpoint of a model of this name, or (None, None)."""
    for path in paths:
        try:
            tree = state.read(path, require_checksum=True, say=warn)
        except WeightsError as error:
            warn(f"-resume auto: passed over {error}")
            continue
        if tree.get("run", {}).get("model_name") == model_name:
            return path, tree  # where its weights do not fit, it will be refused
    return None, None


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
