"""The statistics of the hardest pairs, ``objectives/hardest.py``: there is no sweep of gradients, and no W."""

import triton
import triton.language as tl

from .tiles import HIGHEST, LOWEST, Epilogue, inside_tile, same_group, table_quantity


@triton.jit
def hardest_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    none = tl.full([BLOCK], -1.0, tl.float32)
    return tl.full([BLOCK], LOWEST, tl.float32), none, tl.full([BLOCK], HIGHEST, tl.float32), none, none


@triton.jit
def hardest_reduce(v, row, column, inputs, AXIS: tl.constexpr):
    """(largest v of another group, its number, smallest v of the own group, its number, -1 for the own number)."""
    pairs, same = inside_tile(row, column, inputs), same_group(row, column, inputs)
    number = table_quantity(row, column, inputs, 4, 1 - AXIS)
    negatives = tl.where(pairs & (same == 0), v, LOWEST)
    negative = tl.max(negatives, AXIS)
    positives = tl.where(pairs & same, v, HIGHEST)
    positive = tl.min(positives, AXIS)
    of_negative = hardest_number(negatives == tl.expand_dims(negative, AXIS), number, AXIS)
    of_positive = hardest_number(positives == tl.expand_dims(positive, AXIS), number, AXIS)
    of_negative = tl.where(negative > LOWEST, of_negative, -1.0)
    of_positive = tl.where(positive < HIGHEST, of_positive, -1.0)
    return negative, of_negative, positive, of_positive, tl.full(negative.shape, -1.0, tl.float32)


@triton.jit
def hardest_number(chosen, number, AXIS: tl.constexpr):
    """The first of equals."""
    return tl.min(tl.where(chosen, number, HIGHEST), AXIS)


@triton.jit
def hardest_merge(a, b, inputs):
    """``a`` comes first, and is the table at last, whose own numbers stay."""
    of_negative = tl.where(b[0] > a[0], b[1], a[1])
    of_positive = tl.where(b[2] < a[2], b[3], a[3])
    return tl.maximum(a[0], b[0]), of_negative, tl.minimum(a[2], b[2]), of_positive, a[4]


HARDEST = Epilogue("hardest", hardest_empty, hardest_reduce, hardest_merge, reads_tables=True)
