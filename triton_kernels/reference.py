"""Sweep 2 of a softmax with one exponential an entry: the exponent that all rows and columns share, if they can.

``W_ij = E_ij (r_i + c_j)``, against the middle of the logarithms of all sums, where exponents are small and
have the most digits; no entry is larger than its row's sum, so none overflows (:func:`store_reference`). Where sums
lie too far apart for that, and in blocks that hold a row's own number, its positive (CLIP) or the row itself (SupCon),
W is formed with two exponentials, as everywhere else (softmax.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launching import run_kernel
from .softmax import LOG2_E, softmax_rate, softmax_share_of
from .tiles import TileInputs, load_quantities

_SPREAD = tl.constexpr(60.0)
"""How far from the reference a sum may lie: a row's weight, 1 at most, is divided by 2^60 then, and may be 2^-66."""
_LARGEST_LOGARITHM = tl.constexpr(4096.0)
"""Of a sum: known to 2^-12 then. A GPU takes an exact product less the reference, which has to be as exact."""
_NONE = tl.constexpr(1e30)
"""More than any logarithm."""
_SHARES = 512
"""Of a program."""


@triton.jit
def logarithms_range(top, logarithm, inside, inputs):
    """The logarithm, to the base 2, of every row's sum, as the least and as the largest of one: where it is not finite
    it is less and more than any."""
    total = top * softmax_rate(inputs) + logarithm * LOG2_E
    usable = tl.abs(total) < _NONE
    least = tl.where(inside, tl.where(usable, total, -_NONE), _NONE)
    largest = tl.where(inside, tl.where(usable, total, _NONE), -_NONE)
    return least, largest


@triton.jit
def nothing_between(BLOCK: tl.constexpr):
    return tl.full([BLOCK], _NONE, tl.float32), tl.full([BLOCK], -_NONE, tl.float32)


@triton.jit
def table_range(table, stride, count, inputs, BLOCK: tl.constexpr):
    least, largest = nothing_between(BLOCK)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        top, logarithm = load_quantities(table, stride, index, inside, 2)
        low, high = logarithms_range(top, logarithm, inside, inputs)
        least, largest = tl.minimum(least, low), tl.maximum(largest, high)
    return tl.min(least, 0), tl.max(largest, 0)


@triton.jit
def store_reference(reference, least, largest):
    """The middle of the logarithms, and whether all are near enough to it."""
    exponent = 0.5 * (least + largest)
    shared = (largest - exponent <= _SPREAD) & (tl.maximum(tl.abs(least), tl.abs(largest)) <= _LARGEST_LOGARITHM)
    tl.store(reference, exponent)
    tl.store(reference + 1, shared.to(tl.float32))


@triton.jit
def reference_kernel(reference, inputs, BLOCK: tl.constexpr):
    least, largest = table_range(inputs.row_table, inputs.row_stride, inputs.rows, inputs, BLOCK)
    if inputs.column_table is not None:
        low, high = table_range(inputs.column_table, inputs.column_stride, inputs.columns, inputs, BLOCK)
        least, largest = tl.minimum(least, low), tl.maximum(largest, high)
    store_reference(reference, least, largest)


@triton.jit
def shares_kernel(row_shares, column_shares, inputs, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        store_shares(row_shares, inputs.row_table, inputs.row_stride, index, inputs.rows, inputs)
    elif inputs.column_table is not None:
        store_shares(column_shares, inputs.column_table, inputs.column_stride, index, inputs.columns, inputs)


@triton.jit
def store_shares(shares, table, stride, index, count, inputs):
    tl.store(shares + index, softmax_share_of(table, stride, index, count, inputs), mask=index < count)


def form_shares(inputs: TileInputs) -> tuple[Tensor, Tensor | None]:
    """``weight / sum``, ``[1, rows]`` and ``[1, columns]``, of a problem's coefficients: of sums that are taken against
    ``inputs.reference``. Where rows and columns cannot share one, nobody may read them."""
    row_shares = inputs.row_table.new_empty(1, inputs.rows)
    column_shares = None if inputs.column_table is None else row_shares.new_empty(1, inputs.columns)
    blocks = cdiv(max(inputs.rows, inputs.columns), _SHARES)
    run_kernel(
        shares_kernel, (blocks, 1 if column_shares is None else 2),
        row_shares, column_shares, inputs, BLOCK=_SHARES, num_warps=4, enable_fp_fusion=True
    )
    return row_shares, column_shares


def shared_reference(inputs: TileInputs) -> Tensor:
    """``inputs.reference`` for the tiles of a problem, of whose coefficients (max, log of the sum, ...) it is read."""
    reference = inputs.row_table.new_empty(2)
    run_kernel(reference_kernel, (1,), reference, inputs, BLOCK=4096, num_warps=8, enable_fp_fusion=True)
    return reference
