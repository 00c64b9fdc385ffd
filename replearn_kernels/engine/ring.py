"""How blocks of keys meet the rows of other ranks: a ring, or all at once.

A block leaves home, is visited by the rows of other ranks, and what they add for its columns (statistics, gradients)
comes home. The order of those sums is fixed by the ranks, for block b ``((c_b+1 + c_b+2) + c_b+3) + ...``, and the
same for both strategies; timing has no part in it.

    ring     Each step, blocks move to the next rank. What is carried follows a step behind: a rank computes its own
             share while the others' arrives, so that block, share and product all overlap. Two blocks and three
             shares at a time: memory is O(local N x d).
    gather   All blocks at once, and all shares at once: two exchanges in all. Memory is O(global N x d).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .counters import count_workspace
from .world import World, wait


class Tour(ABC):
    """What travels, and what is done where it comes by. All tensors are contiguous."""

    block: list[Tensor]
    """The home block; it is only read."""

    @abstractmethod
    def new_block(self, rank: int) -> list[Tensor]:
        """Room for the block of ``rank``."""

    @abstractmethod
    def new_carried(self, rank: int) -> list[Tensor]:
        """Room for what is carried to ``rank``."""

    @abstractmethod
    def at_home(self) -> None:
        """The rows meet their own rank's block."""

    @abstractmethod
    def visit(self, rank: int, block: list[Tensor]) -> list[Tensor]:
        """The rows meet the block of ``rank``: what is to be carried there."""

    @abstractmethod
    def merge(self, carried: list[Tensor], other: list[Tensor]) -> None:
        """``carried += other``, in place."""

    def held(self) -> tuple[Tensor | None, ...]:
        """What the tour holds beside the tensors above, for the count of workspace."""
        return ()


def travel(tour: Tour, world: World, hops: int, strategy: str) -> list[Tensor]:
    """The block to the ``hops`` ranks that follow, and home what they add for it."""
    return (_ring if strategy == "ring" else _gather)(tour, world, hops)


def _ring(tour: Tour, world: World, hops: int) -> list[Tensor]:
    rank, size = world.rank, world.size
    following, previous = (rank + 1) % size, (rank - 1) % size
    block, carried = tour.block, []
    for step in range(hops + 1):
        visitor = (rank - step) % size
        incoming = tour.new_block((visitor - 1) % size) if step < hops else []
        arriving = tour.new_carried(visitor) if step >= 2 else []
        sent = (block if step < hops else []) + carried  # what was carried for the last visitor, which has moved on
        pending = world.start(_all(following, sent), _all(previous, incoming + arriving))
        fresh = tour.visit(visitor, block) if step else tour.at_home() or []
        wait(pending)
        count_workspace(*tour.held(), *(block if step else []), *incoming, *carried, *arriving, *fresh)
        if arriving:
            tour.merge(fresh, arriving)
        block, carried = incoming, fresh
    home = tour.new_carried(rank)
    world.exchange(_all((rank - hops) % size, carried), _all((rank + hops) % size, home))
    return home


def _gather(tour: Tour, world: World, hops: int) -> list[Tensor]:
    visitors = [(world.rank - step) % world.size for step in range(1, hops + 1)]
    visited = [(world.rank + step) % world.size for step in range(1, hops + 1)]
    blocks = [tour.new_block(rank) for rank in visitors]
    sends = [pair for rank in visited for pair in _all(rank, tour.block)]
    pending = world.start(sends, [pair for rank, block in zip(visitors, blocks) for pair in _all(rank, block)])
    tour.at_home()
    wait(pending)
    carried = [tour.visit(rank, block) for rank, block in zip(visitors, blocks)]
    shares = [tour.new_carried(world.rank) for _ in visited]
    count_workspace(*tour.held(), *(tensor for parts in (*blocks, *carried, *shares) for tensor in parts))
    sends = [pair for rank, parts in zip(visitors, carried) for pair in _all(rank, parts)]
    world.exchange(sends, [pair for rank, parts in zip(visited, shares) for pair in _all(rank, parts)])
    home, *others = shares
    for share in others:
        tour.merge(home, share)
    return home


def _all(rank: int, tensors: list[Tensor]) -> list[tuple[int, Tensor]]:
    return [(rank, tensor) for tensor in tensors]
