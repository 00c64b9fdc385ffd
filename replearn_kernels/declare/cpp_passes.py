"""The passes of a declared loss on a CPU: its C++ compiled by the system's compiler, kept on disk, and loaded.

A loss is compiled by its first call on a CPU, for one dtype and this processor's instruction set, in 1 to 4 s; later
processes find the library in a folder of the user's. A name there tells all that the library depends on, and what is
in it, and a library comes to have its name when it is complete: processes that compile at the same time do no harm, nor
does one that dies, or a disk that is full.

REPLEARN_KERNELS_CXX      the compiler, or "none"; default: CXX, or the first of c++, g++ and clang++ that there is
REPLEARN_KERNELS_CACHE    the folder; default: replearn_kernels in XDG_CACHE_HOME, or in ~/.cache
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..engine import native
from ..objectives import OBJECTIVES
from .cpp_source import source_of
from .definition import Definition

_PACKAGE = Path(__file__).resolve().parents[1]
_HEADERS = (
    "declared.h", "declared_head.inl", "declared_kernels.inl", "mining_kernels.h", "tile_kernels.h", "vector.h",
    "vector_loops.inl",
)  # fmt: skip
_FLAGS = "-std=c++17 -O3 -g0 -shared -fPIC -fvisibility=hidden -fno-math-errno -Wno-psabi".split()
_INSTRUCTIONS = {  # as csrc/cpu/tile_kernels_*.cpp have them
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-DREPLEARN_VECTOR_BYTES=64"],
    "avx2": ["-mavx2", "-mfma", "-DREPLEARN_VECTOR_BYTES=32"],
    "baseline": ["-DREPLEARN_VECTOR_BYTES=16"],
}
# Of a user's, not taken: they hide a NaN, and with some compilers a library that has them makes all small numbers 0.
_WRONG_FLAGS = {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only"}
_SECONDS = 300  # a compiler takes at most


def why_none(name: str, dtype: torch.dtype) -> str | None:
    """Why the objective of this name has no passes for features of this dtype, or None. Compiles them if they are not
    known yet."""
    found = _found(name, dtype == torch.float64)
    return found if isinstance(found, str) else None


# The mark that torch.compiler.assume_constant_result leaves, which itself imports all of dynamo: 1.3 s.
why_none._dynamo_marked_constant = True


def number_of(name: str, dtype: torch.dtype) -> int:
    """By which the operators find the passes, of similarities of this dtype."""
    found = _found(name, dtype == torch.float64)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache
def _found(name: str, is_double: bool) -> int | str:
    """The number of the passes, or why there are none."""
    if not native.available():
        return native.why_missing()
    # In a thread of its own, where nobody traces: a program that is exported must not hold the path of a library.
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(_loaded, OBJECTIVES[name].definition, is_double).result()


def _loaded(definition: Definition, is_double: bool) -> int | str:
    try:
        library = _library(definition, is_double)
        try:
            return torch.ops.replearn_kernels.load_declared_passes(str(library), is_double)
        except RuntimeError:
            library.unlink(missing_ok=True)  # whatever the compiler wrote there, the next process tries again
            raise
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return f"the C++ of {definition.cls.__name__} could not be compiled: {error}"


def _library(definition: Definition, is_double: bool) -> Path:
    compiler, headers, source = _compiler(), _headers(), source_of(definition)
    flags = [*_FLAGS, *_INSTRUCTIONS[torch.ops.replearn_kernels.instruction_set()]]
    flags.append(f"-DREPLEARN_TYPE={'double' if is_double else 'float'}")
    texts = (Path(headers, name).read_text(encoding="utf-8") for name in _HEADERS)
    _, text = source.split("\n", 1)  # without the name, which tells of the author's other formulas too
    contents = [text, *texts, *flags, *compiler, _version(compiler)]
    folder, name = _folder(), f"{definition.cls.__name__}-{'fp64' if is_double else 'fp32'}"
    name += f"-{_digest(chr(0).join(contents).encode())}"
    for known in sorted(folder.glob(f"{name}-*.so")):
        if known.stem == f"{name}-{_digest(known.read_bytes())}":  # whole: a part of a library ends the process
            return known
    with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as place:
        file, result = Path(place, "loss.cpp"), Path(place, "loss.so")
        file.write_text(source, encoding="utf-8")
        _run([*compiler, *flags, "-I", headers, str(file), "-o", str(result)])
        if not result.is_file():
            raise RuntimeError(f"{shlex.join(compiler)} wrote no library, and said that all went well")
        library = folder / f"{name}-{_digest(result.read_bytes())}.so"
        os.replace(result, library)
    return library


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:24]


def _run(command: list[str]) -> str:
    """Run the command and return what it printed.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", timeout=_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed ({done.returncode}): {done.stdout[-2000:]}")
    return done.stdout


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).partition("\n")[0]


def _compiler() -> tuple[str, ...]:
    """The command, as REPLEARN_KERNELS_CXX or CXX have it with its first flags."""
    wanted = os.environ.get("REPLEARN_KERNELS_CXX", "").strip() or os.environ.get("CXX", "").strip()
    if wanted == "none":
        raise RuntimeError("REPLEARN_KERNELS_CXX is none")
    if wanted:
        command = [part for part in shlex.split(wanted) if part not in _WRONG_FLAGS]
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"there is no {command[0]}, which REPLEARN_KERNELS_CXX or CXX asks for")
        return tuple(command)
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise RuntimeError("there is no C++ compiler: none of c++, g++ and clang++ is on the path")
    return (found,)


def _headers() -> str:
    """The folder of the passes' sources: a wheel has a copy of it, a checkout the folder itself."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc" / "cpu"):
        if all((folder / name).is_file() for name in _HEADERS):
            return str(folder)
    raise RuntimeError(f"{_PACKAGE} was installed without the sources of its passes")


def _folder() -> Path:
    """Where libraries are kept, which nobody else may write to: what is in it runs as the user."""
    try:
        given, home = os.environ.get("REPLEARN_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
        caches = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
        folder = Path(given).expanduser() if given else caches / "replearn_kernels"
        if not folder.is_absolute():
            raise OSError(f"{folder} is no absolute path")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise OSError(f"{folder} belongs to another user, or others may write to it (`chmod 700` helps)")
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # of no home, too
        raise RuntimeError(f"{error}; set REPLEARN_KERNELS_CACHE to a folder of yours") from None
