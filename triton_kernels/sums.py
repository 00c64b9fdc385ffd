"""Softmax with one exponential an entry, which its row and its column share.

Against the maximum of its row and that of its column an entry takes two exponentials, and both maxima first. Here all
entries of a tile are taken against one number:

Sweep 1. ``E_ij = 2^(rate v_ij - shift)``, where rate is ``|logit_scale| log2(e)`` and ``rate v_ij`` is at most
``bound = rate max|x| max|y|`` (Cauchy-Schwarz). With ``shift = max(0, bound - 100)`` no sum can overflow. Rows and
columns whose sums may have lost what underflowed (:func:`enough`) are formed again against their maxima, by the same
launch that finishes the others. Unit rows and a scale of 69 or less never are; at a scale of 100 only those whose best
cosine is below -0.28, of 65,536, are. A bound beyond 220 is not tried.

Sweep 2. W of a block without positives takes one exponential, too: reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, cdiv, even_regions, launch_options, next_power_of_2, pick, ring_of
from .hopper.launch import Sums, launch_sums
from .launching import run_kernel
from .softmax import LOG2_E, softmax_rate
from .tiles import (
    Epilogue,
    TileInputs,
    aligned,
    load_quantities,
    load_vector,
    mirrored,
    partial_sums,
    store_quantities,
)
from .tma import described_rows, described_tile, resident_programs

_HEADROOM = tl.constexpr(100.0)
"""The largest exponent of an entry: 2^27 of them fit one sum."""
_LARGEST_SHIFT = tl.constexpr(120.0)
"""Beyond it hardly a row has an entry near enough to the bound, and the sums are not even tried."""
_BOUND_PROGRAMS = 128


@triton.jit
def begin_kernel(
    query, query_stride, rows,  # [rows, d]
    key, key_stride, columns,  # [columns, d]
    row_table, row_stride,  # [quantities, rows], or None
    column_table, column_stride,  # [quantities, columns], or None
    largest,  # [2, programs]
    d,
    EMPTY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest square of a row's length, of the rows that this program visits; tables are given empty sets there.

    Programs (., 0) visit the query and the table of the rows, (., 1) the key and the columns' table.
    """
    if tl.program_id(1) == 0:
        top = begin_rows(query, query_stride, rows, row_table, row_stride, d, EMPTY, 1, BLOCK_M, BLOCK_K)
    else:
        top = begin_rows(key, key_stride, columns, column_table, column_stride, d, EMPTY, 0, BLOCK_M, BLOCK_K)
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), top)


