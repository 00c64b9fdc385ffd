"""A problem: the inputs of one loss, in the form in which the engine works on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import OwnColumns, SharedColumns, Source, Tile
from .plan import TileShape


@dataclass(slots=True, eq=False)
class Problem:
    """``N`` rows compared with the columns of every source.

    ``scale`` multiplies the similarities: a float on the CPU, a 0-d tensor elsewhere, so that no kernel
    launch waits for the value. ``target[i]`` is the column of the first source that is row i's positive.
    """

    query: Tensor  # [N, d]
    sources: tuple[Source, ...]
    given_target: Tensor | None  # [N] int64; None: row i's positive is column i
    scale: float | Tensor

    @classmethod
    def build(cls, query, keys, own, target, scale, needs_grad) -> Problem:
        """From the operator's arguments: ``needs_grad`` follows the order query, keys, own."""
        sources: list[Source] = [
            SharedColumns(_rows_contiguous(key), needs, has_target=i == 0)
            for i, (key, needs) in enumerate(zip(keys, needs_grad[1:]))
        ]
        if own is not None:
            sources.append(OwnColumns(own, needs_grad[1 + len(keys)]))
        target = None if target is None else target.contiguous()
        return cls(_rows_contiguous(query), tuple(sources), target, scale)

    @property
    def target(self) -> Tensor:
        """``[N]`` int64."""
        if self.given_target is None:
            self.given_target = torch.arange(self.rows, device=self.query.device)
        return self.given_target

    @property
    def rows(self) -> int:
        return self.query.shape[0]

    @property
    def width(self) -> int:
        """Columns that a row sees, over all sources."""
        return sum(source.width for source in self.sources)

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.query.dtype)

    def of_rows(self, rows: slice) -> Problem:
        """The same problem for a chunk of its rows."""
        sources = tuple(source.of_rows(rows) for source in self.sources)
        return Problem(self.query[rows], sources, self.target[rows], self.scale)

    def tiles(self, shape: TileShape, compute_dtype: torch.dtype) -> Iterator[Tile]:
        """The rectangular walk: sources, then blocks of rows, then blocks of columns, always in this order.

        The order fixes the order of every accumulation, and with it the bits of the result.
        """
        for position, source in enumerate(self.sources):
            row_block, column_block = shape.fit(source)
            for rows in blocks(self.rows, row_block):
                query = self.query[rows].to(compute_dtype)
                for columns in blocks(source.width, column_block):
                    yield Tile(query, rows, source, position, columns)

    def total_logits(self) -> Tensor:
        """``sum_j l_ij`` over all columns of row i, ``[N]``, in O((N + M) d)."""
        dtype = self.statistics_dtype
        total = sum(source.total(dtype) for source in self.sources)
        return (self.query.to(dtype) * total).sum(1) * self.scale

    def total_column_logits(self) -> Tensor:
        """``sum_i l_ij`` over all rows, for every column j of the first source, ``[M]``."""
        dtype = self.statistics_dtype
        return (self.sources[0].features.to(dtype) @ self.query.sum(0, dtype=dtype)) * self.scale


def scale_of(logit_scale: Tensor) -> float | Tensor:
    """The scale as :class:`Problem` wants it."""
    return logit_scale.item() if logit_scale.device.type == "cpu" else logit_scale


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, accumulators and losses: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(count: int, size: int) -> Iterator[slice]:
    """Cut ``range(count)`` into slices of at most ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _rows_contiguous(features: Tensor) -> Tensor:
    """BLAS reads rows of any stride, but not elements of any stride (nor stride 0 of an expanded batch)."""
    inner_ok = features.shape[1] <= 1 or features.stride(1) == 1
    outer_ok = features.shape[0] <= 1 or features.stride(0) >= features.shape[1]
    return features if inner_ok and outer_ok else features.contiguous()
