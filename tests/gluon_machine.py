"""What a kernel in Gluon finds on a multiprocessor, over torch: shared memory, barriers, TMA, products of matrices.

Vector clocks tell what is ordered: each partition, buffer and barrier counts its events, and an arrival at a barrier
passes on what the partition knows. So a race is found though this order of events did not show it. See
gluon_interpreter.py.
"""

import linecache
import math
import re
import types
from dataclasses import dataclass

import torch
from gluon_blocks import NOW, DotOperandLayout, Memory, MMALayout, Tensor, check, fail, place, shown

SHARED_BYTES = 232448  # of a program on sm_90


def join(clock, other):
    for agent, time in other.items():
        if clock.get(agent, 0) < time:
            clock[agent] = time


# -- Shared memory, barriers --------------------------------------------------------------------------------------


class Cell:
    """What is synchronised as one: an index of the first dimension of an allocation."""

    def __init__(self, name):
        self.name, self.written, self.written_at, self.unread = name, None, None, False
        self.busy, self.reads, self.loads, self.barrier = [], {}, 0, None

    def write(self, agent, time):
        me = NOW.program.me
        if self.busy:
            fail(f"{self.name} is overwritten while it is still read by {shown(self.busy[0][1])}")
        for part, (then, at) in self.reads.items():
            if not me.knows(part, then):
                fail(f"{self.name} is overwritten, and nothing orders this after the read at {shown(at)}")
        if self.written and not me.knows(*self.written):
            fail(f"{self.name} is overwritten, and nothing orders this after the write at {shown(self.written_at)}")
        if self.unread:
            fail(f"{self.name} is overwritten, and what {shown(self.written_at)} loaded was never read")
        self.written, self.written_at, self.reads = (agent, time), place(), {}

    def start_read(self, asynchronous=True):
        """Returns what ``end_read`` takes."""
        me, mark = NOW.program.me, (NOW.program.me, place())
        if not self.written:
            fail(f"{self.name} is read and was never written")
        if not me.knows(*self.written):
            fail(f"{self.name} is read, and nothing orders this after the write at {shown(self.written_at)}")
        if asynchronous and any(self in p.unfenced for p in NOW.program.parts):
            fail(f"{self.name}: fence_async_shared is missing after {shown(self.written_at)}")
        self.unread = False
        self.busy.append(mark)
        return mark

    def end_read(self, mark):
        self.busy.remove(mark)
        part, at = mark
        self.reads[part.number] = part.clock[part.number], at


class Barrier:
    """A phase ends when all its arrivals and bytes are in. A wait on parity p returns in phases of parity 1 - p."""

    def __init__(self, name, count):
        self.name, self.count, self.pending, self.bytes, self.phase = name, count, count, 0, 0
        self.clock, self.coming = {}, {}

    def __str__(self):
        return f"{self.name} (in phase {self.phase}, lacks {self.pending} arrivals, {self.bytes} bytes)"

    def signal(self, clock, arrivals=0, bytes=0):
        self.pending, self.bytes = self.pending - arrivals, self.bytes + bytes
        join(self.coming, clock)
        check(self.pending >= 0, f"{self.name}: more arrivals in a phase than its count, {self.count}")
        check(self.pending > 0 or self.bytes >= 0, f"{self.name}: {-self.bytes} bytes more than expected")
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            join(self.clock, self.coming | {self: self.phase})
            self.coming = {}


class Shared:
    """A shared memory descriptor."""

    def __init__(self, data, cells):
        self.data, self.cells, self.shape, self.dtype = data, cells, list(data.shape), data.dtype

    def index(self, i):
        i = int(i)
        check(len(self.cells) == self.shape[0] and 0 <= i < self.shape[0], f"index {i} of {self.shape[0]} buffers")
        return Shared(self.data[i], [self.cells[i]])

    def permute(self, order):
        return Shared(self.data.permute(order), self.cells)

    def store(self, value):
        NOW.program.step()
        fits = value.shape == self.shape and value.dtype == self.dtype
        check(fits, f"a block {value.shape} of {value.dtype} stored to {self.shape} of {self.dtype}")
        me = NOW.program.me
        for cell in self.cells:
            cell.write(me.number, me.clock[me.number])
        me.unfenced.update(self.cells)
        self.data.copy_(value.data)

    def load(self, layout=None):
        NOW.program.step()
        for cell in self.cells:
            cell.end_read(cell.start_read(asynchronous=False))
        return Tensor(self.data.clone(), layout)

    @property
    def barrier(self):
        check(len(self.cells) == 1 and self.cells[0].barrier, f"{self.cells[0].name} is not an initialised barrier")
        return self.cells[0].barrier


