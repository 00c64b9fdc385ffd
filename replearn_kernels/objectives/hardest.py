"""Losses of the hardest pairs: the gradient is one of few pairs, which one sweep of statistics finds.

Over ``v_ij = -|x_i - x_j|^2``, one table for rows and columns:

    [5, N]  negative (the largest v of another group), its column, positive (the smallest v of the row's group), its
            column, own number (the columns' too)

A column is -1 where there is none; of equal ones the first is taken. Columns are numbers of the table's dtype, exact up
to 2^24 rows in fp32.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.listed_pairs import add_differences_, pair_squares
from ..engine.problem import Pairs, Problem
from .base import Objective
from .triplet_distance import TripletDistance, gradient_of_gap, loss_of_gap

MOST_ROWS = 2**24
"""What fp32 can number."""


class Hardest(Objective):
    """What such losses share: the statistics, and a gradient without a sweep."""

    family = "hardest"
    by_distance = "square"
    needs_columns = True
    uses_target = False
    sweeps_gradients = False

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        table = like.new_full((5, rows), -1)
        check_numbers(rows, like.dtype)
        limits = torch.finfo(like.dtype)
        table[0].fill_(limits.min)
        table[2].fill_(limits.max)
        table[4] = torch.arange(rows, device=like.device)
        return table, None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        positive = pairs.same_group()
        limits = torch.finfo(s.dtype)
        negatives = s.masked_fill(pairs.same_group(), limits.min)
        if pairs.diagonal:
            negatives.fill_diagonal_(limits.min)
        positives = s.masked_fill(~positive, limits.max)
        of_columns = row_table if column_table is None else column_table
        for dim, table, others in ((1, row_table, of_columns), (0, column_table, row_table)):
            if table is not None:
                keep_better(table[0:2], *negatives.max(dim), others[4], torch.gt)
                keep_better(table[2:4], *positives.min(dim), others[4], torch.lt)

    def number_rows(self, table: Tensor, first: int) -> None:
        check_numbers(first + table.shape[1], table.dtype)
        table[4] += first

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        """Of the same rows, from other columns; of equal pairs that with the lower number stays."""
        for first, better in ((0, torch.gt), (2, torch.lt)):
            self.merge_better(*table[first : first + 2], *other[first : first + 2], better)

    @staticmethod
    def merge_better(value: Tensor, number: Tensor, new: Tensor, new_number: Tensor, better) -> None:
        """Into ``value`` and ``number``, of any shape: the better of two, of equal ones that with the lower number."""
        lower = (new == value) & (new_number >= 0) & ((new_number < number) | (number < 0))
        replace = better(new, value) | lower
        value.copy_(torch.where(replace, new, value))
        number.copy_(torch.where(replace, new_number, number))

    def weights(self, s, out, pairs, row_table, column_table) -> None:
        raise NotImplementedError(f"{self.name} has no sweep of gradients")

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        self.add_gradient(problem, row_table, grad_rows, d_query)
        # Comparisons choose no NaN: without this, a loss of NaN would have finite gradients, all of them 0.
        d_query += (problem.squares * 0).unsqueeze(1)
        return grad_rows.unsqueeze(0), None

    @abstractmethod
    def add_gradient(self, problem: Problem, row_table: Tensor, grad_rows: Tensor, d_query: Tensor) -> None:
        """Add the gradients of the pairs to ``d_query``."""


def check_numbers(rows: int, dtype: torch.dtype) -> None:
    if rows > MOST_ROWS and dtype == torch.float32:
        raise ValueError(f"the hardest pairs of at most {MOST_ROWS:,} rows can be numbered in fp32, got {rows:,}")


def keep_better(table: Tensor, value: Tensor, index: Tensor, numbers: Tensor, better) -> None:
    """``table = (value, number)``, where the new value is strictly better."""
    replace = better(value, table[0])
    table[0].copy_(torch.where(replace, value, table[0]))
    table[1].copy_(torch.where(replace, numbers[index], table[1]))


def hardest_negatives(row_table: Tensor) -> tuple[Tensor, Tensor]:
    """Whether every row has a negative, and its column (0 where not)."""
    return row_table[1] >= 0, row_table[1].clamp(min=0).long()


def hardest_positives(row_table: Tensor) -> tuple[Tensor, Tensor]:
    """The same of positives."""
    return row_table[3] >= 0, row_table[3].clamp(min=0).long()


@dataclass(frozen=True)
class BatchHard(Hardest):
    r"""Hermans et al. 2017: ``L_a = [D(a, p) - D(a, n) + margin]+`` with a's farthest positive and nearest negative, or
    without a margin the soft one, ``log(1 + exp(D(a, p) - D(a, n)))``.

    0 for an anchor without a positive or without a negative. The distances of the pairs found are formed again from the
    differences of their rows.
    """

    margin: float | None
    distance: TripletDistance

    name = "batch_hard"

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> BatchHard:
        distance, *margin = parameters
        return cls(margin[0] if margin else None, TripletDistance.numbered(distance))

    @property
    def parameters(self) -> list[float]:
        return [self.distance.number] if self.margin is None else [self.distance.number, self.margin]

    @property
    def unit_rows(self) -> bool:
        return self.distance.unit_rows

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        gap, _, valid = self._gaps(problem, row_table)
        losses = torch.where(valid, loss_of_gap(gap, self.margin), 0)
        return losses + problem.squares * 0  # a NaN shows, also where no pair with it was chosen

    def add_gradient(self, problem: Problem, row_table: Tensor, grad_rows: Tensor, d_query: Tensor) -> None:
        gap, pairs, valid = self._gaps(problem, row_table)
        weight = torch.where(valid, gradient_of_gap(grad_rows, gap, self.margin), 0)
        anchor = torch.arange(problem.rows, device=weight.device)
        for sign, (other, square) in zip((1, -1), pairs):
            add_differences_(d_query, problem.given_rows, anchor, other, sign * weight * self.distance.slope(square))

    def _gaps(self, problem: Problem, row_table: Tensor):
        """``D(a, p) - D(a, n)``, the pairs with their squared distances, and which anchors have both."""
        (has_positive, p), (has_negative, n) = hardest_positives(row_table), hardest_negatives(row_table)
        anchor = torch.arange(problem.rows, device=p.device)
        squares = [pair_squares(problem.given_rows, anchor, other, problem.isolated) for other in (p, n)]
        to_positive, to_negative = (self.distance.of_square(square) for square in squares)
        valid = has_positive & has_negative
        return to_positive - to_negative, list(zip((p, n), squares)), valid
