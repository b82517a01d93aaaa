"""tools/benchmark/mixed.py: mixed precision simulated on a CPU, and the bytes that are counted."""

import collections
import json

import numpy as np
import paddle
import pytest
from paddle.amp.amp_lists import white_list
from paddle.nn import functional as F
from program import CONFIG, run_tool

from gmlp import GMLP, Sizes
from tools.benchmark import __main__ as benchmark
from tools.benchmark import mixed
from tools.benchmark.mixed import simulated
from training.optim import Amp

SIZES = Sizes(16, 3, 10, 4, dim=8, depth=2, mlp_ratio=4.0, drop_path=0.1)
TOKENS = [2, 16]  # of the images
FLOAT32 = paddle.float32
NORMS_TOO = [False, True]
AMPS = [Amp(dtype, norm) for dtype in ("bfloat16", "float16") for norm in NORMS_TOO]
needs_linear_v2 = pytest.mark.skipif(
    "linear_v2" not in white_list()["bfloat16"]["O1"],
    reason="this Paddle's nn.Linear has other rules under AMP",
)


def images(sizes=SIZES, count=2):
    shape = [count, sizes.in_channels, sizes.image_size, sizes.image_size]
    return paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype("float32"))


def recorded(amp, module=None, x=None):
    record = []
    with simulated(amp, record):
        (module or GMLP(SIZES))(images() if x is None else x)
    return record


def is_tokens(tensor):
    return tensor.shape[:2] == TOKENS


@needs_linear_v2
@pytest.mark.parametrize("amp", AMPS)
def test_operators_take_the_types_that_paddles_lists_say(amp):
    dtype, types = getattr(paddle, amp.dtype), collections.defaultdict(set)
    for operator in recorded(amp):
        inputs = operator.inputs
        if operator.name == "layer_norm":
            inputs, parameters = inputs[:1], inputs[1:]
            assert {tensor.dtype for tensor in parameters} == {FLOAT32}
        # Stochastic depth multiplies numbers of a sample, which have no tokens.
        if operator.name != "multiply" or any(map(is_tokens, inputs)):
            types[operator.name] |= {tensor.dtype for tensor in inputs}
        if operator.name not in ("cast", "mean"):
            assert {tensor.dtype for tensor in operator.outputs} == {inputs[0].dtype}
    for name in ("conv2d", "linear_v2", "matmul", "gelu", "multiply"):
        assert types[name] == {dtype}, name
    assert types["layer_norm"] == {dtype if amp.layer_norm else FLOAT32}
    assert types["mean"] == {FLOAT32}
    assert types["add"] == {FLOAT32, dtype}  # the residual stream; the bias along the tokens


@needs_linear_v2
@pytest.mark.parametrize("norm", NORMS_TOO)
def test_with_layer_norm_in_the_amp_type_the_residual_stream_alone_is_float32(norm):
    block = GMLP(SIZES).mixer_layers[0]
    x = paddle.randn([*TOKENS, SIZES.dim])
    record = recorded(Amp("bfloat16", norm), block, x)
    wide = {
        id(tensor)
        for operator in record
        for tensor in (*operator.inputs, *operator.outputs)
        if tensor.dtype == FLOAT32 and is_tokens(tensor)
    }
    last = record[-1]
    stream = {id(tensor) for tensor in (x, *last.inputs, *last.outputs)}
    assert last.name == "add" and len(stream) == 3  # x, what is added to it, their sum
    assert (wide == stream) is norm and wide >= stream


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_rounded_numbers_are_rounded_and_so_are_the_gradients(dtype):
    def rounded(tensor):
        return tensor.astype(dtype).astype("float32")

    x, weight = paddle.randn([4, 8]), paddle.randn([8, 5])
    x.stop_gradient = weight.stop_gradient = False
    with simulated(Amp(dtype)):
        y = paddle.matmul(x, weight)
    assert y.dtype == getattr(paddle, dtype)
    exact = paddle.matmul(rounded(x), rounded(weight))
    assert (y.astype("float32") == rounded(exact)).all()
    factor = paddle.randn([4, 5])  # of which the backward pass gets the rounded numbers
    (y.astype("float32") * factor).sum().backward()
    expected = rounded(paddle.matmul(rounded(factor), rounded(weight), transpose_y=True))
    assert x.grad.dtype == FLOAT32 and (x.grad == expected).all()


@needs_linear_v2
def test_a_gpu_wheels_linear_layer_is_the_same_operator(gpu_wheel, request):
    there = [operator.name for operator in recorded(AMPS[0])]
    request.getfixturevalue("monkeypatch").undo()
    assert there == [operator.name for operator in recorded(AMPS[0])] and "linear_v2" in there


