"""How the tests of the Triton kernels compare: shared by the files of each family.

An fp64 run of the eager formula on the same (rounded) inputs is the truth. The kernels may err as much as the eager
formula in the features' dtype, plus :func:`tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.interpreter import count_loops_with_new_numpy
from replearn_kernels.triton_kernels import sums
from replearn_kernels.triton_kernels.configs import Config

INTERPRETED = triton.knobs.runtime.interpret


count_loops_with_new_numpy()

interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in the environment when triton is imported"),
    # exp of a masked entry goes through -inf on purpose, never through NaN.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("error:invalid value encountered:RuntimeWarning"),
]
aot = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="compiles: TRITON_INTERPRET must not be set"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no TRITON_INTERPRET"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Blocks so small that a few dozen rows make several of them: row blocks, regions of two column blocks, steps over d.
SMALL_BLOCKS = Config(16, 16, 16, warps=4, stages=2, column_blocks=2)
ALL_OF_D = Config(16, 32, 0, warps=4, stages=2, column_blocks=2)  # the fused gradient kernel needs a row at once

Values = dict[str, torch.Tensor]
Loss = Callable[[Values, str], torch.Tensor]
"""A loss of tensors by name, on a backend."""


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """Relative to the norm: W is rounded once to half precision (2^-8 for bf16, 2^-11 for fp16; the interpreter does
    not round to nearest but towards zero, 2^-7). Similarities formed again in another order differ in their last bits,
    of a logit of up to ``scale``: a GPU adds in the same order in both sweeps, NumPy depends on the blocks."""
    w_rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}[dtype]
    return 1e-6 + w_rounding + 2 * abs(scale) * 2**-24


def evaluate(loss_fn: Loss, inputs: Values, backend: str, dtype: torch.dtype | None = None) -> Values:
    """The loss and every gradient, by name; with ``dtype``, of the floating-point inputs cast to it."""
    leaves = {
        name: (x.detach() if dtype is None or not x.is_floating_point() else x.detach().to(dtype)).requires_grad_(
            x.requires_grad
        )
        for name, x in inputs.items()
    }
    loss = loss_fn(leaves, backend)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    loss.backward(upstream)
    return {"loss": loss.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def relative_error(value: torch.Tensor, truth: torch.Tensor, size: float = 0.0) -> float:
    """The norm of the error over the norm of the truth, or over ``size`` if that is larger."""
    return ((value.double() - truth).norm() / max(truth.norm().item(), size, 1e-30)).item()


def check(loss_fn: Loss, inputs: Values, dtype: torch.dtype, scale: float, sizes_of: Callable) -> None:
    """``sizes_of(truth)``: by name, the size of the terms of a sum in which they cancel."""
    truth = evaluate(loss_fn, inputs, "eager", torch.float64)
    eager = evaluate(loss_fn, inputs, "eager")
    fused = evaluate(loss_fn, inputs, "triton")
    assert fused.keys() == truth.keys()
    sizes = sizes_of(truth)
    for name, expected in truth.items():
        assert fused[name].dtype == eager[name].dtype and fused[name].shape == expected.shape
        error, allowed = (relative_error(values[name], expected, sizes.get(name, 0.0)) for values in (fused, eager))
        assert error <= allowed + tolerance(dtype, scale), name


def blocks_for(d: int) -> Config:
    return ALL_OF_D if d <= 128 else SMALL_BLOCKS


def few_programs(monkeypatch) -> None:
    """The largest lengths by 2 programs, of which each visits many rows; the interpreter runs 256 one by one."""
    monkeypatch.setattr(sums, "_BOUND_PROGRAMS", 2)
