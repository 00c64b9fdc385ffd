r"""The softmax family: InfoNCE, CLIP, and all that is a cross entropy over similarities.

With logits ``l_ij = logit_scale * <x_i, y_j>``, ``t_i`` the positive of row i, ``W`` columns in all and
label smoothing ``e``::

    L_i  = lse_j l_ij - (1 - e) l_i,t_i - e / W sum_j l_ij                      one direction
    L_i  = 1/2 [the same over row i] + 1/2 [the same over column t_i]           symmetric
    dL_i / dl_ij = softmax_j(l_ij) - (1 - e) [j = t_i] - e / W

Similarities are signed so that a larger one is a larger logit, ``v_ij = sign(logit_scale) <x_i, y_j>``, and a
log-sum-exp is kept as a pair (max of v, sum of exp(|logit_scale| (v - max))) from the first tile to the last
gradient, never as one number: at ``logit_scale = 1000`` one fp32 number has an error of 6e-5, which is the relative
error of every probability formed from it, and so has a logit that is rounded before the maximum is taken from it.
``v - max`` loses nothing. For the same reason the positive's v is picked out of the tile that computed it, so that
``max - positive`` is exactly 0 when the positive is the largest.

Tables (one row a quantity, so that a tile takes a slice of all of them at once):

    row statistics      [3, N]  max, sum, positive         column statistics    [2, M]  max, sum
    row coefficients    [5, N]  max, log_sum, weight, positive_weight, offset
    column coefficients [4, M]  max, log_sum, weight, offset

    W_ij = weight_i exp(|logit_scale| (v_ij - max_i) - log_sum_i) - offset_i - [j = t_i] positive_weight_i
         + weight_j exp(|logit_scale| (v_ij - max_j) - log_sum_j) - offset_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Problem


@dataclass(frozen=True)
class Softmax:
    """Cross entropy of every row, and with ``symmetric`` of every positive's column too."""

    symmetric: bool = False
    label_smoothing: float = 0.0

    name = "softmax"

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> Softmax:
        symmetric, label_smoothing = parameters
        return cls(bool(symmetric), label_smoothing)

    @property
    def parameters(self) -> list[float]:
        return [float(self.symmetric), float(self.label_smoothing)]

    @property
    def needs_columns(self) -> bool:
        return self.symmetric

    @property
    def one_tile_parameters(self) -> tuple[bool] | None:
        """What the native call for a single tile takes beyond features and target; None if it cannot serve."""
        return None if self.label_smoothing else (self.symmetric,)

    # -- sweep 1 ---------------------------------------------------------------------------------------------

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tables of an empty set: the lowest max, no sum, no positive."""
        return _empty_table(3, rows, like), _empty_table(2, columns, like) if self.symmetric else None

    def update_statistics(self, s, scale, target, first_column, row_table, column_table) -> None:
        """Fold a tile of products ``s[R, C]`` into the statistics of its rows and columns."""
        v = s * sign(scale)
        _fold_sum_exp(v, abs(scale), 1, row_table)
        if column_table is not None:
            _fold_sum_exp(v, abs(scale), 0, column_table)
        if target is not None:
            inside, column = _targets_inside(target, first_column, s.shape[1])
            row_table[2] = torch.where(inside, v.gather(1, column).squeeze(1), row_table[2])

    # -- combine ---------------------------------------------------------------------------------------------

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        """``L_i`` of every row, ``[N]``."""
        row_max, row_sum, positive = row_table
        steepness = abs(problem.scale)
        loss = (row_max - positive) * steepness + row_sum.log()
        if self.label_smoothing:
            loss = loss + self.label_smoothing * (positive * steepness - problem.total_logits() / max(problem.width, 1))
        if self.symmetric:
            column_max, column_sum = column_table[:, problem.target]
            column_loss = (column_max - positive) * steepness + column_sum.log()
            if self.label_smoothing:
                mean = problem.total_column_logits()[problem.target] / max(problem.rows, 1)
                column_loss = column_loss + self.label_smoothing * (positive * steepness - mean)
            loss = (loss + column_loss) / 2
        return loss

    def coefficients(self, problem, row_table, column_table, grad_rows) -> tuple[Tensor, Tensor | None]:
        """What a tile needs to know of its rows and columns to form W, for upstream gradients ``dL/dL_i``."""
        smoothing = self.label_smoothing
        weight = grad_rows / 2 if self.symmetric else grad_rows
        row_max, row_sum, _ = row_table
        positive_weight, offset = grad_rows * (1 - smoothing), weight * (smoothing / max(problem.width, 1))
        rows = torch.stack([row_max, row_sum.log(), weight, positive_weight, offset])
        if not self.symmetric:
            return rows, None
        column_max, column_sum = column_table
        # A column that is no row's positive has weight 0, one that is several rows' has their sum.
        weight = torch.zeros_like(column_max).index_put_((problem.target,), weight, accumulate=True)
        return rows, torch.stack([column_max, column_sum.log(), weight, weight * (smoothing / max(problem.rows, 1))])

    # -- sweep 2 ---------------------------------------------------------------------------------------------

    def weights(self, s, out, scale, target, first_column, row_coefficients, column_coefficients) -> Tensor:
        """``out = W = dL/dl`` of a tile of products ``s``; the two may be the same tensor."""
        v, steepness = s * sign(scale), abs(scale)
        row_max, log_sum, weight, positive_weight, offset = row_coefficients.unsqueeze(2)
        w = ((v - row_max) * steepness - log_sum).exp_() * weight - offset
        if column_coefficients is not None:
            column_max, log_sum, weight, offset = column_coefficients
            w += ((v - column_max) * steepness - log_sum).exp_() * weight - offset
        if target is not None:
            inside, column = _targets_inside(target, first_column, s.shape[1])
            w.scatter_add_(1, column, torch.where(inside.unsqueeze(1), -positive_weight, 0))
        return out.copy_(w)


def _empty_table(quantities: int, count: int, like: Tensor) -> Tensor:
    table = like.new_zeros((quantities, count))
    table[0] = torch.finfo(like.dtype).min
    return table


def sign(scale: float | Tensor) -> int | Tensor:
    """-1 for a negative scale, else 1; without reading the value of a tensor."""
    if isinstance(scale, Tensor):
        return torch.where(scale < 0, -1, 1)
    return -1 if scale < 0 else 1


def _fold_sum_exp(v: Tensor, steepness: float | Tensor, dim: int, table: Tensor) -> None:
    """Merge the sum of ``exp(steepness (v - max))`` along ``dim`` into ``table = (max, sum, ...)``."""
    old_max, old_sum = table[0], table[1]
    new_max = torch.maximum(old_max, v.amax(dim))
    total = ((v - new_max.unsqueeze(dim)) * steepness).exp_().sum(dim)
    old_sum.mul_(((old_max - new_max) * steepness).exp_()).add_(total)
    old_max.copy_(new_max)


def _targets_inside(target: Tensor, first_column: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows have their positive in this tile, ``[R]``, and its column there, ``[R, 1]`` (0 where not).

    A mask and not a list of rows: finding how many there are would make a GPU wait.
    """
    column = target - first_column
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0).unsqueeze(1)
