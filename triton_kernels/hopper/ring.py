"""What the kernels of this folder share: the ring of features between producer and consumers, and the exponential.

A program keeps one block of rows of one matrix, its *own*, in shared memory. Blocks of rows of the *other* matrix pass
through a ring of stages, each of which holds a chunk: the block's next ``BLOCK_K`` features. The producer waits until a
stage is empty and fills it; a consumer waits until it is full, multiplies and says that it is empty.

Two consumers take visits to other blocks in turn. A wait tells only the parity of a barrier's phase, so a consumer
that ran ahead of the other by a whole ring would take the phase before for the one it waits for. So they also take
turns to issue products: a turn is passed on as soon as a visit's last product is issued, not when it is done.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..groups import SPAN, STEP

# Triton 3.9 renamed both.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_K = gl.constexpr(64)  # features of a chunk: 128 bytes, the widest rows that shared memory swizzles
RANGES = gl.constexpr((STEP, SPAN))
LOG2_E = gl.constexpr(1.4426950408889634)
BEYOND = gl.constexpr(1e30)  # an exponent taken off entries that count for nothing
HIGHEST = gl.constexpr(3.4028234663852886e38)

# Registers of a thread, in multiples of 8: two groups of 128 threads, one warp of 32, and 65,536 in all.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def exp2(x):
    """``2^x``, 0 where it is below 2^-126; one instruction, exact to 2^-22."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def signed(scale, x):
    """``x``, or where the scale is negative ``-x``: of which a larger one is a larger logit."""
    return gl.where(scale < 0, -x, x)


@gluon.jit
def group_range(ranges, start, count, BLOCK: gl.constexpr):
    """The least and the largest group of the BLOCK rows from ``start`` on, or a few more, of ``..groups.group_ranges``.
    """
    least, largest = 2147483647, -2147483648
    for k in gl.static_range((BLOCK + RANGES[1] - 1) // RANGES[1]):
        number = (start + k * RANGES[1]) // RANGES[0]
        inside = number * RANGES[0] < count
        least = gl.minimum(least, gl.load(ranges + 2 * number, mask=inside, other=2147483647))
        largest = gl.maximum(largest, gl.load(ranges + 2 * number + 1, mask=inside, other=-2147483648))
    return least, largest


@gluon.jit
def may_meet(least, largest, ranges, start, count, BLOCK: gl.constexpr):
    """Whether rows of this range of groups may have one in common with the BLOCK rows from ``start`` on."""
    other_least, other_largest = group_range(ranges, start, count, BLOCK)
    return (least <= other_largest) & (other_least <= largest)


@gluon.jit
def column_of(x):
    """A vector of rows as a column, to broadcast over entries."""
    return gl.expand_dims(x, 1)


@gluon.jit
def row_of(x):
    """A vector of columns as a row."""
    return gl.expand_dims(x, 0)


@gluon.jit
def new_ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Barriers ``(full, empty)``, one of each a stage, that READERS consumers release."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def new_turns():
    """Barriers, one a consumer: whose turn it is."""
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    return turn


@gluon.jit
def produce(
    own_rows, other_rows,  # descriptors, in blocks of [BLOCK_N, BLOCK_K] and [BLOCK_M, BLOCK_K]
    own, other,  # shared memory, [CHUNKS, ...] and [STAGES, ...] of these
    arrived, full, empty,  # barriers: of the own block, and of the ring
    own_start,  # the first row of the own block
    first, blocks, second, more,  # other blocks in the order of their visits, as visited() has it
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The producer: the own block once, then the other blocks, a chunk at a time."""
    if blocks + more > 0:
        mbarrier.expect(arrived, CHUNKS * own_rows.block_type.nbytes)
        for number in gl.static_range(CHUNKS):
            tma_load(own_rows, [own_start, number * BLOCK_K], arrived, own.index(number))
    chunk = 0
    for visit in range(blocks + more):
        start = visited(visit, first, blocks, second) * BLOCK_M
        for k in range(CHUNKS):
            stage = chunk % STAGES
            mbarrier.wait(empty.index(stage), ((chunk // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), other_rows.block_type.nbytes)
            tma_load(other_rows, [start, k * BLOCK_K], full.index(stage), other.index(stage))
            chunk += 1


@gluon.jit
def visited(visit, first, blocks, second):
    """The other block of a visit: ``blocks`` of them from ``first`` on, then those from ``second`` on."""
    return gl.where(visit < blocks, first + visit, second + visit - blocks)


@gluon.jit
def near_diagonal(own_start, diagonal, first, blocks, OWN: gl.constexpr, OTHER: gl.constexpr):
    """``(second, more)``: those of ``blocks`` blocks of OTHER rows from ``first`` on that have the number of one of OWN
    own rows. Own row i has that of other row i + diagonal."""
    start = own_start + diagonal
    low = gl.maximum(start, 0) // OTHER
    high = (gl.maximum(start + OWN, 0) + OTHER - 1) // OTHER
    low = gl.minimum(gl.maximum(low, first), first + blocks)
    high = gl.minimum(gl.maximum(high, first), first + blocks)
    return low, high - low


@gluon.jit
def is_on_diagonal(row, column, diagonal, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Whether a block of BLOCK_M rows from ``row`` on has one whose number is that of a column of BLOCK_N from
    ``column`` on; row i has that of column i + diagonal."""
    return (row + diagonal < column + BLOCK_N) & (row + diagonal + BLOCK_M > column)


@gluon.jit
def similarities(
    own, other, full, empty, turn, zero, visit, CONSUMER: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr
):
    """``S[BLOCK_M, BLOCK_N]`` of the visit's other block against the own one, by the consumer whose visit it is."""
    chunk = visit * CHUNKS
    s = zero
    mbarrier.wait(turn.index(CONSUMER), ((visit // 2) & 1) ^ (1 - CONSUMER))
    for k in gl.static_range(CHUNKS):
        stage = (chunk + k) % STAGES
        mbarrier.wait(full.index(stage), ((chunk + k) // STAGES) & 1)
        s = warpgroup_mma(other.index(stage), own.index(k).permute([1, 0]), s, use_acc=k > 0, is_async=True)
        if k == CHUNKS - 1:
            mbarrier.arrive(turn.index(1 - CONSUMER), count=1)
        if k > 0:
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(empty.index((chunk + k - 1) % STAGES), count=1)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(empty.index((chunk + CHUNKS - 1) % STAGES), count=1)
    return s
