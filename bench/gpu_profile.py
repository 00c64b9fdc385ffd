"""What a training step is made of: its kernels, how many launches, and when the GPU waits for the host.

`python -m bench.gpu_profile --point clip 8192 512 --output DIR` writes DIR/kernels.csv, steps.csv and profile.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.cases import CASES
from bench.gpu_warmup import MOST_ROWS, compile_point, side_by_side
from bench.harness import DTYPES, Point, Step, implementations
from bench.report import markdown

STEPS = 3
TIMED_SECONDS, MOST_TIMED = 0.3, 60  # of short steps, whose times vary most, more than STEPS are timed
SHOWN = 12  # kernels of a point in profile.md; kernels.csv has all


@dataclass(frozen=True)
class Kernel:
    """On a CPU: an operator that no other one called."""

    name: str
    per_step: float
    ms_per_step: float


@dataclass(frozen=True)
class StepTimes:
    """``host_ms``: until the step returns; ``wall_ms``: until the GPU has ended it too. Both without the profiler."""

    launches: float
    host_ms: float
    wall_ms: float
    busy_ms: float  # some kernel runs
    gap_ms: float  # none does


def time_step(step: Step, synchronize) -> tuple[float, float]:
    """Median (host ms, wall ms)."""
    host, wall = [], []
    while len(wall) < STEPS or (len(wall) < MOST_TIMED and sum(wall) < TIMED_SECONDS):
        synchronize()
        start = time.perf_counter()
        result = step()
        host.append(time.perf_counter() - start)
        synchronize()
        wall.append(time.perf_counter() - start)
        del result
    return statistics.median(host) * 1e3, statistics.median(wall) * 1e3


def trace(step: Step, device: str, synchronize) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of all that ran on the device in STEPS steps."""
    on_gpu = device == "cuda"
    # Without the host's operators, which take longer to record than to run.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and event.cpu_parent is None and not event.is_user_annotation
    ]


def busy(events: Iterable[tuple[str, float, float]]) -> float:
    """Microseconds in which some event ran: events of several streams may overlap."""
    total, end = 0.0, float("-inf")
    for _, start, stop in sorted(events, key=lambda event: event[1]):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def kernels_of(events: Iterable[tuple[str, float, float]]) -> list[Kernel]:
    """The longest first."""
    times = defaultdict(list)
    for name, start, stop in events:
        times[name].append(stop - start)
    found = [Kernel(name, len(each) / STEPS, sum(each) / STEPS / 1e3) for name, each in times.items()]
    return sorted(found, key=lambda kernel: -kernel.ms_per_step)


def measure(case: str, point: Point, backend: str) -> tuple[StepTimes, list[Kernel]]:
    name = "ours" if backend == "auto" else f"ours[{backend}]"
    [implementation] = implementations(CASES[case], [backend], [name])
    step = implementation.prepare(point.make_inputs(CASES[case]))
    synchronize = torch.cuda.synchronize if point.device == "cuda" else lambda: None
    for _ in range(2):  # compilation, and the allocator's first blocks
        step()
    host_ms, wall_ms = time_step(step, synchronize)
    events = trace(step, point.device, synchronize)
    busy_ms = busy(events) / STEPS / 1e3
    return StepTimes(len(events) / STEPS, host_ms, wall_ms, busy_ms, wall_ms - busy_ms), kernels_of(events)


def write(output: Path, case: str, point: Point, step: StepTimes, kernels: list[Kernel]) -> str:
    """Adds a point to the files. Returns its Markdown."""
    where = {"case": case, "n": point.n, "d": point.d, "dtype": point.dtype, "device": point.device}
    append(output / "steps.csv", where, [step])
    append(output / "kernels.csv", where, kernels)
    title = f"### {case}, N = {point.n}, d = {point.d}, {point.dtype}, {point.device}"
    times = markdown(
        ["launches", "host ms until the step returns", "wall ms", "busy ms", "gaps, ms"],
        [[f"{value:.4g}" for value in astuple(step)]],
    )
    lines = [[k.name[:90].replace("|", "/"), f"{k.per_step:g}", f"{k.ms_per_step:.4f}"] for k in kernels[:SHOWN]]
    table = markdown(["kernel", "launches a step", "ms a step"], lines)
    with (output / "profile.md").open("a") as file:
        file.write(text := f"{title}\n\n{times}\n\n{table}\n\n")
    return text


def append(path: Path, where: dict[str, object], records: list) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        for record in records:
            if is_new:
                writer.writerow([*where, *(field.name for field in fields(record))])
                is_new = False
            writer.writerow([*where.values(), *astuple(record)])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=3, action="append", required=True, metavar=("CASE", "N", "D"))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side before anything is timed")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    given = parse_arguments()
    if given.backend == "triton" and given.device == "cpu":
        from bench.interpreter import count_loops_with_new_numpy

        count_loops_with_new_numpy()
    given.output.mkdir(parents=True, exist_ok=True)
    points = [(case, Point(int(n), int(d), given.dtype, given.device)) for case, n, d in given.point]
    name = "ours" if given.backend == "auto" else f"ours[{given.backend}]"
    if given.device == "cuda":
        sizes = defaultdict(list)
        for case, point in points:
            sizes[case, point.d].append(min(point.n, MOST_ROWS))
        jobs = [(*key, given.dtype, given.device, given.backend, name, tuple(each)) for key, each in sizes.items()]
        side_by_side(compile_point, jobs, given.processes)
    all_seen = True
    for case, point in points:
        try:
            step, kernels = measure(case, point, given.backend)
        except Exception:
            traceback.print_exc()
            all_seen = False
            continue
        print(write(given.output, case, point, step, kernels), flush=True)
        all_seen = all_seen and bool(kernels)  # none: the profiler may not see the GPU
    sys.exit(not all_seen)


if __name__ == "__main__":
    main()
