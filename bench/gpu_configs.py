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
from dataclasses import dataclass
from pathlib import Path

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
    begin_sums,
    form_shares,
    form_weights,
    group_ranges,
    launch_gradient,
    launch_weights,
    shared_reference,
    update_by_sums,
    update_statistics,
)
from replearn_kernels.triton_kernels.configs import (
    Config,
    Ring,
    architecture,
    default,
    product_kind,
    ring_of,
    use_config,
)

MACHINE = ("gpu", "torch", "triton")
COLUMNS = ("kernel", "config", "shipped", "n", "d", "dtype", "ms_median", "tflops", "error", "device", *MACHINE)
FUSED_D = 128  # of the gradient kernel: the widest that it is used for
Step = Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """A kernel with an epilogue: what it does, how much of it, and what to try besides the shipped config."""

    kernel: str
    epilogue: str
    prepare: Callable[[Kernel, int, int, torch.dtype, str], Step]
    others: tuple[Config | Ring, ...]
    columns: bool = False  # has tables of columns, too
    products: float = 1  # of n x n x d
    in_gluon: bool = False
    half: bool = False  # of a batch with itself, every pair once

    @property
    def name(self) -> str:
        symmetric = " symmetric" * (self.columns and self.epilogue == "softmax")
        return f"{self.epilogue}{symmetric} {self.kernel}{' of half' * self.half}{' in Gluon' * self.in_gluon}"

    def choices(self, d: int) -> list[Config | Ring]:
        """The shipped one first; none where the GPU has no such kernel for features of this width."""
        if self.in_gluon:
            shipped = ring_of(self.kernel, self.epilogue, torch.bfloat16, d)
        else:
            shipped = default(self.kernel, self.epilogue, product_kind(torch.bfloat16), architecture())
        if shipped is None or (self.kernel == "gradient" and d > FUSED_D):
            return []
        return list(dict.fromkeys((shipped, *self.others)))


def described(config: Config | Ring) -> str:
    """What is not as usual is named."""
    if isinstance(config, Ring):
        return f"{config.own} own rows, {config.other} others, {config.stages} stages"
    usual = Config(0, 0, 0, 0, 0)
    names = {"column_blocks": "column blocks", "parts": "parts", "programs": "programs", "registers": "registers"}
    others = [f"{getattr(config, f)} {name}" for f, name in names.items() if getattr(config, f) != getattr(usual, f)]
    blocks = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return ", ".join([blocks, f"{config.warps} warps", f"{config.stages} stages", *others])


# -- the launches -------------------------------------------------------------------------------------------------


