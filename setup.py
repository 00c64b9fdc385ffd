"""Builds the C++ kernels (LibTorch stable ABI: one library for every Python, torch >= 2.10) where a compiler is."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for kind in ("h", "inl") for path in ROOT.glob(f"csrc/**/*.{kind}"))


def compiler_works() -> bool:
    """Whether a C++17 program can be compiled here at all. An error in our own sources still fails the build."""
    compiler = os.environ.get("CXX", "c++")
    compiler = compiler if shutil.which(compiler.split()[0]) else "g++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        command = [*compiler.split(), "-std=c++17", str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def extensions() -> dict:
    """The arguments of setup() that build ``replearn_kernels/_native``; none without a compiler."""
    if not compiler_works():
        print("replearn_kernels: no working C++ compiler: installing without the C++ kernels", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    native = CppExtension(
        "replearn_kernels._native",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
