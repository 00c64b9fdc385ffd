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
        ctx.route = Route(world, counts, index)
        return ctx.route.fetch(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        with torch.no_grad():
            total = ctx.route.send_back(gradient)
        return *differentiable_once([gradient], [total]), None, None, None


class Route:
    """Who asked whom for what: the way of rows, and back of their gradients, of :func:`fetch_rows`.

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
        self.count = counts[world.rank]

    def fetch(self, rows: Tensor) -> Tensor:
        """``[M, d]``, of the own ``rows[N_r, d]`` and those of other ranks."""
        given = [rows[place] for place in self.given]
        found = self.world.swap(given, self.asked)
        asked = torch.cat(found)[self.places]
        count_workspace(*given, *found, asked)
        return asked

    def send_back(self, gradient: Tensor) -> Tensor:
        """``[N_r, d]``: what all ranks, this one with ``gradient[M, d]``, made of the own rows."""
        asked = [part.contiguous() for part in gradient[self.order].split(self.asked)]
        arriving = self.world.swap(asked, [len(place) for place in self.given])
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(self.count, gradient.shape[1], dtype=wide)
        for place, part in zip(self.given, arriving):
            add_rows_(total, place, part.to(wide))
        return total.to(gradient.dtype)
