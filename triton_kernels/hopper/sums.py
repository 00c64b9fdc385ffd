"""Sweep 1 of a softmax: sums of one exponential an entry. See ``..sums`` for the shift, and for what finishes them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ring import (
    BEYOND,
    CONSUMER_REGISTERS,
    LOG2_E,
    PRODUCER_REGISTERS,
    column_of,
    exp2,
    is_on_diagonal,
    new_ring,
    new_turns,
    produce,
    row_of,
    signed,
    similarities,
)


@gluon.jit
def consume_sums(
    own, other, arrived, full, empty, turn,
    row_sums, column_sums, positives, row_groups, column_groups,
    scale, shift, own_start, first, blocks, rows, columns, diagonal,
    CONSUMER: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of the own block: one scalar less in every address
    last = columns - own_start  # that many columns of the own block there are
    rate = scale * LOG2_E
    # A thread has 2 rows of every 64 and the same columns of all blocks, so that its part of the columns' sums stays
    # in registers to the end: the reshape names these axes, and moves nothing.
    of_columns = gl.sum(gl.sum(gl.reshape(zero, [BLOCK_M // 64, 4, 2, 8, BLOCK_N]), 2), 0)
    if column_groups is not None:
        own_groups = row_of(gl.load(column_groups + own_start + column, mask=column < last, other=-1))
    if blocks > 0:
        mbarrier.wait(arrived, 0)
    for block in range(CONSUMER, blocks, 2):
        s = similarities(own, other, full, empty, turn, zero, block, CONSUMER, CHUNKS, STAGES)
        start = (first + block) * BLOCK_M
        row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        here = column_of(row + diagonal - own_start) == row_of(column)  # a row with its own number
        on_diagonal = is_on_diagonal(start, own_start, diagonal, BLOCK_M, BLOCK_N)
        if row_groups is not None:
            same = column_of(gl.load(row_groups + row, mask=row < rows, other=-2)) == own_groups
            positive = gl.where(same, s, 0.0)
            if on_diagonal:
                positive = gl.where(here, 0.0, positive)
            gl.store(positives + row, signed(scale, gl.sum(positive, 1)), mask=row < rows)
        elif on_diagonal:
            v = signed(scale, gl.sum(gl.where(here, s, 0.0), 1))
            own_column = row + diagonal
            inside = (own_column >= own_start) & (own_column < own_start + BLOCK_N) & (own_column < columns)
            gl.store(positives + row, v, mask=inside & (row < rows))
        # Past the edges s is 0: rows there get an E of 0 by their shift, columns by a mask in the last block.
        e = exp2(s * rate - column_of(gl.where(row < rows, shift, BEYOND)))
        if last < BLOCK_N:
            e = gl.where(row_of(column < last), e, 0.0)
        if row_groups is not None:
            if on_diagonal:
                e = gl.where(here, 0.0, e)
        gl.store(row_sums + row, gl.sum(e, 1), mask=row < rows)
        if column_sums is not None:
            of_columns += gl.sum(gl.sum(gl.reshape(e, [BLOCK_M // 64, 4, 2, 8, BLOCK_N]), 2), 0)
    if column_sums is not None:
        total = gl.convert_layout(gl.sum(gl.sum(of_columns, 1), 0), gl.SliceLayout(0, layout))
        gl.store(column_sums + own_start + column, total, mask=column < last)


@gluon.jit(do_not_specialize=["height", "diagonal"])
def sums_kernel(
    query, key,  # descriptors of [R, d] and [C, d], in blocks of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]
    bounds,  # [2, PROGRAMS], the largest squares of the rows' lengths
    scale,
    used_shift,  # [1], written
    row_sums,  # [column blocks, R]
    column_sums,  # [2 * regions, C], or None
    positives,  # [R]: v of the rows that have their positive in this tile; with groups [column blocks, R], sums of v
    row_groups, column_groups,  # [R], [C], or None
    rows, columns, diagonal,
    height,  # blocks of rows in a region
    HEADROOM: gl.constexpr, LARGEST_SHIFT: gl.constexpr, PROGRAMS: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """``..sums.sums_kernel`` with the block of columns in shared memory and the region's rows streamed past it."""
    own = gl.allocate_shared_memory(key.dtype, [CHUNKS] + key.block_type.shape, key.layout)
    other = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    full, empty = new_ring(STAGES, 1)
    turn = new_turns()
    fence_async_shared()
    places = gl.arange(0, PROGRAMS, gl.BlockedLayout([1], [32], [4], [0]))
    longest, longest_other = gl.max(gl.load(bounds + places), 0), gl.max(gl.load(bounds + PROGRAMS + places), 0)
    factor = gl.load(scale).to(gl.float32)
    bound = gl.maximum(gl.abs(factor), 1.2e-38) * LOG2_E * gl.sqrt(longest) * gl.sqrt(longest_other)
    shift = gl.ceil(gl.maximum(bound - HEADROOM, 0.0))
    number, region = gl.program_id(0), gl.program_id(1)
    if (number == 0) & (region == 0):
        gl.store(used_shift, shift)
    first = region * height
    blocks = gl.minimum(height, (rows + BLOCK_M - 1) // BLOCK_M - first)
    blocks = gl.where(shift <= LARGEST_SHIFT, blocks, 0)
    of_rows = row_sums + number.to(gl.int64) * rows
    of_positives = positives
    if row_groups is not None:
        of_positives = positives + number.to(gl.int64) * rows
    of_columns, of_columns_too = column_sums, column_sums
    if column_sums is not None:
        of_columns = column_sums + 2 * region.to(gl.int64) * columns
        of_columns_too = of_columns + columns
    own_start = number * BLOCK_N
    gl.warp_specialize([
        (consume_sums, (
            own, other, arrived, full, empty, turn, of_rows, of_columns, of_positives, row_groups, column_groups,
            factor, shift, own_start, first, blocks, rows, columns, diagonal,
            0, CHUNKS, STAGES, BLOCK_M, BLOCK_N,
        )),
        (consume_sums, (
            own, other, arrived, full, empty, turn, of_rows, of_columns_too, of_positives, row_groups, column_groups,
            factor, shift, own_start, first, blocks, rows, columns, diagonal,
            1, CHUNKS, STAGES, BLOCK_M, BLOCK_N,
        )),
        (produce, (
            key, query, own, other, arrived, full, empty, own_start, first, blocks, 0, 0, CHUNKS, STAGES, BLOCK_M,
        )),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
