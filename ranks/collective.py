"""What ranks tell each other: sums and means, rank 0's objects, the key-value store that all share.

With one rank, which has joined no others, everything here is its own value.
"""

import contextlib
import io
import os
import sys

import paddle
from paddle import distributed as dist

from ranks import host
from ranks.report import has_launcher


def init_distributed():
    """Takes this rank's device and joins the other ranks.  Returns (rank, number of ranks)."""
    ranks = host.all_ranks()
    backend = os.environ.get("PADDLE_DISTRI_BACKEND")
    if backend != "gloo" and paddle.device.cuda.device_count() > 0:
        # Paddle's launcher names all GPUs to a single rank; as Paddle does, take the first.
        device = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]
        paddle.set_device(f"gpu:{device}")
    else:
        paddle.set_device("cpu")
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    if ranks == 1:
        return 0, 1
    if not has_launcher():  # left over in a shell, the variables make it wait for nobody
        where = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
        print(
            f"joining {ranks} ranks ({where}), as PADDLE_TRAINERS_NUM and its like say",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):  # it lists Paddle's flags; errors are raised
        dist.init_parallel_env()
    return dist.get_rank(), ranks


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class MeanMeter:
    """The mean of device scalars over batches and ranks, without a host read until it is asked.

    Args:
        mean, count: what to go on from.
    """

    def __init__(self, mean=0.0, count=0):
        self.count = count
        self.total = paddle.to_tensor(mean * count, dtype="float64")

    def add(self, value):
        self.total = self.total + value.detach().astype("float64")
        self.count += 1

    def read(self):
        """The mean over all ranks, a number; every rank has to call it.

        The same number on every rank, so that all of them stop where it is not finite.
        """
        return float(all_reduce_sum(self.total / self.count)) / dist.get_world_size()


def all_reduce_max(number):
    """The largest of the ranks' integers."""
    if not dist.is_initialized():
        return number
    tensor = paddle.to_tensor(number, dtype="int64")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def broadcast_object(value):
    """Rank 0's picklable value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def add_in_store(key, value):
    """Adds to a number, 0 at first, in the store that the ranks share; returns the sum.

    No collective: any rank may ask at any time, and one that waits does so in Python.
    """
    return paddle.base.core.create_or_get_global_tcp_store().add(key, value)
