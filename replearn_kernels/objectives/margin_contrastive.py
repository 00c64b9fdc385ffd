r"""The margin contrastive loss: pairs of one group attract, all others repel up to a margin.

With ``D_ij = |x_i - x_j|`` = -v_ij, of every pair::

    positives   D^2         or, not squared, D
    negatives   [margin - D]+^2             [margin - D]+

A row's loss is half of its pairs'; the mean is over the N (N - 1) / 2 pairs. An entry needs nothing but itself, so one
sweep yields losses and gradients.

    row table  [2, N]  loss, which the passes add to; weight (dL/dL_i)

    W_ij + W_ji = (weight_i + weight_j) / 2 dl_ij / dv_ij
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective


@dataclass(frozen=True)
class MarginContrastive(Objective):
    """Hadsell, Chopra, LeCun 2006 (``squared``), and its plain hinge."""

    margin: float = 1.0
    squared: bool = True

    name = "margin_contrastive"
    family = "margin_contrastive"
    by_distance = "distance"
    needs_statistics = False
    uses_target = False

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> MarginContrastive:
        margin, squared = parameters
        return cls(margin, bool(squared))

    @property
    def parameters(self) -> list[float]:
        return [self.margin, float(self.squared)]

    @property
    def roles(self) -> tuple[float, bool]:
        return self.margin, self.squared

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        table = like.new_zeros((2, rows))
        table[1].fill_(1)
        return table, None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        losses = self._losses(s, pairs)
        row_table[0] += losses.sum(1) / 2
        if column_table is not None:
            column_table[0] += losses.sum(0) / 2

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        table[0] += other[0]

    def share_losses(self, table: Tensor, before: Tensor, own: int) -> None:
        gained = (table[0, :own] - before[0, :own]) / 2
        table[0, :own] = before[0, :own] + gained
        table[0, own : own + 1] += gained.sum()  # their sum is all that counts

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        return row_table[0] + problem.squares * 0  # a NaN shows, whatever its row counts for

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> float:
        """The pairs: half of the own rows' with all."""
        return problem.rows * (problem.total_rows - 1) / 2

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        return torch.stack([torch.zeros_like(grad_rows), grad_rows]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Adds the losses to the rows of ``row_table``, too; a mirror image's to the same row, as the sum is all."""
        row_table[0] += self._losses(s, pairs).sum(1) / (2 if pairs.diagonal else 1)
        weight = (row_table[1].unsqueeze(1) + column_table[1]) / 2
        short = (s + self.margin).clamp(min=0)  # of the margin
        if self.squared:
            slope = torch.where(pairs.same_group(), s, short) * 2
        else:
            slope = torch.where(pairs.same_group(), -1, (short > 0).to(s.dtype))
        out.copy_(slope * weight)

    def _losses(self, s: Tensor, pairs: Pairs) -> Tensor:
        losses = torch.where(pairs.same_group(), -s, (s + self.margin).clamp(min=0))
        if self.squared:
            losses = losses.square()
        return losses.fill_diagonal_(0) if pairs.diagonal else losses
