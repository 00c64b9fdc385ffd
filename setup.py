"""Builds the C++ kernels (LibTorch stable ABI: one library for every Python, torch >= 2.10) where a compiler is.

The CUDA kernels (csrc/cuda) join the same library if torch was built with CUDA and its nvcc is found: set CUDA_HOME if
nvcc is not on the path, TORCH_CUDA_ARCH_LIST="8.0 9.0" to choose GPUs other than those of this machine, and
REPLEARN_KERNELS_CUDA=0 to leave them out.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(str(path.relative_to(ROOT)) for kind in ("h", "inl", "cuh") for path in ROOT.glob(f"csrc/**/*.{kind}"))
# -fmad=false: the kernels say themselves where a multiplication and an addition are one operation.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def compiles(command: list[str], suffix: str, program: str) -> bool:
    """Whether a program can be compiled here at all. An error in our own sources still fails the build."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(program)
        try:
            command = [*command, str(source), "-o", str(Path(folder, "probe"))]
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def compiler_works() -> bool:
    """Whether there is a C++17 compiler."""
    compiler = os.environ.get("CXX", "c++")
    compiler = compiler if shutil.which(compiler.split()[0]) else "g++"
    program = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
    return compiles([*compiler.split(), "-std=c++17"], ".cpp", program)


def cuda_works() -> bool:
    """Whether this torch has CUDA, and there is an nvcc of the same major version."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("REPLEARN_KERNELS_CUDA", "1") == "0" or torch.version.cuda is None or CUDA_HOME is None:
        return False
    nvcc, major = str(Path(CUDA_HOME, "bin", "nvcc")), torch.version.cuda.split(".")[0]
    program = f"#include <optional>\n#if __CUDACC_VER_MAJOR__ != {major}\n#error version\n#endif\n"
    if compiles([nvcc, "-std=c++17", "-c"], ".cu", program):
        return True
    print(f"replearn_kernels: {nvcc} does not compile for CUDA {major}: no CUDA kernels", file=sys.stderr)
    return False


def extensions() -> dict:
    """The arguments of setup() that build ``replearn_kernels/_native``; none without a compiler."""
    if not compiler_works():
        print("replearn_kernels: no working C++ compiler: installing without the C++ kernels", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = cuda_works()
    cxx_flags = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    native = (CUDAExtension if cuda else CppExtension)(
        "replearn_kernels._native",
        SOURCES + CUDA_SOURCES * cuda,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), *[("USE_CUDA", None)] * cuda],
        extra_compile_args={"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
