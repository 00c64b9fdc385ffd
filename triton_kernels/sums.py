"""Sweep 1 of a softmax by one exponential an entry, which rows and columns share.

Against the maximum of its row and of its column an entry takes two exponentials, and both maxima first. Here all of a
tile is taken against one number: ``E_ij = 2^(rate v_ij - shift)``, where rate is ``|logit_scale| log2(e)`` and
``rate v_ij`` is at most ``bound = rate max|x| max|y|`` (Cauchy-Schwarz). With ``shift = max(0, bound - 100)`` no sum can
overflow. A row's statistics are then (shift / rate, sum of E), as good as its maximum: see :func:`enough` for when they
are not. Then :func:`finish_kernel` forms the rows or columns concerned again, against their maxima. Unit rows and a
scale of 69 or less never are; at a scale of 100 only those whose best cosine is below -0.28 are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, launch_options, pick
from .softmax import LOG2_E, softmax_rate
from .tiles import Epilogue, TileInputs, aligned, load_quantities, store_quantities
from .tma import described_rows, described_tile, resident_programs

_HEADROOM = tl.constexpr(100.0)
"""The largest exponent of an entry: 2^27 of them fit one sum."""
_LARGEST_SHIFT = tl.constexpr(120.0)
"""Beyond it hardly a row has an entry near enough to the bound, and the sums are not even tried."""
_BOUND_PROGRAMS = 128
_FOLDED = tl.constexpr(32)  # partial sums that are loaded at once


@triton.jit
def largest_squares_kernel(
    query, query_stride, rows,  # [rows, d]
    key, key_stride, columns,  # [columns, d]
    largest,  # [2, programs]
    d,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest square of a row's length, of the rows that this program visits."""
    x, stride, count = query, query_stride, rows
    if tl.program_id(1) == 1:
        x, stride, count = key, key_stride, columns
    k = tl.arange(0, BLOCK_K)
    top = tl.zeros([BLOCK_M], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < count)[:, None] & (k < d)[None, :]
        block = tl.load(x + row.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.sum(block * block, 1), propagate_nan=tl.PropagateNan.ALL)
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(top, 0))


