"""Another image size from the same weights: the spatial projections, resampled.

    weights = load_weights(path)
    weights, _ = resample_weights(weights, model, path)
    assign_weights(model, weights, path)

A spatial projection mixes the n x n tokens of an image: out[j] = sum_i W[i, j] v[i] + b[j].  Here W
and b are functions of the tokens' positions in the image, which get values on another grid.  The
two sides of W are not alike:

- j is a place where a result is read: W and b are interpolated there.
- i is a place that is summed over: a token's weight is a density over its square of the image, and
  the new tokens get the density's integrals over their squares.  What an output adds up to stays
  the same, also where it is near zero and no scaling could restore it.

Both are cubic (Keys, a = -1/2), separate in y and x, aligned by the image's borders (half-pixel
centres), constant beyond them, and the identity at the same size.  demo/resolution_study.py
measures what they keep.
"""

import math

import numpy as np

from weights.pdparams import WeightsError

_PAD = 2  # tokens beyond a border that a cubic reaches


def resample_weights(weights, model, path):
    """A model's weights for images of another size, in patches of the same size.

    Args:
        weights: parameter names to arrays, as load_weights returns.
        model: the GMLP that they are for.
        path: where they are from, for the message.

    Returns:
        (weights, side): a dict with every spatial projection resampled, and how many tokens high
        and wide the old ones were; the same dict and None where they fit already.  What cannot be
        a projection is left as it is, for assign_weights to refuse.

    Raises:
        WeightsError: the old tokens are no square, or not the same in all blocks.
    """
    num_tokens = model.sizes.num_tokens
    weight_suffix, bias_suffix = f".{model.gate_name}.weight", f".{model.gate_name}.bias"
    old_tokens = set()
    resampled = dict(weights)
    for name, weight in weights.items():
        bias_name = name.removesuffix(weight_suffix) + bias_suffix
        bias = weights.get(bias_name)
        if (
            name.endswith(weight_suffix)
            and _is_projection(weight, bias)
            and len(bias) != num_tokens
        ):
            side = _side(len(bias), f"{path}: {name}")
            old_tokens.add(side)
            resampled[name], resampled[bias_name] = resample_projection(
                weight, bias, math.isqrt(num_tokens)
            )
    if len(old_tokens) > 1:
        raise WeightsError(f"{path}: its blocks have different numbers of tokens: this is no gMLP")
    return (resampled, old_tokens.pop()) if old_tokens else (weights, None)


def resample_projection(weight, bias, side):
    """A spatial projection for `side` x `side` tokens.

    Args:
        weight: float array [in_tokens, out_tokens] (Paddle's Linear), of a square grid in rows.
        bias: float array [out_tokens].
        side: height and width of the new grid.

    Returns:
        (weight, bias) of the same types, computed in float64; the same arrays at the same size.
    """
    old = _side(len(bias), "a spatial projection")
    if old == side:
        return weight, bias
    source, target = spread_matrix(old, side), interpolation_matrix(old, side)
    # [y, x] of the source tokens, then of the target tokens.
    weight4 = weight.astype("float64").reshape([old] * 4)
    bias2 = bias.astype("float64").reshape([old] * 2)
    matrices = (source, source, target, target)
    new_weight = np.einsum("ijkl,ai,bj,ck,dl->abcd", weight4, *matrices, optimize=True)
    new_bias = np.einsum("kl,ck,dl->cd", bias2, target, target)
    tokens = side * side
    return (
        new_weight.reshape(tokens, tokens).astype(weight.dtype),
        new_bias.reshape(tokens).astype(bias.dtype),
    )


def interpolation_matrix(old, new):
    """Values at the centres of `new` tokens from those at `old` ones: float64 [new, old].

    Rows sum to 1.
    """
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    return _cubic(centres + _PAD, old + 2 * _PAD) @ _padding(old)


def spread_matrix(old, new):
    """Densities of `old` tokens as sums over `new` tokens: float64 [new, old].

    Columns sum to 1: each old token's weight is shared out.  Rows sum to old / new.
    """
    # The integral up to a place is a cumulative sum, known at the old tokens' edges.
    tokens = old + 2 * _PAD
    cumulative = np.tril(np.ones((tokens + 1, tokens)), -1) @ _padding(old)
    edges = np.arange(new + 1) * old / new
    return np.diff(_cubic(edges + _PAD, tokens + 1) @ cumulative, axis=0)


def _cubic(positions, count):
    """Cubic interpolation between the values at 0 .. count - 1: [positions, count]."""
    # R. Keys, Cubic convolution interpolation for digital image processing, 1981: a = -1/2 is the
    # one that reproduces quadratics.
    x = np.abs(positions[:, None] - np.arange(count))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _padding(count):
    """Repeats the first and the last token beyond the borders: [count + 2 x _PAD, count]."""
    return np.eye(count)[np.clip(np.arange(-_PAD, count + _PAD), 0, count - 1)]


def _is_projection(weight, bias):
    return (
        bias is not None
        and bias.size > 0
        and weight.shape == (bias.size, bias.size)
        and bias.ndim == 1
        and weight.dtype.kind == bias.dtype.kind == "f"
    )


def _side(tokens, name):
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise WeightsError(
            f"{name} is for {tokens} tokens, which are no square: it cannot be resampled for "
            "another image size"
        )
    return side
