"""The end of a step: sums of products become gradients, in the features' dtype, and the scale's gradient is read off.

    gradient of a row   (factor * scale) * sums                     or, of a row that was normalised on the fly,
                        (factor * scale / |x|) * (sums - u <u, sums>),  u = x / |x|
    the scale's         factor * sum_i <x_i, sums_i>                of one side; of normalised rows, with u

One launch for all, where PyTorch's kernels take two a side and some seven for the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, next_power_of_2
from .launching import run_kernel
from .tiles import scalar

_ELEMENTS = 4096  # of a program: 32 a thread
_FOLDED = tl.constexpr(1024)  # partial sums that are loaded at once


class Side(NamedTuple):
    """The rows of the queries, or of one source."""

    sums: Tensor  # [rows, d], contiguous, of the statistics' dtype
    out: Tensor | None  # [rows, d], contiguous; None: no gradient is due, only the scale's
    features: Tensor | None  # [rows, d], where the scale's gradient is read off them or they were normalised
    stride: int
    inverse_norms: Tensor | None  # [rows]
    rows: int

    @classmethod
    def of(cls, sums, out=None, features=None, inverse_norms=None) -> Side:
        return cls(sums, out, features, 0 if features is None else features.stride(0), inverse_norms, sums.shape[0])


@triton.jit
def finish_side(
    side, block, factor, scale, partials, place, d, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One block of rows, and its part of the scale's gradient into ``partials[place]``."""
    row, k = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside = (row < side.rows)[:, None] & (k < d)[None, :]
    entry = row.to(tl.int64)[:, None] * d + k[None, :]
    sums = tl.load(side.sums + entry, mask=inside, other=0.0)
    if side.features is not None:
        x = tl.load(side.features + row.to(tl.int64)[:, None] * side.stride + k[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        if side.inverse_norms is not None:
            inverse = tl.load(side.inverse_norms + row, mask=row < side.rows, other=0.0)
            x = x * inverse[:, None]
        along = tl.sum(x * sums, 1)
        if partials is not None:
            tl.store(partials + place, tl.sum(along.to(tl.float64), 0))
        if side.inverse_norms is not None:
            along = tl.where((inverse > 0) & (inverse < WHOLE), along, 0.0)
            sums = (sums - x * along[:, None]) * inverse[:, None]
    if side.out is not None:
        sums = sums * (factor * tl.load(scale).to(tl.float32))
        tl.store(side.out + entry, sums.to(side.out.dtype.element_ty), mask=inside)


@triton.jit
def outputs_kernel(
    first, second, third,  # Side, or None. Not asked which: of a tuple that has a None in it, Triton 3.6 cannot say
    number, one, another,  # whose product is the factor: a float, and 0-d tensors or None
    scale,  # 0-d
    partials,  # [count] fp64: of the blocks of sides with features; None: the scale gets no gradient
    counter,  # how many of them are there: 0 before, and 0 again after
    scale_gradient,  # 0-d
    weight_sum, bias_gradient,  # 0-d, or None
    count, halves, d,
    SIDES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of rows of one side. Who comes last adds up the scale's gradient, in the blocks' order."""
    block, factor = tl.program_id(0), number
    if one is not None:
        factor = factor * tl.load(one).to(tl.float32)
    if another is not None:
        factor = factor * tl.load(another).to(tl.float32)
    if bias_gradient is not None:
        if block == 0:
            gradient = tl.load(weight_sum) * factor
            tl.store(bias_gradient, gradient.to(bias_gradient.dtype.element_ty))
    before = tl.cdiv(first.rows, BLOCK_M)
    if SIDES == 1:
        finish_side(first, block, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
    elif SIDES == 2:
        if block < before:
            finish_side(first, block, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
        else:
            finish_side(second, block - before, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
    else:
        middle = before + tl.cdiv(second.rows, BLOCK_M)
        if block < before:
            finish_side(first, block, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
        elif block < middle:
            finish_side(second, block - before, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
        else:
            finish_side(third, block - middle, factor, scale, partials, block, d, WHOLE, BLOCK_M, BLOCK_K)
    if partials is not None:
        # A program's first thread has stored the part, and counts it: what it wrote before is seen by who counts later.
        if block < count:
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
                total = tl.zeros([_FOLDED], tl.float64)
                for start in range(0, count, _FOLDED):
                    place = start + tl.arange(0, _FOLDED)
                    total += tl.load(partials + place, mask=place < count, other=0.0, cache_modifier=".cg")
                gradient = tl.sum(total, 0) * factor / halves
                tl.store(scale_gradient, gradient.to(scale_gradient.dtype.element_ty))
                tl.store(counter, 0)


def finish_gradients(
    sides: Sequence[Side],  # three at most; where the scale gets a gradient, those with features come first
    scale: Tensor | float,  # 0-d
    factors: Sequence[Tensor | float],  # of which two at most are (0-d) tensors
    scale_gradient: Tensor | None = None,  # 0-d
    weight_sum: Tensor | None = None,  # 0-d, fp64
    bias_gradient: Tensor | None = None,  # 0-d
    halves: int = 1,  # 2: every pair is counted twice in <x, sums>
    counter: Tensor | None = None,  # one element, int32 or of its size, 0; default: a new one
) -> None:
    """Write the gradients of the sides, the scale's, and the bias's: ``weight_sum`` times the factors."""
    d = sides[0].sums.shape[1] if sides else 0
    block_k = max(next_power_of_2(d), 16)
    block_m = max(_ELEMENTS // block_k, 1)
    blocks = [cdiv(side.rows, block_m) for side in sides]
    count = 0
    if scale_gradient is not None:
        count = sum(number for number, side in zip(blocks, sides) if side.features is not None)
    if scale_gradient is not None and not count:
        scale_gradient.zero_()
    if not sum(blocks):
        if bias_gradient is not None:
            bias_gradient.copy_(weight_sum * math.prod(factors))
        return
    partials = None
    if count:
        partials = sides[0].sums.new_empty(count, dtype=torch.float64)
        counter = sides[0].sums.new_zeros(1) if counter is None else counter
        counter = counter.view(torch.int32)
    first, second, third = [*sides, None, None][:3]
    tensors = [factor for factor in factors if isinstance(factor, Tensor)]
    number = math.prod(factor for factor in factors if not isinstance(factor, Tensor))
    one, another = [*tensors, None, None][:2]
    run_kernel(
        outputs_kernel, (sum(blocks),),
        first, second, third, float(number), one, another, scalar(scale), partials, counter,
        scale_gradient, weight_sum, bias_gradient, count, halves, d,
        SIDES=len(sides), WHOLE=torch.finfo(torch.float32).tiny ** -0.5, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
