"""Sweep 1: the statistics of a tile's rows and columns, without atomics and so with the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, cdiv, launch_options, pick
from .distances import negative_distances
from .launching import run_kernel
from .tiles import (
    Epilogue,
    Points,
    TileInputs,
    aligned,
    load_quantities,
    partial_sums,
    similarity_tile,
    store_quantities,
)

# A program of the merge kernel folds this many rows or columns: 16,384 columns make 256 programs.
_MERGE_BLOCK = 64


@triton.jit
def statistics_kernel(
    query, query_stride,  # [R, d]
    key, key_stride,  # [C, d]
    row_partials,  # [regions, row quantities, R]
    column_partials,  # [row blocks, column quantities, C], or None
    d,
    inputs,
    points,  # where similarities are distances (SQUARED: their squares), or None
    SQUARED: tl.constexpr, EMPTY: tl.constexpr, REDUCE: tl.constexpr, MERGE: tl.constexpr,
    ROW_QUANTITIES: tl.constexpr, COLUMN_QUANTITIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows against one region of COLUMN_BLOCKS blocks of columns.

    The rows' statistics stay in registers along the region; a block's column statistics are written as they are.
    """
    row_block, region = tl.program_id(0), tl.program_id(1)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    near_row = tl.minimum(row, inputs.rows - 1)  # in range, so that no load of features needs a mask over rows
    first = region * COLUMN_BLOCKS * BLOCK_N
    of_rows = EMPTY(BLOCK_M, 1)
    for start in range(first, tl.minimum(first + COLUMN_BLOCKS * BLOCK_N, inputs.columns), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        near_column = tl.minimum(column, inputs.columns - 1)
        s = similarity_tile(
            query, query_stride, near_row, key, key_stride, near_column, d, BLOCK_K, PRECISION, UPCAST
        )
        if points is not None:
            s = negative_distances(s, row[:, None], column[None, :], inputs, points, SQUARED, BLOCK_K)
        of_rows = MERGE(of_rows, REDUCE(s, row[:, None], column[None, :], inputs, 1), inputs)
        if column_partials is not None:
            of_columns = REDUCE(s, row[:, None], column[None, :], inputs, 0)
            partials = column_partials + row_block.to(tl.int64) * COLUMN_QUANTITIES * inputs.columns
            store_quantities(partials, inputs.columns, column, column < inputs.columns, of_columns)
    partials = row_partials + region.to(tl.int64) * ROW_QUANTITIES * inputs.rows
    store_quantities(partials, inputs.rows, row, row < inputs.rows, of_rows)


@triton.jit
def merge_kernel(
    partials,  # [count, QUANTITIES, size]
    table, table_stride,  # [QUANTITIES, size]
    count, size,
    inputs,
    MERGE: tl.constexpr, QUANTITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``table = merge(table, partials[0], partials[1], ...)``, always in this order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = load_quantities(table, table_stride, index, inside, QUANTITIES)
    # The loop is one load after another, 128 times for 16,384 rows: keep four of them in flight.
    for _ in tl.range(0, count, num_stages=4):
        total = MERGE(total, load_quantities(partials, size, index, inside, QUANTITIES), inputs)
        partials += QUANTITIES * size
    store_quantities(table, table_stride, index, inside, total)


def update_statistics(
    epilogue: Epilogue,
    query: Tensor,  # [R, d]
    key: Tensor,  # [C, d]
    inputs: TileInputs,
    points: Points | None,  # where similarities are distances
    squared: bool,  # they are their squares
    row_table: Tensor,  # [row quantities, R]
    column_table: Tensor | None,  # [column quantities, C]
) -> tuple[Tensor, ...]:
    """Fold a tile into the tables. Returns the partial statistics, for the count of workspace."""
    query, key = aligned(query), aligned(key)

    def launch(config: Config) -> tuple[Tensor, Tensor | None]:
        row_blocks = cdiv(query.shape[0], config.block_m)
        # Neighbouring programs share a region: its keys stay in L2.
        regions = cdiv(key.shape[0], config.block_n * config.column_blocks)
        of_rows = row_table.new_empty(regions, *row_table.shape)
        of_columns = None if column_table is None else column_table.new_empty(row_blocks, *column_table.shape)
        run_kernel(
            statistics_kernel, (row_blocks, regions),
            query, query.stride(0), key, key.stride(0), of_rows, of_columns,
            query.shape[1], inputs, points,
            squared, epilogue.empty, epilogue.reduce, epilogue.merge,
            row_table.shape[0], 0 if column_table is None else column_table.shape[0],
            COLUMN_BLOCKS=config.column_blocks, **launch_options(config, query),
        )  # fmt: skip
        return of_rows, of_columns

    of_rows, of_columns = launch(pick("statistics", epilogue.name, query, launch))
    merge(epilogue, of_rows, inputs, row_table)
    if of_columns is None:
        return (of_rows,)
    merge(epilogue, of_columns, inputs, column_table)
    return of_rows, of_columns


@triton.jit
def add_kernel(
    partials,  # [count, QUANTITIES, size]
    table, table_stride,  # [QUANTITIES, size]
    count, size,
    QUANTITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``table[q] += sum(partials[:, q])`` for a block of one quantity."""
    index, quantity = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = index < size
    total = partial_sums(partials + quantity * size, QUANTITIES * size, count, index, inside)
    place = table + quantity * table_stride + index
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def merge(epilogue: Epilogue, partials: Tensor, inputs: TileInputs, table: Tensor) -> None:
    """Fold ``partials[count, quantities, size]`` into ``table[quantities, size]``, in order."""
    count, quantities, size = partials.shape
    blocks = cdiv(size, _MERGE_BLOCK)
    if epilogue.additive:
        run_kernel(
            add_kernel, (blocks, quantities),
            partials, table, table.stride(0), count, size,
            quantities, _MERGE_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return
    # All that a merge reads: one kernel serves every kind of tile.
    scale = TileInputs.of((0, 0), inputs.scale, roles=inputs.roles)
    run_kernel(
        merge_kernel, (blocks,),
        partials, table, table.stride(0), count, size, scale,
        epilogue.merge, quantities, _MERGE_BLOCK, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
