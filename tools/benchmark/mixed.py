"""Paddle's mixed precision on a CPU, by rounding where a GPU would; what its operators move.

`paddle.amp.auto_cast` switches itself off on a CPU.  `simulated` does what it does on a GPU: the
operators of a gMLP's forward pass take the types that Paddle's own lists say, and hand on real
tensors of these types.  Each computes in float32, and what it hands on is rounded, its gradients
too.  Within a product that is what tensor cores do, but for the order of their sums.  Other
kernels may round more often inside, or keep more than they hand on; LayerNorm's statistics are
float32 on both.
"""

import collections
import contextlib
from typing import NamedTuple
from unittest import mock

import paddle
from paddle import _C_ops
from paddle.amp.amp_lists import black_list, white_list

from gmlp import GMLP
from training.optim import Amp, build_autocast
from training.run import build_model

# Where the model finds its operators, and what AMP calls them.  nn.functional.linear is linear_v2
# where Paddle 3.3.1 is compiled with CUDA; Paddle 2.6 has none, and its lists do not name it.
OPERATORS = [
    (_C_ops, "conv2d", "conv2d"), (_C_ops, "linear", "linear_v2"), (_C_ops, "matmul", "matmul"),
    (_C_ops, "linear_v2", "linear_v2"), (_C_ops, "layer_norm", "layer_norm"),
    (_C_ops, "gelu", "gelu"), (_C_ops, "mean", "mean"), (_C_ops, "transpose", "transpose"),
    (_C_ops, "add", "add"), (paddle.Tensor, "__add__", "add"),
    (paddle.Tensor, "__mul__", "multiply"),
]  # fmt: skip
PRODUCTS = ("conv2d", "linear_v2", "matmul")  # each input's gradient is a kernel of its own
# What an operator's gradient needs of its inputs, by their places: what Paddle keeps of them.
SAVED = {
    **dict.fromkeys([*PRODUCTS, "multiply"], (0, 1)), **dict.fromkeys(["layer_norm", "gelu"], (0,))
}  # fmt: skip

WAYS = {
    "float32": None,
    "bfloat16, LayerNorm in float32": Amp("bfloat16"),
    "LayerNorm in bfloat16": Amp("bfloat16", layer_norm=True),
}


class Operator(NamedTuple):
    """An operator that ran: its name, its float tensors as it took them, and what it handed on."""

    name: str
    inputs: list
    outputs: list


@contextlib.contextmanager
def simulated(amp, record=None):
    """The context in which a model runs as under build_autocast(amp) on a GPU.

    Args:
        amp: an optim.Amp, or None: everything in the types that it has.
        record: a list; gets an Operator for each that runs, and for each cast.
    """
    record = [] if record is None else record
    with contextlib.ExitStack() as stack:
        for place, attribute, name in OPERATORS:
            compute = getattr(place, attribute, None)
            if compute:
                ruled = _ruled(name, compute, _type_rule(amp, name), record)
                stack.enter_context(mock.patch.object(place, attribute, ruled))
        yield


def _type_rule(amp, name):
    """The type in which an operator takes its inputs, as a function of theirs; None: as they are.

    paddle/fluid/eager/amp_utils.h: an operator on neither list takes float32 where an input does.
    """
    if not amp:
        return lambda types: None
    options, dtype = build_autocast(amp).keywords, getattr(paddle, amp.dtype)
    custom = options.get("custom_white_list", set())
    if name in custom or name in white_list()[amp.dtype][options["level"]]:
        return lambda types: dtype
    if name in black_list()[amp.dtype][options["level"]]:
        return lambda types: paddle.float32
    return lambda types: paddle.float32 if paddle.float32 in types else dtype


def _ruled(name, compute, type_rule, record):
    def cast(tensor, dtype):
        if tensor.dtype == dtype:
            return tensor
        result = tensor.astype(dtype)
        record.append(Operator("cast", [tensor], [result]))
        return result

    def run(*args, **options):
        args = list(args)
        floats = [i for i, arg in enumerate(args) if _is_float(arg)]
        dtype = type_rule([args[i].dtype for i in floats])
        if dtype is None:
            output = compute(*args, **options)
        else:
            # Of LayerNorm's inputs x alone is cast (paddle/fluid/eager/amp_auto_cast.h).
            for i in floats[:1] if name == "layer_norm" else floats:
                args[i] = cast(args[i], dtype)
            wide = [arg.astype("float32") if _is_float(arg) else arg for arg in args]
            output = compute(*wide, **options).astype(dtype)
        record.append(Operator(name, [args[i] for i in floats], [output]))
        return output

    return run


