"""What Paddle 2.6 does otherwise than Paddle 3: no other file asks for versions."""

import inspect

import paddle
from paddle.nn import initializer as init


def truncated_normal(std):
    """An initializer: normal around 0, cut off at two standard deviations."""
    if "a" in inspect.signature(init.TruncatedNormal).parameters:
        return init.TruncatedNormal(std=std, a=-2 * std, b=2 * std)
    return init.TruncatedNormal(std=std)  # 2.6 cuts off there, and nowhere else


def recompute(block, x):
    """block(x), which the backward pass computes once more instead of keeping what is inside."""
    # Imported where it is used: fleet takes a second.
    from paddle.distributed.fleet.utils import recompute

    # Otherwise a parameter's gradient is ready more than once, which DataParallel refuses.
    return recompute(block, x, use_reentrant=False)


def can_recompute():
    """Whether recompute() works on the current device: Paddle 2.6 needs a GPU for it."""
    return paddle.get_device() != "cpu" or not paddle.__version__.startswith("2.")


def can_compile():
    """Whether Paddle Inference runs the model with oneDNN here: 2.6.2's GPU wheel crashes."""
    return paddle.get_device() == "cpu" and not paddle.__version__.startswith("2.")


def create_accumulators(optimizer, parameters):
    """Makes an optimizer's state now, where Paddle does it at the first step."""
    if optimizer.helper is None:  # 3 makes one here by itself
        optimizer.helper = paddle.base.layer_helper.LayerHelper(type(optimizer).__name__)
    block = paddle.static.default_main_program().global_block()
    optimizer._create_accumulators(block, parameters)
