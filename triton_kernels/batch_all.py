"""All triplets' epilogue; its mathematics is described in ``objectives/batch_all.py``.

A launch sees PER_PART thresholds of every row and column; where there are more, the backend launches again.
"""

import triton
import triton.language as tl

from .tiles import Epilogue, inside_tile, load_vector, same_group, table_quantity

PER_PART = 4
"""A thread keeps a count per threshold of all its columns: with 8 of them its registers spill on every GPU."""
_PER_PART = tl.constexpr(PER_PART)


@triton.jit
def batch_all_distances(v, row, column, inputs):
    """Of negatives; infinity, which violates nothing, for others."""
    negative = inside_tile(row, column, inputs) & (same_group(row, column, inputs) == 0)
    return tl.where(negative, -inputs.role_0 * v, float("inf"))


@triton.jit
def batch_all_empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(2 + 2 * _PER_PART):
        zeros = zeros + (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
def batch_all_reduce(v, row, column, inputs, AXIS: tl.constexpr):
    """(loss, 0 for the table's weight, 0 for its thresholds, counts of violating negatives)."""
    distances = batch_all_distances(v, row, column, inputs)
    losses, counts = tl.zeros_like(distances), ()
    for k in tl.static_range(_PER_PART):
        violations = table_quantity(row, column, inputs, 2 + k, AXIS) - distances
        losses += tl.where(violations > 0, violations, 0.0)
        counts = counts + (tl.sum((violations > 0).to(tl.float32), AXIS),)
    total = tl.sum(losses, AXIS)
    zeros = ()
    for _ in tl.static_range(1 + _PER_PART):
        zeros = zeros + (tl.zeros_like(total),)
    return (total,) + zeros + counts


@triton.jit
def batch_all_merge(a, b, inputs):
    """Weight and thresholds are those of ``a``, which is the table at last."""
    merged = (a[0] + b[0],)
    for q in tl.static_range(1, 2 + _PER_PART):
        merged = merged + (a[q],)
    for q in tl.static_range(2 + _PER_PART, 2 + 2 * _PER_PART):
        merged = merged + (a[q] + b[q],)
    return merged


@triton.jit
def batch_all_weights(v, row, column, inputs):
    """W of ``objectives/batch_all.py``: what these thresholds add to it."""
    distances = batch_all_distances(v, row, column, inputs)
    of_row, of_column = tl.zeros_like(distances), tl.zeros_like(distances)
    for k in tl.static_range(_PER_PART):
        of_row += (table_quantity(row, column, inputs, 2 + k, 1) > distances).to(tl.float32)
        of_column += (table_quantity(row, column, inputs, 2 + k, 0) > distances).to(tl.float32)
    of_row *= load_vector(inputs.row_table + inputs.row_stride, row, inputs.rows)
    of_column *= load_vector(inputs.column_table + inputs.column_stride, column, inputs.columns)
    return inputs.role_0 * (of_row + of_column)


BATCH_ALL = Epilogue(
    "batch_all",
    batch_all_empty,
    batch_all_reduce,
    batch_all_merge,
    batch_all_weights,
    takes_roles=True,
    reads_tables=True,
    folds_columns=True,
    per_part=PER_PART,
)
