"""Blocks, pointers and Gluon's operations on them, over torch: what of gluon_interpreter.py has no order of events.
Also its errors, which name a line of the kernel's source."""

import linecache
import operator
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch

FILES = set()  # of kernels
NOW = SimpleNamespace(program=None, seed=0)  # what runs, and in which order of events


class KernelError(Exception):
    """What is wrong, in which program and partition, at which line of the kernel's source."""


def place():
    """``(file, line)`` of the kernel's statement that runs."""
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename not in FILES:
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("?", 0)


def shown(at):
    return f"{at[0]}:{at[1]}: {linecache.getline(*at).strip()}"


def fail(message, at=None):
    where = f"program {NOW.program.index}, {NOW.program.me.name}: " if NOW.program else ""
    raise KernelError(f"{message}\n    {where}{shown(at or place())}")


def check(condition, message):
    if not condition:
        fail(message)


# -- Tensors and pointers -----------------------------------------------------------------------------------------


@dataclass
class MMALayout:
    version: list
    warps_per_cta: list
    instr_shape: list


@dataclass
class DotOperandLayout:
    operand_index: int
    parent: object
    k_width: int


@dataclass
class SliceLayout:
    dim: int
    parent: object


class Tensor:
    """A block, or a scalar: no dimension. ``layout`` None: not known."""

    def __init__(self, data, layout=None):
        self.data, self.layout, self.dtype, self.shape = data, layout, data.dtype, list(data.shape)
        if data.numel() & (data.numel() - 1):
            fail(f"a block {self.shape}: not a power of two")

    def to(self, dtype):
        return Tensor(self.data.to(dtype), self.layout)

    def __index__(self):
        check(not self.shape, "a block where a scalar is needed")
        return int(self.data)

    def __bool__(self):
        check(not self.shape, "a branch on a block")
        return bool(self.data)

    def __neg__(self):
        return Tensor(-self.data, self.layout)


def scalar(x):
    wide = isinstance(x, int) and not -(2**31) <= x < 2**31
    types = {bool: torch.bool, int: torch.int64 if wide else torch.int32, float: torch.float32}
    return Tensor(torch.tensor(x, dtype=types[type(x)]))


def plain(x, like=None):
    """The torch tensor of ``x``; a Python number takes the type of ``like``, if it can."""
    if not isinstance(x, Tensor) and isinstance(x, (bool, int, float)):
        x = scalar(x)
        if like is not None and (like.is_floating_point or not x.dtype.is_floating_point and like != torch.bool):
            return x.data.to(like)
    return x.data


def common_layout(*values):
    layout = None
    for other in (v.layout for v in values if isinstance(v, (Tensor, Pointer)) and v.shape):
        check(layout is None or other is None or layout == other, f"layouts differ: {layout} and {other}")
        layout = layout or other
    return layout


def binary(function, a, b):
    if isinstance(a, Pointer) or isinstance(b, Pointer):
        return NotImplemented
    x, y = plain(a, getattr(b, "dtype", None)), plain(b, getattr(a, "dtype", None))
    if function in (operator.floordiv, operator.mod):
        check(not (x < 0).any() and (y > 0).all(), "// or % of negative numbers rounds towards 0 on a GPU, not down")
    dtype, layout = torch.promote_types(x.dtype, y.dtype), common_layout(a, b)
    wide = torch.int64 if dtype == torch.int32 else dtype
    result = function(x.to(wide), y.to(wide))
    if dtype == torch.int32 and result.dtype == torch.int64:
        check(-(2**31) <= result.min() and result.max() < 2**31, "overflow of 32-bit integers")
        result = result.to(dtype)
    return Tensor(result, layout)


for _name in "add sub mul truediv floordiv mod and_ or_ xor lt le gt ge eq ne".split():
    _f, _name = getattr(operator, _name), _name.strip("_")
    setattr(Tensor, f"__{_name}__", lambda a, b, f=_f: binary(f, a, b))
    setattr(Tensor, f"__r{_name}__", lambda a, b, f=_f: binary(f, b, a))


