"""Measures every implementation of a case: speed in one process, memory in a fresh process each.

A case (see `cases.py`) is data. Nothing here knows a loss, and nothing there knows how it is measured.
"""

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from replearn_kernels.engine import native
from replearn_kernels.engine.backends import why_no_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2, "fp64": 1e-6}
DENSE_KINDS = ("eager", "compiled")
MIN_ROUND_MS = 20.0  # a step shorter than this is repeated within a round, so that the clock's grain does not show
MAX_LOOPS = 1000
PROBES = 5
MIN_FLUSH_BYTES = 256 * 2**20

Inputs = dict[str, torch.Tensor]
Loss = Callable[..., torch.Tensor]
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One loss to measure. The first entry of `dense` is the formula in common use.

    ours:     {name: loss(**inputs, backend=...)}
    dense:    {name: loss(**inputs)}, each measured eager and under torch.compile
    chunked:  {name: loss(**inputs)}, low-memory formulas without a fused kernel
    products: {name: prepare(inputs) -> step}, the bare matrix products with preallocated outputs;
              the first is what `ours_budget_0` must do at least
    processes: {name: prepare(inputs) -> step}, ours divided among processes, timed only
    backends: those that ours can run on
    sizes:    the N that are measured unless others are asked for
    training: a step is forward and backward of a loss. Otherwise it is a call, whose result has `item()`, the number by
              which implementations must agree, and `nbytes`, which does not count as memory; nothing is compiled
    """

    name: str
    title: str
    make_inputs: Callable[[int, int, torch.dtype, str], Inputs]
    ours: dict[str, Loss]
    dense: dict[str, Loss]
    chunked: dict[str, Loss] = field(default_factory=dict)
    products: dict[str, Callable[[Inputs], Step]] = field(default_factory=dict)
    processes: dict[str, Callable[[Inputs], Step]] = field(default_factory=dict)
    backends: Sequence[str] = ("auto", "triton", "cpp", "torch", "eager")
    sizes: Sequence[int] = (1024, 2048, 4096, 8192)
    training: bool = True


@dataclass(frozen=True)
class Implementation:
    """A named way to do one training step; `prepare(inputs)` does all that must not be measured."""

    name: str
    kind: str
    prepare: Callable[[Inputs], Step]
    backend: str = "auto"  # of ours


@dataclass(frozen=True)
class Point:
    """Where a case is measured."""

    n: int
    d: int
    dtype: str
    device: str

    def make_inputs(self, case: Case) -> Inputs:
        return case.make_inputs(self.n, self.d, DTYPES[self.dtype], self.device)


def why_fallback(case: Case, point: Point) -> str | None:
    """Why "auto" stands for plain PyTorch here in place of the kernels that the case would be measured for, if so."""
    device = torch.device(point.device)
    if device.type == "cpu":
        missing = native.why_missing() if "cpp" in case.backends else None
        return missing and f"the C++ kernels are not available: {missing}"
    if "cuda" in case.backends:
        missing = native.why_not_on_cuda()
        return missing and f"the CUDA kernels are not available: {missing}"
    if "triton" in case.backends and point.dtype != "fp64":  # which only PyTorch has on a GPU
        missing = why_no_triton(device, DTYPES[point.dtype])
        return missing and str(missing)
    return None


def training_step(loss: Loss, inputs: Inputs) -> Step:
    """Forward and backward; the gradients are returned, hence alive (and counted) when the step ends."""
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]

    def step():
        value = loss(**inputs)
        return value, torch.autograd.grad(value, leaves)

    return step


def call_step(call: Loss, inputs: Inputs) -> Step:
    """A call that has no gradient, its result as a step returns it."""
    return lambda: (call(**inputs),)


def compiled_training_step(loss: Loss, inputs: Inputs) -> Step:
    return training_step(torch.compile(loss, dynamic=False), inputs)


def implementations(case: Case, backends: Sequence[str] = ("auto",), names: Sequence[str] = ()) -> list[Implementation]:
    """Every implementation of `case`, or only those called `names`; `ours` once per backend."""
    found = []
    step = training_step if case.training else call_step
    for backend in (one for one in backends if one in case.backends):
        suffix = "" if backend == "auto" else f"[{backend}]"
        for name, loss in case.ours.items():
            prepare = partial(step, partial(loss, backend=backend))
            found.append(Implementation(name + suffix, "ours", prepare, backend))
    for name, loss in case.dense.items():
        found.append(Implementation(f"eager_{name}", "eager", partial(step, loss)))
        if case.training:
            found.append(Implementation(f"compiled_{name}", "compiled", partial(compiled_training_step, loss)))
    for name, loss in case.chunked.items():
        found.append(Implementation(name, "chunked", partial(step, loss)))
    for kind in ("products", "processes"):
        for name, prepare in getattr(case, kind).items():
            found.append(Implementation(name, kind, prepare))
    if unknown := set(names) - {implementation.name for implementation in found}:
        known = ", ".join(implementation.name for implementation in found)
        raise ValueError(f"case {case.name} has no implementation {', '.join(sorted(unknown))}; it has {known}")
    return [implementation for implementation in found if not names or implementation.name in names]


def measure_speed(
    case: Case, point: Point, chosen: Sequence[Implementation], rounds: int, seconds: float
) -> dict[str, dict]:
    """{implementation: measured columns}, from `rounds` rounds, or more until `seconds` have passed.

    All take turns in every round, so that their ratios share one weather.
    """
    torch.compiler.reset()  # a new point must not find the graphs, or the recompile limit, of the last one
    inputs = point.make_inputs(case)
    timer = make_timer(point.device)
    steps, losses, measured = {}, {}, {}
    # Products first: their buffers stay, and who does not fit beside them must show it in this loop.
    for implementation in sorted(chosen, key=lambda one: one.kind != "products"):
        try:
            step = implementation.prepare(inputs)
            result = step()
            loops = choose_loops(timer, step)
        except Exception as error:  # a baseline may run out of memory, ours must not fail
            if implementation.kind == "ours":
                raise
            measured[implementation.name] = {"error": short_error(f"{type(error).__name__}: {error}")}
            continue
        steps[implementation.name] = (step, loops)
        if result is not None:
            losses[implementation.name] = result[0].item()
        del result
    kinds = {implementation.name: implementation.kind for implementation in chosen}
    for name, reason in disagreements(losses, LOSS_TOLERANCE[point.dtype] if case.training else 0.0).items():
        # A formula that loses all digits in half precision is a finding; anything else is a mistake.
        if DTYPES[point.dtype].itemsize > 2 or kinds[name] not in (*DENSE_KINDS, "chunked"):
            raise RuntimeError(f"implementations disagree: {reason}")
        measured[name] = {"error": f"another loss: {reason}"}
        del steps[name]
    for name, times in time_rounds(timer, steps, rounds, seconds).items():
        measured[name] = {"loops": steps[name][1], "round_ms": times}
    return measured


def choose_loops(timer: Callable[[Step, int], float], step: Step) -> int:
    """How often to repeat a (warm) step within a round, by the shortest of a few probes: one may be disturbed."""
    shortest = timer(step, 1)
    if shortest < MIN_ROUND_MS * PROBES:
        shortest = min(shortest, *(timer(step, 1) for _ in range(PROBES)))
    return min(MAX_LOOPS, math.ceil(MIN_ROUND_MS / max(shortest, 1e-3)))


def time_rounds(timer, steps: dict[str, tuple[Step, int]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per step, one per round; each round starts one implementation further on."""
    names = list(steps)
    times = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for step, loops in steps.values():
            timer(step, loops)  # an untimed round
        end = time.perf_counter() + seconds
        turn = 0
        while names and (turn < rounds or time.perf_counter() < end):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(timer(*steps[name]))
            turn += 1
    finally:
        gc.enable()
    return times


