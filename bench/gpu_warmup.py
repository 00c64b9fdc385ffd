"""Compiles the kernels of points in several processes at once, so that the process that times them finds them on disk.

Takes the options of `python -m bench run` that name points. Triton, and torch.compile, keep what they compile.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from bench.cases import CASES
from bench.harness import DTYPES, Point, implementations, short_error

# A kernel is compiled again where a size is 1 or is no multiple of 16, and for a tile on the diagonal. From here on all
# sizes that kernels see are multiples of 16 in tiles as large as they get, two of a batch's 32,768 rows beside each
# other: more rows are more of the same tiles.
MOST_ROWS = 65536

Job = tuple  # the arguments of a function that compiles


def side_by_side(function: Callable, jobs: Sequence[Job], processes: int) -> None:
    """``function(*job)`` for all jobs. An error is shown and no more: timing will tell what did not compile."""
    # Each of these processes compiles for itself; torch.compile's own pools beside them would be dozens of processes.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with ProcessPoolExecutor(max(1, min(processes, len(jobs))), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(function, *job): job for job in jobs}
        for future in as_completed(running):
            error = future.exception()
            failure = short_error(f"{type(error).__name__}: {error}")
            told = "compiled" if error is None else f"not compiled: {failure}"
            print(f"{' '.join(map(str, running[future]))}: {told}", flush=True)


def compile_point(case: str, d: int, dtype: str, device: str, backend: str, name: str, sizes: Sequence[int]) -> None:
    """A step of one implementation at each of these N, in the order that they are timed in."""
    torch.set_num_threads(1)
    [implementation] = implementations(CASES[case], [backend], [name])
    for n in sizes:
        implementation.prepare(Point(n, d, dtype, device).make_inputs(CASES[case]))()
    if device == "cuda":
        torch.cuda.synchronize()


def jobs(given: argparse.Namespace) -> list[Job]:
    """One per implementation: its sizes share most kernels. A graph of torch.compile is of one N: it needs them all."""
    found = []
    for case in given.case:
        chosen = implementations(CASES[case], [given.backend], given.implementation)
        for one in (one for one in chosen if one.kind == "ours" or (given.compiled and one.kind == "compiled")):
            most = max(given.n) if one.kind == "compiled" else MOST_ROWS
            sizes = tuple(dict.fromkeys(min(n, most) for n in given.n))
            for d in given.d:
                found.append((case, d, given.dtype, given.device, given.backend, one.name, sizes))
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("case", str), ("n", int), ("d", int), ("implementation", str)):
        parser.add_argument(f"--{name}", type=kind, action="append", default=[])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    given = parse_arguments()
    side_by_side(compile_point, jobs(given), given.processes)


if __name__ == "__main__":
    main()
