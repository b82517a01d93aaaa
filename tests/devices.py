"""What tests compute on: the CPU, where there are GPUs too, unless a test asks for one of those.

Paddle would take GPU 0.  To be imported before Paddle is.
"""

import contextlib
import gc
import os
from typing import NamedTuple, Optional

# CUDA's libraries read it when Paddle loads them: float32 is float32 in this process, without TF32
# and its 10 bits.  The programs that tests start compute as users' do (program.py).
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import paddle

_VISIBLE, _count_gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), paddle.device.cuda.device_count
GPUS = _count_gpus()


class Device(NamedTuple):
    """What a test computes on."""

    name: str  # "cpu" or "gpu"
    count: int  # how many ranks have one each
    visible: Optional[str]  # CUDA_VISIBLE_DEVICES of a program that computes there; None: unset


CPU, GPU = Device("cpu", 2, ""), Device("gpu", GPUS, _VISIBLE)


def hide_gpus():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    paddle.device.cuda.device_count = lambda: 0
    paddle.set_device("cpu")


def why_cpu():
    """Why this process is to compute on the CPU whatever there is; "" where it is not."""
    if not paddle.is_compiled_with_cuda():
        return f"Paddle {paddle.__version__} here is a wheel for the CPU"
    if _VISIBLE is not None and _VISIBLE.strip() in ("", "-1"):  # as in parallel test processes
        return f"CUDA_VISIBLE_DEVICES is {_VISIBLE!r}, which asks for the CPU"
    return ""


def why_no_gpu():
    """Why this process has no GPU; "" where it has one."""
    return "" if GPUS else why_cpu() or "Paddle finds no GPU on this machine"


@contextlib.contextmanager
def show_gpus():
    """In here Paddle has its GPUs, the first of which computes."""
    if _VISIBLE is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE
    paddle.device.cuda.device_count = _count_gpus
    paddle.set_device("gpu:0")
    try:
        yield
    finally:
        gc.collect()  # what a test leaves on the GPU, for the next one
        hide_gpus()
