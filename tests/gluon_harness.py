"""The kernels in Gluon, and their launchers, as gluon_interpreter.py runs them on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from gluon_interpreter import load_module

import replearn_kernels.triton_kernels as triton_kernels
from replearn_kernels.triton_kernels.hopper import launch

PACKAGE = f"{triton_kernels.__name__}.hopper"
FOLDER = Path(launch.__file__).parent
FILES = ("ring", "sums", "weights", "gradients", "launch")
LAUNCHERS = {name: getattr(launch, name) for name in ("launch_sums", "launch_weights", "launch_gradient")}


def interpreted(replace: Sequence[tuple[str, str, str]] = ()) -> ModuleType:
    """launch.py over interpreted kernels. ``replace``: (file, old, new) of their sources: mutations."""
    modules: dict[str, ModuleType] = {}
    for name in FILES:
        changes = [(old, new) for file, old, new in replace if file == name]
        path = FOLDER / f"{name}.py"
        modules[f"{PACKAGE}.{name}"] = load_module(path, changes, modules, package=PACKAGE)
    return modules[f"{PACKAGE}.launch"]


def unwritten_is_nan() -> AbstractContextManager:
    """Tables of launchers begin as NaN: what nobody writes is seen."""
    return mock.patch.object(torch.Tensor, "new_empty", lambda self, *size: self.new_full(size, torch.nan))


def interpreted_launchers(replace: Sequence[tuple[str, str, str]] = ()) -> dict[str, Callable]:
    module = interpreted(replace)
    return {name: getattr(module, name) for name in LAUNCHERS}
