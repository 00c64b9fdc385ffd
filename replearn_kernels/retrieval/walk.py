"""The walk over tiles of queries and gallery, which nearest neighbours, ranks and counts of pairs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..engine.columns import blocks
from .bounds import Filter, Scores

# Rows and columns of a tile. On two cores of an EPYC at d = 128 products of 1,024 x 1,024 run at 175 GFLOP/s, in bf16
# at 370, and of 2,048 x 2,048, which leave the L2 cache, at 150 and 320. The GPU's is not measured.
_CPU_TILE = 1024, 1024
_GPU_TILE = 2048, 8192

# The share of pairs in doubt beyond which bf16 loses: a score takes some 20 times what a pair's product in bf16 spares
# (12 to 19 ns against 0.7 on the same cores).
MOST_IN_DOUBT = 0.04
_LEAST_BF16_WIDTH = 32


Ids = tuple[Tensor, Tensor]
"""Of queries and of the gallery, integers."""


def renumbered(of_queries: Tensor, of_gallery: Tensor) -> Ids:
    """Ids of any value, or rows of them, as int32 ``[N]`` and ``[M]``: equal ones alike."""
    ids = torch.cat((of_queries, of_gallery)).unique(return_inverse=True, dim=0)[1].int()
    return ids[: len(of_queries)], ids[len(of_queries) :]


@dataclass(frozen=True)
class Alike:
    """Ids, int32 ``[L, N]`` and ``[L, M]``, L at most 2. Pairs of which one of the L is equal are left out."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(ids: list[Ids], scores: Scores) -> Alike:
        if ids:
            return Alike(*(torch.stack(side) for side in zip(*ids)))
        none = torch.empty(0, 1, dtype=torch.int32, device=scores.query.features.device)
        return Alike(none.expand(0, len(scores.query)), none.expand(0, len(scores.gallery)))


@dataclass(frozen=True)
class Tile:
    """Products of some queries' and some columns' unit rows, ``[R, C]``."""

    s: Tensor
    filter: Filter
    rows: slice
    columns: slice
    left_out: Alike

    @property
    def arguments(self) -> tuple:
        """As the native operators take them, after ``s`` and the scores."""
        ids = self.left_out.rows[:, self.rows], self.left_out.columns[:, self.columns]
        columns, row_factor = self.filter.columns[:, self.columns], self.filter.row_factor[self.rows]
        return columns, row_factor, self.filter.relative, *ids, self.columns.start

    @cached_property
    def v(self) -> Tensor:
        """fp32 ``[R, C]``"""
        v = self.s.float()
        if self.filter.scales_columns:
            v = v * self.filter.columns[0, self.columns]
        return self._times_rows(v)

    def _times_rows(self, values: Tensor) -> Tensor:
        """Values of pairs or of columns times each row's factor, where it is not 1."""
        return values * self.filter.row_factor[self.rows, None] if self.filter.scales_rows else values

    @cached_property
    def upper(self) -> Tensor:
        """The upper bounds of v, -inf where a pair is left out."""
        _, slack, above, _ = self.filter.columns[:, self.columns]
        upper = torch.add(self.v, self.v.abs(), alpha=self.filter.relative).add_(self._times_rows(slack) + above)
        return self.without_left_out(upper)

    @cached_property
    def lower(self) -> Tensor:
        """The lower bounds of v, -inf where a pair is left out."""
        _, slack, _, below = self.filter.columns[:, self.columns]
        lower = torch.sub(self.v, self.v.abs(), alpha=self.filter.relative).sub_(self._times_rows(slack) - below)
        return self.without_left_out(lower)

    def lower_at(self, row: Tensor, column: Tensor) -> Tensor:
        """The lower bounds of pairs, ``[P]``, that are not left out."""
        _, slack, _, below = self.filter.columns[:, self.columns]
        v = self.v[row, column]
        fixed = slack[column] * self.filter.row_factor[self.rows][row] - below[column]
        return torch.sub(v, v.abs(), alpha=self.filter.relative).sub_(fixed)

    def without_left_out(self, bounds: Tensor) -> Tensor:
        """Changes them in place: -inf where a pair is left out."""
        for of_rows, of_columns in zip(self.left_out.rows, self.left_out.columns):
            bounds.masked_fill_(of_rows[self.rows, None] == of_columns[self.columns], -torch.inf)
        return bounds


class Fold(Protocol):
    """What a tile's rows keep of it."""

    def add(self, tile: Tile) -> int:
        """Returns how many pairs were in doubt, and scored."""


F = TypeVar("F", bound=Fold)


def walk(
    scores: Scores,
    filter: Filter,
    left_out: list[Ids],
    row_blocks: Iterator[slice],
    fold_of: Callable[[slice], F],
    on_rows: Callable[[int], object],
    first_column: Callable[[slice], int] = lambda rows: 0,
) -> Iterator[tuple[slice, F]]:
    """A block of queries after the other, each with what it keeps of all columns, or those from its first one on, but
    for pairs of which one of the ids is equal. ``on_rows`` hears of finished queries."""
    alike = Alike.of(left_out, scores)
    device = scores.query.features.device
    _, width = tile_shape(device)
    buffer = None
    for rows in row_blocks:
        fold = fold_of(rows)
        height, in_doubt = rows.stop - rows.start, 0
        if buffer is None or buffer.dtype != filter.dtype or buffer.numel() < height * width:
            buffer = torch.empty(height * width, dtype=filter.dtype, device=device)
        for columns in blocks(len(scores.gallery), width, first_column(rows)):
            shape = height, columns.stop - columns.start
            s = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(filter.query.features[rows], filter.gallery.features[columns].t(), out=s)
            in_doubt += fold.add(Tile(s, filter, rows, columns, alike))
        yield rows, fold
        on_rows(height)
        if filter.dtype == torch.bfloat16 and in_doubt > MOST_IN_DOUBT * height * len(scores.gallery):
            filter = Filter(scores, torch.float32)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """The most rows and columns of a tile."""
    return _CPU_TILE if device.type == "cpu" else _GPU_TILE


def first_filter(scores: Scores) -> Filter:
    """What a walk of few pairs in doubt begins with."""
    return Filter(scores, _first_dtype(scores))


def _first_dtype(scores: Scores) -> torch.dtype:
    """bf16 where the processor multiplies it; torch's own bf16 elsewhere is slower than fp32."""
    features = scores.query.features
    multiplies = features.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if multiplies and features.shape[1] >= _LEAST_BF16_WIDTH else torch.float32
