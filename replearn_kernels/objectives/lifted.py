r"""Lifted structured losses: every positive pair against all negatives of both of its rows.

With ``D_ij = |x_i - x_j|``, P the unordered positive pairs, and N_i the rows of other groups than i's::

    J_ij = max(r_i, r_j) + D_ij      r_i = max_{k in N_i} (margin - D_ik)        hard
    J_ij = log(exp r_i + exp r_j) + D_ij      r_i = log sum_{k in N_i} exp(margin - D_ik)        smooth
    L = 1 / (2 |P|) sum_{(i, j) in P} [J_ij]+^2

A row's loss is half of its pairs'. The smooth r is a log-sum-exp over ``v = -D``: its statistics, and W of the
negatives, are those of the softmax family without the row's own group, with ``c_i = dL / dr_i`` for the weight:

    W_ij + W_ji = c_i softmax_j(v_ij) + c_j softmax_i(v_ij)

The positive pairs, of which there are few, are visited one by one, before (L), and before the second sweep (c and their
own gradient); their distances are formed from the differences of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.listed_pairs import add_differences_, pair_squares
from ..engine.problem import Pairs, Problem
from .base import Objective, empty_table
from .hardest import Hardest, hardest_negatives
from .softmax import fold_sum_exp, logarithms, merge_sum_exp, probabilities


class _Lifted(Objective):
    """The positive pairs' part, over the rows' r."""

    margin: float

    @classmethod
    def from_parameters(cls, parameters: list[float]):
        return cls(*parameters)

    @property
    def parameters(self) -> list[float]:
        return [self.margin]

    def _combine(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of r_i and r_j, what J takes, and its slope in r_i."""
        raise NotImplementedError

    def _of_rows(self, row_table: Tensor) -> Tensor:
        """r, ``[N]``; -inf for a row without negatives."""
        raise NotImplementedError

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> Tensor:
        """The positive pairs."""
        return problem.positive_counts.sum().to(problem.statistics_dtype) / 2

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        r = self._of_rows(row_table)
        losses = torch.zeros_like(r, dtype=torch.float64)
        for i, j, rows, (r_of,) in problem.positive_pairs(r):
            combined, _ = self._combine(r_of[i], r_of[j])
            loss = (combined + pair_squares(rows, i, j).sqrt()).clamp(min=0).square() / 4
            of_rows = losses.new_zeros(len(rows))
            of_rows.index_put_((i,), loss.double(), accumulate=True)
            of_rows.index_put_((j,), loss.double(), accumulate=True)
            losses += of_rows[: len(losses)]
        return losses.to(r.dtype) + problem.squares * 0  # a NaN shows, whatever its row counts for

    def _positive_gradients(self, problem: Problem, row_table: Tensor, grad_rows: Tensor, d_query: Tensor) -> Tensor:
        """Adds the positive pairs' gradients to ``d_query``; returns ``dL / dr``, ``[N]``."""
        r = self._of_rows(row_table)
        slopes, own = torch.zeros_like(r, dtype=torch.float64), len(r)
        for i, j, rows, (r_of, grad_of) in problem.positive_pairs(r, grad_rows):
            combined, share = self._combine(r_of[i], r_of[j])
            distance = pair_squares(rows, i, j).sqrt()
            slope = (combined + distance).clamp(min=0) * (grad_of[i] + grad_of[j]) / 2
            counted = slope != 0
            of_rows = slopes.new_zeros(len(rows))
            of_rows.index_put_((i,), torch.where(counted, slope * share, 0).double(), accumulate=True)
            of_rows.index_put_((j,), torch.where(counted, slope * (1 - share), 0).double(), accumulate=True)
            slopes += of_rows[:own]
            gradient = d_query if len(rows) == own else d_query.new_zeros(rows.shape)
            add_differences_(gradient, rows, i, j, torch.where(distance > 0, slope / distance, 0))
            if gradient is not d_query:
                d_query += gradient[:own]
        return slopes.to(r.dtype)


@dataclass(frozen=True)
class Lifted(_Lifted):
    """Oh Song et al. 2016, with the log-sum-exp bound that the paper trains with."""

    margin: float = 1.0

    name = "lifted"
    family = "softmax"
    by_distance = "distance"
    needs_columns = True
    uses_target = False
    roles = (False, True)

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        return empty_table(3, rows, like), None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        v = _negatives(s, pairs)
        for dim, table in ((1, row_table), (0, column_table)):
            if table is not None:
                fold_sum_exp(v, 1.0, dim, table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        merge_sum_exp(table, other, 1.0)

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        slopes = self._positive_gradients(problem, row_table, grad_rows, d_query)
        top, log_sum = logarithms(row_table[0], row_table[1])
        return torch.stack([top, log_sum, slopes, torch.zeros_like(top), torch.zeros_like(top)]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        out.copy_(probabilities(_negatives(s, pairs), pairs, row_table, column_table))

    def _of_rows(self, row_table: Tensor) -> Tensor:
        return self.margin + row_table[0] + row_table[1].log()

    def _combine(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(a, b), (a - b).sigmoid()


@dataclass(frozen=True)
class HardLifted(_Lifted, Hardest):
    """The paper's equation 3, of which :class:`Lifted` is a smooth upper bound."""

    margin: float = 1.0

    name = "hard_lifted"

    def add_gradient(self, problem: Problem, row_table: Tensor, grad_rows: Tensor, d_query: Tensor) -> None:
        slopes = self._positive_gradients(problem, row_table, grad_rows, d_query)
        valid, negative = hardest_negatives(row_table)

        def slope(squares: Tensor) -> Tensor:
            return torch.where(valid & (squares > 0), -slopes * squares.rsqrt(), 0)

        problem.add_pairs_(d_query, negative, slope)

    def _of_rows(self, row_table: Tensor) -> Tensor:
        return torch.where(row_table[1] >= 0, self.margin - (-row_table[0]).sqrt(), -torch.inf)

    def _combine(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """At a tie the two share, as in torch.maximum."""
        return torch.maximum(a, b), (a > b).to(a.dtype) + (a == b).to(a.dtype) / 2


def _negatives(v: Tensor, pairs: Pairs) -> Tensor:
    """``v`` with the entries of the row's own group, itself included, at -inf."""
    v = v.masked_fill(pairs.same_group(), -torch.inf)
    return v.fill_diagonal_(-torch.inf) if pairs.diagonal else v
