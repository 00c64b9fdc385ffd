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
    group_range,
    is_on_diagonal,
    may_meet,
    new_ring,
    new_turns,
    produce,
    row_of,
    signed,
    similarities,
    visited,
)


@gluon.jit
def own_entries(own, column):
    """Entries of rows with their own number, which is column ``own``. Formed where they are needed, on the diagonal."""
    return column_of(own) == row_of(column)


@gluon.jit
def over_rows(x, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """What a thread has of the sums of x's columns.

    It has 2 rows of every 64 and the same columns of all blocks, so that its part of the columns' sums stays in
    registers to the end: the reshape names these axes, and moves nothing.
    """
    return gl.sum(gl.sum(gl.reshape(x, [BLOCK_M // 64, 4, 2, 8, BLOCK_N]), 2), 0)


@gluon.jit
def consume_sums(
    own, other, arrived, full, empty, turn,
    row_sums, column_sums, positives, column_positives, row_groups, column_groups, row_ranges, column_ranges,
    scale, shift, number, before, first, blocks, second, more, rows, columns, diagonal,
    CONSUMER: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    own_start = number * BLOCK_N
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of the own block: one scalar less in every address
    last = columns - own_start  # that many columns of the own block there are
    rate = scale * LOG2_E
    of_columns = over_rows(zero, BLOCK_M, BLOCK_N)
    if row_groups is not None:
        if column_ranges is not None:
            least, largest = group_range(column_ranges, own_start, columns, BLOCK_N)
        if column_positives is not None:
            of_own = column_positives + own_start + column
            gl.store(of_own, gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(0, layout)), mask=column < last)
    if blocks + more > 0:
        mbarrier.wait(arrived, 0)
    for visit in range(CONSUMER, blocks + more, 2):
        start = visited(visit, first, blocks, second) * BLOCK_M
        row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        on_diagonal = is_on_diagonal(start, own_start, diagonal, BLOCK_M, BLOCK_N)
        part, counts = number, 1.0
        if HALF:
            part = (before + visit) // (BLOCK_N // BLOCK_M)
            counts = gl.where((part > 0) & (2 * part < (columns + BLOCK_N - 1) // BLOCK_N), 1.0, 0.0)
        place = part.to(gl.int64) * rows + row
        if row_groups is not None:
            meets = True
            if row_ranges is not None:  # known by the time the products are
                meets = may_meet(least, largest, row_ranges, start, rows, BLOCK_M)
        s = similarities(own, other, full, empty, turn, zero, visit, CONSUMER, CHUNKS, STAGES)
        if row_groups is not None:
            of_positives = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, layout))
            if meets:
                of_row = gl.load(row_groups + row, mask=row < rows, other=-2)
                of_column = gl.load(column_groups + own_start + column, mask=column < last, other=-1)
                positive = gl.where(column_of(of_row) == row_of(of_column), s, 0.0)
                if on_diagonal:
                    positive = gl.where(own_entries(row + diagonal - own_start, column), 0.0, positive)
                of_positives = signed(scale, gl.sum(positive, 1))
                if column_positives is not None:
                    # Few blocks have positives, and registers are short: the columns' sums wait in memory. A thread
                    # reads back what it wrote: of those that hold an entry the first alone stores it, always the same.
                    more_of_own = signed(scale, gl.sum(positive, 0)) * counts
                    gl.store(of_own, gl.load(of_own, mask=column < last, other=0.0) + more_of_own, mask=column < last)
            gl.store(positives + place, of_positives, mask=row < rows)
        elif on_diagonal:
            v = signed(scale, gl.sum(gl.where(own_entries(row + diagonal - own_start, column), s, 0.0), 1))
            own_column = row + diagonal
            inside = (own_column >= own_start) & (own_column < own_start + BLOCK_N) & (own_column < columns)
            gl.store(positives + row, v, mask=inside & (row < rows))
        # Past the edges s is 0: rows there get an E of 0 by their shift, columns by a mask in the last block.
        e = exp2(s * rate - column_of(gl.where(row < rows, shift, BEYOND)))
        if last < BLOCK_N:
            e = gl.where(row_of(column < last), e, 0.0)
        if row_groups is not None:
            if on_diagonal:
                e = gl.where(own_entries(row + diagonal - own_start, column), 0.0, e)
        gl.store(row_sums + place, gl.sum(e, 1), mask=row < rows)
        if column_sums is not None:
            if HALF:
                of_columns += over_rows(e, BLOCK_M, BLOCK_N) * counts
            else:
                of_columns += over_rows(e, BLOCK_M, BLOCK_N)
    if column_sums is not None:
        total = gl.convert_layout(gl.sum(gl.sum(of_columns, 1), 0), gl.SliceLayout(0, layout))
        gl.store(column_sums + own_start + column, total, mask=column < last)


@gluon.jit
def half_of_a_batch(number, before, height, columns, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """``(first, blocks, second, more)`` of the visits of own block ``number`` from its visit ``before`` on.

    Of B blocks of a batch the b-th meets those numbered b, b + 1, ... b + B // 2, after the last the first: of every
    two blocks one meets the other, if they are not B / 2 apart, and with itself a block is met once. So all have as
    many visits, and no entry is visited twice but in these.
    """
    count = (columns + BLOCK_N - 1) // BLOCK_N * (BLOCK_N // BLOCK_M)
    visits = ((columns + BLOCK_N - 1) // BLOCK_N // 2 + 1) * (BLOCK_N // BLOCK_M)
    all_visits = gl.minimum(height, visits - before)
    first = number * (BLOCK_N // BLOCK_M) + before
    blocks = gl.minimum(all_visits, count - first)  # before the first again; below 0 if that was in an earlier region
    return first, blocks, first * 0, all_visits - blocks


@gluon.jit(do_not_specialize=["height", "diagonal"])
def sums_kernel(
    query, key,  # descriptors of [R, d] and [C, d], in blocks of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]
    bounds,  # [2, PROGRAMS], the largest squares of the rows' lengths
    scale,
    used_shift,  # [1], written
    row_sums,  # [column blocks, R]; HALF: [column blocks // 2 + 1, R]
    column_sums,  # [2 * regions, C], or None
    positives,  # [R]: v of the rows that have their positive in this tile; with groups as row_sums, sums of v
    column_positives,  # with groups, as column_sums; else None
    row_groups, column_groups,  # [R], [C], or None
    row_ranges, column_ranges,  # as ``..groups.group_ranges`` has them, or None: any blocks may meet
    rows, columns, diagonal,
    height,  # blocks of rows in a region
    HEADROOM: gl.constexpr, LARGEST_SHIFT: gl.constexpr, PROGRAMS: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """``..sums.sums_kernel`` with the block of columns in shared memory and the region's rows streamed past it.

    HALF: query and key are the same batch, of which only pairs of blocks are visited, as half_of_a_batch() has it. What
    a row sums is then in both tables. Sums of a block with itself, and with one B / 2 away, are its rows' alone.
    """
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
    before = region * height
    if HALF:
        first, blocks, second, more = half_of_a_batch(number, before, height, columns, BLOCK_M, BLOCK_N)
    else:
        first, second, more = before, 0, 0
        blocks = gl.minimum(height, (rows + BLOCK_M - 1) // BLOCK_M - first)
    blocks, more = gl.where(shift <= LARGEST_SHIFT, blocks, 0), gl.where(shift <= LARGEST_SHIFT, more, 0)
    of_columns, of_columns_too = column_sums, column_sums
    if column_sums is not None:
        of_columns = column_sums + 2 * region.to(gl.int64) * columns
        of_columns_too = of_columns + columns
    of_positives, of_positives_too = column_positives, column_positives
    if column_positives is not None:
        of_positives = column_positives + 2 * region.to(gl.int64) * columns
        of_positives_too = of_positives + columns
    gl.warp_specialize([
        (consume_sums, (
            own, other, arrived, full, empty, turn, row_sums, of_columns, positives, of_positives,
            row_groups, column_groups, row_ranges, column_ranges,
            factor, shift, number, before, first, blocks, second, more, rows, columns, diagonal,
            0, CHUNKS, STAGES, BLOCK_M, BLOCK_N, HALF,
        )),
        (consume_sums, (
            own, other, arrived, full, empty, turn, row_sums, of_columns_too, positives, of_positives_too,
            row_groups, column_groups, row_ranges, column_ranges,
            factor, shift, number, before, first, blocks, second, more, rows, columns, diagonal,
            1, CHUNKS, STAGES, BLOCK_M, BLOCK_N, HALF,
        )),
        (produce, (
            key, query, own, other, arrived, full, empty, number * BLOCK_N, first, blocks, second, more,
            CHUNKS, STAGES, BLOCK_M,
        )),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
