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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from replearn_kernels.triton_kernels import (
    EPILOGUES,
    Points,
    Side,
    TileInputs,
    accumulate_gradient,
    begin_sums,
    combine_losses,
    combine_statistics,
    finish_gradients,
    form_weights,
    shared_reference,
    update_by_sums,
    update_statistics,
)
from replearn_kernels.triton_kernels.configs import default
from replearn_kernels.triton_kernels.statistics import merge

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
ARCHITECTURE = {"sm_80": 80, "sm_90": 90, "sm_100": 100, PORTABILITY: 80}  # whose configs a target takes
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# name: (dtype, torch.set_float32_matmul_precision)
PRODUCTS = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
}
KIND = {"fp16": "half", "bf16": "half", "tf32": "tf32", "fp32": "ieee"}  # in configs.py

# Kernels of tables alone: the same for every kind of product. And those that form no products.
OF_TABLES = ("merge", "add", "combine", "total", "reference")
NO_PRODUCTS = (*OF_TABLES, "begin", "outputs")


@dataclass(frozen=True)
class Variant:
    """An epilogue with what one kind of tile tells it: every combination that the engine launches."""

    epilogue: str
    target: str = ""  # "own": row i's positive is column i; "given": any
    groups: bool = False
    columns: bool = False  # the tile has tables of columns, too
    diagonal: bool = False
    fused: bool = False  # the gradient kernel can take the products
    one_sweep: bool = False  # the weights kernel folds the row statistics
    distance: str = ""  # "distance" or its "square", where similarities are no products
    quantities: int = 3  # of the statistics of rows; of columns too where these are rows elsewhere
    gradients: bool = True  # there is a sweep of gradients
    told_apart: bool = False  # where TMA moves W, blocks off the diagonal are told from those on it
    first: bool = True  # of its epilogue's variants: kernels that know nothing of tiles are listed once

    def kernels(self, product: str, target: str) -> list[str]:
        """Those that a GPU has a config for. "weights apart": the weights kernel that tells blocks apart."""
        names = ["statistics", "weights"] if self.gradients else ["statistics"]
        names += ["gradient", "gradient transposed"] * self.fused + self._of_tables() * self.first
        if not self.told_apart:
            return names
        sums, weights = (
            default(kernel, self.epilogue, KIND[product], ARCHITECTURE[target]) for kernel in ("sums", "weights")
        )
        names += ["weights apart"] * (weights.parts > 0)
        if sums is None or not EPILOGUES[self.epilogue].by_sums:
            return names
        return [*names, *["begin"] * self.first, "sums", "finish", *["reference"] * self.first]

    def _of_tables(self) -> list[str]:
        epilogue = EPILOGUES[self.epilogue]
        names = ["add rows" if epilogue.additive else "merge rows"]
        if self.columns and not self.diagonal:
            names.append("merge columns")
        if epilogue.combine is not None:
            names.append("total" if self.one_sweep else "combine")
        return names


OF_PAIRS = {"groups": True, "columns": True}
CONTRASTIVE = {"one_sweep": True, "distance": "distance", "quantities": 2}
HARDEST = {"distance": "square", "quantities": 5, "gradients": False}
SEMI_HARD = {"distance": "square", "quantities": 3 + 3 * EPILOGUES["semi_hard"].per_part, "gradients": False}
BATCH_ALL = {"one_sweep": True, "quantities": 2 + 2 * EPILOGUES["batch_all"].per_part}

