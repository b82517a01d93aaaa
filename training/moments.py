"""An optimizer's tensors under structured names, such as `head.weight.moment1`.

Paddle's own names ("linear_0.w_0_moment1_0") depend on what else a process has created.  Files of
other programs, such as PaddleViT's, have the state under them, and tell each parameter's.
"""

import collections
import re

import numpy as np
import paddle

# A parameter's name, the tensor's kind, a number (Optimizer._add_accumulator in
# paddle/optimizer/optimizer.py).
_OWN_NAME = re.compile(r"(.+?\.[wb]_\d+)_(\w+)_\d+")


def optimizer_state(optimizer, model):
    """The optimizer's tensors under structured names."""
    state = optimizer.state_dict()
    return {name: state[own] for name, own in _state_names(model, state).items()}


def under_structured_names(state, parameters):
    """An optimizer's state of another process, under structured names.

    Args:
        state: a dict, as Paddle's `optimizer.state_dict()` or optimizer_state gave it.
        parameters: the names that parameters had in that process, to their structured names.

    Returns:
        A dict with the same values.  What is no tensor of one of the parameters keeps its name, as
        do two tensors of one kind and parameter.  What is no dict is returned as it is.
    """
    if not isinstance(state, dict):
        return state
    names = {own: _structured(own, parameters) or own for own in state}
    counts = collections.Counter(names.values())
    return {name if counts[name] == 1 else own: state[own] for own, name in names.items()}


def _structured(own, parameters):
    """The structured name for Paddle's own, None for what is no tensor of these parameters."""
    match = _OWN_NAME.fullmatch(str(own))
    if match and match[1] in parameters:
        return f"{parameters[match[1]]}.{match[2]}"
    return None


def _state_names(model, state):
    """Structured name of each tensor of an optimizer's state -> Paddle's own name."""
    parameters = {param.name: name for name, param in model.named_parameters()}
    names = {_structured(own, parameters): own for own in state}
    return {name: own for name, own in names.items() if name}


def restore_optimizer(optimizer, model, state):
    """Loads what optimizer_state gave, all or none.

    Args:
        optimizer: before its first step, which is changed.
        model: whose parameters it trains.
        state: structured names to arrays; None for no state.

    Returns:
        (missing, unused): the names of the tensors that the state has not in the optimizer's
        shapes, [] where it was loaded; and of those in it that the optimizer has not.
    """
    _create_accumulators(optimizer, [p for p in model.parameters() if not p.stop_gradient])
    current = optimizer.state_dict()
    names = _state_names(model, current)
    state = state if isinstance(state, dict) else {}
    missing = [name for name, own in names.items() if not _fits(state.get(name), current[own])]
    unused = [name for name in state if isinstance(state[name], np.ndarray) and name not in names]
    for name, own in names.items() if not missing else ():
        # Where it was: AdamW has the powers of its betas on the host, and with them on a GPU each
        # parameter would take a launch more (paddle/optimizer/adam.py).
        old = current[own]
        old.set_value(paddle.to_tensor(state[name], dtype=old.dtype, place=old.place))
    return missing, unused


def _fits(array, tensor):
    shape, kind = getattr(array, "shape", None), getattr(array, "dtype", np.dtype("O")).kind
    return shape == tuple(tensor.shape) and kind == "f"


def _create_accumulators(optimizer, parameters):
    """Makes an optimizer's state now; Paddle makes it at the first step, under its own names."""
    if optimizer.helper is None:  # Paddle 3 makes one here by itself
        optimizer.helper = paddle.base.layer_helper.LayerHelper(type(optimizer).__name__)
    block = paddle.static.default_main_program().global_block()
    optimizer._create_accumulators(block, parameters)
