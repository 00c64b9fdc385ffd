r"""All triplets of a batch, without a list of them.

``L_a = sum_{p, n} [D_ap - D_an + margin]+`` over a's positives p and negatives n. With a's thresholds
``t_k = D_ap + margin``, sorted, a negative at distance D is violated by the positives with ``t_k > D``: found by a
binary search, they count ``active(D)`` and the negative's part of the loss is ``sum_k t_k - active D``::

    W_ij + W_ji = weight_i active_i(D_ij) + weight_j active_j(D_ij)        dL/d(-D) of a negative pair
    dL/dD_ap = weight_a #{n : D_an < t_p}                                   of a positive pair

An entry needs nothing but itself and the thresholds of its row and column, so one sweep yields losses and gradients, in
O(N^2 (d + log p)) time and O(N (d + p)) memory for p positives a row; the positive pairs' gradients follow from counts.

    row table  [2 + 2 p, N]  loss, weight, then thresholds in ascending order (-inf: none), then the counts of violating
                             negatives of each; the sweep adds to losses and counts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective
from .parts import parts_of
from .triplet_distance import TripletDistance


@dataclass(frozen=True)
class BatchAll(Objective):
    """FaceNet's loss over every triplet; the mean is over all of them, or over the violated ones (``nonzero``)."""

    margin: float
    distance: TripletDistance
    nonzero: bool = False

    name = "batch_all"
    family = "batch_all"
    needs_statistics = False
    uses_target = False
    prepares = True

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> BatchAll:
        margin, distance, nonzero = parameters
        return cls(margin, TripletDistance.numbered(distance), bool(nonzero))

    @property
    def parameters(self) -> list[float]:
        return [self.margin, self.distance.number, float(self.nonzero)]

    @property
    def by_distance(self) -> str:
        return self.distance.similarity

    @property
    def unit_rows(self) -> bool:
        return self.distance.unit_rows

    @property
    def roles(self) -> tuple[float]:
        return (self.distance.factor,)

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        table = like.new_zeros((2, rows))
        table[1].fill_(1)
        return table, None

    def prepared(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, None]:
        """With the thresholds, and counts of 0."""
        _, squares = problem.positives
        thresholds = torch.where(squares < 0, -torch.inf, self.distance.of_square(squares) + self.margin)
        return torch.cat([row_table, thresholds, torch.zeros_like(thresholds)]), None

    def parts(self, *tables: Tensor | None, most: int):
        return parts_of(tables, 2, 2, most)

    def saved(self, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, None]:
        return row_table[:2], None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        for of_row, table in ((True, row_table), (False, column_table)):
            if table is not None:
                self._fold(s if of_row else s.t(), self._negative(pairs, of_row), table)

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        return row_table[0] + problem.squares * 0  # a NaN shows, though it violates nothing

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> Tensor:
        """Triplets."""
        if self.nonzero:
            return _split(row_table)[1].double().sum().to(row_table.dtype)
        positives = problem.positive_counts.double()
        return (positives * (problem.total_rows - 1 - positives)).sum().to(problem.statistics_dtype)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        """Losses and counts of other negatives."""
        table[0] += other[0]
        _split(table)[1].add_(_split(other)[1])

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        return self.prepared(problem, torch.stack([torch.zeros_like(grad_rows), grad_rows]), None)

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Adds to losses and counts, too: of a tile on the diagonal, to those of the rows."""
        w = self._fold(s, self._negative(pairs, True), row_table) * row_table[1].unsqueeze(1)
        own = column_table.clone() if pairs.diagonal else column_table
        w += self._fold(s.t(), self._negative(pairs, False), own).t() * column_table[1]
        out.copy_(w.mul_(self.distance.factor))

    def add_pair_gradients(self, problem: Problem, row_table: Tensor, d_query: Tensor) -> None:
        numbers, squares = problem.positives
        for number, square, count in zip(numbers, squares, _split(row_table)[1]):
            a = torch.where(square > 0, self.distance.slope(square) * count * row_table[1], 0)
            problem.add_pairs_(d_query, number, a)

    def _negative(self, pairs: Pairs, of_row: bool) -> Tensor:
        positive = pairs.same_group()
        if pairs.diagonal:
            positive.fill_diagonal_(True)
        return ~(positive if of_row else positive.t())

    def _fold(self, v: Tensor, negative: Tensor, table: Tensor) -> Tensor:
        """The rows' losses and counts from ``v[R, C]``; returns how many positives each negative violates."""
        thresholds, counts = _split(table)
        sorted_thresholds = thresholds.t().contiguous()
        distance = v * -self.distance.factor
        first = torch.searchsorted(sorted_thresholds, distance.contiguous(), right=True)  # the first above
        active = (len(thresholds) - first).masked_fill(~negative, 0)
        none = v.new_zeros((len(v), 1))
        totals = torch.cat([sorted_thresholds.flip(1).cumsum(1).flip(1), none], dim=1).gather(1, first)
        table[0] += torch.where(active > 0, totals - active * distance, 0).sum(1)
        histogram = v.new_zeros((len(v), len(thresholds) + 1)).scatter_add_(1, first, negative.to(v.dtype))
        counts += histogram.cumsum(1)[:, :-1].t()
        return active.to(v.dtype)


def _split(table: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds and counts of a table."""
    most = (len(table) - 2) // 2
    return table[2 : 2 + most], table[2 + most :]
