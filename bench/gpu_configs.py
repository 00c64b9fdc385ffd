"""Times each Triton kernel with its shipped configuration and a handful of others, and the products beside them.

`python -m bench.gpu_configs --output DIR` adds a line to DIR/configs.csv after each. A configuration that needs more
registers or shared memory than there are is a line too, with its error.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor

from bench.gpu_warmup import side_by_side
from bench.harness import DTYPES, short_error
from bench.interpreter import count_loops_with_new_numpy
from bench.results import machine
from replearn_kernels.engine.backends.triton import TritonBackend
from replearn_kernels.triton_kernels import (
    EPILOGUES,
    TileInputs,
    accumulate_gradient,
    form_weights,
    gradients,
    update_statistics,
)
from replearn_kernels.triton_kernels import statistics as statistics_kernels
from replearn_kernels.triton_kernels.configs import (
    Config,
    architecture,
    default,
    launch_options,
    product_kind,
    use_config,
)

MACHINE = ("gpu", "torch", "triton")
COLUMNS = ("kernel", "config", "shipped", "n", "d", "dtype", "ms_median", "tflops", "error", "device", *MACHINE)
FUSED_D = 128  # of the gradient kernel: the widest that it is used for
BLOCK = 4096  # rows and columns of a tile of W: what the engine writes at a time


@dataclass(frozen=True)
class Choice:
    """``maxnreg``: the most registers of a thread; None: as many as the compiler takes."""

    config: Config
    maxnreg: int | None = None

    def __str__(self) -> str:
        c = self.config
        text = f"{c.block_m}x{c.block_n}x{c.block_k}, {c.warps} warps, {c.stages} stages"
        columns = f", {c.column_blocks} column blocks" if c.column_blocks != Config.column_blocks else ""
        parts = f", {c.parts} parts by TMA" if c.parts else ""
        registers = "" if self.maxnreg is None else f", maxnreg={self.maxnreg}"
        return text + columns + parts + registers


@dataclass(frozen=True)
class Kernel:
    """A kernel with an epilogue: what it does, how much of it, and what to try besides the shipped config."""

    kernel: str
    epilogue: str
    products: int  # of n x n x d
    prepare: Callable[[str, int, int, torch.dtype, str], Callable[[], object]]
    others: tuple[Config, ...]

    @property
    def name(self) -> str:
        return f"{self.epilogue} {self.kernel}"

    def choices(self) -> list[Choice]:
        shipped = default(self.kernel, self.epilogue, product_kind(torch.bfloat16), architecture())
        more = [Choice(config) for config in self.others if config != shipped]
        return [Choice(shipped), Choice(shipped, 128), *more]


# -- the launches -------------------------------------------------------------------------------------------------


def operands(epilogue: str, n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, TileInputs]:
    """Unit rows, and tables of any values: no time depends on them."""
    query, key = (torch.nn.functional.normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
    rows, columns = torch.rand(5, n, device=device), torch.rand(5, n, device=device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device)
    sigmoid = epilogue == "sigmoid"
    return query, key, TileInputs.of(
        (n, n), scale, bias if sigmoid else 0.0, torch.arange(n, device=device),
        row_table=rows, column_table=None if sigmoid else columns,
    )  # fmt: skip


def statistics_step(epilogue: str, n: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Of rows and columns; of the sigmoid's rows alone. With the kernel that merges them."""
    query, key, inputs = operands(epilogue, n, d, dtype, device)
    of_rows = torch.zeros(3, n, device=device)
    of_columns = None if epilogue == "sigmoid" else torch.zeros(2, n, device=device)
    return lambda: update_statistics(EPILOGUES[epilogue], query, key, inputs, None, False, of_rows, of_columns)


