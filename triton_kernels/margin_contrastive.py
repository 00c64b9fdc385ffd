"""The margin contrastive loss's epilogue; its mathematics is described in ``objectives/margin_contrastive.py``."""

import triton
import triton.language as tl

from .tiles import Epilogue, inside_tile, load_vector, same_group


@triton.jit
def margin_contrastive_short(v, inputs):
    """By how much a distance is short of the margin; NaN for NaN."""
    short = v + inputs.role_0
    return tl.where(short < 0, 0.0, short)


@triton.jit
def margin_contrastive_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero, zero


@triton.jit
def margin_contrastive_reduce(v, row, column, inputs, AXIS: tl.constexpr):
    """(loss, 0 for the table's row of weights).

    Half of a pair's loss goes to its row and half to its column. Where one sweep does all, the sum is all that counts,
    and a tile above the diagonal gives its rows both halves.
    """
    losses = tl.where(same_group(row, column, inputs), -v, margin_contrastive_short(v, inputs))
    losses = tl.where(inputs.role_1 != 0, losses * losses, losses)
    total = tl.sum(tl.where(inside_tile(row, column, inputs), losses, 0.0), AXIS) / 2
    if inputs.row_table is not None:
        total = tl.where(inputs.diagonal == 0, 2 * total, total)
    return total, tl.zeros_like(total)


@triton.jit
def margin_contrastive_merge(a, b, inputs):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def margin_contrastive_weights(v, row, column, inputs):
    """W of ``objectives/margin_contrastive.py``."""
    weight = load_vector(inputs.row_table + inputs.row_stride, row, inputs.rows)
    weight += load_vector(inputs.column_table + inputs.column_stride, column, inputs.columns)
    positive, short = same_group(row, column, inputs), margin_contrastive_short(v, inputs)
    slope = tl.where(positive, 2 * v, 2 * short)
    slope = tl.where(inputs.role_1 != 0, slope, tl.where(positive, -1.0, tl.where(short > 0, 1.0, 0.0)))
    return slope * weight / 2


MARGIN_CONTRASTIVE = Epilogue(
    "margin_contrastive",
    margin_contrastive_empty,
    margin_contrastive_reduce,
    margin_contrastive_merge,
    margin_contrastive_weights,
    takes_roles=True,
)
