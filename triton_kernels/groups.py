"""Where pairs of one group can be: the least and the largest group number of some rows that follow each other.

Positives are few, and looking for them takes as many instructions as the exponentials. Where the ranges of two blocks
are apart none of their pairs is a positive: nearly everywhere, if rows of a group follow each other, or come in the
same order in both views.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launching import run_kernel

STEP = 16
"""A range begins at every so many rows: tiles begin at multiples of it."""
SPAN = 128
"""Rows of a range: those of a block, of which a kernel reads the range at once."""
_BLOCKS = 32  # ranges of a program


@triton.jit
def ranges_kernel(groups, ranges, count, STEP: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr):
    number = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    row = number[:, None] * STEP + tl.arange(0, SPAN)[None, :]
    group = tl.load(groups + row, mask=row < count, other=0)
    least, largest = tl.where(row < count, group, 2147483647), tl.where(row < count, group, -2147483648)
    inside = number * STEP < count
    tl.store(ranges + 2 * number, tl.min(least, 1), mask=inside)
    tl.store(ranges + 2 * number + 1, tl.max(largest, 1), mask=inside)


def group_ranges(groups: Tensor) -> Tensor:
    """``[cdiv(N, STEP), 2]`` of ``groups[N]``, int32: the least and the largest of SPAN rows, from every STEP-th on."""
    ranges = groups.new_empty(cdiv(len(groups), STEP), 2)
    blocks = cdiv(len(ranges), _BLOCKS)
    run_kernel(ranges_kernel, (blocks,), groups, ranges, len(groups), STEP=STEP, SPAN=SPAN, BLOCKS=_BLOCKS, num_warps=4)
    return ranges


def ranges_of(ranges: Tensor, rows: slice) -> Tensor:
    """Of a tile's rows."""
    assert rows.start % STEP == 0, rows
    return ranges[rows.start // STEP :]
