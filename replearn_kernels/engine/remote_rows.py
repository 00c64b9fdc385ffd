"""Single rows of other ranks, asked for by their number in the batch of all ranks, and their gradients sent back."""

from __future__ import annotations

import torch
from torch import Tensor

from .counters import count_workspace
from .listed_pairs import add_rows_
from .operators import differentiable_once
from .world import World


def fetch_rows(rows: Tensor, world: World, counts: list[int], index: Tensor) -> Tensor:
    """``[M, d]``: the rows of all ranks at ``index[M]``, of which this one has ``rows[N_r, d]``; differentiable.

    ``counts``: the rows of every rank.

    All ranks must call it, and backward. What goes from rank to rank are numbers, rows and gradients of rows: for even
    shards about 2 (R - 1) / R M d numbers are sent. A row's gradients are added in the order of the ranks, in fp32.
    """
    return _FetchRows.apply(rows, world, counts, index)


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, world: World, counts: list[int], index: Tensor) -> Tensor:
        ctx.route = route = _Route(world, counts, index)
        ctx.count = len(rows)
        given = [rows[place] for place in route.given]
        found = world.swap(given, route.asked)
        asked = torch.cat(found)[route.places]
        count_workspace(*given, *found, asked)
        return asked

    @staticmethod
    def backward(ctx, gradient: Tensor):
        with torch.no_grad():
            total = _FetchRows._sent_back(ctx, gradient)
        return *differentiable_once([gradient], [total]), None, None, None

    @staticmethod
    def _sent_back(ctx, gradient: Tensor) -> Tensor:
        route = ctx.route
        asked = [part.contiguous() for part in gradient[route.order].split(route.asked)]
        arriving = route.world.swap(asked, [len(place) for place in route.given])
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(ctx.count, gradient.shape[1], dtype=wide)
        for place, part in zip(route.given, arriving):
            add_rows_(total, place, part.to(wide))
        return total.to(gradient.dtype)


class _Route:
    """Who asked whom for what.

    order: the asked numbers' places, by owner        asked: how many were asked of each rank
    places: the inverse of ``order``                  given: the own rows that each rank asked for
    """

    def __init__(self, world: World, counts: list[int], index: Tensor):
        self.world, size = world, world.size
        ends = torch.tensor(counts, device=index.device).cumsum(0)
        owner = torch.searchsorted(ends, index, right=True)
        self.order = owner.argsort(stable=True)
        self.places = torch.empty_like(self.order)
        self.places[self.order] = torch.arange(len(index), device=index.device)
        by_owner = torch.bincount(owner, minlength=size)
        matrix = torch.stack(world.gather(by_owner, [size] * size)).tolist()  # [of rank][to rank]
        self.asked = matrix[world.rank]
        numbers = (index - (ends - ends.new_tensor(counts))[owner])[self.order].split(self.asked)
        self.given = world.swap(list(numbers), [row[world.rank] for row in matrix])