def allocate_shared_memory(dtype, shape, layout):
    world, name = NOW.program, re.match(r"\s*(\w+)\s*=", linecache.getline(*place()))
    cells = [Cell(f"{name[1] if name else 'shared'}[{i}]") for i in range(shape[0])]
    world.bytes += math.prod(shape) * dtype.itemsize
    check(world.bytes <= SHARED_BYTES, f"{world.bytes} bytes of shared memory")
    world.cells += cells
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype), cells)


class mbarrier:
    class MBarrierLayout:
        pass

    def init(shared, count):
        (cell,) = shared.cells
        cell.barrier, cell.written_at = Barrier(cell.name, int(count)), place()
        NOW.program.me.unfenced.add(cell)

    def expect(shared, bytes, pred=True):
        NOW.program.step()
        if pred:
            shared.barrier.signal(NOW.program.me.release(), 1, int(bytes))

    def arrive(shared, *, count=1, pred=True):
        NOW.program.step()
        if pred:
            shared.barrier.signal(NOW.program.me.release(), int(count))

    def wait(shared, phase, pred=True, deps=()):
        if not pred:
            return
        barrier, parity, me = shared.barrier, int(phase), NOW.program.me
        check(parity in (0, 1), f"a parity is 0 or 1, not {parity}")
        NOW.program.step(lambda: barrier.phase & 1 != parity, lambda: f"{barrier}, parity {parity},")
        known = me.clock.get(barrier, 0)
        seen = f"all that the partition knows is that phase {known} has begun"
        check(barrier.phase <= known + 1, f"{barrier}: this wait could have returned two phases earlier, as {seen}")
        join(me.clock, barrier.clock)


# -- TMA ----------------------------------------------------------------------------------------------------------


@dataclass
class TensorDescriptor:
    base: torch.Tensor
    shape: list
    strides: list
    block_shape: list
    layout: object

    def __post_init__(self):
        size = self.base.element_size()
        assert self.base.data_ptr() % 16 == 0 and self.strides[-1] == 1, "base or last stride"
        assert all(s * size % 16 == 0 for s in self.strides[:-1]), "strides have to be multiples of 16 bytes"
        assert all(1 <= n <= 256 and n & (n - 1) == 0 for n in self.block_shape), "shape of the block"


class Descriptor:
    """In a kernel."""

    def __init__(self, t, users):
        base = t.base.as_strided(t.shape, t.strides)
        self.memory, self.shape, self.dtype, self.layout = Memory(base, users), t.shape, base.dtype, t.layout
        nbytes = math.prod(t.block_shape) * base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=list(t.block_shape), element_ty=base.dtype)

    def box(self, coord, shared):
        """Offsets in the tensor of a box at ``coord``, without what lies outside, and where in the box they are."""
        box = self.block_type.shape
        check(shared.shape == box and shared.dtype == self.dtype, f"a box {box} of {self.dtype} and shared memory "
              f"{shared.shape} of {shared.dtype}")  # fmt: skip
        check(len(coord) == len(box), f"{len(coord)} coordinates of {len(box)}")
        spans = []
        for c, n, b in zip((int(c) for c in coord), self.shape, box, strict=True):
            low = max(c, 0)
            spans.append((c, low, max(min(c + b, n), low)))
        return (self.memory.offsets[tuple(slice(low, high) for _, low, high in spans)],
                tuple(slice(low - c, high - c) for c, low, high in spans))  # fmt: skip