@triton.jit
def shift_of(largest, inputs, PROGRAMS: tl.constexpr):
    """The exponent that is taken off; NaN or infinite where a feature is."""
    places = tl.arange(0, PROGRAMS)
    of_rows, of_columns = tl.max(tl.load(largest + places), 0), tl.max(tl.load(largest + PROGRAMS + places), 0)
    bound = softmax_rate(inputs) * tl.sqrt(of_rows) * tl.sqrt(of_columns)
    return tl.ceil(tl.maximum(bound - _HEADROOM, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["height"])
def sums_kernel(
    query, key,  # descriptors of [R, d], [C, d]
    largest,  # [2, PROGRAMS]
    row_sums,  # [column blocks, R]
    column_sums,  # [regions, C], or None
    positives,  # [R]: v of the rows that have their positive in this tile
    first_positive,  # row i's positive is column i + first_positive of the tile; None: no row's is in it
    height,  # blocks of rows in a region
    d,
    inputs,
    PROGRAMS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of columns against a region of rows.

    A thread holds the same columns of every block of rows, and 2 rows of every 16 of its warp. So its part of the
    columns' sums stays in registers until the region ends: the reshape names these axes, and moves nothing.
    """
    start, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * height
    column = tl.arange(0, BLOCK_N)
    scale = tl.load(inputs.scale).to(tl.float32)
    rate, shift = scale * LOG2_E, shift_of(largest, inputs, PROGRAMS)
    mine = row_sums + tl.program_id(0).to(tl.int64) * inputs.rows
    groups: tl.constexpr = min(BLOCK_M // 16, WARPS)
    of_columns = tl.zeros([groups, 8, BLOCK_N], tl.float32)
    if shift <= _LARGEST_SHIFT:
        for block in range(first, tl.minimum(first + height, tl.cdiv(inputs.rows, BLOCK_M))):
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            s = described_tile(
                query, key, block * BLOCK_M, start, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
            )
            if first_positive is not None:
                near = block * BLOCK_M + first_positive - start  # the column of the block's first row, in this block
                if (near < BLOCK_N) & (near + BLOCK_M > 0):
                    here = (near + tl.arange(0, BLOCK_M))[:, None] == column[None, :]
                    v = tl.sum(tl.where(here, s, 0.0), 1)
                    of_row = near + tl.arange(0, BLOCK_M)
                    inside = (row < inputs.rows) & (of_row >= 0) & (of_row < tl.minimum(BLOCK_N, inputs.columns - start))
                    tl.store(positives + row, tl.where(scale < 0, -v, v), mask=inside)
            # Past the edges s is 0: rows there are given an E of 0 by their shift, columns by a mask in the last block.
            e = tl.exp2(s * rate - tl.where(row < inputs.rows, shift, 1e30)[:, None])
            if start + BLOCK_N > inputs.columns:
                e = tl.where((column < inputs.columns - start)[None, :], e, 0.0)
            tl.store(mine + row, tl.sum(e, 1), mask=row < inputs.rows)
            if column_sums is not None:
                of_columns += tl.sum(tl.sum(tl.reshape(e, [BLOCK_M // 16 // groups, groups, 2, 8, BLOCK_N]), 2), 0)
        if column_sums is not None:
            place = column_sums + tl.program_id(1).to(tl.int64) * inputs.columns + start + column
            tl.store(place, tl.sum(tl.sum(of_columns, 1), 0), mask=column < inputs.columns - start)


@triton.jit
def enough(total, others):
    """Whether a sum over ``others`` entries is right to 2^-24: those below 2^-126 were taken for 0."""
    return total >= others.to(tl.float32) * 1.9721523e-31  # 2^-102


@triton.jit
def finish_kernel(
    query, key,  # descriptors of [R, d], [C, d]
    largest,  # [2, PROGRAMS]
    sums,  # [count, R], or [count, C] where AXIS = 0
    positives,  # [R], or None: no quantity of this table
    table, table_stride,  # [QUANTITIES, R], or [QUANTITIES, C]
    first_positive, count, d,
    inputs,
    EMPTY: tl.constexpr, REDUCE: tl.constexpr, MERGE: tl.constexpr, QUANTITIES: tl.constexpr, AXIS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold a block of rows (AXIS = 1) or columns (0) into the table: its sums, or where they are not enough, anew."""
    block: tl.constexpr = BLOCK_M if AXIS == 1 else BLOCK_N
    size, others = inputs.rows, inputs.columns
    if AXIS == 0:
        size, others = inputs.columns, inputs.rows
    start = tl.program_id(0) * block
    index = start + tl.arange(0, block)
    inside = index < size
    shift = shift_of(largest, inputs, PROGRAMS)
    total = tl.zeros([block], tl.float32)
    for first in range(0, count, _FOLDED):
        part = first + tl.arange(0, _FOLDED)
        place = sums + part.to(tl.int64)[:, None] * size + index[None, :]
        total += tl.sum(tl.load(place, mask=(part < count)[:, None] & inside[None, :], other=0.0), 0)
    known = load_quantities(table, table_stride, index, inside, QUANTITIES)
    if (shift <= _LARGEST_SHIFT) & (tl.min((enough(total, others) | (inside == 0)).to(tl.int32), 0) == 1):
        found = (tl.zeros([block], tl.float32) + shift / softmax_rate(inputs), total)
        if QUANTITIES == 3:
            if first_positive is None:
                found = found + (tl.zeros([block], tl.float32),)
            else:
                of_row = index + first_positive
                has = inside & (of_row >= 0) & (of_row < inputs.columns)
                found = found + (tl.load(positives + index, mask=has, other=0.0),)
        store_quantities(table, table_stride, index, inside, MERGE(known, found, inputs))
    else:
        for other in range(0, others, BLOCK_N if AXIS == 1 else BLOCK_M):
            row_start, column_start = start, other
            if AXIS == 0:
                row_start, column_start = other, start
            s = described_tile(query, key, row_start, column_start, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
            row, column = row_start + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_N)
            known = MERGE(known, REDUCE(s, row[:, None], column[None, :], inputs, AXIS), inputs)
        store_quantities(table, table_stride, index, inside, known)


def largest_squares(query: Tensor, key: Tensor) -> Tensor:
    """For :func:`update_by_sums`: ``[2, programs]``, whose largest are the largest squares of the rows' lengths."""
    largest = query.new_empty(2, _BOUND_PROGRAMS, dtype=torch.float32)
    width = triton.next_power_of_2(query.shape[1])
    largest_squares_kernel[(_BOUND_PROGRAMS, 2)](
        query, query.stride(0), query.shape[0], key, key.stride(0), key.shape[0], largest, query.shape[1],
        BLOCK_M=max(4096 // width, 1), BLOCK_K=width, num_warps=4,
    )  # fmt: skip
    return largest


def update_by_sums(
    epilogue: Epilogue,
    query: Tensor,  # [R, d]
    key: Tensor,  # [C, d]
    inputs: TileInputs,
    largest: Tensor,  # of matrices that query and key are blocks of
    first_positive: int | None,  # the column, in this tile, of row 0's positive, where row i's is i further
    row_table: Tensor,  # [row quantities, R]
    column_table: Tensor | None,  # [column quantities, C]
) -> tuple[Tensor, ...]:
    """What statistics.update_statistics does, for a plain softmax. Returns the partial sums."""
    query, key = aligned(query), aligned(key)
    rows, columns, d = query.shape[0], key.shape[0], query.shape[1]

    def launch(config: Config) -> tuple[Tensor, Tensor | None, Tensor]:
        row_blocks, column_blocks = triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n)
        regions = even_regions(column_blocks, row_blocks, resident_programs(config, query.device))
        height = triton.cdiv(row_blocks, regions)
        regions = triton.cdiv(row_blocks, height)  # none of them empty
        of_rows, positives = row_table.new_empty(column_blocks, rows), row_table.new_empty(rows)
        of_columns = None if column_table is None else column_table.new_empty(regions, columns)
        sums_kernel[(column_blocks, regions)](
            *described_rows(query, key, config), largest, of_rows, of_columns, positives, first_positive, height, d,
            inputs, PROGRAMS=_BOUND_PROGRAMS, WARPS=config.warps, **launch_options(config, query),
        )  # fmt: skip
        return of_rows, of_columns, positives

    of_rows, of_columns, positives = launch(pick("sums", epilogue.name, query, launch))
    config = pick("finish", epilogue.name, query, launch)

    def finish(sums: Tensor, table: Tensor, axis: int) -> None:
        blocks = triton.cdiv(table.shape[1], config.block_m if axis else config.block_n)
        finish_kernel[(blocks,)](
            *described_rows(query, key, config), largest, sums, positives, table, table.stride(0), first_positive,
            len(sums), d, inputs, epilogue.empty, epilogue.reduce, epilogue.merge, table.shape[0], axis,
            PROGRAMS=_BOUND_PROGRAMS, **launch_options(config, query),
        )  # fmt: skip

    finish(of_rows, row_table, 1)
    if of_columns is None:
        return of_rows, positives
    finish(of_columns, column_table, 0)
    return of_rows, positives, of_columns


def even_regions(column_blocks: int, row_blocks: int, programs: int) -> int:
    """The fewest regions with which the GPU, that holds ``programs``, idles for 5 % of the time at most.

    If there are none, those of the first 64 with which it idles least.
    """
    best, least = 1, float("inf")
    for regions in range(1, min(row_blocks, 64) + 1):
        waves = triton.cdiv(column_blocks * regions, programs)
        time = waves * triton.cdiv(row_blocks, regions) * programs / (column_blocks * row_blocks)
        if time < least:
            best, least = regions, time
        if time <= 1.05:
            break
    return best
