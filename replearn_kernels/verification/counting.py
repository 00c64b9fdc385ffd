r"""How many pairs have which score, by tiles of the filter's similarities, which are never kept.

Scores fall into *cells* of equal width, 2^-27 of the range they can have, and 4,096 cells are a *bin*. A first walk
counts every pair in the bin where the filter sees it (retrieval/bounds.py), which may be a few bins off its score's:
that tells in which bins a point of the curve may lie. A second walk forms the scores of all pairs near these bins, and
counts each in the bin and the cell of its score. The other pairs are farther from these bins than the filter can err:
they are counted on the right side of them. So the count of pairs that a threshold in these bins accepts is exact. Only
integers are summed: the result is the same for any tile, number of threads or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..engine.columns import blocks
from ..retrieval.bounds import DISTANCES, Filter, Scores
from ..retrieval.walk import MOST_IN_DOUBT, Ids, Tile, first_filter, tile_shape, walk

BINS = 2**15 + 1  # the last one for scores at the end of the range, such as 1
CELLS = 2**12  # of a bin
MOST_BINS = 2**10  # whose cells are counted in one walk: 64 MiB

# Of a bin, in place of its number among those whose cells are counted (csrc/cpu/retrieval_counting.cpp).
SURE, NEAR = -2, -1

_ROUNDING = 0.1  # bins: what fp32 adds to the filter's error where it places a pair, at most some 2^-7


@dataclass(frozen=True)
class Cells:
    """Where scores fall: in cell ``floor(score * per_score) + first``."""

    per_score: float  # a power of two: no rounding, and thresholds at the cells' edges are exact
    first: int

    @staticmethod
    def of(similarity: str, longest_query: float, longest: float) -> Cells:
        """For rows no longer than these, the second of the gallery's rows (distances: of all)."""
        largest = 1.0
        if similarity == "product":
            largest = longest_query * longest
        elif similarity in DISTANCES:
            largest = 4 * longest * longest
        mantissa, exponent = math.frexp(largest or 1.0)
        exponent = max(exponent - (mantissa == 0.5), -990)  # of shorter rows fp64 would not hold per_score
        whole = (BINS - 1) * CELLS
        if similarity in DISTANCES:
            return Cells(math.ldexp(whole, -exponent), whole)
        return Cells(math.ldexp(whole // 2, -exponent), whole // 2)

    def score(self, cell: Tensor) -> Tensor:
        """The least score in a cell, fp64."""
        return (cell - self.first).double() / self.per_score

    def of_scores(self, scores: Tensor) -> Tensor:
        """The cells of scores, fp64."""
        return ((scores * self.per_score).floor() + self.first).clamp(0, BINS * CELLS - 1).long()


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of a query and a row of the gallery, and which of them have one label.

    Args:
        labels: int32 ``[N]`` and ``[M]``, equal ones alike.
        left_out: at most one pair of ids: pairs of which they are equal are not counted.
        half: whether the queries are rows of the gallery from ``first_row`` on: of a pair (i, j) and (j, i), and the
            pairs (i, i), only those with i < j are counted.
    """

    scores: Scores
    labels: Ids
    left_out: list[Ids]
    half: bool
    first_row: int
    cells: Cells
    backend: str

    @cached_property
    def fine(self) -> Filter:
        """In fp32: what finds out where the points of the curve lie, bf16 would leave 200 times as many bins for."""
        return Filter(self.scores, torch.float32)

    @cached_property
    def first(self) -> Filter:
        """That in bf16 where the processor multiplies it: what finds pairs near a few bins."""
        first = first_filter(self.scores)
        return self.fine if first.dtype == self.fine.dtype else first

    def filter_for(self, wanted: Tensor, seen: Tensor) -> Filter:
        """What is faster at counting the cells of these bins. ``seen``: int64 ``[BINS]``, pairs in each bin."""
        in_doubt = seen[near(wanted, self.reach(self.first))].sum()
        return self.first if in_doubt <= MOST_IN_DOUBT * seen.sum() else self.fine

    @cached_property
    def to_bins(self) -> Tensor:
        """Factor and shift of each row, fp64 ``[2, N]``, that make a bin of what the filter sees."""
        per_bin, first = self.cells.per_score / CELLS, self.cells.first / CELLS
        of_rows = self.scores.to_filter
        factor = torch.where(of_rows == 0, 0, per_bin / of_rows)
        return torch.stack((factor, first - self.scores.shift * factor))

    def reach(self, filter: Filter) -> int:
        """How many bins off its score's the filter may see a pair."""
        if not len(self.scores.query):
            return 0
        return math.ceil(float((self.to_bins[0] * filter.largest_errors).max()) + _ROUNDING)

    def count(self, wanted: Tensor, filter: Filter, on_rows: Callable[[int], object]) -> Counts:
        """One walk. ``wanted``: int64 ``[W]``, bins whose cells are counted."""
        device = self.scores.query.features.device
        slots = torch.full((BINS,), SURE, dtype=torch.int16, device=device)
        slots[near(wanted, self.reach(filter))] = NEAR
        slots[wanted] = torch.arange(len(wanted), dtype=torch.int16, device=device)
        counts = Counts(
            wanted,
            slots,
            torch.zeros(BINS, 2, dtype=torch.int64, device=device),
            torch.zeros(len(wanted), CELLS, 2, dtype=torch.int64, device=device),
        )
        fold = {"cpp": NativeCounting, "torch": CountingOnTensors}[self.backend]
        row_blocks = blocks(len(self.scores.query), tile_shape(device)[0])
        first = (lambda rows: self.first_row + rows.start + 1) if self.half else (lambda rows: 0)
        for _ in walk(
            self.scores, filter, self.left_out, row_blocks, lambda rows: fold(self, rows, counts), on_rows, first
        ):
            pass
        return counts


@dataclass(frozen=True)
class Counts:
    """Pairs of different labels, and of one, in this order."""

    wanted: Tensor  # int64 [W]: bins whose cells are counted
    slots: Tensor  # int16 [BINS]: a bin's number among these, else NEAR or SURE
    histogram: Tensor  # int64 [BINS, 2]
    cells: Tensor  # int64 [W, CELLS, 2]


def near(bins: Tensor, reach: int) -> Tensor:
    """bool ``[BINS]``: what is at most ``reach`` bins from one of these."""
    ends = torch.zeros(BINS + 1, dtype=torch.int64, device=bins.device)
    ends.index_add_(0, (bins - reach).clamp(min=0), torch.ones_like(bins))
    ends.index_add_(0, (bins + reach + 1).clamp(max=BINS), torch.full_like(bins, -1))
    return ends[:BINS].cumsum(0) > 0


class NativeCounting:
    """Some queries' pairs, as csrc/cpu/retrieval_counting.cpp counts them."""

    def __init__(self, pairs: LabelledPairs, rows: slice, counts: Counts):
        self.scores, self.column_labels = pairs.scores[rows], pairs.labels[1]
        self.of_rows = pairs.labels[0][rows].contiguous()
        cells = pairs.cells
        to_bins = pairs.to_bins[:, rows].float().contiguous()
        self.table = to_bins, cells.per_score, cells.first, counts.slots, pairs.half, pairs.first_row + rows.start
        self.counts = counts.histogram, counts.cells

    def add(self, tile: Tile) -> int:
        labels = self.of_rows, self.column_labels[tile.columns]
        return torch.ops.replearn_kernels.count_pairs_(
            tile.s, *self.scores.arguments, *tile.arguments, *labels, *self.table, *self.counts
        )


class CountingOnTensors:
    """The same, on any device."""

    def __init__(self, pairs: LabelledPairs, rows: slice, counts: Counts):
        self.pairs, self.scores, self.counts = pairs, pairs.scores[rows], counts
        self.factor, self.shift = pairs.to_bins[:, rows, None].float()

    def add(self, tile: Tile) -> int:
        labels, cells, counts = self.pairs.labels, self.pairs.cells, self.counts
        seen = (tile.v + tile.filter.columns[2, tile.columns]).mul_(self.factor).add_(self.shift)
        bins = seen.clamp_(0, BINS - 1).long()
        same = labels[0][tile.rows, None] == labels[1][tile.columns]
        counted = tile.without_left_out(torch.zeros_like(seen)) == 0
        if self.pairs.half:
            row, column = (torch.arange(of.start, of.stop, device=bins.device) for of in (tile.rows, tile.columns))
            counted &= column > self.pairs.first_row + row[:, None]
        sure = counts.slots[bins] == SURE
        self._add(counts.histogram, (2 * bins + same)[counted & sure])
        row, column = (counted & ~sure).nonzero(as_tuple=True)
        of_pairs = cells.of_scores(self.scores.listed(row, column + tile.columns.start))
        bins, cell, same = of_pairs // CELLS, of_pairs % CELLS, same[row, column]
        self._add(counts.histogram, 2 * bins + same)
        slots = counts.slots[bins].long()
        self._add(counts.cells, (2 * (slots * CELLS + cell) + same)[slots >= 0])
        return len(row)

    @staticmethod
    def _add(table: Tensor, entries: Tensor) -> None:
        table.view(-1).index_put_((entries,), torch.ones_like(entries), accumulate=True)
