"""Losses over a process group whose pairs do not meet block by block: every rank gathers the rows of all.

Each rank does the whole batch's work, in O(global N d) memory, and takes the losses of its own rows. Value and
gradients follow the convention of :mod:`..engine.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.problem import Inputs
from ..engine.shards import meet
from ..engine.world import World
from ..objectives import Objective

RowLosses = Callable[[Inputs], tuple[Tensor, Tensor]]


def gathered_loss(
    world: World, inputs: Inputs, objective: Objective, alike: dict, reduction: str, row_losses: RowLosses
) -> Tensor:
    """The loss of the own rows in the batch of all ranks.

    Args:
        alike: options that must be the same on every rank.
        row_losses: of a batch, the loss of every row, ``[N]``, and what the mean is over, a 0-d tensor.
    """
    needs_grad = torch.is_grad_enabled() and inputs.query.requires_grad
    layout = meet(world, inputs, objective, {"reduction": reduction, "requires_grad": needs_grad, **alike}, "gather")
    rows = _GatherRows.apply(inputs.query, world, layout.rows)
    labels = torch.cat(world.gather(inputs.row_group, layout.rows))
    losses, counted = row_losses(inputs._replace(query=rows, row_group=labels))
    own = losses[sum(layout.rows[: world.rank]) :][: layout.rows[world.rank]]
    if reduction == "none":
        return own
    if reduction == "sum":
        return own.sum()
    return own.sum() * (world.size / counted.to(own.dtype).clamp(min=1))


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in their order; the gradient of a rank's rows is the sum over what all ranks made of them."""

    @staticmethod
    def forward(ctx, rows: Tensor, world: World, counts: list[int]) -> Tensor:
        ctx.world, ctx.counts = world, counts
        own = rows.contiguous()
        parts = [own if rank == world.rank else own.new_empty(count, own.shape[1]) for rank, count in enumerate(counts)]
        others = [rank for rank in range(world.size) if rank != world.rank]
        world.exchange([(rank, own) for rank in others], [(rank, parts[rank]) for rank in others])
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        world = ctx.world
        shares = [share.contiguous() for share in gradient.split(ctx.counts)]
        arriving = [torch.empty_like(shares[world.rank]) for _ in ctx.counts]
        arriving[world.rank] = shares[world.rank]
        others = [rank for rank in range(world.size) if rank != world.rank]
        world.exchange([(rank, shares[rank]) for rank in others], [(rank, arriving[rank]) for rank in others])
        wide = torch.promote_types(gradient.dtype, torch.float32)  # half-precision shares add up in fp32
        return sum(share.to(wide) for share in arriving).to(gradient.dtype), None, None