def operands(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, TileInputs]:
    """Unit rows, and tables of sums that lie near each other, as a softmax's do. A class has four rows, one after
    another."""
    query, key = (torch.nn.functional.normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
    rows, columns = (torch.rand(5, n, device=device) for _ in range(2))
    sigmoid, grouped = kernel.epilogue == "sigmoid", kernel.epilogue == "sup_con"
    numbers = torch.arange(n, device=device)
    groups = (numbers.int() // 4,) * 2 if grouped else (None, None)
    by_number = sigmoid or kernel.epilogue == "softmax"
    return query, key, TileInputs.of(
        (n, n), torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device) if sigmoid else 0.0,
        None if grouped or by_number else numbers, *groups, own=0 if by_number else None,
        row_table=rows[:3] if sigmoid else rows, column_table=columns if kernel.columns else None,
    )  # fmt: skip


def ranges_of_groups(inputs: TileInputs) -> tuple[Tensor | None, Tensor | None]:
    if inputs.row_group is None:
        return None, None
    return group_ranges(inputs.row_group), group_ranges(inputs.column_group)


def statistics_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """With the kernel that merges them."""
    query, key, inputs = operands(kernel, n, d, dtype, device)
    of_rows = torch.zeros(3, n, device=device)
    of_columns = torch.zeros(2 if inputs.row_group is None else 3, n, device=device) if kernel.columns else None
    return lambda: update_statistics(EPILOGUES[kernel.epilogue], query, key, inputs, None, False, of_rows, of_columns)


def sums_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """With the kernel that finishes them. By TMA SupCon's are of rows alone."""
    query, key, inputs = operands(kernel, n, d, dtype, device)
    grouped, ranges = inputs.row_group is not None, ranges_of_groups(inputs)
    tables = torch.zeros(3, n, device=device), None
    if kernel.half:
        key, inputs = query, inputs._replace(diagonal=1)
    elif kernel.columns:
        tables = tables[0], torch.zeros(3 if grouped else 2, n, device=device)
    largest = begin_sums(EPILOGUES[kernel.epilogue], query, key)
    return lambda: update_by_sums(EPILOGUES[kernel.epilogue], query, key, inputs, largest, 0, *tables, ranges)


def gluon_weights_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """The same tile of a softmax."""
    query, key, inputs = operands(kernel, n, d, dtype, device)
    inputs, w = inputs._replace(reference=shared_reference(inputs)), torch.empty(n, n, dtype=dtype, device=device)
    shares = form_shares(inputs)
    ranges = ranges_of_groups(inputs)

    def step() -> None:
        ring = ring_of(kernel.kernel, kernel.epilogue, dtype, d)
        launch_weights(query, key, inputs, ranges, shares, True, 0, w, ring)

    return step


def gluon_gradient_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """Of the rows: a batch's only launch, one of two where there are keys."""
    query, key, inputs = operands(kernel, n, d, dtype, device)
    inputs, sums = inputs._replace(reference=shared_reference(inputs)), torch.zeros(query.shape, device=device)
    shares = form_shares(inputs)
    ranges = ranges_of_groups(inputs)

    def step() -> None:
        ring = ring_of(kernel.kernel, kernel.epilogue, dtype, d)
        launch_gradient(query, key, inputs, ranges, shares, True, 0, sums, ring, transposed=False)

    return step


def weights_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """One tile, on the diagonal. The sigmoid's losses come with it."""
    query, key, inputs = operands(kernel, n, d, dtype, device)
    epilogue, w = EPILOGUES[kernel.epilogue], torch.empty(n, n, dtype=dtype, device=device)
    folded = torch.zeros(3, n, device=device) if kernel.epilogue == "sigmoid" else None
    if epilogue.by_reference:
        inputs = inputs._replace(reference=shared_reference(inputs))
    diagonal = 0 if epilogue.off_diagonal else None
    return lambda: form_weights(epilogue, query, key, inputs, None, False, w, folded, diagonal=diagonal)


def gradient_step(kernel: Kernel, n: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """Of the rows: one of the two launches of a step."""
    query, key, inputs = operands(kernel, n, min(d, FUSED_D), dtype, device)
    sums = torch.zeros(query.shape, device=device)
    return lambda: accumulate_gradient(EPILOGUES[kernel.epilogue], query, key, inputs, sums, transposed=False)


def product_step(rows: int, d: int, dtype: torch.dtype, device: str) -> Step:
    """C += W Y, in fp32."""
    w, y = torch.randn(rows, rows, device=device).to(dtype), torch.randn(rows, d, device=device).to(dtype)
    c = torch.zeros(rows, d, device=device)
    return lambda: TritonBackend.addmm_(c, w, y)


# Those with more registers spill by the hundred under Triton 3.6 on sm_90, as do fewer warps of the same block.
BY_POINTERS = (
    Config(128, 128, 64, warps=8, stages=4),
    Config(128, 64, 64, warps=8, stages=4),
    Config(128, 64, 64, warps=8, stages=4, registers=128),
)
BY_TMA = (
    *(Config(128, 128, 64, warps=8, stages=3, parts=n, programs=2, registers=128) for n in (2, 4, 8)),
    Config(128, 128, 64, warps=8, stages=4, parts=4),
    Config(128, 256, 64, warps=8, stages=3, parts=8),
)
SUMS = (
    Config(128, 128, 64, warps=8, stages=4, parts=1),
    Config(128, 256, 64, warps=8, stages=3, parts=1),
)
GRADIENT = (
    Config(128, 128, 0, warps=8, stages=2),
    Config(128, 64, 0, warps=8, stages=3),
    Config(64, 64, 0, warps=4, stages=3),
)
RINGS = tuple(Ring(*sizes) for sizes in ((128, 64, 6), (128, 64, 8), (128, 64, 9), (128, 128, 3), (128, 128, 4)))
GRADIENT_RINGS = tuple(Ring(*sizes) for sizes in ((128, 64, 4), (128, 64, 8), (128, 128, 3), (128, 128, 4)))
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("weights", "softmax", weights_step, (*BY_TMA, *BY_POINTERS), columns=True),
        Kernel("weights", "softmax", weights_step, (*BY_TMA, *BY_POINTERS)),
        Kernel("weights", "sup_con", weights_step, (*BY_TMA, *BY_POINTERS), columns=True),
        Kernel("weights", "sigmoid", weights_step, (*BY_TMA, *BY_POINTERS)),
        Kernel("weights", "margin_softmax", weights_step, (*BY_TMA, *BY_POINTERS)),
        Kernel("sums", "softmax", sums_step, SUMS, columns=True),
        Kernel("sums", "sup_con", sums_step, SUMS),
        Kernel("statistics", "softmax", statistics_step, BY_POINTERS, columns=True),
        Kernel("statistics", "sup_con", statistics_step, BY_POINTERS, columns=True),
        Kernel("gradient", "softmax", gradient_step, GRADIENT, columns=True, products=2),
        Kernel("sums", "softmax", sums_step, RINGS, columns=True, in_gluon=True),
        Kernel("sums", "sup_con", sums_step, RINGS, columns=True, in_gluon=True),
        Kernel("sums", "sup_con", sums_step, RINGS, products=0.5, in_gluon=True, half=True),
        Kernel("weights", "softmax", gluon_weights_step, RINGS, columns=True, in_gluon=True),
        Kernel("weights", "softmax", gluon_weights_step, RINGS, in_gluon=True),
        Kernel("weights", "sup_con", gluon_weights_step, RINGS, columns=True, in_gluon=True),
        Kernel("gradient", "softmax", gluon_gradient_step, GRADIENT_RINGS, columns=True, products=2, in_gluon=True),
        Kernel("gradient", "sup_con", gluon_gradient_step, GRADIENT_RINGS, columns=True, products=2, in_gluon=True),
    )
}


