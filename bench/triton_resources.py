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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.triton_sources import digest_of
from bench.triton_variants import NO_PRODUCTS, OF_TABLES, OUTPUTS, PRODUCTS, VARIANTS, launch

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

@dataclass(frozen=True)
class Case:
    """One compilation: a kernel with a variant of an epilogue, for features of one kind on one GPU."""

    variant: str
    kernel: str
    product: str
    target: str


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case. ``spills`` counts instructions; ``matrix`` those that multiply matrices."""

    variant: str
    kernel: str
    product: str
    target: str
    config: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: int
    instruction: str
    source: str  # of triton_sources.py
    triton: str
    date: str

    @property
    def case(self) -> Case:
        return Case(self.variant, self.kernel, self.product, self.target)

    def programs(self) -> int:
        """How many fit on a multiprocessor of sm_90, which keeps 1 KiB of shared memory for each."""
        threads = 32 * int(re.search(r"(\d+) warps", self.config)[1])
        return min(65_536 // (self.registers * threads), 233_472 // (self.shared_bytes + 1024))

    def problems(self) -> list[str]:
        name = f"{self.variant}, {self.kernel}, {self.product}, {self.target}"
        found = []
        if self.spills and self.target != PORTABILITY:
            found.append(f"{name}: {self.spills} instructions spill registers")
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            found.append(f"{name}: {self.shared_bytes} B of shared memory, limit {SHARED_LIMIT[self.target]} B")
        forms_none = self.kernel.startswith("weights") and not VARIANTS[self.variant].weighs_similarities
        if not (self.matrix or forms_none or self.product == "fp32" or self.kernel.startswith(NO_PRODUCTS)):
            found.append(f"{name}: no {self.instruction}")
        return found


def cases() -> list[Case]:
    """Every variant's kernels x kind of product x GPU; for bf16 also tables' and ragged sizes. AMD: bf16 alone."""
    found = []
    for target in TARGETS:
        for product in ("bf16",) if target == PORTABILITY else PRODUCTS:
            for name, variant in VARIANTS.items():
                every = variant.kernels(product, target)
                kernels = of_features = [kernel for kernel in every if not kernel.startswith(OF_TABLES)]
                if product == "bf16" and target != PORTABILITY:
                    kernels = every + [f"{kernel} ragged" for kernel in of_features]
                found += [Case(name, kernel, product, target) for kernel in kernels]
            found += [Case("any", kernel, product, target) for kernel in OUTPUTS]
    return found


def epilogue_name(variant: str) -> str:
    """Of kernels of any variant "any"."""
    return VARIANTS[variant].epilogue if variant in VARIANTS else variant


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


@contextmanager
def launching(target: GPUTarget) -> Iterator[list[tuple[JITFunction, tuple, dict]]]:
    """Launches inside end before they compile anything; the list receives (kernel, arguments, options)."""
    launched = []
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", lambda self, *args, **options: launched.append((self, args, options))),
    ):
        yield launched


def _launch(case: Case, listening: Callable) -> tuple:
    """What ``listening`` (:func:`compiling` or :func:`launching`) receives of the case's launch."""
    dtype, precision = PRODUCTS[case.product]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with listening(TARGETS[case.target]) as received:
            launch(VARIANTS.get(case.variant), case.kernel, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    return received["finish" in case.kernel]


def source_of(case: Case) -> str:
    """A digest of what the case's kernel is compiled from: another one, another kernel."""
    return digest_of(*_launch(case, launching))


def measure(case: Case) -> Row:
    try:
        kernel, options = _launch(case, compiling)
    except Exception as error:  # Triton's own cannot be sent from one process to another, which would wait for ever
        raise RuntimeError(f"{case}: {type(error).__name__}: {error}") from None
    read = _read_amdgcn if case.target == PORTABILITY else _read_cubin
    registers, spills, matrix = read(kernel, MATRIX_INSTRUCTION[case.target])
    return Row(
        case.variant, case.kernel, case.product, case.target, _describe(options),
        registers, spills, kernel.metadata.shared, matrix, MATRIX_INSTRUCTION[case.target] if matrix else "",
        source_of(case), triton.__version__, datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip


def _describe(options: dict) -> str:
    blocks = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options)
    text = f"{blocks + ', ' if blocks else ''}{options['num_warps']} warps"
    for name, option in (
        ("stages", "num_stages"), ("stages", "STAGES"), ("parts", "PARTS"), ("registers at most", "maxnreg")
    ):  # fmt: skip
        text += f", {options[option]} {name}" if option in options else ""
    return text


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


def results_of_this_version() -> Path:
    """``triton_3_6_resources.csv`` for Triton 3.6."""
    major, minor = triton.__version__.split(".")[:2]
    return RESULTS.with_name(f"triton_{major}_{minor}_resources.csv")


def committed() -> Path:
    """The table of this Triton: its own, or that of the pinned one."""
    own = results_of_this_version()
    return own if own.exists() else RESULTS


def load(path: Path | None = None) -> list[Row]:
    """A table; by default the one of this Triton."""
    with (path or committed()).open() as file:
        return [
            Row(**{f.name: int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Row)})
            for row in csv.DictReader(file)
        ]


def write(rows: list[Row], path: Path) -> None:
    """The CSV file, and the same as a Markdown table beside it."""
    names = [field.name for field in fields(Row)]
    lines = [[str(getattr(row, name)) for name in names] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *lines])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *lines))
    heading = f"# Triton kernels: what the compiler of Triton {rows[0].triton} made of them"
    text = f"Compiled without a GPU; nothing here is a time. {_programs_of_clip(rows)}"
    path.with_suffix(".md").write_text(f"{heading}\n\n{text}\n\n{table}\n")


def _programs_of_clip(rows: list[Row]) -> str:
    """Why `configs.py` bounds the registers of CLIP's weights kernel: only another program can hide its epilogue."""
    [row] = [row for row in rows if row.case == Case("softmax symmetric", "weights apart", "bf16", "sm_90")]
    text = f"CLIP's weights kernel (softmax symmetric, bf16, sm_90) takes {row.registers} registers"
    return f"{text} and {row.shared_bytes} B: {row.programs()} of its programs fit on a multiprocessor."


def main(output: Path | None = None, processes: int = 2, missing: bool = False, by_version: bool = False) -> None:
    """Compile every kernel for every GPU, write the table, and exit with 1 if a kernel spills or does not fit.

    ``--missing``: only kernels of which the table has no row, or one of other sources. The other rows stay.
    ``--by-version``: to a table of this Triton's own, which stands beside that of the pinned Triton from then on.
    """
    output = output or (results_of_this_version() if by_version else committed())
    known = {row.case: row for row in load(output)} if missing else {}
    new = [case for case in cases() if case not in known or known[case].source != source_of(case)]
    # A process forked off one in which PyTorch has started threads may wait for them for ever.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        known |= zip(new, pool.map(measure, new))
    rows = [known[case] for case in cases()]
    write(rows, output)
    print(output.with_suffix(".md").read_text())
    problems = [problem for row in rows for problem in row.problems()]
    print("\n".join(problems), file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    import typer

    typer.run(main)