class Memory:
    """A tensor in global memory. ``users``: of each element of its storage, who wrote and who read it."""

    def __init__(self, t, users):
        self.flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        self.base, self.name = t.storage_offset(), f"a tensor {list(t.shape)} of {t.dtype}"
        self.offsets = torch.arange(len(self.flat)).as_strided(t.shape, t.stride(), self.base) - self.base
        self.inside = torch.zeros(len(self.flat), dtype=torch.bool)
        self.inside[self.offsets.flatten() + self.base] = True
        new = torch.zeros(2, len(self.flat), dtype=torch.int64)
        self.writers, self.readers = users.setdefault(t.untyped_storage().data_ptr(), new)

    def reach(self, offsets, users, verb):
        where, n = offsets.flatten() + self.base, len(self.flat)
        bad = (where < 0) | (where >= n) | ~self.inside[where.clamp(0, n - 1)]
        if bad.any():
            fail(f"offset {int(where[bad][0]) - self.base} is outside {self.name}")
        world = NOW.program
        main = 64 * (world.index + 1)  # what the main part did comes before
        for who in users:
            bad = (who[where] != 0) & (who[where] != main) & (who[where] != main + world.me.number)
            if bad.any():
                other = int(who[where][bad][0])
                fail(f"offset {int(where[bad][0]) - self.base} of {self.name} is {verb} by program {other // 64 - 1}, "
                     f"{world.parts[other % 64].name}")  # fmt: skip
        return where, main + world.me.number

    def get(self, offsets):
        where, me = self.reach(offsets, [self.writers], "also written")
        self.readers[where] = me
        return self.flat[where].reshape(offsets.shape)

    def claim(self, offsets):
        """Before ``put``: no other program or partition may write these elements or read them."""
        where, me = self.reach(offsets, [self.writers, self.readers], "also written or read")
        check(len(where.unique()) == len(where), f"one store writes an element of {self.name} twice")
        self.writers[where] = me

    def put(self, offsets, values):
        self.flat[offsets.flatten() + self.base] = values.flatten().to(self.flat.dtype)


class Pointer:
    def __init__(self, memory, offset):
        self.memory, self.offset, self.layout, self.shape = memory, offset, offset.layout, offset.shape

    def __add__(self, x):
        return Pointer(self.memory, self.offset + x)

    __radd__ = __add__


def masked(pointer, value, mask):
    common_layout(pointer, value, mask)
    offsets, value, mask = pointer.offset.data, plain(value), plain(mask)
    fits = torch.broadcast_shapes(offsets.shape, value.shape, mask.shape) == offsets.shape
    check(fits, f"a block {list(value.shape)} with mask {list(mask.shape)} at pointers {pointer.shape}")
    mask = mask.expand(offsets.shape)
    return offsets[mask], value.expand(offsets.shape), mask


def load(pointer, mask=True, other=float("nan")):
    dtype = pointer.memory.flat.dtype
    offsets, result, mask = masked(pointer, other if dtype.is_floating_point or other == other else -(2**30), mask)
    result = result.to(dtype).clone()
    result[mask] = pointer.memory.get(offsets)
    return Tensor(result, pointer.layout)


def store(pointer, value, mask=True):
    offsets, value, mask = masked(pointer, value, mask)
    pointer.memory.claim(offsets)
    pointer.memory.put(offsets, value[mask])


# -- Operations of gl ---------------------------------------------------------------------------------------------


def reduction(function):
    def reduce(x, axis):
        return Tensor(function(x.data, axis), x.layout and SliceLayout(axis, x.layout))

    return reduce


def reduce(x, axis, combine):
    data = x.data.movedim(axis, 0)
    while len(data) > 1:
        data = combine(*(Tensor(half) for half in data.chunk(2))).data
    return Tensor(data[0], x.layout and SliceLayout(axis, x.layout))


