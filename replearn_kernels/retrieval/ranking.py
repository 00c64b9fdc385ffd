"""The rank of every positive: what a block of rows keeps of its tiles, natively and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..engine.columns import blocks
from .bounds import Scores
from .walk import Ids, Tile, first_filter, renumbered, tile_shape, walk

BEYOND = torch.iinfo(torch.int64).max
"""The rank of a positive that comes after what was asked for."""

_MOST_POSITIVES = 2**22  # of a block of rows: 160 MB


@dataclass(frozen=True)
class Positives:
    """Columns that belong to each of some rows, one row after the other."""

    offsets: Tensor  # int64 [R + 1]: row i's are [offsets[i], offsets[i + 1])
    columns: Tensor  # int64 [P]

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """``[P]``: whose each one is."""
        counts = self.counts
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def but(self, excluded: list[Ids], rows: slice) -> Positives:
        """Without columns of a row's id."""
        positives = self
        for of_rows, of_columns in excluded:
            kept = of_rows[rows][positives.rows] != of_columns[positives.columns]
            positives = Positives(ascending(kept)[positives.offsets], positives.columns[kept])
        return positives


class PositivesSource(Protocol):
    """Which columns belong to which rows."""

    counts: Tensor
    """int64 ``[N]``"""

    ids: list[Ids]
    """By which tiles tell positives, if they can."""

    def of(self, rows: slice) -> Positives: ...


class ByLabel:
    """Columns of a row's label, but those of its id: ``excluded`` has at most one pair of ids."""

    def __init__(self, query_labels: Tensor, gallery_labels: Tensor, excluded: list[Ids]):
        self.ids, self.excluded = [renumbered(query_labels, gallery_labels)], excluded
        self.labelled = _Grouped(*self.ids[0])
        self.counts = self.labelled.counts
        for ids in excluded:
            both = (torch.stack(pair, 1) for pair in zip(self.ids[0], ids))
            self.counts = self.counts - _Grouped(*renumbered(*both)).counts

    def of(self, rows: slice) -> Positives:
        return self.labelled.of(rows).but(self.excluded, rows)


class _Grouped:
    """Columns of a row's group."""

    def __init__(self, query_group: Tensor, gallery_group: Tensor):
        groups, self.order = gallery_group.sort(stable=True)
        self.first = torch.searchsorted(groups, query_group)
        self.counts = torch.searchsorted(groups, query_group, right=True) - self.first

    def of(self, rows: slice) -> Positives:
        offsets = ascending(self.counts[rows])
        return Positives(offsets, self.order[places(offsets) + self.first[rows].repeat_interleave(offsets.diff())])


class ByTarget:
    """Columns that are named, ``[N, P]``, but those of a row's id: -1 names none, and each counts once."""

    def __init__(self, target: Tensor, excluded: list[Ids]):
        self.ids = []
        self.target = target.sort(dim=1).values
        self.named = self.target >= 0
        self.named[:, 1:] &= self.target[:, 1:] != self.target[:, :-1]
        for of_rows, of_columns in excluded:
            row, place = self.named.nonzero(as_tuple=True)
            self.named[row, place] = of_columns[self.target[row, place]] != of_rows[row]
        self.counts = self.named.sum(1)

    def of(self, rows: slice) -> Positives:
        return Positives(ascending(self.counts[rows]), self.target[rows][self.named[rows]])


def ascending(counts: Tensor) -> Tensor:
    """Where each row's positives begin, and the last one's end: ``[R + 1]``."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def places(offsets: Tensor) -> Tensor:
    """The place of each positive among its row's, from 0."""
    return torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(offsets.diff())


@dataclass(frozen=True)
class Ranks:
    """The ranks of some queries' positives, from 1, in ascending order for each query, one query after the other."""

    rows: slice
    offsets: Tensor  # int64 [R + 1]
    ranks: Tensor  # int64 [P]


def ranks(
    scores: Scores,
    source: PositivesSource,
    excluded: list[Ids],
    cutoff: Tensor,
    first_always: bool,
    backend: str,
    on_rows: Callable[[int], object],
) -> Iterator[Ranks]:
    """Of all queries, some at a time.

    Args:
        excluded: at most one pair of ids: a column of a row's id has no rank, and is no positive of ``source``.
        cutoff: int64 ``[N]``: ranks of a query up to it are told, later ones are ``BEYOND``.
        first_always: the rank of a query's first positive is told whatever it is.
    """
    fold = {"cpp": NativeRanking, "torch": RankingOnTensors}[backend]
    row_blocks = _row_blocks(source.counts, tile_shape(source.counts.device)[0], padded=backend == "torch")

    def fold_of(rows: slice) -> NativeRanking | RankingOnTensors:
        return fold(scores[rows], source.of(rows), cutoff[rows], first_always)

    left_out = excluded + source.ids
    for rows, found in walk(scores, first_filter(scores), left_out, row_blocks, fold_of, on_rows):
        yield Ranks(rows, found.offsets, found.result())


def _row_blocks(counts: Tensor, most_rows: int, padded: bool) -> Iterator[slice]:
    """Blocks of rows, and of one row at least, for whose positives there is room; ``padded``: as many in each as the
    most of one."""
    counts = counts.cpu()
    start = 0
    while start < len(counts):
        block = counts[start : start + most_rows]
        needed = block.cummax(0).values * torch.arange(1, len(block) + 1) if padded else block.cumsum(0)
        stop = start + max(int((needed <= _MOST_POSITIVES).sum()), 1)
        yield slice(start, stop)
        start = stop