def make_timer(device: str) -> Callable[[Step, int], float]:
    """A function (step, loops) -> mean milliseconds per step."""
    if torch.device(device).type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(max(2 * l2_bytes, MIN_FLUSH_BYTES), dtype=torch.int8, device=device)
        return partial(time_cuda, flush=flush)
    return time_cpu


def time_cpu(step: Step, loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        step()
    return (time.perf_counter() - start) * 1e3 / loops


def time_cuda(step: Step, loops: int, *, flush: torch.Tensor) -> float:
    """CUDA events around each step; overwriting `flush` first empties L2 of what the last step left there."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(loops)]
    for start, end in events:
        flush.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / loops


def disagreements(losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """{implementation: what it gives} of those without the first one's loss: their times are worth nothing."""
    first, expected = next(iter(losses.items()), ("", 0.0))
    return {
        name: f"{first} gives {expected}, {name} gives {value}"
        for name, value in losses.items()
        if not math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    }


def short_error(message: str) -> str:
    return "out of memory" if "OutOfMemoryError" in message else message.splitlines()[0][:200]


def measure_memory(case: Case, point: Point, implementation: Implementation) -> dict:
    """Measured columns of one fresh process (`bench.memory`), which prints them as JSON on its last line."""
    torch.cuda.empty_cache()  # what this process keeps cached on the GPU, the other one may need
    names = {"case": case.name, "implementation": implementation.name, "backend": implementation.backend}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(names | vars(point))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if implementation.kind == "ours":
        raise RuntimeError(f"measuring the memory of {implementation.name} failed:\n{done.stderr}")
    last_line = (done.stderr.strip().splitlines() or [f"killed (exit status {done.returncode})"])[-1]
    return {"error": short_error(last_line)}
