"""The softmax family: InfoNCE, CLIP, and all that is a cross entropy over similarities.

The statistics, the tables, and why a difference of similarities comes before its scaling, are described in
``objectives/softmax.py``. Here ``exp(|scale| (v - max))`` is ``exp2((v - max) * rate)``: one multiplication less.
"""

import triton
import triton.language as tl

from .tiles import HIGHEST, LOWEST, Epilogue, load_vector

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_rate(inputs):
    """``|scale| log2(e)``. Never 0, at which a masked -inf would become NaN; at 1e-30 every exp2 is 1 all the same."""
    return tl.maximum(tl.abs(tl.load(inputs.scale).to(tl.float32)), 1e-30) * LOG2_E


@triton.jit
def softmax_signed(s, inputs):
    """``v``: similarities of which a larger one is a larger logit."""
    return tl.where(tl.load(inputs.scale) < 0, -s, s)


@triton.jit
def softmax_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    top = tl.full([BLOCK], LOWEST, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    if AXIS == 1:
        return top, zero, zero
    else:
        return top, zero


@triton.jit
def softmax_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """(max, sum of exp), and for rows the positive's v: 0 from tiles that do not hold it."""
    inside = (row < inputs.rows) & (column < inputs.columns)
    v = tl.where(inside, softmax_signed(s, inputs), float("-inf"))
    top = tl.maximum(tl.max(v, AXIS), LOWEST)
    total = tl.sum(tl.exp2((v - tl.expand_dims(top, AXIS)) * softmax_rate(inputs)), AXIS)
    if AXIS == 0:
        return top, total
    elif inputs.target is None:
        return top, total, tl.zeros_like(top)
    else:
        is_positive = softmax_positive(row, column, inputs) & inside
        return top, total, tl.sum(tl.where(is_positive, v, 0.0), AXIS)


@triton.jit
def softmax_merge(a, b, inputs):
    top = tl.maximum(a[0], b[0])
    rate = softmax_rate(inputs)
    total = a[1] * tl.exp2((a[0] - top) * rate) + b[1] * tl.exp2((b[0] - top) * rate)
    if len(a) == 3:
        return top, total, a[2] + b[2]
    else:
        return top, total


@triton.jit
def softmax_weights(s, row, column, inputs):
    """W of ``objectives/softmax.py``."""
    v, rate = softmax_signed(s, inputs), softmax_rate(inputs)
    w = softmax_share(v, rate, inputs.row_table, inputs.row_stride, row, inputs.rows, 4)
    if inputs.column_table is not None:
        w += softmax_share(v, rate, inputs.column_table, inputs.column_stride, column, inputs.columns, 3)
    if inputs.target is not None:
        positive_weight = load_vector(inputs.row_table + 3 * inputs.row_stride, row, inputs.rows)
        w -= tl.where(softmax_positive(row, column, inputs), positive_weight, 0.0)
    return w


@triton.jit
def softmax_share(v, rate, table, stride, index, size, OFFSET: tl.constexpr):
    """``weight * softmax - offset`` from a table of max, log_sum, weight, ..., with the offset in row OFFSET.

    The sum divides the weight, a value per row or column, and not every exp: one register less per column.
    """
    share = load_vector(table + 2 * stride, index, size) * tl.exp(-load_vector(table + stride, index, size))
    top = load_vector(table, index, size, HIGHEST)  # past the edge the exp is 0 and cannot overflow
    return tl.exp2((v - top) * rate) * share - load_vector(table + OFFSET * stride, index, size)


@triton.jit
def softmax_positive(row, column, inputs):
    """Which entries are a row's positive. In int32: 64-bit columns would take two registers each."""
    target = load_vector(inputs.target, row, inputs.rows)
    return column == (target - inputs.first_column).to(tl.int32)


SOFTMAX = Epilogue(softmax_empty, softmax_reduce, softmax_merge, softmax_weights)
