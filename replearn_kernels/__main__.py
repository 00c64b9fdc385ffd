"""``python -m replearn_kernels``: what a bug report needs to say about an installation."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator

import torch

from . import __version__
from .engine import native
from .engine.backends import resolve_backend, why_no_triton

_VARIABLES = (
    "REPLEARN_KERNELS_INSTRUCTION_SET", "REPLEARN_KERNELS_TUNE", "REPLEARN_KERNELS_REPLAY", "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)  # fmt: skip


def facts() -> Iterator[tuple[str, str]]:
    """Versions, backends and devices of this installation, by name."""
    yield "replearn_kernels", f"{__version__}, {os.path.dirname(os.path.abspath(__file__))}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads"
    yield "triton", _triton_version()
    yield "GPU", ", ".join(_gpus()) or "none"
    yield "backend cpp", native.why_missing() or f"available, {torch.ops.replearn_kernels.instruction_set()}"
    yield "backend triton", _on_gpu(why_no_triton(torch.device("cuda"), torch.float32))
    yield "backend torch", "available"
    without = native.why_not_on_cuda()
    yield "mine_triplets on a GPU", "CUDA kernels" if without is None else f"torch: {without}"
    for where, device in (("CPU", "cpu"), ("GPU", "cuda")):
        yield f'"auto" takes, for {where} tensors', _automatic(torch.device(device))
    for name in _VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _triton_version() -> str:
    try:
        import triton
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    return triton.__version__


def _gpus() -> Iterator[str]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _on_gpu(problem: Exception | None) -> str:
    if problem is not None:
        return f"missing: {problem}"
    return "available" if torch.cuda.is_available() else "available, but no GPU is visible"


def _automatic(device: torch.device) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the C++ kernels are missing is said above
        single, double = (resolve_backend("auto", device, dtype) for dtype in (torch.float32, torch.float64))
    return f"{single} (fp64: {double})"


def main() -> None:
    for name, fact in facts():
        print(f"{name}: {fact}")


if __name__ == "__main__":
    main()