class tma:
    def async_copy_global_to_shared(desc, coord, barrier, result, pred=True):
        world, bar, (cell,) = NOW.program, barrier.barrier, result.cells
        world.step()
        if not pred:
            return
        if any(barrier.cells[0] in p.unfenced for p in world.parts):
            fail(f"{bar.name}: fence_async_shared is missing after its initialisation")
        offsets, inner = desc.box(coord, result)
        data = torch.zeros(result.shape, dtype=result.dtype)
        data[inner] = desc.memory.get(offsets)
        cell.loads += 1
        cell.write(cell, cell.loads)
        cell.unread = True
        clock = world.me.release() | {cell: cell.loads}
        result.data.fill_(float("nan"))

        def arrival():
            result.data.copy_(data)
            bar.signal(clock, 0, -desc.block_type.nbytes)

        world.events.append(arrival)

    def async_copy_shared_to_global(desc, coord, src):
        world, (cell,) = NOW.program, src.cells
        world.step()
        offsets, inner = desc.box(coord, src)
        mark = cell.start_read()
        desc.memory.claim(offsets)
        copy = lambda: desc.memory.put(offsets, src.data[inner])  # noqa: E731
        world.events.append(copy)
        world.me.stores.append((copy, cell, mark))

    def store_wait(pendings):
        world, me = NOW.program, NOW.program.me
        old = me.stores[: max(len(me.stores) - int(pendings), 0)]
        world.step(lambda: not any(copy in world.events for copy, *_ in old), lambda: "TMA stores")
        me.stores = me.stores[len(old) :]
        for _, cell, mark in old:
            cell.end_read(mark)


# -- Products -----------------------------------------------------------------------------------------------------


@dataclass
class ProductInFlight:
    """Good for nothing but a further product and a wait: anything else needs attributes of a Tensor."""

    value: torch.Tensor
    its_layout: object
    done: bool = False
    continued: bool = False


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    NOW.program.step()
    me, running = NOW.program.me, isinstance(acc, ProductInFlight)
    check(me.warps % 4 == 0, f"warpgroup_mma in a partition of {me.warps} warps")
    check(isinstance(b, Shared), "the second operand has to be in shared memory")
    check(not running or not acc.continued, "an accumulator in flight goes into two products")
    value, layout = (acc.value, acc.its_layout) if running else (acc.data, acc.layout)
    (m, k), (k2, n), dtypes = a.shape, b.shape, (a.dtype, b.dtype, value.dtype)
    check(k == k2 and list(value.shape) == [m, n], f"a product of {a.shape} and {b.shape} to {list(value.shape)}")
    check(a.dtype == b.dtype and value.dtype == torch.float32, f"a product of types {dtypes}")
    if layout is not None:
        is_hopper = isinstance(layout, MMALayout) and layout.version == [3, 0]
        check(is_hopper and m % 64 == 0, f"a product {m} x {n} in {layout}")
        check(n % layout.instr_shape[1] == 0 and layout.instr_shape[1] <= 256, f"a product {m} x {n} in {layout}")
        check(math.prod(layout.warps_per_cta) == me.warps, f"{layout} in a partition of {me.warps} warps")
    if isinstance(a, Tensor) and a.layout is not None:
        check(a.layout == DotOperandLayout(0, layout, a.layout.k_width), f"operand in {a.layout}, result in {layout}")
    marks = [(cell, cell.start_read()) for x in (a, b) if isinstance(x, Shared) for cell in x.cells]
    product = a.data.float() @ b.data.float()
    result = ProductInFlight(product + value if use_acc else product, layout)
    if running:
        acc.continued = True
    me.products.append((result, marks))
    return result if is_async else warpgroup_mma_wait(0, deps=(result,))


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    NOW.program.step()
    me = NOW.program.me
    while len(me.products) > num_outstanding:
        result, marks = me.products.pop(0)
        result.done = True
        for cell, mark in marks:
            cell.end_read(mark)
    results = [Tensor(d.value, d.its_layout) if getattr(d, "done", False) else d for d in deps]
    return results[0] if len(results) == 1 else tuple(results)
