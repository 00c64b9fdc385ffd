"""Between the sweeps: the loss, and what sweep 2 needs to know of rows and columns, in one launch of O(N + M) work.

The same formulas as an objective's ``row_losses`` and ``coefficients``, which take two dozen launches of PyTorch's
kernels. For losses of one upstream gradient: where each row has its own, they depend on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run_kernel
from .reference import logarithms_range, nothing_between, store_reference
from .tiles import Epilogue, TileInputs, load_quantities, store_quantities

# One program adds up the losses, so always in the same order. It visits 65,536 rows in 32 steps.
_BLOCK = 2048
COEFFICIENTS = 5
"""Of a row or a column: max, logarithm of the sum, weight, positive weight, offset."""
STATE = 4
"""The reference (reference.py), a row's share in the loss, and a 0 for finish_gradients to count with."""


@triton.jit
def combine_kernel(
    loss,  # 0-d
    state,  # [STATE]
    row_coefficients,  # [5, rows]
    column_coefficients,  # [5, columns], or None
    counts,  # [rows] int64, the other rows of a row's group; None: there are no groups, or ``count`` of each
    count,
    inputs,  # with the statistics as its tables
    COMBINE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total, counted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    least, largest = nothing_between(BLOCK)
    last = inputs.rows
    if column_coefficients is not None:
        last = tl.maximum(last, inputs.columns)
    for start in range(0, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < inputs.rows
        of_row = load_quantities(inputs.row_table, inputs.row_stride, index, inside, 3)
        of_column = ()
        if column_coefficients is not None:
            of_column = load_quantities(inputs.column_table, inputs.column_stride, index, index < inputs.columns, 2)
        positives = count + tl.zeros([BLOCK], tl.int32)
        if counts is not None:
            positives = tl.load(counts + index, mask=inside, other=0).to(tl.int32)
        losses, counts_for, rows, columns = COMBINE(of_row, of_column, inside, positives, inputs)
        total += tl.where(inside, losses, 0.0)
        counted += tl.where(inside, counts_for, 0.0)
        store_quantities(row_coefficients, inputs.rows, index, inside, rows)
        low, high = logarithms_range(rows[0], rows[1], inside, inputs)
        least, largest = tl.minimum(least, low), tl.maximum(largest, high)
        if column_coefficients is not None:
            inside = index < inputs.columns
            store_quantities(column_coefficients, inputs.columns, index, inside, columns)
            low, high = logarithms_range(columns[0], columns[1], inside, inputs)
            least, largest = tl.minimum(least, low), tl.maximum(largest, high)
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(tl.sum(counted, 0), 1.0)
    tl.store(loss, tl.sum(total, 0) * share)
    store_reference(state, tl.min(least, 0), tl.max(largest, 0))
    tl.store(state + 2, share)
    tl.store(state + 3, 0.0)


@triton.jit
def total_kernel(
    loss, weight_sum,  # 0-d, fp64 the second
    state,  # [STATE]
    inputs,  # with the table that the sweep has left
    COMBINE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total, weights = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float64)
    for start in range(0, inputs.rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < inputs.rows
        losses, of_rows = COMBINE(load_quantities(inputs.row_table, inputs.row_stride, index, inside, 3))
        total += losses
        weights += of_rows.to(tl.float64)
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(inputs.rows, 1).to(tl.float32)
    tl.store(loss, tl.sum(total, 0) * share)
    tl.store(weight_sum, tl.sum(weights, 0))
    tl.store(state, 0.0)  # nobody reads a reference, but all of a result is the same every time
    tl.store(state + 1, 0.0)
    tl.store(state + 2, share)
    tl.store(state + 3, 0.0)


def combine_losses(epilogue: Epilogue, inputs: TileInputs, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """After the only sweep: the loss, the state (without a reference), and the sum of W, for a bias."""
    loss, state = inputs.row_table.new_empty(()), inputs.row_table.new_empty(STATE)
    weight_sum = inputs.row_table.new_empty((), dtype=torch.float64)
    run_kernel(
        total_kernel, (1,),
        loss, weight_sum, state, inputs, epilogue.combine, mean, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=True
    )
    return loss, state, weight_sum


def combine_statistics(
    epilogue: Epilogue, inputs: TileInputs, counts: Tensor | int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The loss, the state, and the coefficients of rows and columns; the tables of ``inputs`` are the statistics."""
    row_table, column_table = inputs.row_table, inputs.column_table
    loss, state = row_table.new_empty(()), row_table.new_empty(STATE)
    rows = row_table.new_empty(COEFFICIENTS, inputs.rows)
    columns = None if column_table is None else row_table.new_empty(COEFFICIENTS, inputs.columns)
    given = isinstance(counts, Tensor)
    run_kernel(
        combine_kernel, (1,),
        loss, state, rows, columns, counts if given else None, 0 if given else counts, inputs,
        epilogue.combine, mean, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, state, rows, columns