def expand_dims(x, axis):
    check(x.layout is None or getattr(x.layout, "dim", None) == axis, f"expand_dims({axis}) of {x.layout}")
    return Tensor(x.data.unsqueeze(axis), x.layout and x.layout.parent)


def where(condition, a, b):
    x, y = plain(a, getattr(b, "dtype", None)), plain(b, getattr(a, "dtype", None))
    return Tensor(torch.where(plain(condition), x, y), common_layout(condition, a, b))


APPROXIMATIONS = {  # of PTX, with what its manual allows them to be off: relative, absolute
    "ex2": (torch.exp2, 2**-22, 0), "rcp": (torch.reciprocal, 2**-23, 0), "lg2": (torch.log2, 2**-22, 2**-22),
}  # fmt: skip


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    found = re.fullmatch(r"\s*(\w+)\.approx(\.ftz)?\.f32\s+\$0\s*,\s*\$1\s*;\s*", asm)
    check(found and found[1] in APPROXIMATIONS and constraints == "=f,f" and pack == 1, f"inline assembly: {asm}")
    function, relative, absolute = APPROXIMATIONS[found[1]]
    (x,) = args
    check(x.dtype == dtype == torch.float32, f"{asm} of {x.dtype}")
    flush = (lambda t: torch.where(t.abs() < 2.0**-126, 0.0, t)) if found[2] else lambda t: t
    y, sign = function(flush(x.data)), 1 if NOW.seed % 2 else -1  # as wrong as allowed, one way or the other
    off = torch.where((x.data > 0.5) & (x.data < 2), absolute, y.abs() * relative) if absolute else y.abs() * relative
    return Tensor(flush(torch.where(y.isfinite(), y + sign * off, y)), x.layout)


def numpy_like(function):
    return lambda x: Tensor(function(x.data), x.layout)


def any_layout(*args, **kwargs):
    return args, tuple(kwargs.items())


OPERATIONS = {
    "static_range": range, "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16, "int32": torch.int32, "int64": torch.int64, "int1": torch.bool,
    "NVMMADistributedLayout": MMALayout, "DotOperandLayout": DotOperandLayout, "SliceLayout": SliceLayout,
    "NVMMASharedLayout": any_layout, "BlockedLayout": any_layout, "SwizzledSharedLayout": any_layout,
    "load": load, "store": store, "where": where, "reduce": reduce,
    "program_id": lambda axis: scalar(NOW.program.at[axis]),
    "num_programs": lambda axis: scalar(NOW.program.grid[axis]),
    "zeros": lambda shape, dtype, layout=None: Tensor(torch.zeros(shape, dtype=dtype), layout),
    "full": lambda shape, value, dtype, layout=None: Tensor(torch.full(shape, value, dtype=dtype), layout),
    "arange": lambda start, end, layout=None: Tensor(torch.arange(start, end, dtype=torch.int32), layout),
    "reshape": lambda x, shape: Tensor(x.data.reshape(shape)),
    "permute": lambda x, order: Tensor(x.data.permute(order)),
    "convert_layout": lambda x, layout: Tensor(x.data, layout), "expand_dims": expand_dims,
    "inline_asm_elementwise": inline_asm_elementwise,
    "sum": reduction(torch.sum), "max": reduction(torch.amax), "min": reduction(torch.amin),
    "maximum": lambda a, b: binary(torch.maximum, a, b), "minimum": lambda a, b: binary(torch.minimum, a, b),
    "abs": numpy_like(torch.abs), "exp2": numpy_like(torch.exp2), "log2": numpy_like(torch.log2),
    "ceil": numpy_like(torch.ceil), "sqrt": numpy_like(torch.sqrt),
    "exp": numpy_like(torch.exp), "log": numpy_like(torch.log),
}  # fmt: skip
