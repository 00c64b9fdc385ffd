"""The statistics of the nearest negatives beyond every positive, ``objectives/semi_hard.py``: there is no W.

A launch sees PER_PART positives of every row and column; where there are more, the backend launches again.
"""

import triton
import triton.language as tl

from .hardest import hardest_number
from .tiles import HIGHEST, LOWEST, Epilogue, inside_tile, same_group, table_quantity

PER_PART = 4
"""As in batch_all.py; here a thread keeps a value and a number of each."""
_PER_PART = tl.constexpr(PER_PART)


@triton.jit
def semi_hard_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    none = tl.full([BLOCK], -1.0, tl.float32)
    empty = (tl.full([BLOCK], HIGHEST, tl.float32), none, none)
    for _ in tl.static_range(_PER_PART):
        empty = empty + (none,)
    for _ in tl.static_range(_PER_PART):
        empty = empty + (tl.full([BLOCK], LOWEST, tl.float32),)
    for _ in tl.static_range(_PER_PART):
        empty = empty + (none,)
    return empty


@triton.jit
def semi_hard_reduce(v, row, column, inputs, AXIS: tl.constexpr):
    """(smallest v of another group, its number, -1 for the own number and the thresholds, then for each threshold the
    largest v below it, and the numbers of those)."""
    negative = inside_tile(row, column, inputs) & (same_group(row, column, inputs) == 0)
    number = table_quantity(row, column, inputs, 2, 1 - AXIS)
    candidates = tl.where(negative, v, HIGHEST)
    farthest = tl.min(candidates, AXIS)
    of_farthest = hardest_number(candidates == tl.expand_dims(farthest, AXIS), number, AXIS)
    found = (farthest, tl.where(farthest < HIGHEST, of_farthest, -1.0))
    for _ in tl.static_range(1 + _PER_PART):
        found = found + (tl.full(farthest.shape, -1.0, tl.float32),)
    numbers = ()
    for k in tl.static_range(_PER_PART):
        beyond = negative & (v < table_quantity(row, column, inputs, 3 + k, AXIS))
        candidates = tl.where(beyond, v, LOWEST)
        nearest = tl.max(candidates, AXIS)
        of_nearest = hardest_number(candidates == tl.expand_dims(nearest, AXIS), number, AXIS)
        found = found + (nearest,)
        numbers = numbers + (tl.where(nearest > LOWEST, of_nearest, -1.0),)
    return found + numbers


@triton.jit
def semi_hard_merge(a, b, inputs):
    """``a`` comes first, and is the table at last, whose own numbers and thresholds stay."""
    merged = (tl.minimum(a[0], b[0]), tl.where(b[0] < a[0], b[1], a[1]))
    for q in tl.static_range(2, 3 + _PER_PART):
        merged = merged + (a[q],)
    for q in tl.static_range(3 + _PER_PART, 3 + 2 * _PER_PART):
        merged = merged + (tl.maximum(a[q], b[q]),)
    for q in tl.static_range(3 + _PER_PART, 3 + 2 * _PER_PART):
        merged = merged + (tl.where(b[q] > a[q], b[q + _PER_PART], a[q + _PER_PART]),)
    return merged


SEMI_HARD = Epilogue(
    "semi_hard", semi_hard_empty, semi_hard_reduce, semi_hard_merge, reads_tables=True, per_part=PER_PART
)
