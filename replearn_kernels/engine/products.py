"""Products of matrices in half precision, added up in fp32: one cuBLAS call on CUDA, where alone PyTorch offers it."""

from __future__ import annotations

import torch
from torch import Tensor


def addmm_(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """``accumulator += a @ b``, in the accumulator's dtype."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(a.to(accumulator.dtype), b.to(accumulator.dtype))


def mm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
