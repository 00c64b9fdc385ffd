"""Sweep 2 of a softmax: W = dL/ds of a tile, written through shared memory, in half precision.

Where rows and columns can share an exponential blocks off the diagonal come first, and then, in a loop of their own,
those on it; else all of them come then. In one loop registers that only the latter need would spill.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .ring import (
    CONSUMER_REGISTERS,
    HIGHEST,
    LOG2_E,
    PRODUCER_REGISTERS,
    column_of,
    exp2,
    group_range,
    is_on_diagonal,
    may_meet,
    near_diagonal,
    new_ring,
    new_turns,
    produce,
    row_of,
    signed,
    similarities,
    tma_store,
)


@gluon.jit
def shared_weights(s, row_share, column_share, scale, reference):
    """W without positives, by the exponential that rows and columns share.

    Shares are ``..reference.form_shares``'s: 0 past the edges, where W may be anything; None where there are no
    statistics.
    """
    if row_share is None:
        share = row_of(column_share)
    elif column_share is None:
        share = column_of(row_share)
    else:
        share = column_of(row_share) + row_of(column_share)
    return exp2(s * (scale * LOG2_E) - reference) * share


@gluon.jit
def less_positives(w, row_groups, column_groups, row_positives, column_positives, row, column, rows, columns):
    """W where rows and columns of one group are positives.

    ``column_positives`` is None where two rows of a group have the same positive weight.
    """
    positive = column_of(gl.load(row_positives + row, mask=row < rows, other=0.0))
    if column_positives is None:
        positive = 2.0 * positive
    else:
        positive = positive + row_of(gl.load(column_positives + column, mask=column < columns, other=0.0))
    of_row = gl.load(row_groups + row, mask=row < rows, other=-2)
    of_column = gl.load(column_groups + column, mask=column < columns, other=-1)
    return gl.where(column_of(of_row) == row_of(of_column), w - positive, w)


@gluon.jit
def exact_weights(s, row_table, row_stride, column_table, column_stride, row, column, rows, columns, scale):
    """W without positives by an exponential against the row's maximum, and one against the column's.

    Exact where these are the positive's own: W less the positive's weight is 0 where a probability is 1. Tables are
    coefficients, None of what has no statistics.
    """
    v = signed(scale, s)
    if row_table is None:
        w = of_table(v, column_table, column_stride, row_of(column), columns, scale)
    else:
        w = of_table(v, row_table, row_stride, column_of(row), rows, scale)
        if column_table is not None:
            w += of_table(v, column_table, column_stride, row_of(column), columns, scale)
    return w


@gluon.jit
def of_table(v, table, stride, index, size, scale):
    inside = index < size
    top = gl.load(table + index, mask=inside, other=HIGHEST)  # past the edge the exponential is 0
    logarithm = gl.load(table + stride + index, mask=inside, other=0.0)
    weight = gl.load(table + 2 * stride + index, mask=inside, other=0.0)
    rate = gl.maximum(gl.abs(scale), 1.2e-38) * LOG2_E
    return exp2((v - top) * rate) * (weight * exp2(-logarithm * LOG2_E))


@gluon.jit
def consume_weights(
    own, other, written, into, arrived, full, empty, turn,
    row_shares, column_shares, row_table, row_stride, column_table, column_stride,
    row_positives, column_positives, row_groups, column_groups, row_ranges, column_ranges,
    scale, reference, own_start, first, blocks, second, more, rows, columns, diagonal,
    CONSUMER: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    column = own_start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    column_share = None
    if column_shares is not None:
        column_share = gl.load(column_shares + column, mask=column < columns, other=0.0)
    if column_groups is not None:
        least, largest = group_range(column_ranges, own_start, columns, BLOCK_N)
    buffer = written.index(CONSUMER)
    if blocks + more > 0:
        mbarrier.wait(arrived, 0)
    for visit in range(CONSUMER, blocks, 2):
        start = (first + visit) * BLOCK_M
        row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        row_share = gl.load(row_shares + row, mask=row < rows, other=0.0)  # is here by the time the products are
        if row_groups is not None:
            meets = may_meet(least, largest, row_ranges, start, rows, BLOCK_M)
        s = similarities(own, other, full, empty, turn, zero, visit, CONSUMER, CHUNKS, STAGES)
        w = shared_weights(s, row_share, column_share, scale, reference)
        if row_groups is not None:
            if meets:
                w = less_positives(
                    w, row_groups, column_groups, row_positives, column_positives, row, column, rows, columns
                )
        if is_on_diagonal(start, own_start, diagonal, BLOCK_M, BLOCK_N) == 0:
            store_block(w, buffer, into, start, own_start)
    tma.store_wait(0)
    for visit in range(blocks + (blocks + CONSUMER) % 2, blocks + more, 2):
        s = similarities(own, other, full, empty, turn, zero, visit, CONSUMER, CHUNKS, STAGES)
        start = (second + visit - blocks) * BLOCK_M
        row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        w = exact_weights(s, row_table, row_stride, column_table, column_stride, row, column, rows, columns, scale)
        here = column_of(row + diagonal) == row_of(column)  # a row with its own number
        if row_groups is None:
            positive = gl.load(row_positives + row, mask=row < rows, other=0.0)
            w = gl.where(here, w - column_of(positive), w)
        else:
            w = less_positives(
                w, row_groups, column_groups, row_positives, column_positives, row, column, rows, columns
            )
            w = gl.where(here, 0.0, w)
        store_block(w, buffer, into, start, own_start)
    tma.store_wait(0)


@gluon.jit
def store_block(w, buffer, into, row, column):
    tma.store_wait(0)  # what left the buffer before
    buffer.store(w.to(buffer.dtype))
    fence_async_shared()
    tma_store(into, [row, column], buffer)


@gluon.jit(do_not_specialize=["height", "diagonal"])
def weights_kernel(
    query, key,  # descriptors of [R, d] and [C, d], in blocks of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]
    weights,  # a descriptor of [R, C], in blocks of [BLOCK_M, BLOCK_N]
    row_shares, column_shares,  # [R], [C]; the second None: columns have no statistics
    row_table, row_stride, column_table, column_stride,  # coefficients, [5, R], and [5, C] or None
    row_positives, column_positives,  # weights of the positives: [R], [C], as less_positives has them
    row_groups, column_groups,  # [R], [C], or None
    row_ranges, column_ranges,  # as ``..groups.group_ranges`` has them, where there are groups
    scale, reference,  # one element; [2], as ``..reference`` has it
    rows, columns, diagonal,
    height,  # blocks of rows in a region
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """``W[R, C]``: a block of columns in shared memory, and a region's rows streamed past it.

    Entries on the diagonal are the rows' positives, or where there are groups no pairs.
    """
    own = gl.allocate_shared_memory(key.dtype, [CHUNKS] + key.block_type.shape, key.layout)
    other = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    written = gl.allocate_shared_memory(weights.dtype, [2] + weights.block_type.shape, weights.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    full, empty = new_ring(STAGES, 1)
    turn = new_turns()
    fence_async_shared()
    own_start, first = gl.program_id(0) * BLOCK_N, gl.program_id(1) * height
    blocks = gl.minimum(height, (rows + BLOCK_M - 1) // BLOCK_M - first)
    second, more = near_diagonal(own_start, -diagonal, first, blocks, BLOCK_N, BLOCK_M)
    if gl.load(reference + 1) == 0:
        second, more, blocks = first, blocks, 0
    factor, exponent = gl.load(scale).to(gl.float32), gl.load(reference)
    gl.warp_specialize([
        (consume_weights, (
            own, other, written, weights, arrived, full, empty, turn,
            row_shares, column_shares, row_table, row_stride, column_table, column_stride,
            row_positives, column_positives, row_groups, column_groups, row_ranges, column_ranges,
            factor, exponent, own_start, first, blocks, second, more, rows, columns, diagonal,
            0, CHUNKS, STAGES, BLOCK_M, BLOCK_N,
        )),
        (consume_weights, (
            own, other, written, weights, arrived, full, empty, turn,
            row_shares, column_shares, row_table, row_stride, column_table, column_stride,
            row_positives, column_positives, row_groups, column_groups, row_ranges, column_ranges,
            factor, exponent, own_start, first, blocks, second, more, rows, columns, diagonal,
            1, CHUNKS, STAGES, BLOCK_M, BLOCK_N,
        )),
        (produce, (
            key, query, own, other, arrived, full, empty, own_start, first, blocks, second, more,
            CHUNKS, STAGES, BLOCK_M,
        )),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
