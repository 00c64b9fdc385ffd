"""Single rows of other ranks, asked for by their number in the batch of all ranks, and their gradients sent back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .counters import count_workspace
from .listed_pairs import add_rows_
from .world import World


class Route:
    """The way of the rows of all ranks at ``index[M]`` to this one, and of their gradients back.

    All ranks make one, and call what it has. What goes from rank to rank are numbers, rows and gradients of rows: for
    even shards about (R - 1) / R M d numbers are sent either way. A row's gradients are added in the order of the
    ranks, in fp32 at least. ``counts``: the rows of every rank.

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


class RemotePairs:
    """Pairs of own rows with rows of any rank, whose rows are fetched some at a time, each once.

    All ranks make one, and iterate over it as often: they have the same number of parts.

    Args:
        own: of each pair the own row, ``[P]``.
        number: the other row's number in the batch of all ranks, ``[P]``.
        held: fetched rows at a time.
    """

    def __init__(self, world: World, counts: list[int], own: Tensor, number: Tensor, held: int):
        self.world, self._own, self.pairs = world, own, len(own)
        wanted, self._place = number.unique(return_inverse=True)
        parts = max(world.most(torch.tensor(-(-len(wanted) // max(held, 1)), device=own.device)), 1)
        self._ends = [len(wanted) * part // parts for part in range(parts + 1)]
        self._routes = [Route(world, counts, wanted[begin:end]) for begin, end in pairwise(self._ends)]

    def __len__(self) -> int:
        """The parts."""
        return len(self._routes)

    def __iter__(self) -> Iterator[tuple[Route, slice | Tensor, Tensor, Tensor]]:
        """Of each part: the route of its rows, which pairs are of it, their own rows, the others' places there."""
        if len(self) == 1:
            yield self._routes[0], slice(None), self._own, self._place
            return
        for route, (begin, end) in zip(self._routes, pairwise(self._ends)):
            (pairs,) = ((self._place >= begin) & (self._place < end)).nonzero(as_tuple=True)
            yield route, pairs, self._own[pairs], self._place[pairs] - begin