def weights_step(epilogue: str, n: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """All of W, tile by tile into the same memory. The sigmoid's losses come with it."""
    query, key, inputs = operands(epilogue, n, d, dtype, device)
    size = min(n, BLOCK)
    w = torch.empty(size, size, dtype=dtype, device=device)
    inputs = inputs._replace(rows=size, columns=size)
    folded = torch.zeros(3, size, device=device) if epilogue == "sigmoid" else None
    blocks = [slice(start, start + size) for start in range(0, n, size)]

    def step() -> None:
        for rows in blocks:
            for columns in blocks:
                form_weights(EPILOGUES[epilogue], query[rows], key[columns], inputs, None, False, w, folded)

    return step


def gradient_step(epilogue: str, n: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Of the rows: one of the two launches of a step."""
    query, key, inputs = operands(epilogue, n, min(d, FUSED_D), dtype, device)
    sums = torch.zeros(query.shape, device=device)
    return lambda: accumulate_gradient(EPILOGUES[epilogue], query, key, inputs, sums, transposed=False)


def product_step(rows: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """C += W Y, in fp32."""
    w, y = torch.randn(rows, rows, device=device).to(dtype), torch.randn(rows, d, device=device).to(dtype)
    c = torch.zeros(rows, d, device=device)
    return lambda: TritonBackend.addmm_(c, w, y)


# Larger ones spill by the hundred under Triton 3.6 on sm_90, as do fewer warps of the same block.
STATISTICS = (
    Config(128, 128, 64, warps=8, stages=3),
    Config(128, 128, 64, warps=8, stages=4, column_blocks=4),
    Config(128, 128, 64, warps=8, stages=4, column_blocks=16),
    Config(128, 64, 64, warps=8, stages=4),
    Config(128, 64, 64, warps=8, stages=4, column_blocks=16),
    Config(64, 128, 64, warps=4, stages=4),
    Config(64, 64, 64, warps=4, stages=4),
)
WEIGHTS = (
    Config(128, 128, 64, warps=8, stages=3),
    Config(128, 128, 64, warps=8, stages=4),
    Config(128, 64, 64, warps=8, stages=3),
    Config(128, 64, 32, warps=8, stages=4),
    Config(128, 64, 64, warps=4, stages=4),
    Config(64, 128, 64, warps=4, stages=4),
    Config(64, 64, 64, warps=4, stages=4),
)
GRADIENT = (
    Config(128, 128, 0, warps=8, stages=2),
    Config(128, 64, 0, warps=8, stages=3),
    Config(128, 32, 0, warps=8, stages=3),
    Config(64, 64, 0, warps=4, stages=2),
    Config(64, 64, 0, warps=4, stages=3),
    Config(64, 32, 0, warps=4, stages=3),
)
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("weights", "softmax", 1, weights_step, WEIGHTS),
        Kernel("statistics", "softmax", 1, statistics_step, STATISTICS),
        Kernel("gradient", "softmax", 2, gradient_step, GRADIENT),
        Kernel("weights", "sigmoid", 1, weights_step, WEIGHTS),
        Kernel("statistics", "sigmoid", 1, statistics_step, STATISTICS),
    )
}


@contextmanager
def chosen(choice: Choice):
    """Launches inside run with this configuration."""
    extra = {} if choice.maxnreg is None else {"maxnreg": choice.maxnreg}

    def options(config: Config, features: Tensor) -> dict:
        return launch_options(config, features) | extra

    with ExitStack() as stack:
        stack.enter_context(use_config(choice.config))
        for module in (gradients, statistics_kernels):
            stack.enter_context(mock.patch.object(module, "launch_options", options))
        yield


# -- compilation and time -------------------------------------------------------------------------------------------


def compile_choice(name: str, index: int, n: int, d: int, dtype: str, device: str) -> None:
    kernel = KERNELS[name]
    with chosen(kernel.choices()[index]):
        kernel.prepare(kernel.epilogue, n, d, DTYPES[dtype], device)()
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return triton.testing.do_bench(step, warmup=10, rep=60, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


class Table:
    """configs.csv, and the same on the terminal."""

    def __init__(self, folder: Path, given: argparse.Namespace):
        self._path = folder / "configs.csv"
        folder.mkdir(parents=True, exist_ok=True)
        here = machine(given.device)
        common = {"dtype": given.dtype, "device": given.device}
        self._common = common | {name: here[name] for name in MACHINE}

    def time(self, step: Callable[[], object], flops: float, **columns: object) -> bool:
        """Adds a line: the step's time, or why it has none. Returns whether it has one."""
        measured = {}
        try:
            ms = median_ms(step, self._common["device"])
            measured = {"ms_median": f"{ms:.5g}", "tflops": f"{flops / ms / 1e9:.4g}"}
        except Exception as error:  # OutOfResources, or what a compiler says of a config
            measured = {"error": short_error(f"{type(error).__name__}: {error}")}
        row = dict.fromkeys(COLUMNS, "") | self._common | columns | measured
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        told = row["error"] or f"{row['ms_median']} ms, {row['tflops']} TFLOP/s"
        print(f"{row['kernel']}, N = {row['n']}, d = {row['d']}, {row['config']}: {told}", flush=True)
        return not row["error"]


def time_kernel(table: Table, kernel: Kernel, choices: list[Choice], given: argparse.Namespace) -> bool:
    """Whether the shipped configuration, which is the first, ran."""
    d = min(given.d, FUSED_D) if kernel.kernel == "gradient" else given.d
    step = kernel.prepare(kernel.epilogue, given.n, d, DTYPES[given.dtype], given.device)
    flops = 2.0 * kernel.products * given.n**2 * d
    timed = []
    for choice in choices:
        with chosen(choice):
            shipped = "" if timed else "yes"
            columns = {"kernel": kernel.name, "config": str(choice), "shipped": shipped, "n": given.n, "d": d}
            timed.append(table.time(step, flops, **columns))
    return timed[0]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16384, help="rows, and columns")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=int, default=99, help="configurations of a kernel")
    parser.add_argument("--rows", type=int, action="append", help="of W in the products")
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side before anything is timed")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    given = parse_arguments()
    count_loops_with_new_numpy()
    choices = {name: kernel.choices()[: given.most] for name, kernel in KERNELS.items()}
    if given.device == "cuda":
        size = (given.n, given.d, given.dtype, given.device)
        jobs = [(name, index, *size) for name, of in choices.items() for index in range(len(of))]
        side_by_side(compile_choice, jobs, given.processes)
    table = Table(given.output, given)
    for rows in given.rows or (4096, 8192, 16384):
        step = product_step(rows, given.d, DTYPES[given.dtype], given.device)
        name = f"W Y, [{rows}, {rows}] x [{rows}, {given.d}]"
        table.time(step, 2.0 * rows**2 * given.d, kernel=name, config="cuBLAS", n=rows, d=given.d)
    ran = [time_kernel(table, kernel, choices[name], given) for name, kernel in KERNELS.items()]
    sys.exit(not all(ran))


if __name__ == "__main__":
    main()