# -- compilation and time -------------------------------------------------------------------------------------------


def compile_choice(name: str, index: int, n: int, d: int, dtype: str, device: str) -> None:
    kernel = KERNELS[name]
    with use_config(kernel.choices(d)[index], kernel.kernel):
        kernel.prepare(kernel, n, d, DTYPES[dtype], device)()
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


def time_kernel(table: Table, kernel: Kernel, d: int, choices: list[Config], given: argparse.Namespace) -> bool:
    """Whether the shipped configuration, which is the first, ran."""
    step = kernel.prepare(kernel, given.n, d, DTYPES[given.dtype], given.device)
    flops = 2.0 * kernel.products * given.n**2 * d
    timed = []
    for config in choices:
        with use_config(config, kernel.kernel):
            shipped = "" if timed else "yes"
            columns = {"kernel": kernel.name, "config": described(config), "shipped": shipped, "n": given.n, "d": d}
            timed.append(table.time(step, flops, **columns))
    return timed[0]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", help="only those with this in their name; may be repeated")
    parser.add_argument("--n", type=int, default=16384, help="rows, and columns")
    parser.add_argument("--d", type=int, action="append", help="may be repeated; 512, 768 and 128")
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
    kernels = {name: kernel for name, kernel in KERNELS.items() if any(part in name for part in given.kernel or [""])}
    widths = given.d or [512, 768, 128]
    choices = {d: {name: kernel.choices(d)[: given.most] for name, kernel in kernels.items()} for d in widths}
    if given.device == "cuda":  # most kernels are compiled for any width: for each but the first they are found
        jobs = [
            (name, index, min(given.n, 4096), d, given.dtype, given.device)
            for d in widths
            for name, of in choices[d].items()
            for index in range(len(of))
            if d == min(widths) or kernels[name].in_gluon
        ]
        side_by_side(compile_choice, jobs, given.processes)
    table, ran = Table(given.output, given), []
    for d in widths:
        for rows in given.rows or (4096, 8192, 16384):
            step = product_step(rows, d, DTYPES[given.dtype], given.device)
            name = f"W Y, [{rows}, {rows}] x [{rows}, {d}]"
            table.time(step, 2.0 * rows**2 * d, kernel=name, config="cuBLAS", n=rows, d=d)
        for name, kernel in kernels.items():
            if choices[d][name]:
                ran.append(time_kernel(table, kernel, d, choices[d][name], given))
    sys.exit(not all(ran))


if __name__ == "__main__":
    main()
