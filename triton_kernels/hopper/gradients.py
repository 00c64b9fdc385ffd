"""Sweep 2 of a softmax over narrow features: W stays in registers, where its products with the features are summed.

In two loops, as in weights.py; here the first one, too, goes through the blocks on the diagonal, where its W is 0, and
leaves the last block to the second, if rows are missing in it: so that it need not ask where rows end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .ring import (
    BEYOND,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    column_of,
    group_range,
    is_on_diagonal,
    may_meet,
    near_diagonal,
    new_ring,
    row_of,
    tma_load,
    visited,
)
from .weights import exact_weights, less_positives, shared_weights


@gluon.jit
def block_of(visit, first, blocks, second, near, last):
    """The other block of a visit: ``blocks`` of them from ``first`` on, ``near`` from ``second`` on, then ``last``."""
    return gl.where(visit < blocks + near, visited(visit, first, blocks, second), last)


@gluon.jit
def produce_rows(
    own_rows, other_rows, own, other, arrived, full, empty, own_start, first, blocks, second, near, last, more,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The producer: the own rows of both consumers once, then the other blocks, of all features at once."""
    if blocks + more > 0:
        mbarrier.expect(arrived, 2 * own_rows.block_type.nbytes)
        for consumer in gl.static_range(2):
            tma_load(own_rows, [own_start + consumer * BLOCK_M, 0], arrived, own.index(consumer))
    for visit in range(blocks + more):
        stage = visit % STAGES
        mbarrier.wait(empty.index(stage), ((visit // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), other_rows.block_type.nbytes)
        start = block_of(visit, first, blocks, second, near, last) * BLOCK_N
        tma_load(other_rows, [start, 0], full.index(stage), other.index(stage))


@gluon.jit
def meets_off_diagonal(
    own_groups, least, largest, other_ranges, start, other_count, on_diagonal, BLOCK: gl.constexpr
):  # fmt: skip
    """Whether there may be positives in a block off the diagonal."""
    if own_groups is None:
        return False
    else:
        return may_meet(least, largest, other_ranges, start, other_count, BLOCK) & (on_diagonal == 0)


@gluon.jit
def off_diagonal_weights(
    s, own_share, row, other_share, meets, on_diagonal, own_positives, other_positives, own_groups, other_groups,
    scale, reference, start, own_count, other_count, BLOCK_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """W of a consumer's own rows against the other block that begins at row ``start``; 0 if it is on the diagonal.

    The block is a whole one. In rows past the own ones' edge, of which no gradient is stored, W is anything.
    """
    w = shared_weights(s, own_share, other_share, scale, gl.where(on_diagonal, BEYOND, reference))
    if own_groups is not None:
        if meets:
            other_row = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            w = less_positives(
                w, own_groups, other_groups, own_positives, other_positives, row, other_row, own_count, other_count
            )
    return w


@gluon.jit
def rest_of_weights(
    s, own_positives, positives_offset, other_positives, own_groups, other_groups,
    own_table, own_stride, other_table, other_stride,
    scale, all_of_it, own_start, start, own_count, other_count, diagonal,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The same of a block that may have rows past the edge, if it is on the diagonal, else 0; or in any case."""
    row = own_start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    other_row = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    w = exact_weights(
        s, own_table, own_stride, other_table, other_stride, row, other_row, own_count, other_count, scale
    )
    here = column_of(row + diagonal) == row_of(other_row)  # a row with its own number
    if own_groups is None:
        number = row + diagonal
        has = (row < own_count) & (number >= 0) & (number < other_count)
        positive = gl.load(own_positives + row + positives_offset, mask=has, other=0.0)
        w = gl.where(here, w - column_of(positive), w)
    else:
        w = less_positives(
            w, own_groups, other_groups, own_positives, other_positives, row, other_row, own_count, other_count
        )
        w = gl.where(here, 0.0, w)
    count = gl.where(all_of_it | is_on_diagonal(own_start, start, diagonal, BLOCK_M, BLOCK_N), other_count, 0)
    return gl.where(row_of(other_row < count), w, 0.0)


@gluon.jit
def consume_gradients(
    own, other, arrived, full, empty,
    gradient, gradient_stride, own_shares, other_shares, own_table, own_stride, other_table, other_stride,
    own_positives, positives_offset, other_positives, own_groups, other_groups, own_ranges, other_ranges,
    scale, reference, block_start, first, blocks, second, near, last, more, own_count, other_count, diagonal, d,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    own_start = block_start + CONSUMER * BLOCK_M
    row = own_start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    place = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of another row in its block
    share, least, largest = None, None, None
    if own_shares is not None:
        share = gl.load(own_shares + row, mask=row < own_count, other=0.0)
    if own_groups is not None:
        least, largest = group_range(own_ranges, own_start, own_count, BLOCK_M)
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    sums = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, of_sums)
    mine = own.index(CONSUMER)
    if blocks + more > 0:
        mbarrier.wait(arrived, 0)
    if blocks > 0:
        mbarrier.wait(full.index(0), 0)
        s = warpgroup_mma(mine, other.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        at_first = is_on_diagonal(own_start, first * BLOCK_N, diagonal, BLOCK_M, BLOCK_N)
        first_share = None
        if other_shares is not None:
            first_share = gl.load(other_shares + first * BLOCK_N + place)
        w = off_diagonal_weights(
            s, share, row, first_share,
            meets_off_diagonal(
                own_groups, least, largest, other_ranges, first * BLOCK_N, other_count, at_first, BLOCK_N
            ),
            at_first, own_positives, other_positives, own_groups, other_groups,
            scale, reference, first * BLOCK_N, own_count, other_count, BLOCK_N, layout,
        )  # fmt: skip
        w = gl.convert_layout(w.to(other.dtype), operand)
        # A block's similarities are formed while the products with the block before, whose W is finished, are added.
        for visit in range(1, blocks):
            stage, before = visit % STAGES, (visit + STAGES - 1) % STAGES
            mbarrier.wait(full.index(stage), (visit // STAGES) & 1)
            s = warpgroup_mma(mine, other.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
            running = warpgroup_mma(w, other.index(before), sums, is_async=True)
            # Read while the products are formed.
            start = (first + visit) * BLOCK_N
            on_diagonal = is_on_diagonal(own_start, start, diagonal, BLOCK_M, BLOCK_N)
            other_share = None
            if other_shares is not None:
                other_share = gl.load(other_shares + start + place)
            meets = meets_off_diagonal(
                own_groups, least, largest, other_ranges, start, other_count, on_diagonal, BLOCK_N
            )
            s = warpgroup_mma_wait(1, deps=(s,))
            found = off_diagonal_weights(
                s, share, row, other_share, meets, on_diagonal, own_positives, other_positives,
                own_groups, other_groups, scale, reference, start, own_count, other_count, BLOCK_N, layout,
            )  # fmt: skip
            sums = warpgroup_mma_wait(0, deps=(running,))
            mbarrier.arrive(empty.index(before), count=1)
            w = gl.convert_layout(found.to(other.dtype), operand)
        final = (blocks - 1) % STAGES
        running = warpgroup_mma(w, other.index(final), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(running,))
        mbarrier.arrive(empty.index(final), count=1)
    for visit in range(blocks, blocks + more):
        stage = visit % STAGES
        mbarrier.wait(full.index(stage), (visit // STAGES) & 1)
        s = warpgroup_mma(mine, other.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        start = block_of(visit, first, blocks, second, near, last) * BLOCK_N
        rest = rest_of_weights(
            s, own_positives, positives_offset, other_positives, own_groups, other_groups,
            own_table, own_stride, other_table, other_stride, scale, (blocks == 0) | (start + BLOCK_N > other_count),
            own_start, start, own_count, other_count, diagonal, BLOCK_M, BLOCK_N, layout,
        )  # fmt: skip
        operands = gl.convert_layout(rest.to(other.dtype), operand)
        running = warpgroup_mma(operands, other.index(stage), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(running,))
        mbarrier.arrive(empty.index(stage), count=1)
    row = own_start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_sums))
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, of_sums))
    into = gradient + column_of(row.to(gl.int64) * gradient_stride) + row_of(k)
    inside = column_of(row < own_count) & row_of(k < d)
    if ADD:
        sums += gl.load(into, mask=inside, other=0.0)
    gl.store(into, sums, mask=inside)


@gluon.jit(do_not_specialize=["height", "diagonal", "positives_offset"])
def gradients_kernel(
    own_rows, other_rows,  # descriptors of [own_count, d] and [other_count, d], blocks of BLOCK_M and BLOCK_N rows
    gradient, gradient_stride,  # [regions, own_count, d], fp32
    own_shares, other_shares,  # [own_count], [other_count]; None: those have no statistics
    own_table, own_stride, other_table, other_stride,  # coefficients, [5, own_count] and [5, other_count], or None
    own_positives, positives_offset,  # own row i's positive has the weight own_positives[i + positives_offset]
    other_positives,  # as less_positives has them
    own_groups, other_groups,  # or None
    own_ranges, other_ranges,  # as ``..groups.group_ranges`` has them, where there are groups
    scale, reference,  # one element; [2], as ``..reference`` has it
    own_count, other_count, diagonal, d,
    height,  # other blocks in a region
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """``gradient[region] = W @ other`` (ADD: ``+=``) for 2 BLOCK_M own rows, which no other program of the region
    has, BLOCK_M of each consumer.

    ``own`` are the rows of W, or where the columns' gradient is asked for W's transposed, its columns.
    """
    own = gl.allocate_shared_memory(own_rows.dtype, [2] + own_rows.block_type.shape, own_rows.layout)
    other = gl.allocate_shared_memory(other_rows.dtype, [STAGES] + other_rows.block_type.shape, other_rows.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    full, empty = new_ring(STAGES, 2)
    fence_async_shared()
    own_start, region = gl.program_id(0) * (2 * BLOCK_M), gl.program_id(1)
    first = region * height
    there = gl.minimum(height, (other_count + BLOCK_N - 1) // BLOCK_N - first)
    blocks = gl.minimum(there, other_count // BLOCK_N - first)
    last = first + blocks  # which is not whole, if there is one
    second, near = near_diagonal(own_start, diagonal, first, there, 2 * BLOCK_M, BLOCK_N)
    more = near
    if (blocks < there) & ((near == 0) | (second + near <= last)):
        more += 1
    if gl.load(reference + 1) == 0:
        second, near, more, blocks = first, there, there, 0
    factor, exponent = gl.load(scale).to(gl.float32), gl.load(reference)
    into = gradient + region.to(gl.int64) * own_count * gradient_stride
    gl.warp_specialize([
        (consume_gradients, (
            own, other, arrived, full, empty,
            into, gradient_stride, own_shares, other_shares, own_table, own_stride, other_table, other_stride,
            own_positives, positives_offset, other_positives, own_groups, other_groups, own_ranges, other_ranges,
            factor, exponent, own_start, first, blocks, second, near, last, more, own_count, other_count, diagonal, d,
            0, STAGES, BLOCK_M, BLOCK_N, BLOCK_K, ADD,
        )),
        (consume_gradients, (
            own, other, arrived, full, empty,
            into, gradient_stride, own_shares, other_shares, own_table, own_stride, other_table, other_stride,
            own_positives, positives_offset, other_positives, own_groups, other_groups, own_ranges, other_ranges,
            factor, exponent, own_start, first, blocks, second, near, last, more, own_count, other_count, diagonal, d,
            1, STAGES, BLOCK_M, BLOCK_N, BLOCK_K, ADD,
        )),
        (produce_rows, (
            own_rows, other_rows, own, other, arrived, full, empty, own_start, first, blocks, second, near, last, more,
            STAGES, BLOCK_M, BLOCK_N,
        )),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