VARIANTS = {
    "softmax symmetric": Variant("softmax", target="own", columns=True, fused=True, told_apart=True),
    "softmax": Variant("softmax", target="own", fused=True, told_apart=True, first=False),
    "softmax target": Variant("softmax", target="given", fused=True, first=False),
    "softmax queue": Variant("softmax", fused=True, told_apart=True, first=False),
    "softmax groups": Variant("softmax", target="own", groups=True, fused=True, first=False),
    "sup_con": Variant("sup_con", groups=True, columns=True, told_apart=True),
    "sup_con diagonal": Variant("sup_con", groups=True, columns=True, diagonal=True, told_apart=True, first=False),
    "margin_softmax": Variant("margin_softmax", target="given", fused=True),
    "sigmoid": Variant("sigmoid", target="own", one_sweep=True, told_apart=True),
    "sigmoid groups": Variant("sigmoid", groups=True, one_sweep=True, first=False),
    "lifted": Variant("lifted", **OF_PAIRS, distance="distance"),
    "lifted diagonal": Variant("lifted", first=False, **OF_PAIRS, diagonal=True, distance="distance"),
    "margin_contrastive": Variant("margin_contrastive", **OF_PAIRS, **CONTRASTIVE),
    "margin_contrastive diagonal": Variant("margin_contrastive", first=False, **OF_PAIRS, diagonal=True, **CONTRASTIVE),
    "hardest": Variant("hardest", **OF_PAIRS, **HARDEST),
    "hardest diagonal": Variant("hardest", first=False, **OF_PAIRS, diagonal=True, **HARDEST),
    "semi_hard": Variant("semi_hard", **OF_PAIRS, **SEMI_HARD),
    "semi_hard diagonal": Variant("semi_hard", first=False, **OF_PAIRS, diagonal=True, **SEMI_HARD),
    "batch_all": Variant("batch_all", **OF_PAIRS, **BATCH_ALL, distance="distance"),
    "batch_all diagonal": Variant(
        "batch_all", first=False, **OF_PAIRS, diagonal=True, **BATCH_ALL, distance="distance"
    ),
    "batch_all squared": Variant("batch_all", first=False, **OF_PAIRS, **BATCH_ALL, distance="square"),
}


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
        if not self.matrix and self.product != "fp32" and not self.kernel.startswith(NO_PRODUCTS):
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


OUTPUTS = ("outputs", "outputs of three", "outputs normalised")

# -- the launches -------------------------------------------------------------------------------------------------

ROLES = {"margin_contrastive": (0.5, True), "batch_all": (0.5,)}

# Rows and columns: the code depends on whether they are divisible by 16.
EVEN, RAGGED = (2048, 4096), (2047, 4095)


def launch(variant: Variant | None, kernel: str, dtype: torch.dtype, d: int | None = None) -> None:
    """Without ``d``, gradients at 128, the widest that the fused kernel is used for, and all else at 512.

    The launch that the kernel is named for is the first, but that its sums come before what finishes them. Outputs are
    of no variant.
    """
    sizes = RAGGED if kernel.endswith(" ragged") else EVEN
    kernel = kernel.removesuffix(" ragged")
    d = d or (128 if kernel.startswith("gradient") else 512)
    query, key = (torch.empty(size, d, dtype=dtype) for size in sizes)
    if kernel in ("statistics", "merge rows", "merge columns", "add rows"):
        _launch_statistics(variant, kernel, query, key)
    elif kernel in ("begin", "sums", "finish", "combine", "total"):
        _launch_sums(variant, kernel, query, key)
    elif kernel in OUTPUTS:
        _launch_outputs(kernel, query, key)
    else:
        _launch_gradients(variant, kernel, query, key)


def _launch_statistics(variant: Variant, kernel: str, query, key) -> None:
    epilogue, row_table, column_table = EPILOGUES[variant.epilogue], torch.empty(variant.quantities, len(query)), None
    if variant.columns and not variant.diagonal:
        column_table = torch.empty(variant.quantities if variant.groups else 2, len(key))
    read = (row_table, row_table if column_table is None else column_table) if epilogue.reads_tables else ()
    inputs = _inputs(variant, query, key, *read)
    if kernel == "statistics":
        update_statistics(epilogue, query, key, inputs, *_points(variant, query, key), row_table, column_table)
    else:
        table = column_table if kernel == "merge columns" else row_table
        merge(epilogue, torch.empty(4, *table.shape), inputs, table)


def _launch_sums(variant: Variant, kernel: str, query, key) -> None:
    """A tile's mirror image has its own sums: with groups, of rows alone."""
    epilogue, row_table = EPILOGUES[variant.epilogue], torch.empty(variant.quantities, len(query))
    column_table = torch.empty(2, len(key)) if variant.columns and not variant.groups else None
    inputs = _inputs(variant, query, key, row_table, column_table, torch.int32)
    if kernel == "begin":
        begin_sums(epilogue, query, key, row_table, column_table)
    elif kernel == "combine":
        combine_statistics(epilogue, inputs, torch.empty(len(query), dtype=torch.int64) if variant.groups else 0, True)
    elif kernel == "total":
        combine_losses(epilogue, inputs, True)
    else:
        inputs = _inputs(variant, query, key, group_dtype=torch.int32)
        update_by_sums(epilogue, query, key, inputs, torch.empty(2, 128), 0, row_table, column_table)