def _is_float(value):
    return isinstance(value, paddle.Tensor) and value.is_floating_point()


# --- memory traffic ---


def num_bytes(tensors):
    return sum(int(tensor.size) * tensor.element_size() for tensor in tensors)


def forward_bytes(operator):
    """What an operator reads and writes, each tensor once."""
    return num_bytes([*operator.inputs, *operator.outputs])


def backward_bytes(operator):
    """What its gradients' kernels read and write, each tensor once per kernel."""
    needed = [not tensor.stop_gradient for tensor in operator.inputs]
    gradients = [tensor for tensor in operator.inputs if not tensor.stop_gradient]
    if operator.name == "add" and needed[0]:
        # The output's becomes the first input's, in place (paddle/phi/ops/yaml/backward.yaml).
        gradients = gradients[1:]
    kernels = len(gradients) if operator.name in PRODUCTS else min(1, len(gradients))
    places = SAVED.get(operator.name, ())
    if len(places) == 2:  # one factor's gradient takes the other factor
        places = [1 - place for place in places if needed[place]]
    saved = [operator.inputs[place] for place in places]
    return kernels * num_bytes(operator.outputs) + num_bytes(saved + gradients)


def count_bytes(model, images, amp):
    """What a forward and a backward pass move and keep.

    Returns:
        A Counter of bytes by (operator, "forward" or "backward"), where a "sum" is of the gradients
        of what is used more than once; and by (operator, "kept"), what its gradient needs of it.
    """
    record, counted = [], collections.Counter()
    sizes = model.sizes
    with simulated(amp, record):
        model(paddle.zeros([images, sizes.in_channels, sizes.image_size, sizes.image_size]))
    used, kept = set(), set()  # by id: the record holds the tensors, so that none has another's
    for operator in record:
        counted[operator.name, "forward"] += forward_bytes(operator)
        counted[operator.name, "backward"] += backward_bytes(operator)
        has_gradient = not all(tensor.stop_gradient for tensor in operator.inputs)
        for place, tensor in enumerate(operator.inputs):
            saves = has_gradient and place in SAVED.get(operator.name, ())
            if saves and id(tensor) not in kept:
                counted[operator.name, "kept"] += num_bytes([tensor])
                kept.add(id(tensor))
            if id(tensor) in used and not tensor.stop_gradient:
                counted["sum", "backward"] += 3 * num_bytes([tensor])
            used.add(id(tensor))
    return counted


def image_bytes(sizes, amp):
    """count_bytes of an image in training, without the weights, which a batch reads once.

    Returns:
        Those of a block, of a model of one block, and of the whole model.
    """

    def of_depth(depth):
        model = GMLP(sizes._replace(depth=depth))
        counted = count_bytes(model, 2, amp)
        counted.subtract(count_bytes(model, 1, amp))
        return counted

    one, block = of_depth(1), of_depth(2)
    block.subtract(one)
    whole = {key: one[key] + (sizes.depth - 1) * block[key] for key in block}
    return block, one, whole


def total(counted, kind):
    """All bytes of a kind: "forward", "backward" or "kept"."""
    return sum(count for (_, own), count in counted.items() if own == kind)


def show_traffic(bench, batch_size):
    """A table of a block's operators, and of the whole model, in float32 and mixed precision."""
    sizes, gigabytes = build_model(bench.config).sizes, batch_size / 1e9
    results = {}
    for way, amp in WAYS.items():
        block, _, whole = image_bytes(sizes, amp)
        rows = {name: [block[name, "forward"], block[name, "backward"]] for name, _ in +block}
        for name, counted in (("a block", block), ("the model", whole)):
            rows[name] = [total(counted, "forward"), total(counted, "backward")]
            rows[f"{name}, kept"] = [total(counted, "kept")]
        for name, parts in rows.items():
            row = results.setdefault(name, {"name": name, **{each: [0, 0] for each in WAYS}})
            row[way] = [gigabytes * part for part in parts]
    rows = sorted(results.values(), key=lambda row: (" " in row["name"], row["name"]))
    cells = [
        {"": row["name"], **{way: " + ".join(f"{part:.2f}" for part in row[way]) for way in WAYS}}
        for row in rows
    ]
    title = f"GB moved for {batch_size} images of {bench.config.MODEL.NAME}, forward + backward"
    bench.show(f"{title}, a block's operators", rows, cells)
