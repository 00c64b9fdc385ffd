"""The sigmoid family's epilogue; its mathematics is described in ``objectives/sigmoid.py``."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .softmax import LOG2_E
from .tiles import Epilogue, is_target, load_vector, same_group

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FACTORS = tl.constexpr(64)
"""Factors ``1 + u``, of 2 at most, in one product: 128 of them could overflow."""


@triton.jit
def log1p(u):
    """For u >= 0, to a few units in the last place however small u is.

    Up to 1 ``2 atanh(z)`` with ``z = u / (2 + u)``, at most 1/3, by its series ``z + z^3 / 3 + z^5 / 5 + ...``, of
    which seven terms leave out less than 2e-8 of the sum.
    """
    z = u / (2.0 + u)
    square = z * z
    sum = tl.full(u.shape, 1 / 13, tl.float32)
    for k in tl.static_range(11, 0, -2):
        sum = sum * square + 1 / k
    return tl.where(u <= 1.0, 2.0 * z * sum, tl.log(1.0 + u))


@triton.jit
def sigmoid_given(x, u):
    """A sigmoid of x, given ``u = exp(-|x|)`` or its power of 2: ``1 / (1 + u)``, and times u where x is not above 0.

    On an NVIDIA GPU by a reciprocal of one instruction, right to 1 unit in the last place, where a division takes five.
    In one piece: the compiler would decide for all entries which are negative before it needs it, and keep that packed
    in bits, five instructions an entry.
    """
    if INTERPRETED:
        return tl.where(x > 0, 1.0, u) * (1.0 / (1.0 + u))
    elif is_cuda():
        return tl.inline_asm_elementwise(
            """{
            .reg .pred above;
            .reg .f32 numerator, denominator;
            add.f32 denominator, $2, 0f3F800000;
            rcp.approx.ftz.f32 denominator, denominator;
            setp.gt.f32 above, $1, 0f00000000;
            selp.f32 numerator, 0f3F800000, $2, above;
            mul.f32 $0, numerator, denominator;
            }""",
            "=f,f,f", [x, u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(x > 0, 1.0, u) * (1.0 / (1.0 + u))


@triton.jit
def exp2(x):
    """``2^x``, one instruction on an NVIDIA GPU, where results below 2^-126 take three more; there these are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def compound(a, b):
    """``(1 + a)(1 + b) - 1``, which keeps the digits of small a and b."""
    return a + b + a * b


@triton.jit
def sigmoid_positive(row, column, inputs):
    if inputs.row_group is not None:
        return same_group(row, column, inputs)
    else:
        return is_target(row, column, inputs)


@triton.jit
def sigmoid_wrong_side(s, positive, column, inputs):
    """``-z l`` in units of ln 2: how far every logit is on the wrong side of 0; -inf past the last column.

    ``positive``: which are, or None: none is.
    """
    logit = s * (tl.load(inputs.scale).to(tl.float32) * LOG2_E)
    if inputs.bias is not None:
        logit += tl.load(inputs.bias).to(tl.float32) * LOG2_E
    if positive is not None:
        logit = tl.where(positive, -logit, logit)
    return tl.where(column < inputs.columns, logit, float("-inf"))


@triton.jit
def sigmoid_slope(wrong, positive):
    """``-z sigmoid(-z l)``."""
    w = sigmoid_given(wrong, exp2(-tl.abs(wrong)))
    if positive is not None:
        w = tl.where(positive, -w, w)
    return w


@triton.jit
def sigmoid_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero, zero, zero


@triton.jit
def sigmoid_totals(s, positive, column, inputs):
    """(loss, sum of W, 0 for the table's row of weights) of every row.

    ``sum_j log1p(u_j)``, with ``u_j = exp(-|l_ij|)``, is the logarithm of a product: one logarithm for 64 entries.
    """
    wrong = sigmoid_wrong_side(s, positive, column, inputs)
    u = exp2(-tl.abs(wrong))
    width: tl.constexpr = min(u.shape[1], _FACTORS)
    products = tl.reduce(tl.reshape(u, [u.shape[0], u.shape[1] // width, width]), 2, compound)
    loss = tl.sum(tl.maximum(wrong, 0.0), 1) / LOG2_E + tl.sum(log1p(products), 1)
    return loss, tl.sum(sigmoid_slope(wrong, positive), 1), tl.zeros_like(loss)


@triton.jit
def sigmoid_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    tl.static_assert(AXIS == 1, "columns have no statistics")
    return sigmoid_totals(s, sigmoid_positive(row, column, inputs), column, inputs)


@triton.jit
def sigmoid_off_diagonal_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """Of entries none of which is positive."""
    tl.static_assert(AXIS == 1, "columns have no statistics")
    return sigmoid_totals(s, None, column, inputs)


@triton.jit
def sigmoid_merge(a, b, inputs):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def sigmoid_weights(s, row, column, inputs):
    """W of ``objectives/sigmoid.py``."""
    positive = sigmoid_positive(row, column, inputs)
    weight = load_vector(inputs.row_table + 2 * inputs.row_stride, row, inputs.rows)
    return weight * sigmoid_slope(sigmoid_wrong_side(s, positive, column, inputs), positive)


@triton.jit
def sigmoid_off_diagonal(s, row, column, inputs):
    """Of entries none of which is positive."""
    weight = load_vector(inputs.row_table + 2 * inputs.row_stride, row, inputs.rows)
    return weight * sigmoid_slope(sigmoid_wrong_side(s, None, column, inputs), None)


@triton.jit
def sigmoid_combine(of_row):
    """(loss, sum of W) of the rows of ``objectives/sigmoid.py``."""
    return of_row[0], of_row[1] * of_row[2]


SIGMOID = Epilogue(
    "sigmoid", sigmoid_empty, sigmoid_reduce, sigmoid_merge, sigmoid_weights,
    off_diagonal=sigmoid_off_diagonal, off_diagonal_reduce=sigmoid_off_diagonal_reduce, additive=True,
    combine=sigmoid_combine,
)  # fmt: skip
