"""The softmax family's epilogues: InfoNCE and CLIP, SupCon, the lifted structure loss, and the margin losses.

The statistics, the tables, and why a difference of similarities comes before its scaling, are described in
``objectives/softmax.py``. Here ``exp(|scale| (v - max))`` is ``exp2((v - max) * rate)``: one multiplication less.
"""

import triton
import triton.language as tl

from .tiles import HIGHEST, LOWEST, Epilogue, inside_tile, is_target, load_vector, same_group

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rate_of(factor):
    """``|factor| log2(e)``. Never 0, at which a masked -inf would become NaN: 1.2e-38, the smallest normal number,
    changes no logit of similarities up to 1e30. (A factor of 0 for all of them costs registers that some kernels lack.)
    """
    return tl.maximum(tl.abs(factor), 1.2e-38) * LOG2_E


@triton.jit
def signed(factor, x):
    """``x`` if the factor is positive, else ``-x``: of which a larger one is a larger product with the factor."""
    return tl.where(factor < 0, -x, x)


@triton.jit
def softmax_rate(inputs):
    return rate_of(tl.load(inputs.scale).to(tl.float32))


@triton.jit
def softmax_signed(s, inputs):
    """``v``: similarities of which a larger one is a larger logit."""
    return signed(tl.load(inputs.scale), s)


@triton.jit
def softmax_fold(v, inputs, AXIS: tl.constexpr):
    """(max, sum of exp); entries at -inf do not count."""
    top = tl.maximum(tl.max(v, AXIS), LOWEST)
    return top, tl.sum(tl.exp2((v - tl.expand_dims(top, AXIS)) * softmax_rate(inputs)), AXIS)


@triton.jit
def softmax_share(v, rate, table, stride, index, size):
    """``weight * softmax - offset`` from a table of max, log_sum, weight, positive, offset.

    The sum divides the weight, a value per row or column, and not every exp: one register less per column.
    """
    share = load_vector(table + 2 * stride, index, size) * tl.exp(-load_vector(table + stride, index, size))
    top = load_vector(table, index, size, HIGHEST)  # past the edge the exp is 0 and cannot overflow
    return tl.exp2((v - top) * rate) * share - load_vector(table + 4 * stride, index, size)


@triton.jit
def softmax_shares(v, row, column, inputs):
    """W without its positives. What does not count is at -inf before the exp, where it could overflow."""
    rate = softmax_rate(inputs)
    w = softmax_share(v, rate, inputs.row_table, inputs.row_stride, row, inputs.rows)
    if inputs.column_table is not None:
        w += softmax_share(v, rate, inputs.column_table, inputs.column_stride, column, inputs.columns)
    return w


@triton.jit
def softmax_merge(a, b, inputs):
    top = tl.maximum(a[0], b[0])
    rate = softmax_rate(inputs)
    total = a[1] * tl.exp2((a[0] - top) * rate) + b[1] * tl.exp2((b[0] - top) * rate)
    if len(a) == 3:
        return top, total, a[2] + b[2]
    else:
        return top, total


# -- one positive per row: InfoNCE, CLIP, N-pair --------------------------------------------------------------------


