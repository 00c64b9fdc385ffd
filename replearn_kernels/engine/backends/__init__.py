"""Backends by name, and the choice among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

from .. import native
from ..validation import check_backend_name
from .base import Backend
from .dense import CppBackend, TorchBackend

BACKENDS: dict[str, type[Backend]] = {"torch": TorchBackend, "cpp": CppBackend}


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, why_no_passes: Callable[[], str | None] | None = None
) -> str:
    """The backend that ``name`` stands for on these inputs.

    "auto" takes ``triton`` on a GPU and ``cpp`` on a CPU where they are installed, and ``torch`` elsewhere.
    A backend asked for by name is never replaced by another. ``why_no_passes``: of a loss whose passes in C++ are no
    part of the library, asks why there are none; without them it takes ``torch`` on a CPU.

    Raises:
        ValueError: the name is unknown, or the backend cannot run this loss, or on this device or dtype.
        RuntimeError: the backend is not available in this installation.
    """
    check_backend_name(name)
    if name == "auto":
        if device.type == "cpu":
            if not native.available():
                return warn_without_native()
            if why_no_passes is None:
                return "cpp"
            if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
                return "torch"  # where the program will run there may be no compiler
            missing = why_no_passes()
            return "cpp" if missing is None else warn_without_passes(missing)
        return "triton" if why_no_triton(device, dtype) is None else "torch"
    if name == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend='cpp' runs on CPU tensors, got tensors on {device}")
        if not native.available():
            raise RuntimeError(f"backend='cpp' is not available: {native.why_missing()}")
        if why_no_passes is not None and (missing := why_no_passes()) is not None:
            raise RuntimeError(f"backend='cpp' is not available: {missing}")
    if name == "triton" and (problem := why_no_triton(device, dtype)) is not None:
        raise problem
    return name


def make_backend(name: str, objective) -> Backend:
    """A fresh backend (they hold a tile buffer) for one run of ``objective``."""
    return backend_class(name)(objective)


def backend_class(name: str) -> type[Backend]:
    if name == "triton":
        from .triton import TritonBackend

        return TritonBackend
    return BACKENDS[name]


@cache
def warn_without_native() -> str:
    warnings.warn(
        f"the C++ kernels of replearn_kernels are not available ({native.why_missing()}); "
        "CPU losses use the slower 'torch' backend.",
        stacklevel=4,
    )
    return "torch"


@cache
def warn_without_passes(missing: str) -> str:
    """Once for each reason."""
    warnings.warn(f"{missing}; on a CPU the slower 'torch' backend takes its place.", stacklevel=4)
    return "torch"


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; torch.compile cannot trace the question."""
    import triton

    return triton.knobs.runtime.interpret


# The mark that torch.compiler.assume_constant_result leaves, which itself imports all of dynamo: 1.3 s.
_interpreted._dynamo_marked_constant = True


def why_no_triton(device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why Triton kernels cannot run on these inputs, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return RuntimeError(f"backend='triton' needs the triton package (>= 3.6): {error}")
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return RuntimeError(
            f"backend='triton' needs tensors on a GPU, got tensors on {device} "
            "(or TRITON_INTERPRET=1 in the environment, to run the kernels in Triton's interpreter)"
        )
    if dtype == torch.float64:
        return ValueError("backend='triton' takes fp16, bf16 and fp32 features, got torch.float64; use 'torch'")
    return None
