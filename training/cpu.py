"""Gradients that take a CPU less time than Paddle's own, for the layers of a gMLP.

    speed_up(model)  # before its first step; what it computes stays the same

Paddle sums gradients of LayerNorms and biases on one core, number by number, and pads those of a
weight's halves with zeros.  Here sums are products with ones, which MKL computes on all cores.
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
        if type(layer) in _FUNCTIONS:
            layer.forward = types.MethodType(_forward, layer)  # which a deep copy makes its own


def _forward(layer, x):
    inputs = x, layer.weight, layer.bias
    # In a program (paddle.jit), and where anything is frozen, the layer's own.
    if not paddle.in_dynamic_mode() or any(tensor.stop_gradient for tensor in inputs):
        return type(layer).forward(layer, x)
    return _FUNCTIONS[type(layer)].apply(layer, *inputs)


def _sum_rows(matrix):
    """The sum of a matrix's rows: [rows, columns] -> [columns]."""
    return paddle.matmul(paddle.ones([1, matrix.shape[0]], matrix.dtype), matrix).flatten()


class _Halves(PyLayer):
    """gmlp.HalvedLinear.  [..., inner] -> two [..., outer / 2]"""

    @staticmethod
    def forward(ctx, layer, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return HalvedLinear.forward(layer, x)

    @staticmethod
    def backward(ctx, first, second):
        x, weight = ctx.saved_tensor()
        gradient = paddle.concat([first, second], axis=-1)
        rows = gradient.flatten(0, -2)
        of_weight = paddle.matmul(x.flatten(0, -2), rows, transpose_x=True)
        return paddle.matmul(gradient, weight, transpose_y=True), of_weight, _sum_rows(rows)


class _Norm(PyLayer):
    """LayerNorm over the last axis, whose statistics the backward pass computes once more."""

    @staticmethod
    def forward(ctx, layer, x, weight, bias):
        ctx.save_for_backward(x.contiguous(), weight)  # recomputation forgets a view's strides
        ctx.epsilon = layer._epsilon
        return nn.LayerNorm.forward(layer, x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        rows, g = x.flatten(0, -2), gradient.flatten(0, -2)
        mean = paddle.full([rows.shape[1], 1], 1 / rows.shape[1], x.dtype)  # of a row, as a product
        rows = rows - paddle.matmul(rows, mean)
        scale = paddle.rsqrt(paddle.matmul(rows * rows, mean) + ctx.epsilon)
        rows.multiply_(scale)
        product, means = g * rows, mean * weight.unsqueeze(1)
        g_x = (g * weight).subtract_(paddle.matmul(g, means))
        g_x.subtract_(rows.multiply_(paddle.matmul(product, means))).multiply_(scale)
        return g_x.reshape(x.shape), _sum_rows(product), _sum_rows(g)


_FUNCTIONS = {HalvedLinear: _Halves, nn.LayerNorm: _Norm}