def _launch_outputs(kernel: str, query, key) -> None:
    normalised = kernel == "outputs normalised"
    sides = [
        Side.of(torch.empty(x.shape), torch.empty_like(x), x, torch.empty(len(x))) if normalised or x is query
        else Side.of(torch.empty(x.shape), torch.empty_like(x))
        for x in (query, key)
    ]  # fmt: skip
    if not normalised:
        sides[0] = sides[0]._replace(inverse_norms=None)
    if kernel == "outputs of three":
        sides.append(sides[1])
    of_scale = None if normalised else torch.empty(())
    finish_gradients(sides, torch.empty(()), (torch.empty(()), torch.empty(())), of_scale, counter=torch.empty(1))


def _launch_gradients(variant: Variant, kernel: str, query, key) -> None:
    epilogue, (rows, columns) = EPILOGUES[variant.epilogue], (len(query), len(key))
    row_table = torch.empty(variant.quantities if variant.one_sweep else 5, rows)
    column_table = torch.empty(len(row_table), columns) if variant.columns else None
    group_dtype = torch.int32 if kernel == "weights apart" else torch.int64
    inputs = _inputs(variant, query, key, row_table, column_table, group_dtype)
    if kernel == "reference":
        shared_reference(inputs)
    elif kernel in ("weights", "weights apart"):
        folded = row_table if variant.one_sweep else None
        of_columns = column_table if epilogue.folds_columns and not variant.diagonal else None
        out = torch.empty(rows, -(-columns // 16) * 16, dtype=query.dtype)[:, :columns]  # as the engine pads its rows
        diagonal = None
        if kernel == "weights apart":
            diagonal, reference = 0, torch.empty(2) if epilogue.by_reference else None
            inputs = inputs._replace(reference=reference)
        form_weights(epilogue, query, key, inputs, *_points(variant, query, key), out, folded, of_columns, diagonal)
    else:
        transposed = kernel == "gradient transposed"
        own, other = (key, query) if transposed else (query, key)
        accumulate_gradient(epilogue, own, other, inputs, torch.empty(own.shape), transposed=transposed)


def _inputs(variant: Variant, query, key, row_table=None, column_table=None, group_dtype=torch.int64) -> TileInputs:
    def ids(given: bool, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.empty(size, dtype=dtype) if given else None

    rows, columns = len(query), len(key)
    return TileInputs.of(
        (rows, columns), torch.empty(()), torch.empty(()) if variant.epilogue == "sigmoid" else 0.0,
        ids(variant.target == "given", rows, torch.int64), ids(variant.groups, rows, group_dtype),
        ids(variant.groups, columns, group_dtype),
        16, variant.diagonal, row_table, column_table, ROLES.get(variant.epilogue, ()),
        own=16 if variant.target == "own" else None,
    )  # fmt: skip


def _points(variant: Variant, query, key) -> tuple[Points | None, bool]:
    if not variant.distance:
        return None, False
    return Points.of(query, key, torch.empty(len(query)), torch.empty(len(key))), variant.distance == "square"


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
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with compiling(TARGETS[case.target]) as compiled:
            launch(VARIANTS.get(case.variant), case.kernel, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    kernel, options = compiled[case.kernel.removesuffix(" ragged") == "finish"]
    read = _read_amdgcn if case.target == PORTABILITY else _read_cubin
    registers, spills, matrix = read(kernel, MATRIX_INSTRUCTION[case.target])
    return Row(
        case.variant, case.kernel, case.product, case.target, _describe(options),
        registers, spills, kernel.metadata.shared, matrix, MATRIX_INSTRUCTION[case.target] if matrix else "",
        triton.__version__, datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip


def _describe(options: dict) -> str:
    blocks = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options)
    text = f"{blocks + ', ' if blocks else ''}{options['num_warps']} warps"
    for name, option in (("stages", "num_stages"), ("parts", "PARTS"), ("registers at most", "maxnreg")):
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

    ``--missing``: only what the table has no row of yet. The others stay, so this is for new kernels alone.
    ``--by-version``: to a table of this Triton's own, which stands beside that of the pinned Triton from then on.
    """
    output = output or (results_of_this_version() if by_version else committed())
    known = {row.case: row for row in load(output)} if missing else {}
    new = [case for case in cases() if case not in known]
    with ProcessPoolExecutor(processes) as pool:
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
