"""Gradients that take a CPU less time than Paddle's own, for the layers of a gMLP.

    speed_up(model)  # before its first step; what it computes stays the same

Paddle sums gradients of LayerNorms and biases on one core, number by number, and pads those of a
weight's halves with zeros.  Here sums are products with ones, which MKL computes on all cores.
As with any PyLayer, a graph is for one backward(): not for retain_graph, nor for paddle.grad.
Who needs these, or changes what a layer has read in place, leaves speed_up() out.
"""

import types

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from gmlp import HalvedLinear


def speed_up(model):
    """Gives the layers of a gMLP these gradients; a GPU has better of its own."""
    if paddle.get_device() != "cpu":
        return
    for layer in model.sublayers():
        if type(layer) in _GRADIENTS:
            layer.forward = types.MethodType(_forward, layer)  # a deep copy has its own


def _forward(self, x):
    inputs = x, self.weight, self.bias
    # As it was in a program (paddle.jit), and where something is frozen or not there.
    if not paddle.in_dynamic_mode() or any(one is None or one.stop_gradient for one in inputs):
        return type(self).forward(self, x)
    return _Layer.apply(self, *inputs)


class _Layer(PyLayer):
    @staticmethod
    def forward(ctx, layer, x, weight, bias):  # parameters are arguments to get gradients
        x = x.contiguous()  # recomputation forgets a view's strides
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.versions = layer, (x.inplace_version, weight.inplace_version)
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensor()
        if (x.inplace_version, weight.inplace_version) != ctx.versions:
            raise RuntimeError(f"input or weight changed in place before backward(): {ctx.layer}")
        return _GRADIENTS[type(ctx.layer)](ctx.layer, x, weight, *gradients)


def _of_halves(layer, x, weight, first, second):
    """HalvedLinear's gradients, of input, weight and bias; `first`, `second`: of its outputs."""
    gradient = paddle.concat([first, second], axis=-1)
    rows = gradient.flatten(0, -2)
    of_weight = paddle.matmul(x.flatten(0, -2), rows, transpose_x=True)
    return paddle.matmul(gradient, weight, transpose_y=True), of_weight, _sum_rows(rows)


def _of_norm(layer, x, weight, gradient):
    """LayerNorm's gradients, of input, weight and bias; the statistics are computed once more."""
    width = weight.shape[0]
    x_rows, rows = x.reshape([-1, width]), gradient.reshape([-1, width])
    average = paddle.full([width, 1], 1 / width, x.dtype)  # a product with it has the rows' means
    normal = x_rows - paddle.matmul(x_rows, average)
    scale = paddle.rsqrt(paddle.matmul(normal * normal, average) + layer._epsilon)
    normal.multiply_(scale)
    of_weight, weighted = rows * normal, average * weight.unsqueeze(1)
    of_x = (rows * weight).subtract_(paddle.matmul(rows, weighted))
    of_x.subtract_(normal.multiply_(paddle.matmul(of_weight, weighted))).multiply_(scale)
    return of_x.reshape(x.shape), _sum_rows(of_weight), _sum_rows(rows)


def _sum_rows(matrix):
    """The sum of a matrix's rows: [rows, columns] -> [columns]."""
    return paddle.matmul(paddle.ones([1, matrix.shape[0]], matrix.dtype), matrix).flatten()


_GRADIENTS = {HalvedLinear: _of_halves, nn.LayerNorm: _of_norm}
