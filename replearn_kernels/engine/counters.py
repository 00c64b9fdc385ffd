"""Counted work: what the schedules did, in the units of the documentation (docs/design.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Work:
    """FLOPs of matrix products, the peak bytes of tile buffers, kept tiles and statistics, and what was sent.

    With a process group, blocks of other ranks and their gradients are workspace too, and so are the own gradients.
    """

    flops: int = 0
    workspace_bytes: int = 0
    sent_elements: int = 0  # to other ranks, by this one; not what they tell each other of their calls

    def units(self, n: int, m: int, d: int) -> float:
        """Products of one N x M x d matrix multiplication, ``2 N M d`` FLOPs each."""
        return self.flops / (2 * n * m * d)


_active: list[Work] = []


@contextmanager
def count_work() -> Iterator[Work]:
    """Count the matrix products and workspace of every fused loss run inside the block; "eager" counts none.

    >>> with count_work() as work:
    ...     clip_loss(x, y, scale, memory_budget=0).backward()  # 3.0 where the budget keeps all similarities
    >>> work.units(len(x), len(y), x.shape[1])
    4.0

    Of a batch against itself N and M are all its rows: 2N for NT-Xent.
    """
    work = Work()
    _active.append(work)
    try:
        yield work
    finally:
        _active.remove(work)


def is_counting() -> bool:
    """Whether this runs inside of a block of :func:`count_work`."""
    return bool(_active)


def count_product(query: Tensor, columns: int) -> None:
    """One product of a ``[R, d]`` block with ``columns`` columns was formed."""
    if _active:
        for work in _active:
            work.flops += 2 * query.shape[0] * query.shape[1] * columns


def count_workspace(*buffers: Tensor | None) -> None:
    """These buffers were alive at the same time."""
    if _active:
        size = sum(b.numel() * b.element_size() for b in buffers if b is not None)
        for work in _active:
            work.workspace_bytes = max(work.workspace_bytes, size)


def count_sent(elements: int) -> None:
    """So many elements left for other ranks."""
    for work in _active:
        work.sent_elements += elements