@triton.jit
def softmax_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    top = tl.full([BLOCK], LOWEST, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    if AXIS == 1:
        return top, zero, zero
    else:
        return top, zero


@triton.jit
def softmax_counted(row, column, inputs):
    """Which entries are in the sums: with groups, of a row's own group only its positive."""
    counted = (row < inputs.rows) & (column < inputs.columns)
    if inputs.row_group is None:
        return counted
    else:
        return counted & (is_target(row, column, inputs) | (same_group(row, column, inputs) == 0))


@triton.jit
def softmax_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """(max, sum of exp), and for rows the positive's v: 0 from tiles that do not hold it."""
    counted = softmax_counted(row, column, inputs)
    v = tl.where(counted, softmax_signed(s, inputs), float("-inf"))
    top, total = softmax_fold(v, inputs, AXIS)
    if AXIS == 0:
        return top, total
    elif (inputs.target is None) & (inputs.own is None):
        return top, total, tl.zeros_like(top)
    else:
        return top, total, tl.sum(tl.where(is_target(row, column, inputs) & counted, v, 0.0), AXIS)


@triton.jit
def softmax_weights(s, row, column, inputs):
    """W of ``objectives/softmax.py``."""
    v = softmax_signed(s, inputs)
    if inputs.row_group is not None:
        v = tl.where(softmax_counted(row, column, inputs), v, float("-inf"))
    w = softmax_shares(v, row, column, inputs)
    if (inputs.target is not None) | (inputs.own is not None):
        positive_weight = load_vector(inputs.row_table + 3 * inputs.row_stride, row, inputs.rows)
        w -= tl.where(is_target(row, column, inputs), positive_weight, 0.0)
    return w


@triton.jit
def softmax_off_diagonal(s, row, column, inputs):
    """W without positives and offsets, by the exponential that a row and a column share."""
    rate, reference = tl.load(inputs.scale).to(tl.float32) * LOG2_E, tl.load(inputs.reference)
    share = softmax_share_of(inputs.row_table, inputs.row_stride, row, inputs.rows, inputs)
    if inputs.column_table is not None:
        share += softmax_share_of(inputs.column_table, inputs.column_stride, column, inputs.columns, inputs)
    return tl.exp2(s * rate - reference) * share


@triton.jit
def softmax_share_of(table, stride, index, size, inputs):
    """``weight / sum`` of exponentials that are taken against the reference."""
    top = load_vector(table, index, size, HIGHEST)  # past the edge the exp is 0 and cannot overflow
    top = top * softmax_rate(inputs) - tl.load(inputs.reference)
    logarithm = top + load_vector(table + stride, index, size) * LOG2_E
    return load_vector(table + 2 * stride, index, size) * tl.exp2(-logarithm)


@triton.jit
def softmax_combine(of_row, of_column, inside, positives, inputs):
    """Losses and coefficients of ``objectives/softmax.py`` without label smoothing. A row's positive is the column of
    its own number, where columns have statistics."""
    steep, zero = tl.abs(tl.load(inputs.scale).to(tl.float32)), tl.zeros_like(of_row[0])
    one = zero + 1.0
    logarithm = tl.log(of_row[1])
    loss = (of_row[0] - of_row[2]) * steep + logarithm
    if len(of_column) == 0:
        return loss, one, (of_row[0], logarithm, one, one, zero), ()
    else:
        of_columns = tl.log(of_column[1])
        loss = 0.5 * (loss + ((of_column[0] - of_row[2]) * steep + of_columns))
        columns = (of_column[0], of_columns, tl.where(inside, 0.5, 0.0), zero, zero)
        return loss, one, (of_row[0], logarithm, 0.5 * one, one, zero), columns


SOFTMAX = Epilogue(
    "softmax", softmax_empty, softmax_reduce, softmax_merge, softmax_weights,
    by_sums=True, off_diagonal=softmax_off_diagonal, by_reference=True, combine=softmax_combine,
)  # fmt: skip


# -- positives by group, rows against each other: SupCon, NT-Xent ---------------------------------------------------


@triton.jit
def sup_con_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return tl.full([BLOCK], LOWEST, tl.float32), zero, zero


@triton.jit
def sup_con_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """(max, sum of exp, sum of the positives' v), the same for rows and columns."""
    counted = inside_tile(row, column, inputs)
    v = tl.where(counted, softmax_signed(s, inputs), float("-inf"))
    top, total = softmax_fold(v, inputs, AXIS)
    return top, total, tl.sum(tl.where(counted & same_group(row, column, inputs), v, 0.0), AXIS)


@triton.jit
def sup_con_weights(s, row, column, inputs):
    """W of ``objectives/sup_con.py``."""
    inside = inside_tile(row, column, inputs)
    w = softmax_shares(tl.where(inside, softmax_signed(s, inputs), float("-inf")), row, column, inputs)
    positive = load_vector(inputs.row_table + 3 * inputs.row_stride, row, inputs.rows)
    positive += load_vector(inputs.column_table + 3 * inputs.column_stride, column, inputs.columns)
    return w - tl.where(inside & same_group(row, column, inputs), positive, 0.0)


@triton.jit
def sup_con_off_diagonal(s, row, column, inputs):
    """W of rows with others, by the exponential that they share."""
    positive = load_vector(inputs.row_table + 3 * inputs.row_stride, row, inputs.rows)
    positive += load_vector(inputs.column_table + 3 * inputs.column_stride, column, inputs.columns)
    return softmax_off_diagonal(s, row, column, inputs) - tl.where(same_group(row, column, inputs), positive, 0.0)


@triton.jit
def sup_con_combine(of_row, of_column, inside, positives, inputs):
    """Losses and coefficients of ``objectives/sup_con.py``. A row without others has an empty sum."""
    steep, zero = tl.abs(tl.load(inputs.scale).to(tl.float32)), tl.zeros_like(of_row[0])
    has = tl.where(positives > 0, 1.0, 0.0)
    several = tl.maximum(positives, 1).to(tl.float32)
    loss = (of_row[0] - of_row[2] / several) * steep + tl.log(of_row[1])
    loss = tl.where((positives > 0) | (of_row[1] != of_row[1]), loss, 0.0)
    empty = of_row[1] == 0
    top, logarithm = tl.where(empty, HIGHEST, of_row[0]), tl.log(tl.where(empty, 1.0, of_row[1]))
    return loss, has, (top, logarithm, has, has / several, zero), ()


SUP_CON = Epilogue(
    "sup_con", sup_con_empty, sup_con_reduce, softmax_merge, sup_con_weights,
    by_sums=True, off_diagonal=sup_con_off_diagonal, by_reference=True, combine=sup_con_combine,
)  # fmt: skip


# -- other groups' rows alone, over distances: lifted structure ------------------------------------------------------


@triton.jit
def lifted_negatives(v, row, column, inputs):
    """``v``, -inf where an entry is no negative."""
    negative = inside_tile(row, column, inputs) & (same_group(row, column, inputs) == 0)
    return tl.where(negative, v, float("-inf"))


@triton.jit
def lifted_reduce(v, row, column, inputs, AXIS: tl.constexpr):
    """(max, sum of exp, 0), the same for rows and columns."""
    top, total = softmax_fold(lifted_negatives(v, row, column, inputs), inputs, AXIS)
    return top, total, tl.zeros_like(top)


@triton.jit
def lifted_weights(v, row, column, inputs):
    """W of ``objectives/lifted.py``."""
    return softmax_shares(lifted_negatives(v, row, column, inputs), row, column, inputs)


LIFTED = Epilogue("lifted", sup_con_empty, lifted_reduce, softmax_merge, lifted_weights)


# -- the positive apart: ArcFace, CosFace ---------------------------------------------------------------------------


@triton.jit
def margin_others(s, row, column, inputs):
    """``s``, -inf at the true class, which can be far above the max, and past the edge, where the last ones repeat."""
    other = (row < inputs.rows) & (column < inputs.columns) & (is_target(row, column, inputs) == 0)
    return tl.where(other, s, float("-inf"))


@triton.jit
def margin_reduce(s, row, column, inputs, AXIS: tl.constexpr):
    """(max, sum of exp) of the other classes, and 0 for the true one, of which the table knows already."""
    top, total = softmax_fold(margin_others(s, row, column, inputs), inputs, AXIS)
    return top, total, tl.zeros_like(top)


@triton.jit
def margin_weights(s, row, column, inputs):
    """W of ``objectives/margin_softmax.py``: 0 at the true class."""
    return softmax_shares(margin_others(s, row, column, inputs), row, column, inputs)


MARGIN_SOFTMAX = Epilogue("margin_softmax", softmax_empty, margin_reduce, softmax_merge, margin_weights)