def test_without_amp_and_outside_of_the_context_nothing_is_rounded():
    model = GMLP(SIZES._replace(drop_path=0.0))
    before = [getattr(place, name, None) for place, name, _ in mixed.OPERATORS]
    exact = model(images())
    with simulated(None):
        assert (model(images()) == exact).all()
    with pytest.raises(RuntimeError), simulated(Amp("bfloat16")):
        raise RuntimeError
    assert [getattr(place, name, None) for place, name, _ in mixed.OPERATORS] == before
    assert (model(images()) == exact).all()


@needs_linear_v2
def test_the_bytes_of_operators_are_those_counted_by_hand():
    x = paddle.randn([10, 16])
    x.stop_gradient = False
    linear = paddle.nn.Linear(16, 32)

    def steps(x):
        return F.layer_norm(F.gelu(linear(x)), [32]).mean()

    counted = {
        operator.name: (mixed.forward_bytes(operator), mixed.backward_bytes(operator))
        for operator in recorded(Amp("bfloat16", layer_norm=True), steps, x)
        if operator.name != "cast" or operator.inputs[0].shape == x.shape
    }
    weight, narrow, wide = 2 * 16 * 32, 2 * 10 * 16, 2 * 10 * 32
    assert counted["linear_v2"] == (
        narrow + weight + 64 + wide,
        # Each of three gradients takes the output's; x's takes the weight too, the weight's x.
        3 * wide + (weight + narrow) + (narrow + weight + 64),
    )
    assert counted["gelu"] == (2 * wide, 3 * wide)
    assert counted["layer_norm"] == (2 * wide, 3 * wide)
    assert counted["mean"] == (2 * wide + 4, 4 + 2 * wide)  # in float32
    residual = recorded(None, lambda x: x + x, x)[0]
    assert mixed.backward_bytes(residual) == 2 * 4 * 160  # one copy; the other is in place


def test_gradients_of_what_is_used_twice_are_summed():
    model = GMLP(SIZES._replace(drop_path=0.0))
    counted = mixed.count_bytes(model, 2, None)
    tokens = 4 * 2 * 16 * SIZES.dim
    # A block's input, and in it what fc1's halves share: each 3 accesses.  (Weights: as halves.)
    assert counted["sum", "backward"] == SIZES.depth * 2 * 3 * tokens


def test_what_is_kept_is_what_paddle_keeps():
    sizes = SIZES._replace(drop_path=0.0)
    _, _, whole = mixed.image_bytes(sizes, None)
    statistics = (2 * sizes.depth + 1) * 2 * 4 * sizes.num_tokens  # LayerNorm's
    assert mixed.total(whole, "kept") + statistics == kept_by_paddle(
        GMLP(sizes), 2
    ) - kept_by_paddle(GMLP(sizes), 1)


def kept_by_paddle(model, count):
    tensors = {}  # the objects too, so that no memory is used twice

    def keep(tensor):
        tensors[tensor.data_ptr()] = tensor
        return tensor

    with paddle.autograd.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images(model.sizes, count))
    return mixed.num_bytes(tensors.values())


def read_results(path):
    return json.loads(path.read_text())["results"]


def test_the_table_of_traffic_adds_up(tmp_path):
    path = tmp_path / "traffic.json"
    args = ["traffic", "-cfg", CONFIG, "-batch_size", 32, "-json", path]
    result = run_tool(benchmark, *args).check()
    (table,) = read_results(path)
    rows = {row["name"]: row for row in table["rows"]}
    assert "layer_norm" in rows and "layer_norm" in result.out
    for way in mixed.WAYS:
        block, step = rows["a block"][way], rows["the model"][way]
        operators = [row[way] for name, row in rows.items() if " " not in name]
        assert np.allclose(np.sum(operators, axis=0), block)
        assert all(whole > 4 * one for whole, one in zip(step, block))
        assert rows["a block, kept"][way][0] < block[0]


@pytest.mark.slow
def test_rounding_is_measured_on_logits_and_on_a_training(tmp_path):
    path = tmp_path / "rounding.json"
    run_tool(benchmark, "rounding", "-batches", 12, "-json", path).check()
    ((exact, *rounded, other_seed),) = (table["rows"] for table in read_results(path))
    assert exact["error"] == exact["difference"] == 0
    for row in rounded:
        low, high = (1e-3, 1e-2) if row["name"].startswith("bfloat16") else (1e-4, 1e-3)
        assert low < row["error"] < high
        assert 0 < row["difference"] < other_seed["difference"]
    assert len(rounded) == 4 and len(exact["losses"]) == 12
