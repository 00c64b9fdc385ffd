"""The native mining operators under AddressSanitizer and UndefinedBehaviorSanitizer, on random problems."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from replearn_kernels.engine.backends import native

ROOT = Path(__file__).parents[1]
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SECONDS = 5


def sanitizer(compiler: str, name: str) -> str:
    """The path of a sanitizer's library; skips where there is none."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of sanitizers: Linux")
def test_random_problems_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not native.available():
        pytest.skip(native.why_missing() or "no g++")
    preload = " ".join(sanitizer(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so"))
    library = tmp_path / "_native_sanitized.so"
    # Only what mining needs, at -O1, which keeps the build short; ops.cpp names the rest of the operators.
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")) + [str(ROOT / "csrc" / "ops.cpp")]
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = [
        compiler, "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-w", "-Wno-psabi", *FLAGS,
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths()),
        *sources, f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-o", str(library),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    fuzz = [sys.executable, str(ROOT / "tests" / "fuzz_native.py"), str(library), str(SECONDS)]
    done = subprocess.run(fuzz, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "random problems" in done.stdout
