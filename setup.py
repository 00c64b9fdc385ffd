"""Builds the C++ kernels, with LibTorch's stable ABI: each library is one file for every Python and torch >= 2.10.

``replearn_kernels/_native`` has the CPU kernels, where a C++ compiler works; ``replearn_kernels/_native_cuda`` those of
csrc/cuda, where torch was built with CUDA and an nvcc works too. That is a library of its own, so that the CPU kernels
are built and loaded without it. What works is found out by building and linking a few lines as the library would be.

CUDA_HOME                where nvcc is, if it is not on the path
TORCH_CUDA_ARCH_LIST     the GPUs to compile for, as in "8.0 9.0+PTX"; see architectures() for what is taken otherwise
REPLEARN_KERNELS_CUDA    0 leaves the CUDA kernels out, 1 makes it an error where they cannot be built
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(str(path.relative_to(ROOT)) for kind in ("h", "inl", "cuh") for path in ROOT.glob(f"csrc/**/*.{kind}"))
# Without debug information, which Python's own flags ask for (-g): 12.1 MB became 1.2.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
# -fmad=false: the kernels say themselves where a multiplication and an addition are one operation.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]
# Without the names that no other library needs; Apple's linker has no such option.
LINK_FLAGS = [] if sys.platform == "darwin" else ["-Wl,-s"]

CPP_PROBE = "#include <torch/csrc/stable/tensor.h>\n"
CUDA_PROBE = """#include <cuda_runtime.h>
__global__ void probe(int* x) { *x = 1; }
void run() { probe<<<1, 1>>>(nullptr); }
"""

SHIPPED = ((8, 0), (9, 0), (10, 0))  # the generations that the kernels are compiled for in the tests
NEEDS_NO_TORCH = {"egg_info", "sdist"}  # commands: an sdist is the same wherever it is made


def say(text: str) -> None:
    print(f"replearn-kernels: {text}", file=sys.stderr)


def check_tools() -> None:
    """Exit with what to do where setuptools or torch is missing or too old: their own errors do not tell."""
    found = setuptools.__version__
    if int(found.split(".")[0]) < 77:
        sys.exit(f"replearn-kernels needs setuptools >= 77, found {found}: pip install --upgrade setuptools")
    if NEEDS_NO_TORCH & set(sys.argv):
        return
    advice = (
        "It is built with the torch that it will run with: install that first (https://pytorch.org has the command), "
        "then `pip install --no-build-isolation ...`, as README.md says."
    )
    try:
        import torch
    except ImportError as error:
        sys.exit(f"replearn-kernels needs torch >= 2.10 ({error}). {advice}")
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 10):
        sys.exit(f"replearn-kernels needs torch >= 2.10, found {torch.__version__}. {advice}")


def cpp_extension(sources: list[str], name: str = "replearn_kernels._native"):
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(name, sources, **_options({"cxx": CXX_FLAGS}, []))


def cuda_extension(sources: list[str], name: str = "replearn_kernels._native_cuda"):
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(name, sources, **_options({"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}, [("USE_CUDA", None)]))


def _options(flags: dict[str, list[str]], macros: list[tuple]) -> dict:
    return {
        "depends": HEADERS,
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000"), *macros],
        "extra_compile_args": flags,
        "extra_link_args": LINK_FLAGS,
        "py_limited_api": True,
    }


def why_not_built(make_extension: Callable, suffix: str, program: str) -> str | None:
    """Why a library of a few lines cannot be compiled and linked here, if so."""
    from torch.utils.cpp_extension import BuildExtension

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(program)
        try:
            extension = make_extension([str(source)], name="probe")
            command = BuildExtension(setuptools.Distribution({"ext_modules": [extension]}))
            command.build_lib = command.build_temp = folder
            command.ensure_finalized()
            command.run()
        except Exception as error:  # whatever torch, setuptools, ninja, compiler or linker have to say
            return f"{type(error).__name__}: {error}"
    return None


def nvcc_architectures(nvcc: str) -> list[tuple[int, int]]:
    """The GPUs that this nvcc compiles for, as compute capabilities; none if it does not run."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return sorted((int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed))


def architectures(supported: Iterable[tuple[int, int]], visible: Iterable[tuple[int, int]]) -> str:
    """What TORCH_CUDA_ARCH_LIST is where the user did not say: 8.0, 9.0 and 10.0 and the GPUs of this machine, as far
    as nvcc knows them, with PTX of the last for all that come later. torch itself takes the GPUs of this machine alone,
    and fails where there are none, as in `docker build` or on a login node.
    """
    chosen = sorted({*SHIPPED, *visible} & set(supported))
    return ";".join(f"{major}.{minor}" for major, minor in chosen) + "+PTX"


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not built here, if so. Chooses the GPUs to compile for if they are."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("REPLEARN_KERNELS_CUDA", "")
    if wanted == "0":
        return "REPLEARN_KERNELS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no nvcc was found: set CUDA_HOME"
    nvcc = str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
    supported = nvcc_architectures(nvcc)
    if not supported:
        return f"{nvcc} does not run"
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        visible = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(supported, visible)
    problem = why_not_built(cuda_extension, ".cu", CUDA_PROBE)
    return problem and f"{nvcc} and torch {torch.__version__} do not build a library together: {problem}"


def extensions() -> list:
    """The libraries that can be built here."""
    needs_cuda = os.environ.get("REPLEARN_KERNELS_CUDA") == "1"
    if problem := why_not_built(cpp_extension, ".cpp", CPP_PROBE):
        if needs_cuda:
            sys.exit(f"replearn-kernels: REPLEARN_KERNELS_CUDA=1, but there is no working C++ compiler: {problem}")
        say(f"no working C++ compiler, installing without the C++ kernels ({problem})")
        return []
    found = [cpp_extension(SOURCES)]
    if problem := why_no_cuda():
        if needs_cuda:
            sys.exit(f"replearn-kernels: REPLEARN_KERNELS_CUDA=1, but no CUDA kernels can be built: {problem}")
        say(f"no CUDA kernels: {problem}")
        return found
    say(f"CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    return [*found, cuda_extension(CUDA_SOURCES)]


def build_command() -> type:
    from torch import __version__ as torch_version
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Keeps its objects, an editable install's too: what did not change is not compiled again."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / f"native-torch-{torch_version}")

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception:
                if extension.name.endswith("_cuda"):
                    say("the CUDA kernels do not compile, see above; REPLEARN_KERNELS_CUDA=0 installs without them")
                raise

    return Build


def arguments() -> dict:
    """Those of setup()."""
    check_tools()
    if NEEDS_NO_TORCH & set(sys.argv) or not (found := extensions()):
        return {}
    return {
        "ext_modules": found,
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setuptools.setup(**arguments())