@triton.jit
def begin_rows(
    x, stride, count, table, table_stride, d,
    EMPTY: tl.constexpr, AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    top = tl.zeros([BLOCK_M], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < count)[:, None] & (k < d)[None, :]
        block = tl.load(x + row.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.sum(block * block, 1), propagate_nan=tl.PropagateNan.ALL)
        if table is not None:
            store_quantities(table, table_stride, row, row < count, EMPTY(BLOCK_M, AXIS))
    return tl.max(tl.where(top == top, top, float("inf")), 0)  # which drops a NaN, and what it hid


@triton.jit
def shift_of(largest, inputs, PROGRAMS: tl.constexpr):
    """The exponent that is taken off; infinite where a feature is, or is NaN."""
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
    positives,  # [R]: v of the rows that have their positive in this tile; GROUPED: [column blocks, R], sums of v
    diagonal,  # row i's own number is that of column i + diagonal of the tile
    height,  # blocks of rows in a region
    d,
    inputs,
    GROUPED: tl.constexpr, PROGRAMS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of columns against a region of rows.

    The entries on the diagonal are the positives, or GROUPED no pairs, and positives are all others of a row's group.
    A thread holds the same columns of every block of rows, and 2 rows of every 16 of its warp. So its part of the
    columns' sums stays in registers until the region ends: the reshape names these axes, and moves nothing.
    """
    start, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * height
    column = tl.arange(0, BLOCK_N)
    scale = tl.load(inputs.scale).to(tl.float32)
    rate, shift = scale * LOG2_E, shift_of(largest, inputs, PROGRAMS)
    offset = tl.program_id(0).to(tl.int64) * inputs.rows
    groups: tl.constexpr = min(BLOCK_M // 16, WARPS)
    of_columns = tl.zeros([groups, 8, BLOCK_N], tl.float32)
    if GROUPED:
        own_groups = load_vector(inputs.column_group, start + column, inputs.columns)[None, :]
    if shift <= _LARGEST_SHIFT:
        for block in range(first, tl.minimum(first + height, tl.cdiv(inputs.rows, BLOCK_M))):
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            s = described_tile(
                query, key, block * BLOCK_M, start, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
            )
            own = block * BLOCK_M + diagonal - start + tl.arange(0, BLOCK_M)  # rows' own columns, in this block
            here = own[:, None] == column[None, :]
            on_diagonal = (tl.min(own) < BLOCK_N) & (tl.max(own) >= 0)
            if GROUPED:
                same = load_vector(inputs.row_group, row, inputs.rows)[:, None] == own_groups
                v = tl.where(same, s, 0.0)
                if on_diagonal:
                    v = tl.where(here, 0.0, v)
                of_positives = tl.sum(v, 1)
                of_positives = tl.where(scale < 0, -of_positives, of_positives)
                tl.store(positives + offset + row, of_positives, mask=row < inputs.rows)
            elif on_diagonal:
                v = tl.sum(tl.where(here, s, 0.0), 1)
                inside = (row < inputs.rows) & (own >= 0) & (own < tl.minimum(BLOCK_N, inputs.columns - start))
                tl.store(positives + row, tl.where(scale < 0, -v, v), mask=inside)
            # Past the edges s is 0: rows there are given an E of 0 by their shift, columns by a mask in the last block.
            e = tl.exp2(s * rate - tl.where(row < inputs.rows, shift, 1e30)[:, None])
            if start + BLOCK_N > inputs.columns:
                e = tl.where((column < inputs.columns - start)[None, :], e, 0.0)
            if GROUPED:
                if on_diagonal:
                    e = tl.where(here, 0.0, e)
            tl.store(row_sums + offset + row, tl.sum(e, 1), mask=row < inputs.rows)
            if column_sums is not None:
                of_columns += tl.sum(tl.sum(tl.reshape(e, [BLOCK_M // 16 // groups, groups, 2, 8, BLOCK_N]), 2), 0)
        if column_sums is not None:
            place = column_sums + tl.program_id(1).to(tl.int64) * inputs.columns + start + column
            tl.store(place, tl.sum(tl.sum(of_columns, 1), 0), mask=column < inputs.columns - start)


@triton.jit
def against_itself(shift, total, rate):
    """(max, sum) for ``total 2^shift``, with a sum near 1, as the true max has it: its logarithm loses no digits.

    ``total 2^(shift - rate top)`` is formed with the top as it was rounded, and of an exponent near 0. At a scale of 0
    every v is 0, and so is the max.
    """
    exponent = tl.floor(tl.log2(total))
    mantissa = total * tl.exp2(-exponent)
    top = tl.where(rate > 1e-30, (shift + tl.log2(total)) / tl.maximum(rate, 1e-30), 0.0)
    return top, mantissa * tl.exp2(shift + exponent - rate * top)


@triton.jit
def against_positive(shift, total, rate, v, top, found):
    """The same against ``v``, that of a row's positive, where its exponential is no small part of the sum;
    0: there is none.

    Of a row that knows its positive the loss is the logarithm of ``found``, near 1: what rounding did to the positive's
    logit cancels, as it does against the maximum, which then is this logit.
    """
    e = tl.exp2(v * rate - shift)
    near = (tl.abs(v * rate) > 1e-30) & (e >= total * 5.9604645e-08) & (e <= total * 16777216.0)  # 2^-24, 2^24
    return tl.where(near, v, top), tl.where(near, tl.div_rn(total, tl.where(near, e, 1.0)), found)


@triton.jit
def enough(total, others):
    """Whether a sum over ``others`` entries is right to 2^-24: those below 2^-126 were taken for 0."""
    return total >= others.to(tl.float32) * 1.9721523e-31  # 2^-102


@triton.jit
def finish_kernel(
    query, key,  # descriptors of [R, d], [C, d]
    largest,  # [2, PROGRAMS]
    used_shift,  # [1], or None: as shift_of has it
    row_sums, row_count,  # [row_count, R]
    column_sums, column_count,  # [column_count, C], or None
    positives,  # of the rows, as sums_kernel left them
    row_table, row_stride,  # [quantities, R]
    column_table, column_stride,  # [2, C], or None
    diagonal, d,
    inputs,
    REDUCE: tl.constexpr, MERGE: tl.constexpr, QUANTITIES: tl.constexpr,
    GROUPED: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold the sums of a block of rows into their table, or, in the programs that follow, of a block of columns."""
    program, row_blocks = tl.program_id(0), tl.cdiv(inputs.rows, BLOCK_M)
    if program < row_blocks:
        finish_block(
            query, key, largest, used_shift, row_sums, row_count, positives, row_table, row_stride, program, diagonal,
            d, inputs,
            REDUCE, MERGE, QUANTITIES, 1, GROUPED, PROGRAMS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    elif column_table is not None:
        finish_block(
            query, key, largest, used_shift, column_sums, column_count, positives, column_table, column_stride,
            program - row_blocks, diagonal, d, inputs,
            REDUCE, MERGE, 2, 0, GROUPED, PROGRAMS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def finish_block(
    query, key, largest, used_shift, sums, count, positives, table, table_stride, number, diagonal, d, inputs,
    REDUCE: tl.constexpr, MERGE: tl.constexpr, QUANTITIES: tl.constexpr, AXIS: tl.constexpr,
    GROUPED: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of rows (AXIS = 1) or columns (0): from its sums, or where they are not enough, anew."""
    block: tl.constexpr = BLOCK_M if AXIS == 1 else BLOCK_N
    size, others = inputs.rows, inputs.columns
    if AXIS == 0:
        size, others = inputs.columns, inputs.rows
    start = number * block
    index = start + tl.arange(0, block)
    inside = index < size
    if used_shift is None:
        shift = shift_of(largest, inputs, PROGRAMS)
    else:
        shift = tl.load(used_shift)
    tried = index < tl.where(shift <= _LARGEST_SHIFT, size, 0)  # else there are no sums
    total = tl.where(inside, partial_sums(sums, size, count, index, tried), 1.0)
    known = load_quantities(table, table_stride, index, inside, QUANTITIES)
    if tl.min(enough(total, others).to(tl.int32), 0) == 1:
        rate = softmax_rate(inputs)
        if GROUPED:  # of several positives their sum, which is none's
            v = partial_sums(positives, size, count, index, inside)
        elif AXIS == 1:
            own = index + diagonal
            v = tl.load(positives + index, mask=inside & (own >= 0) & (own < inputs.columns), other=0.0)
        else:
            own = index - diagonal
            v = tl.load(positives + own, mask=inside & (own >= 0) & (own < inputs.rows), other=0.0)
        top, found = against_itself(shift, total, rate)
        found = against_positive(shift, total, rate, v, top, found)
        if QUANTITIES == 3:
            found = found + (v,)
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


def begin_sums(
    epilogue: Epilogue,
    query: Tensor,
    key: Tensor,
    row_table: Tensor | None = None,  # [quantities, rows]
    column_table: Tensor | None = None,
) -> Tensor:
    """For :func:`update_by_sums`: ``[2, programs]``, whose largest are the largest squares of the rows' lengths.

    Tables become those of empty sets by the same launch.
    """
    largest = query.new_empty(2, _BOUND_PROGRAMS, dtype=torch.float32)
    width = next_power_of_2(max(query.shape[1], 1))
    row_stride, column_stride = (0 if table is None else table.stride(0) for table in (row_table, column_table))
    run_kernel(
        begin_kernel, (_BOUND_PROGRAMS, 2),
        query, query.stride(0), query.shape[0], key, key.stride(0), key.shape[0],
        row_table, row_stride, column_table, column_stride, largest, query.shape[1], epilogue.empty,
        BLOCK_M=max(4096 // width, 1), BLOCK_K=width, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return largest


def update_by_sums(
    epilogue: Epilogue,
    query: Tensor,  # [R, d]
    key: Tensor,  # [C, d]
    inputs: TileInputs,
    largest: Tensor,  # of matrices that query and key are blocks of
    diagonal: int,  # the column of the tile that has its first row's own number, and may lie outside
    row_table: Tensor,  # [row quantities, R]
    column_table: Tensor | None,  # [column quantities, C]
    ranges: tuple[Tensor | None, Tensor | None] = (None, None),  # groups.group_ranges of rows and columns, if known
) -> tuple[Tensor, ...]:
    """What statistics.update_statistics does, for a softmax. Returns the partial sums.

    The entries on the diagonal are the rows' positives, or where there are groups no pairs: then the tile holds all
    rows' entries with themselves (``inputs.diagonal``) or none, and columns are served by the kernel in Gluon alone.
    """
    query, key = aligned(query), aligned(key)
    rows, columns, d, grouped = query.shape[0], key.shape[0], query.shape[1], inputs.row_group is not None
    used_shift = None

    described: dict[tuple[int, int, int], tuple] = {}  # the same for both kernels, where their blocks are

    def rows_for(config: Config) -> tuple:
        blocks = config.block_m, config.block_n, config.block_k
        if blocks not in described:
            described[blocks] = described_rows(query, key, config)
        return described[blocks]

    def launch(config: Config) -> tuple[Sums, Sums | None]:
        row_blocks, column_blocks = cdiv(rows, config.block_m), cdiv(columns, config.block_n)
        regions = even_regions(column_blocks, row_blocks, resident_programs(config, query.device))
        height = cdiv(row_blocks, regions)
        regions = cdiv(row_blocks, height)  # none of them empty
        of_rows = row_table.new_empty(column_blocks, rows)
        positives = row_table.new_empty(column_blocks if grouped else 1, rows)
        of_columns = None if column_table is None else column_table.new_empty(regions, columns)
        run_kernel(
            sums_kernel, (column_blocks, regions),
            *rows_for(config), largest, of_rows, of_columns, positives, diagonal, height, d,
            inputs, GROUPED=grouped, PROGRAMS=_BOUND_PROGRAMS, WARPS=config.warps, **launch_options(config, query),
        )  # fmt: skip
        return Sums(of_rows, positives), None if of_columns is None else Sums(of_columns, positives)

    if ring := ring_of("sums", epilogue.name, query.dtype, d):
        of_rows, of_columns, used_shift = launch_sums(
            query, key, inputs, ranges, largest, diagonal, column_table is not None, ring,
            _HEADROOM.value, _LARGEST_SHIFT.value,
        )  # fmt: skip
    else:
        of_rows, of_columns = launch(pick("sums", epilogue.name, query, launch))
    config = pick("finish", epilogue.name, query, launch)

    def finish(described, inputs, diagonal, of_rows, row_table, of_columns=None, column_table=None) -> None:
        blocks, columns, column_count, column_stride = cdiv(inputs.rows, config.block_m), None, 0, 0
        if column_table is not None:
            blocks += cdiv(inputs.columns, config.block_n)
            columns, column_count, column_stride = of_columns.sums, len(of_columns.sums), column_table.stride(0)
        run_kernel(
            finish_kernel, (blocks,),
            *described, largest, used_shift, of_rows.sums, len(of_rows.sums), columns, column_count, of_rows.positives,
            row_table, row_table.stride(0), column_table, column_stride, diagonal, d,
            inputs, epilogue.reduce, epilogue.merge, row_table.shape[0],
            GROUPED=grouped, PROGRAMS=_BOUND_PROGRAMS, **launch_options(config, query),
        )  # fmt: skip

    if not grouped:
        finish(rows_for(config), inputs, diagonal, of_rows, row_table, of_columns, column_table)
    else:
        finish(rows_for(config), inputs, diagonal, of_rows, row_table)
        if column_table is not None:
            finish(
                described_rows(key, query, config), mirrored(inputs), -diagonal, of_columns, column_table
            )
    return (*of_rows, *(of_columns or ()))
