"""The sigmoid family's epilogue; its mathematics is described in ``objectives/sigmoid.py``."""

import triton
import triton.language as tl

from .tiles import Epilogue, is_target, load_vector, same_group


@triton.jit
def log1p(u):
    """For 0 <= u <= 1, to a few units in the last place however small u is.

    ``2 atanh(z)`` with ``z = u / (2 + u)``, at most 1/3, by its series ``z + z^3 / 3 + z^5 / 5 + ...``, of which seven
    terms leave out less than 2e-8 of the sum.
    """
    z = u / (2.0 + u)
    square = z * z
    sum = tl.full(u.shape, 1 / 13, tl.float32)
    for k in tl.static_range(11, 0, -2):
        sum = sum * square + 1 / k
    return 2.0 * z * sum


@triton.jit
def sigmoid_positive(row, column, inputs):
    if inputs.row_group is not None:
        return same_group(row, column, inputs)
    else:
        return is_target(row, column, inputs)


@triton.jit
def sigmoid_wrong_side(s, positive, inputs):
    """``-z l``: how far every logit is on the wrong side of 0."""
    logit = s * tl.load(inputs.scale).to(tl.float32)
    if inputs.bias is not None:
        logit += tl.load(inputs.bias).to(tl.float32)
    return tl.where(positive, -logit, logit)


@triton.jit
def sigmoid_slope(wrong, positive):
    """``-z sigmoid(-z l)``."""
    u = tl.exp(-tl.abs(wrong))
    w = tl.where(wrong > 0, 1.0, u) / (1.0 + u)
    return tl.where(positive, -w, w)


@triton.jit
def sigmoid_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero, zero, zero


@triton.jit
def sigmoid_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """(loss, sum of W, 0 for the table's row of weights)."""
    inside = (row < inputs.rows) & (column < inputs.columns)
    positive = sigmoid_positive(row, column, inputs)
    wrong = sigmoid_wrong_side(s, positive, inputs)
    loss = tl.maximum(wrong, 0.0) + log1p(tl.exp(-tl.abs(wrong)))
    total = tl.sum(tl.where(inside, loss, 0.0), AXIS)
    return total, tl.sum(tl.where(inside, sigmoid_slope(wrong, positive), 0.0), AXIS), tl.zeros_like(total)


@triton.jit
def sigmoid_merge(a, b, inputs):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def sigmoid_weights(s, row, column, inputs):
    """W of ``objectives/sigmoid.py``."""
    positive = sigmoid_positive(row, column, inputs)
    weight = load_vector(inputs.row_table + 2 * inputs.row_stride, row, inputs.rows)
    return weight * sigmoid_slope(sigmoid_wrong_side(s, positive, inputs), positive)


SIGMOID = Epilogue("sigmoid", sigmoid_empty, sigmoid_reduce, sigmoid_merge, sigmoid_weights)
