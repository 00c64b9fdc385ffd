"""What the shipped Triton kernels take on each GPU, read from their compiled code: `python -m bench.triton_resources`.

The launchers run as they are, under a driver that names the GPU, and every launch ends after compilation: the code
is the code that such a GPU would get, with the specialisation of the arguments. No GPU is needed.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from replearn_kernels.triton_kernels import EPILOGUES, TileInputs, accumulate_gradient, form_weights, update_statistics

RESULTS = Path(__file__).parent / "results" / "triton_resources.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PORTABILITY = "gfx942"  # only has to compile: there are no configs for AMD yet
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# name: (dtype, torch.set_float32_matmul_precision)
PRODUCTS = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel for features of one kind on one GPU."""

    kernel: str
    product: str
    target: str


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case. ``spills`` counts instructions; ``matrix`` those that multiply matrices."""

    kernel: str
    product: str
    target: str
    config: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: int
    instruction: str
    triton: str
    date: str

    @property
    def case(self) -> Case:
        return Case(self.kernel, self.product, self.target)

    def problems(self) -> list[str]:
        name = f"{self.kernel}, {self.product}, {self.target}"
        found = []
        if self.spills and self.target != PORTABILITY:
            found.append(f"{name}: {self.spills} instructions spill registers")
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            found.append(f"{name}: {self.shared_bytes} B of shared memory, limit {SHARED_LIMIT[self.target]} B")
        if not self.matrix and self.product != "fp32" and not self.kernel.startswith("merge"):
            found.append(f"{name}: no {self.instruction}")
        return found


def cases() -> list[Case]:
    """The kernels of every loss x kind of product x GPU; their variants, and AMD, for bf16 alone."""
    return [
        Case(kernel, product, target)
        for target in TARGETS
        for product in (("bf16",) if target == PORTABILITY else PRODUCTS)
        for kernel in LAUNCHES
        if product == "bf16" or kernel in EVERY_PRODUCT
    ]


# -- the launches -------------------------------------------------------------------------------------------------

SOFTMAX = EPILOGUES["softmax"]
Sizes = tuple[int, int]  # rows and columns: the code depends on whether they are divisible by 16 (or 1)
EVEN, RAGGED = (2048, 4096), (2047, 4095)


def statistics(dtype: torch.dtype, sizes: Sizes = EVEN) -> None:
    rows, columns = sizes
    features, tables = _features(dtype, sizes, 512), (torch.empty(3, rows), torch.empty(2, columns))
    update_statistics(SOFTMAX, *features, _inputs(sizes), *tables)


def weights(dtype: torch.dtype, sizes: Sizes = EVEN) -> None:
    form_weights(SOFTMAX, *_features(dtype, sizes, 512), _inputs(sizes, True), torch.empty(sizes, dtype=dtype))


def gradient(dtype: torch.dtype, sizes: Sizes = EVEN, transposed: bool = False) -> None:
    """At d = 128, the widest that it is used for."""
    own, other = _features(dtype, sizes, 128)[:: -1 if transposed else 1]
    accumulate_gradient(SOFTMAX, own, other, _inputs(sizes, True), torch.empty(own.shape), transposed=transposed)


def _features(dtype: torch.dtype, sizes: Sizes, d: int) -> list[torch.Tensor]:
    return [torch.empty(size, d, dtype=dtype) for size in sizes]


def _inputs(sizes: Sizes, with_tables: bool = False) -> TileInputs:
    rows, columns = sizes
    tables = (torch.empty(5, rows), torch.empty(4, columns)) if with_tables else ()
    return TileInputs.of(sizes, torch.empty(()), torch.empty(rows, dtype=torch.int64), 16, *tables)


# kernel: (launch, which of the launched kernels it is)
LAUNCHES: dict[str, tuple[Callable[[torch.dtype], None], int]] = {
    "statistics": (statistics, 0),
    "weights": (weights, 0),
    "gradient": (gradient, 0),
    "gradient transposed": (partial(gradient, transposed=True), 0),
    "merge rows": (statistics, 1),
    "merge columns": (statistics, 2),
    "statistics ragged": (partial(statistics, sizes=RAGGED), 0),
    "weights ragged": (partial(weights, sizes=RAGGED), 0),
    "gradient ragged": (partial(gradient, sizes=RAGGED), 0),
}
EVERY_PRODUCT = ("statistics", "weights", "gradient")


# -- compilation --------------------------------------------------------------------------------------------------


class _Driver:
    """Names a GPU that is not there."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target.arch)
        self.get_current_stream = lambda device: 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list]:
    """Launches inside compile for ``target`` and end there; the list receives (compiled kernel, options)."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, warmup=False, **options):
        compiled.append((run(self, *args, warmup=True, **options), options))

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield compiled


def measure(case: Case) -> Row:
    dtype, precision = PRODUCTS[case.product]
    launch, index = LAUNCHES[case.kernel]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with compiling(TARGETS[case.target]) as compiled:
            launch(dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    kernel, options = compiled[index]
    read = _read_amdgcn if case.target == PORTABILITY else _read_cubin
    registers, spills, matrix = read(kernel, MATRIX_INSTRUCTION[case.target])
    return Row(
        case.kernel, case.product, case.target, _describe(options),
        registers, spills, kernel.metadata.shared, matrix, MATRIX_INSTRUCTION[case.target] if matrix else "",
        triton.__version__, datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip


def _describe(options: dict) -> str:
    blocks = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options)
    stages = f", {options['num_stages']} stages" if "num_stages" in options else ""
    return f"{blocks + ', ' if blocks else ''}{options['num_warps']} warps{stages}"


def _read_cubin(kernel, instruction: str) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", sass)), len(re.findall(rf"\b{instruction}\b", sass))


def _read_amdgcn(kernel, instruction: str) -> tuple[int, int, int]:
    assembly = kernel.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count")
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
    return registers, spills, len(re.findall(instruction, assembly))


# -- the table ----------------------------------------------------------------------------------------------------


def load(path: Path = RESULTS) -> list[Row]:
    with path.open() as file:
        return [
            Row(**{f.name: int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Row)})
            for row in csv.DictReader(file)
        ]


def write(rows: Iterable[Row], path: Path) -> None:
    """The CSV file, and the same as a Markdown table beside it."""
    names = [field.name for field in fields(Row)]
    lines = [[str(getattr(row, name)) for name in names] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *lines])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *lines))
    heading = "# Triton kernels: what the compiler made of them\n\nCompiled without a GPU; nothing here is a time."
    path.with_suffix(".md").write_text(f"{heading}\n\n{table}\n")


def main(output: Path = RESULTS, processes: int = 2) -> None:
    """Compile every kernel for every GPU, write the table, and exit with 1 if a kernel spills or does not fit."""
    with ProcessPoolExecutor(processes) as pool:
        rows = list(pool.map(measure, cases()))
    write(rows, output)
    print(output.with_suffix(".md").read_text())
    problems = [problem for row in rows for problem in row.problems()]
    print("\n".join(problems), file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    import typer

    typer.run(main)
