"""FaceNet's triplets: for every positive the nearest negative beyond it, found by one sweep of statistics.

Over ``v_ij = -|x_i - x_j|^2``, one table for rows and columns, p positives a row:

    [3 + 3 p, N]  farthest (the smallest v of another group), its column, own number (the columns' too), then of the
                  positives, the nearest last: thresholds (their v; -inf: none), of each the largest v of another group
                  below it, its column

A column is -1 where there is none; of equal ones the first is taken. Columns are numbers of the table's dtype, as in
:mod:`.hardest`. The loss is that of the triplets: :mod:`..engine.triplets`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .hardest import Hardest, check_numbers, keep_better
from .parts import parts_of
from .triplet_distance import TripletDistance

_LEAD = 3
"""Quantities of a row, before those of its positives."""


@dataclass(frozen=True)
class SemiHard(Hardest):
    """The statistics alone."""

    distance: TripletDistance

    name = "semi_hard"
    family = "semi_hard"
    prepares = True

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> SemiHard:
        (distance,) = parameters
        return cls(TripletDistance.numbered(distance))

    @property
    def parameters(self) -> list[float]:
        return [self.distance.number]

    @property
    def unit_rows(self) -> bool:
        return self.distance.unit_rows

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        check_numbers(rows, like.dtype)
        table = like.new_full((_LEAD, rows), -1)
        table[0].fill_(torch.finfo(like.dtype).max)
        table[2] = torch.arange(rows, device=like.device)
        return table, None

    def number_rows(self, table: Tensor, first: int) -> None:
        check_numbers(first + table.shape[1], table.dtype)
        table[2] += first

    def prepared(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, None]:
        """With the thresholds, and nothing found beyond them.

        A positive's square comes from the difference of its rows, a negative's from products. A negative at the very
        same distance, a copy of the positive for one, is not beyond it: it has to be further by what rounding can do.
        """
        _, squares = problem.positives
        thresholds = torch.where(squares == -torch.inf, -torch.inf, -(squares + _rounding(problem, squares)))
        nothing = torch.full_like(thresholds, torch.finfo(thresholds.dtype).min)
        return torch.cat([row_table, thresholds, nothing, torch.full_like(thresholds, -1)]), None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        limits = torch.finfo(s.dtype)
        others = pairs.same_group()
        if pairs.diagonal:
            others.fill_diagonal_(True)
        others.logical_not_()
        of_columns = row_table if column_table is None else column_table
        for dim, table, numbers in ((1, row_table, of_columns[2]), (0, column_table, row_table[2])):
            if table is None:
                continue
            keep_better(table[:2], *s.masked_fill(~others, limits.max).min(dim), numbers, torch.lt)
            for threshold, *found in zip(*_of_positives(table)):
                beyond = others & (s < threshold.unsqueeze(dim))
                keep_better(found, *s.masked_fill(~beyond, limits.min).max(dim), numbers, torch.gt)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        self.merge_better(table[0], table[1], other[0], other[1], torch.lt)
        (_, *found), (_, *new) = _of_positives(table), _of_positives(other)
        self.merge_better(*found, *new, torch.gt)

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        raise NotImplementedError("semi_hard's losses are those of the triplets found")

    def add_gradient(self, problem: Problem, row_table: Tensor, grad_rows: Tensor, d_query: Tensor) -> None:
        raise NotImplementedError("semi_hard's gradient is that of the triplets found")

    def parts(self, *tables: Tensor | None, most: int):
        return parts_of(tables, _LEAD, 3, most)


def _rounding(problem: Problem, squares: Tensor) -> Tensor:
    """Of a negative's square ``|x_i|^2 + |x_n|^2 - 2 <x_i, x_n>`` that should be one of ``squares[p, N]``.

    The norms' sum is 3 |x_i|^2 + 2 |x_i - x_n|^2 at most, and the sum over d features errs by some sqrt(d) / 2 units.
    """
    eps, d = torch.finfo(squares.dtype).eps, problem.query.shape[1]
    return eps * (2 + d**0.5 / 2) * (3 * problem.squares + 2 * squares)


def triplets_of(problem: Problem, row_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(anchor, positive, negative), ordered by (anchor, positive). Without a negative beyond, the farthest.

    Anchors are places in the problem's rows, the others numbers in the batch of all ranks.
    """
    numbers, squares = problem.positives
    farthest = row_table[1]
    _, _, nearest = _of_positives(row_table)
    usable = (squares != -torch.inf) & (farthest >= 0)
    by_number = torch.where(usable, numbers, torch.iinfo(numbers.dtype).max).argsort(dim=0)
    chosen = torch.where(nearest >= 0, nearest, farthest).long()
    anchor, place = usable.gather(0, by_number).t().nonzero(as_tuple=True)
    rank = by_number.t()[anchor, place]
    return anchor, numbers[rank, anchor], chosen[rank, anchor]


def _of_positives(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, values and columns of a table, ``[p, N]`` each."""
    return table[_LEAD:].unflatten(0, (3, -1)).unbind(0) if len(table) > _LEAD else (table[:0],) * 3
