"""Runs kernels in Gluon for Hopper on a CPU, without a GPU: finds wrong numbers, races, deadlocks and bad addresses.

    ring = load_module("ring.py", package=...)       # the source as it is, over stand-ins for `gl`, `tma`, ...
    launch = load_module("launch.py", modules={"....ring": ring}, package=...)
    with schedule(seed=3):                           # one order of events: try many
        launch.launch_sums(query, key, ...)          # CPU tensors; a KernelError names the kernel's line

A partition of gl.warp_specialize is a thread. One runs at a time; before each barrier, copy or product the next one is
drawn at random. A TMA copy is an event, at a random time after its issue. Checked is what happened (numbers, waits that
never end, bytes against `expect`, arrivals against counts, what was loaded and never read) and what could have: whether
a read or write of shared memory is ordered after all that it conflicts with, and whether a wait could have taken an
older phase of the same parity. So most races show in any order of events.

Not modelled: warps and threads of a partition (the compiler's barriers between them), layouts beyond their equality,
swizzles, registers, the order of sums in a product, clusters, two programs at once. Only the operations that our
kernels use are there: add to OPERATIONS in gluon_blocks.py. What a multiprocessor has is in gluon_machine.py.
"""

import inspect
import linecache
import math
import random
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from gluon_blocks import FILES, NOW, OPERATIONS, KernelError, Memory, Pointer, Tensor, check, fail, place, scalar, shown
from gluon_machine import (
    Descriptor,
    TensorDescriptor,
    allocate_shared_memory,
    join,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


class Abort(BaseException):
    """Ends the other partitions after an error in one."""


# -- Programs and partitions --------------------------------------------------------------------------------------


class Part:
    """A partition. ``clock``: for each partition, buffer and barrier, how many of its events this one comes after."""

    def __init__(self, number, name, warps, clock):
        self.number, self.name, self.warps, self.clock = number, name, warps, dict(clock) | {number: 1}
        self.lock, self.ready, self.at, self.why, self.ended = threading.Semaphore(0), None, ("?", 0), str, False
        self.products, self.stores, self.unfenced = [], [], set()

    def knows(self, agent, time):
        return self.clock.get(agent, 0) >= time

    def release(self):
        """The clock that an arrival passes on: what follows is later."""
        clock = dict(self.clock)
        self.clock[self.number] += 1
        return clock


class Program:
    """A CTA."""

    def __init__(self, index, grid, warps):
        self.index, self.grid, self.random = index, grid, random.Random(f"{NOW.seed} {index}")
        self.at = index % grid[0], index // grid[0] % grid[1], index // grid[0] // grid[1]
        self.me = self.main = Part(0, "main", warps, {})
        self.parts, self.events, self.cells, self.bytes, self.failure, self.weights = [self.main], [], [], 0, None, {}

    def step(self, ready=None, why=str):
        """Others may run here. Returns once ``ready()``."""
        me = self.me
        me.ready, me.why, me.at = ready, why, place()
        turn = self.next()
        if turn is not me:
            turn.lock.release()
            me.lock.acquire()
            self.me = me
            if self.failure:
                raise Abort
        me.ready = None

    def next(self):
        """The partition that runs next; events drawn before it happen. For a while an order favours some."""
        while True:
            able = [p for p in self.parts if not p.ended and (p.ready is None or p.ready())] + self.events
            if not able:
                waits = [f"\n    {p.name} waits for {p.why()} at {shown(p.at)}" for p in self.parts if not p.ended]
                raise KernelError(f"deadlock in program {self.index}" + "".join(waits))
            if self.random.random() < 0.02:
                self.weights.clear()
            for p in [*self.parts, None]:  # None: events
                self.weights.setdefault(p, self.random.choice((1, 0.3, 0.1, 0.01)))
            weights = [self.weights[a if isinstance(a, Part) else None] for a in able]
            chosen = self.random.choices(able, weights)[0]
            if isinstance(chosen, Part):
                return chosen
            self.events.remove(chosen)
            chosen()

    def specialize(self, functions, warps):
        check(len(functions) == len(warps) + 1, "warp_specialize needs the warps of each worker")
        names = ["default partition"] + [f"worker {i}" for i in range(len(warps))]
        workers = [Part(i + 1, name, n, self.main.clock)
                   for i, (name, n) in enumerate(zip(names, [self.main.warps, *warps], strict=True))]  # fmt: skip
        self.parts += workers
        self.main.release()
        threads = [threading.Thread(target=self.work, args=(p, *f)) for p, f in zip(workers, functions, strict=True)]
        for thread in threads:
            thread.start()
        try:
            self.step(lambda: all(p.ended for p in workers))
        except BaseException as error:
            self.give_up(error)
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        for part in workers:
            join(self.main.clock, part.clock)

    def work(self, part, function, arguments):
        part.lock.acquire()
        try:
            if self.failure:
                return
            self.me = part
            function(*arguments)
            check(not part.products, "the partition ends with products in flight: wait for them")
            check(not part.stores, "the partition ends before its TMA stores have been waited for")
            part.ended = True
            self.next().lock.release()
        except BaseException as error:
            self.give_up(error)

    def give_up(self, error):
        if self.failure is None:
            self.failure = error
            for part in self.parts:
                part.lock.release()

    def run(self, function, arguments):
        NOW.program = self
        try:
            function(*arguments)
            check(not self.events, "the program ends with TMA copies in flight")
            for cell in self.cells:
                if cell.unread:
                    fail(f"{cell.name} was loaded and never read", cell.written_at)
        except KernelError:
            raise
        except Exception as error:
            trace, at = error.__traceback__, ("?", 0)
            while trace:
                file = trace.tb_frame.f_code.co_filename
                trace, at = trace.tb_next, (file, trace.tb_lineno) if file in FILES else at
            raise KernelError(f"{type(error).__name__}: {error}\n    {shown(at)}") from error
        finally:
            NOW.program = None


class constexpr:
    """Of an argument, its annotation; of a number, the number."""

    def __new__(cls, value):
        return value


GL = OPERATIONS | {
    "allocate_shared_memory": allocate_shared_memory, "constexpr": constexpr,
    "warp_specialize": lambda functions, warps, registers: NOW.program.specialize(functions, warps),
}  # fmt: skip
HOPPER = {
    "mbarrier": mbarrier, "tma": tma, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda cluster=False: NOW.program.me.unfenced.clear(),
}  # fmt: skip


# -- Launches, loading --------------------------------------------------------------------------------------------


class Function:
    """What @gluon.jit makes."""

    def __init__(self, function):
        self.function, self.signature, self.__name__ = function, inspect.signature(function), function.__name__
        self.fixed = {n for n, p in self.signature.parameters.items() if p.annotation in (constexpr, "gl.constexpr")}

    def __call__(self, *args, **kwargs):
        for name, value in self.signature.bind(*args, **kwargs).arguments.items() if self.fixed else ():
            check(name not in self.fixed or not isinstance(value, Tensor), f"{name} has to be a constexpr")
        return self.function(*args, **kwargs)

    def __getitem__(self, grid):
        grid = (*grid, 1, 1)[:3]

        def launch(*args, num_warps=4, num_stages=None, num_ctas=1, maxnreg=None, enable_fp_fusion=True, **kwargs):
            bound, users = self.signature.bind(*args, **kwargs), {}
            bound.apply_defaults()
            values = [v if n in self.fixed else argument(v, users) for n, v in bound.arguments.items()]
            for i in random.Random(NOW.seed).sample(range(math.prod(grid)), math.prod(grid)):
                Program(i, grid, num_warps).run(self, values)

        return launch


def argument(value, users):
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return Pointer(Memory(value, users), scalar(0).to(torch.int64))
    return Descriptor(value, users) if isinstance(value, TensorDescriptor) else scalar(value)


@contextmanager
def schedule(seed):
    """Launches inside follow this order of events."""
    old, NOW.seed = NOW.seed, seed
    try:
        yield
    finally:
        NOW.seed = old


def load_module(path, replace=(), modules=None, source=None, package=None):
    """The module of a file, with ``(old, new)`` replaced in its text: mutations. ``modules``: what it may import."""
    source, file = source or Path(path).read_text(), Path(path).name
    for old, new in replace:
        if old not in source:
            raise ValueError(f"not in {file}: {old}")
        source = source.replace(old, new)
    gluon, jit = "triton.experimental.gluon", lambda function=None, **_: Function(function) if function else Function
    contents = {"triton": {}, "triton.experimental": {}, gluon: {"jit": jit}, f"{gluon}.language": GL}
    contents |= {f"{gluon}.language.nvidia": {}, f"{gluon}.language.nvidia.hopper": HOPPER, f"{gluon}.nvidia": {}}
    contents |= {f"{gluon}.nvidia.hopper": {"TensorDescriptor": TensorDescriptor}}
    stand_ins = {}
    for name, content in contents.items():
        stand_ins[name] = types.ModuleType(name)
        vars(stand_ins[name]).update(content)
        if "." in name:
            setattr(stand_ins[name.rpartition(".")[0]], name.rpartition(".")[2], stand_ins[name])
    FILES.add(file)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(Path(path).stem)
    module.__file__, module.__package__ = str(path), package
    with mock.patch.dict(sys.modules, stand_ins | (modules or {})):
        exec(compile(source, file, "exec"), vars(module))
    return module
