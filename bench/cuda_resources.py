"""What the CUDA kernels take on each GPU, as nvcc tells: `python -m bench.cuda_resources`. No GPU is needed."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch.utils.cpp_extension

RESULTS = Path(__file__).parent / "results" / "cuda_resources.csv"
SOURCES = Path(__file__).parents[1] / "csrc"
SOURCE = SOURCES / "cuda" / "mine_triplets.cu"
TARGETS = ("80", "90", "100")
SHARED_LIMIT = 49_152  # of a block, without special request
DTYPES = {"f": "float32", "d": "float64", "4Half": "float16", "8BFloat16": "bfloat16", None: ""}
# As setup.py builds it, but for the host's -O3: kernels are optimised without it.
FLAGS = ["-std=c++17", "-fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

# Of the mangled name: the kernel and its first template argument, which may be one of the namespace's.
NAME = re.compile(r"\d(mine_\w+?_kernel)(?:I(?:NS0_)?(f|d|4Half|8BFloat16)E)?")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>.*?)\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Row:
    """A kernel for embeddings of one dtype (none: for any) on one GPU: per thread, and shared memory per block."""

    kernel: str
    dtype: str
    target: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    nvcc: str
    date: str

    @property
    def case(self) -> tuple[str, str, str]:
        return self.kernel, self.dtype, self.target

    @property
    def figures(self) -> tuple[int, ...]:
        return self.registers, self.stack_bytes, self.spill_bytes, self.shared_bytes

    def problems(self) -> list[str]:
        limits = {"stack_bytes": 0, "spill_bytes": 0, "shared_bytes": SHARED_LIMIT}
        return [
            f"{', '.join(self.case)}: {name} = {getattr(self, name)}, limit {limit}"
            for name, limit in limits.items()
            if getattr(self, name) > limit
        ]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or that on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def compile_for_all(nvcc: str, output: Path) -> list[Row]:
    """Compile the operator, its binding to torch included, into the object ``output``."""
    includes = [f"-I{SOURCES}", *(f"-isystem={path}" for path in torch.utils.cpp_extension.include_paths())]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in TARGETS]
    command = [nvcc, *FLAGS, *includes, *targets, "-Xptxas=-v", "--threads=1", "-c", str(SOURCE), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc failed:\n{result.stdout}{result.stderr}")
    return read(result.stdout + result.stderr, nvcc_version(nvcc))


def read(log: str, version: str) -> list[Row]:
    """The rows in what ptxas says, ordered by kernel, dtype and GPU."""
    date, rows = datetime.now(timezone.utc).date().isoformat(), []
    for entry in ENTRY.finditer(log):
        kernel, dtype = NAME.search(entry["name"]).groups()
        shared = re.search(r"(\d+) bytes smem", entry["more"])
        rows.append(
            Row(
                kernel, DTYPES[dtype], entry["target"], int(entry["registers"]), int(entry["stack"]),
                int(entry["stores"]) + int(entry["loads"]), int(shared[1]) if shared else 0, version, date,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.kernel, row.dtype, int(row.target.removeprefix("sm_"))))


def load(path: Path = RESULTS) -> list[Row]:
    with path.open() as file:
        return [
            Row(**{f.name: int(row[f.name]) if f.type == "int" else row[f.name] for f in fields(Row)})
            for row in csv.DictReader(file)
        ]


def write(rows: list[Row], path: Path) -> None:
    """The CSV file, and the same as a Markdown table beside it."""
    names = [field.name for field in fields(Row)]
    lines = [[str(value) for value in astuple(row)] for row in rows]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *lines])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *lines))
    heading = "# CUDA kernels: what the compiler made of them\n\nCompiled without a GPU; nothing here is a time."
    path.with_suffix(".md").write_text(f"{heading}\n\n{table}\n")


def main() -> None:
    """Compile for every GPU, write the table, and exit with 1 if a kernel spills."""
    nvcc = find_nvcc() or sys.exit("nvcc was not found: set CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        rows = compile_for_all(nvcc, Path(folder, "mine_triplets.o"))
    write(rows, RESULTS)
    print(RESULTS.with_suffix(".md").read_text())
    problems = [problem for row in rows for problem in row.problems()]
    print("\n".join(problems), file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
