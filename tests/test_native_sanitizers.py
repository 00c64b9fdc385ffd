"""The native operators of mining and retrieval under sanitizers of addresses and undefined behaviour."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from replearn_kernels.engine import native

ROOT = Path(__file__).parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SECONDS = 5


def sanitizer(compiler: str, name: str) -> str:
    """The path of a sanitizer's library; skips where there is none."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return found


def build(compiler: str, folder: Path, library: Path) -> None:
    """The whole library with sanitizers, two files at a time: most of this test's time, at -O1 2.5 times as much."""
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-w", *SANITIZE, "-DTORCH_TARGET_VERSION=0x020a000000000000"]

    def compile(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run([compiler, *flags, *includes, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) + [ROOT / "csrc" / "ops.cpp"]))
    torch_libraries = Path(torch.__file__).parent / "lib"
    run([compiler, "-shared", *SANITIZE, *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-o", str(library)])


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of sanitizers: Linux")
def test_random_problems_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not native.available():
        pytest.skip(native.why_missing() or "no g++")
    preload = " ".join(sanitizer(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    library = tmp_path / "_native_sanitized.so"
    build(compiler, tmp_path, library)
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    fuzz = [sys.executable, str(ROOT / "tests" / "fuzz_native.py"), str(library), str(SECONDS)]
    assert "random problems" in run(fuzz, env=environment)
