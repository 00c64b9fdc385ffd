"""What the epilogues of declared losses are written in; their text is printed by ``replearn_kernels/declare``."""

import triton
import triton.language as tl

from .configs import INTERPRETED
from .sigmoid import log1p, sigmoid_given
from .softmax import rate_of as rate_of
from .softmax import signed as signed
from .tiles import HIGHEST, LOWEST, inside_tile, is_target, load_vector, same_group, similarity_tile

every_pairs = inside_tile
_GUIDE_BLOCK_K = tl.constexpr(32)  # features of the guide at a time
_UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's dot takes the bits of bf16 for integers


@triton.jit
def target_pairs(row, column, inputs):
    """Which entries are a row with its target."""
    pairs = inside_tile(row, column, inputs)
    if (inputs.target is not None) | (inputs.own is not None):
        return pairs & is_target(row, column, inputs)
    else:
        return pairs & (row < 0)


@triton.jit
def same_pairs(row, column, inputs):
    """Which entries are pairs of one group; without groups, a row with its target."""
    if inputs.row_group is not None:
        return inside_tile(row, column, inputs) & same_group(row, column, inputs)
    else:
        return target_pairs(row, column, inputs)


@triton.jit
def other_pairs(row, column, inputs):
    return inside_tile(row, column, inputs) & (same_pairs(row, column, inputs) == 0)


@triton.jit
def guide_tile(row, column, inputs):
    """The guide's similarities of all entries: a product of its own, in the dtype of the guide's features.

    Not of a tile that is transposed: no gradient's kernel forms W of a loss with a guide. fp32 features are multiplied
    in fp32 whatever the setting for products is: who filters by a threshold reads single digits.
    """
    rows = tl.minimum(tl.reshape(row, [row.numel]), inputs.rows - 1)  # of what is past the edge, the last one's
    columns = tl.minimum(tl.reshape(column, [column.numel]), inputs.columns - 1)
    return similarity_tile(
        inputs.row_guide, inputs.row_guide_stride, rows, inputs.column_guide, inputs.column_guide_stride, columns,
        inputs.guide_width, _GUIDE_BLOCK_K, "ieee", _UPCAST,
    )  # fmt: skip


@triton.jit
def relu(x):
    """``x``, but 0 below 0; NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``, with all its digits where it is near 0."""
    return relu(x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    return sigmoid_given(x, tl.exp(-tl.abs(x)))


@triton.jit
def minimum(a, b):
    """The smaller one, NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """The larger one, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold(v, rate, AXIS: tl.constexpr):
    """Return (max, sum of exp) along AXIS; values at -inf do not count."""
    top = tl.maximum(tl.max(v, AXIS), LOWEST)
    return top, tl.sum(tl.exp2((v - tl.expand_dims(top, AXIS)) * rate), AXIS)


@triton.jit
def fold_weights(v, rate, AXIS: tl.constexpr):
    """Return (max, sum of exp) along AXIS, and every exp."""
    top = tl.maximum(tl.max(v, AXIS), LOWEST)
    weights = tl.exp2((v - tl.expand_dims(top, AXIS)) * rate)
    return top, tl.sum(weights, AXIS), weights


@triton.jit
def fold_largest(v, numbers, AXIS: tl.constexpr):
    """Return the max along AXIS, its number, of equal ones the lowest, and which entry that is; NaN is above all.

    ``numbers``: of what is along AXIS. Values at -inf do not count; over none the number is -1.
    """
    is_nan = v != v
    nan = tl.sum(tl.where(is_nan, v, 0.0), AXIS)
    top = tl.maximum(tl.max(tl.where(is_nan, LOWEST, v), AXIS), LOWEST) + nan
    chosen = tl.where(tl.expand_dims(nan != nan, AXIS), is_nan, v == tl.expand_dims(top, AXIS))
    number = tl.min(tl.where(chosen, numbers, HIGHEST), AXIS)
    chosen = chosen & (numbers == tl.expand_dims(number, AXIS))
    return top, tl.where(number < HIGHEST, number, -1.0), chosen


@triton.jit
def signed_or_0(factor, x):
    """``x`` by the sign of a factor, which may be 0."""
    return tl.where(factor < 0, -x, x) * tl.where(factor == 0, 0.0, 1.0)


@triton.jit
def is_larger(top, number, other_top, other_number):
    """Whether the second of two (max, number) is larger, NaN above all, or the lower number of equal ones."""
    is_nan, is_other_nan = top != top, other_top != other_top
    is_first = (other_number >= 0) & ((other_number < number) | (number < 0))
    is_first = is_first & ((other_top == top) | (is_nan & is_other_nan))
    return (other_top > top) | (is_other_nan & (is_nan == 0)) | is_first


@triton.jit
def rescaled(top, other_top, rate):
    """Return the max of two disjoint sets, and what the sums of each are multiplied by to be against it."""
    new = tl.maximum(top, other_top)
    return new, tl.exp2((top - new) * rate), tl.exp2((other_top - new) * rate)


@triton.jit
def merged(top, total, other_top, other_total, rate):
    """Return (max, sum of exp) of two disjoint sets, from those of each."""
    new = tl.maximum(top, other_top)
    return new, total * tl.exp2((top - new) * rate) + other_total * tl.exp2((other_top - new) * rate)


@triton.jit
def share(v, rate, table, stride, index, size):
    """``weight exp(v - max - log_sum)`` of a log-sum-exp's coefficients (max, log_sum, weight).

    The sum divides the weight, a value per row or column, and not every exp: one register less per column.
    """
    weight = load_vector(table + 2 * stride, index, size) * tl.exp(-load_vector(table + stride, index, size))
    top = load_vector(table, index, size, HIGHEST)  # past the edge the exp is 0 and cannot overflow
    return tl.exp2((v - top) * rate) * weight
