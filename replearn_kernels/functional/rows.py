"""The rows that a loss compares: one view after the other, of unit length where asked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..engine import workspace
from ..engine.columns import blocks
from ..engine.operators import needs_dispatcher
from ..engine.problem import statistics_dtype

_BLOCK_ELEMENTS = 2**18  # 1 MiB: what a block is read for a second time comes from a core's cache


def stacked(*views: Tensor) -> Tensor:
    """Their rows in one tensor, as of torch.cat."""
    if len(views) == 1:
        return views[0]
    return _Rows.apply(False, *views) if _in_held_memory(views) else torch.cat(views)


def unit_rows(*views: Tensor) -> Tensor:
    """F.normalize of all their rows, in fp32 (fp64), where a norm does not overflow; a row of zeros has the gradient 0.

    F.normalize divides such a row by 1e-12: in fp16 0 / 0, and elsewhere a gradient 1e12 times the others. Rows are
    normalised as far as their squares are in range: in fp32 from 1e-19 to 1e19.
    """
    return _Rows.apply(True, *views) if _in_held_memory(views) else _unit_rows(views)


def _unit_rows(views: tuple[Tensor, ...]) -> Tensor:
    features = views[0] if len(views) == 1 else torch.cat(views)
    rows = features.to(statistics_dtype(features.dtype))
    return (rows / _lengths(rows)).to(features.dtype)


def _lengths(rows: Tensor) -> Tensor:
    """Divided by infinity, a row of zeros and its derivatives become 0 without another pass over all rows."""
    squares = rows.square().sum(-1, keepdim=True)  # no vecdot: autocast would round it
    return torch.where(squares == 0, torch.inf, squares.clamp(min=torch.finfo(rows.dtype).tiny)).sqrt()


def _in_held_memory(views: tuple[Tensor, ...]) -> bool:
    """Whether :class:`_Rows` can take them, and gains by it: 256 x 512 take it 0.05 ms longer than the formula."""
    if not views[0].is_cpu or needs_dispatcher(*views) or sum(view.numel() for view in views) <= _BLOCK_ELEMENTS:
        return False
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


class _Rows(torch.autograd.Function):
    """The same in held memory, and with no other tensor of all rows.

    Of 8192 x 512: forward and backward 10 ms in place of 25; stacking views takes 3 ms in place of 14 to 30, most of
    which the system spends on mapping new memory.
    """

    @staticmethod
    def forward(ctx, normalize, *views):
        first = views[0]
        shape = sum(len(view) for view in views), *first.shape[1:]
        rows = workspace.rows.take(torch.Size(shape).numel(), first.dtype).view(shape)
        ctx.normalize, ctx.sizes = normalize, [len(view) for view in views]
        if not normalize:
            return torch.cat(views, out=rows)
        dtype = statistics_dtype(first.dtype)
        for view, of_view in zip(views, rows.split(ctx.sizes)):
            for block in _blocks(view):
                wide = view[block].to(dtype)
                torch.div(wide, _lengths(wide), out=of_view[block])
        ctx.save_for_backward(*views)
        return rows

    @staticmethod
    def backward(ctx, grad):
        parts = grad.split(ctx.sizes)
        if not ctx.normalize:
            return None, *parts
        views = ctx.saved_tensors
        gradient_of = _differentiable_gradient if torch.is_grad_enabled() else _gradient
        of_views = zip(views, parts, ctx.needs_input_grad[1:])
        return None, *(gradient_of(view, part) if needs else None for view, part, needs in of_views)


def _gradient(view: Tensor, grad: Tensor) -> Tensor:
    """``(g - u <u, g>) / |x|`` for the rows ``u = x / |x|``; without the second term where |x| was raised."""
    dtype = statistics_dtype(view.dtype)
    least = torch.finfo(dtype).tiny ** 0.5
    result = torch.empty(view.shape, dtype=view.dtype)
    for block in _blocks(view):
        x, g = view[block].to(dtype), grad[block].to(dtype)
        lengths = _lengths(x)
        unit = x / lengths
        along = (unit * g).sum(-1, keepdim=True).masked_fill_(lengths <= least, 0)
        torch.div(torch.addcmul(g, unit, along, value=-1), lengths, out=result[block])
    return result


def _differentiable_gradient(view: Tensor, grad: Tensor) -> Tensor:
    """Under create_graph=True."""
    (gradient,) = torch.autograd.grad(_unit_rows((view,)), view, grad, create_graph=True)
    return gradient


def _blocks(view: Tensor) -> Iterator[slice]:
    elements = view[:1].numel()
    return blocks(len(view), max(_BLOCK_ELEMENTS // max(elements, 1), 1))