class NativeRanking:
    """Counts as csrc/cpu/retrieval_ranking.cpp keeps them."""

    def __init__(self, scores: Scores, positives: Positives, cutoff: Tensor, first_always: bool):
        self.scores, self.offsets = scores, positives.offsets
        columns = positives.columns.clone()
        of_positives = torch.empty(len(columns), dtype=torch.float64)
        low, high = torch.empty(2, len(columns), dtype=torch.float32)
        ops = torch.ops.replearn_kernels
        ops.listed_scores_(*scores.arguments, positives.rows, columns, of_positives)
        ops.sort_positives_(*scores.arguments, positives.offsets, of_positives, columns, low, high)
        self.table = positives.offsets, of_positives, columns, low, high, cutoff.contiguous(), first_always
        self.active = torch.minimum(positives.counts, cutoff.clamp(min=int(first_always)))
        self.better = torch.zeros(len(columns), dtype=torch.int64)

    def add(self, tile: Tile) -> int:
        return torch.ops.replearn_kernels.place_(
            tile.s, *self.scores.arguments, *tile.arguments, *self.table, self.active, self.better
        )

    def result(self) -> Tensor:
        """int64 ``[P]``, ascending in each row."""
        counts, place = self.offsets.diff(), places(self.offsets)
        before = torch.nn.functional.pad(self.better.cumsum(0), (1, 0))
        ranks = before[1:] - before[self.offsets[:-1]].repeat_interleave(counts) + place + 1
        return ranks.masked_fill_(place >= self.active.repeat_interleave(counts), BEYOND)


class RankingOnTensors:
    """The same, on any device: positives and counts as ``[R, P]``, of rows with fewer filled up with -inf."""

    def __init__(self, scores: Scores, positives: Positives, cutoff: Tensor, first_always: bool):
        self.scores, self.offsets, self.cutoff, self.first_always = scores, positives.offsets, cutoff, first_always
        counts, row, place = positives.counts, positives.rows, places(positives.offsets)
        shape = len(counts), int(counts.max())
        of_positives = torch.full(shape, -torch.inf, dtype=torch.float64, device=row.device)
        of_positives[row, place] = scores.listed(row, positives.columns)
        columns = torch.full(shape, len(scores.gallery), device=row.device)
        columns[row, place] = positives.columns
        columns, by_column = columns.sort(dim=1)
        of_positives, order = of_positives.gather(1, by_column).sort(dim=1, descending=True, stable=True)
        self.most = min(shape[1], max(int(cutoff.max()), int(first_always)))
        self.of_positives, self.columns = of_positives[:, : self.most], columns.gather(1, order)[:, : self.most]
        rows = torch.arange(shape[0], device=row.device)[:, None].expand_as(self.columns)
        low, high = scores.bounds(rows, self.of_positives)
        none = self.of_positives == -torch.inf
        self.low, self.high = low.masked_fill_(none, -torch.inf), high.masked_fill_(none, -torch.inf)
        self.better = torch.zeros(shape[0], self.most + 1, dtype=torch.int64, device=row.device)

    def add(self, tile: Tile) -> int:
        if not (self.low > -torch.inf).any():
            return 0
        lower, upper = tile.lower, tile.upper
        # The first positive that a column may be better than: those before it are better than the column.
        first = torch.searchsorted(-self.low, -upper)
        first.masked_fill_(upper == -torch.inf, self.most)
        high = torch.nn.functional.pad(self.high, (0, 1), value=-torch.inf)
        sure = lower > high.gather(1, first)
        self.better.scatter_add_(1, first, sure.long())
        row, column = (~sure & (first < self.most)).nonzero(as_tuple=True)
        for some in blocks(len(row), max(2**22 // self.most, 1)):
            self._place(row[some], column[some] + tile.columns.start)
        beyond = ~self._told(self._ranks())  # they lose to every column from here on, which needs no score
        self.low.masked_fill_(beyond, -torch.inf)
        self.high.masked_fill_(beyond, -torch.inf)
        return len(row)

    def _ranks(self) -> Tensor:
        """Of all positives so far, ``[R, P]``."""
        place = torch.arange(self.most, device=self.cutoff.device)
        return self.better[:, :-1].cumsum(1) + place + 1

    def _told(self, ranks: Tensor) -> Tensor:
        """Which ranks matter, ``[R, P]``."""
        told = ranks <= self.cutoff[:, None]
        told[:, :1] |= self.first_always
        return told

    def _place(self, row: Tensor, column: Tensor) -> None:
        score, column = self.scores.listed(row, column)[:, None], column[:, None]
        of_positives, columns = self.of_positives[row], self.columns[row]
        ahead = (of_positives > score) | ((of_positives == score) & (columns < column))
        is_none = ~(columns == column).any(1)
        self.better.index_put_((row, ahead.sum(1)), is_none.long(), accumulate=True)

    def result(self) -> Tensor:
        """int64 ``[P]``, ascending in each row."""
        counts, place = self.offsets.diff(), places(self.offsets)
        row = torch.arange(len(counts), device=place.device).repeat_interleave(counts)
        told = self._ranks()
        told.masked_fill_(~self._told(told), BEYOND)
        ranks = torch.full_like(place, BEYOND)
        held = place < self.most
        ranks[held] = told[row[held], place[held]]
        return ranks
