"""Builds the Python module `cuda_shim` with ninja, plain and with sanitizers, in build/cuda_shim.

cuda_shim.h is the GPU; mine_triplets.cpp runs the kernels of csrc/cuda on it; module.cpp hands that to Python.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_shim"
SOURCES = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "c++")
PYTHON_HEADERS = Path(sysconfig.get_paths()["include"])

# A fused multiply-add is one only where the kernels say so. longjmp goes between stacks, which _FORTIFY_SOURCE forbids.
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off -U_FORTIFY_SOURCE"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"

# name: (flags, an edit: of which file, what, into what)
VARIANTS = {
    "plain": ("-O2", None),
    "sanitized": (f"-O1 {SANITIZERS}", None),
    # Features of the row behind the last are read.
    "out_of_bounds": (
        f"-O0 {SANITIZERS}",
        ("cuda/distance_tile.cuh", "first_row + row < batch.rows &&", "first_row + row <= batch.rows &&"),
    ),
}


def why_missing() -> str | None:
    """Why the module cannot be built here, if so."""
    for package in ("ninja", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return f"no {package}: see requirements.txt"
    if shutil.which(COMPILER.split()[0]) is None:
        return f"no C++ compiler {COMPILER}"
    if not (PYTHON_HEADERS / "Python.h").exists():
        return f"no Python.h in {PYTHON_HEADERS}: install Python's headers (Debian: python3-dev)"
    return None


@functools.cache
def why_no_sanitizers() -> str | None:
    """Why no program with sanitizers can be built here, if so."""
    if why_missing():
        return why_missing()
    command = [*COMPILER.split(), *SANITIZERS.split(), "-x", "c++", "-", "-o", "/dev/null"]
    result = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return f"{COMPILER} has no sanitizers: {result.stderr.strip()[-200:]}" if result.returncode else None


@functools.cache
def build() -> None:
    """Build every variant that this compiler can: two at a time, those that are not up to date."""
    import ninja
    import pybind11

    headers = f"-isystem {pybind11.get_include()} -isystem {PYTHON_HEADERS}"
    lines = [
        "rule compile",
        f"  command = {COMPILER} -MMD -MF $out.d {FLAGS} $flags -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {COMPILER} -shared $flags $in -o $out",
        f"build module.o: compile {HERE / 'module.cpp'}",
        f"  flags = -O1 {headers}",
    ]
    for name, (flags, edit) in VARIANTS.items():
        if "-fsanitize" in flags and why_no_sanitizers():
            continue
        include = [HERE, SOURCES]
        if edit is not None:
            include.insert(0, _edited(name, edit))
        lines += [
            f"build {name}/mine_triplets.o: compile {HERE / 'mine_triplets.cpp'}",
            f"  flags = {flags} {' '.join(f'-I{path}' for path in include)}",
            f"build {name}/cuda_shim.so: link module.o {name}/mine_triplets.o",
            f"  flags = {flags}",
        ]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(BUILD), "-j", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the shim does not compile:\n{result.stdout}")


def _library(name: str) -> Path:
    return BUILD / name / "cuda_shim.so"


def _edited(name: str, edit: tuple[str, str, str]) -> Path:
    """A folder whose copy of a header is found before the original."""
    header, before, after = edit
    text = (SOURCES / header).read_text()
    assert text.count(before) == 1, before
    path, edited = BUILD / name / header, text.replace(before, after)
    if not path.exists() or path.read_text() != edited:  # else ninja would build anew
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edited)
    return BUILD / name


@functools.cache
def module() -> ModuleType:
    """The module, without sanitizers."""
    build()
    spec = importlib.util.spec_from_file_location("cuda_shim", _library("plain"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Run:
    """What a Python of its own made of calls."""

    ok: bool
    results: list
    errors: str


def run_apart(name: str, calls: list, folder: Path) -> Run:
    """Make ``calls`` to a variant of the module, (name of a function, arguments) each, in a Python of its own."""
    build()
    results = folder / "results"
    results.unlink(missing_ok=True)
    (folder / "calls").write_bytes(pickle.dumps(calls))
    environment = dict(os.environ)
    if "-fsanitize" in VARIANTS[name][0]:  # Python itself was built without: the sanitizers' libraries have to be first
        environment["LD_PRELOAD"] = " ".join(map(_path_of, ("libasan.so", "libstdc++.so")))
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    command = [sys.executable, str(HERE / "run_calls.py"), str(_library(name)), str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    ok = process.returncode == 0
    return Run(ok, pickle.loads(results.read_bytes()) if ok else [], process.stderr)


def _path_of(library: str) -> str:
    command = [*COMPILER.split(), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
