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

Tables (one row a quantity):

    row statistics      [3, N]  max, sum, positive         column statistics    [2, M]  max, sum
    row coefficients    [5, N]  max, log_sum, weight, positive_weight, offset
    column coefficients [5, M]  the same, without positives

    W_ij = weight_i exp(|logit_scale| (v_ij - max_i) - log_sum_i) - offset_i - [j = t_i] positive_weight_i
         + weight_j exp(|logit_scale| (v_ij - max_j) - log_sum_j) - offset_j

With ``groups_ignored``, columns of the row's own group are left out of its sum, but for its positive (Sohn's N-pair
loss with labels). With ``own_positives`` (MoCo) a row's positive is the first of its own columns, which are a source of
width 1 beside the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective, empty_table, sign, steepness


@dataclass(frozen=True)
class Softmax(Objective):
    """Cross entropy of every row, and with ``symmetric`` of every positive's column too."""

    symmetric: bool = False
    label_smoothing: float = 0.0
    groups_ignored: bool = False
    own_positives: bool = False

    name = "softmax"
    family = "softmax"

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> Softmax:
        symmetric, label_smoothing, groups_ignored, own_positives = parameters
        return cls(bool(symmetric), label_smoothing, bool(groups_ignored), bool(own_positives))

    @property
    def parameters(self) -> list[float]:
        flags = float(self.groups_ignored), float(self.own_positives)
        return [float(self.symmetric), float(self.label_smoothing), *flags]

    @property
    def needs_columns(self) -> bool:
        return self.symmetric

    @property
    def has_offsets(self) -> bool:
        return self.label_smoothing != 0

    @property
    def roles(self) -> tuple[bool, bool]:
        return False, self.groups_ignored

    @property
    def one_tile_parameters(self) -> tuple[bool] | None:
        return None if self.label_smoothing or self.groups_ignored or self.own_positives else (self.symmetric,)

    # -- sweep 1 ---------------------------------------------------------------------------------------------

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        return empty_table(3, rows, like), empty_table(2, columns, like) if self.symmetric else None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        v = s * sign(pairs.scale)
        if pairs.target is not None:
            pick_targets(v, pairs, row_table[2])
        v = self._masked(v, pairs)
        fold_sum_exp(v, steepness(pairs.scale), 1, row_table)
        if column_table is not None:
            fold_sum_exp(v, steepness(pairs.scale), 0, column_table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        merge_sum_exp(table, other, steepness(scale))

    # -- combine ---------------------------------------------------------------------------------------------

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        row_max, row_sum, positive = row_table
        steep = abs(problem.scale)
        loss = (row_max - positive) * steep + row_sum.log()
        if self.label_smoothing:
            loss = loss + self.label_smoothing * (positive * steep - problem.total_logits() / max(problem.width, 1))
        if self.symmetric:
            column_max, column_sum = problem.at_targets(column_table)
            column_loss = (column_max - positive) * steep + column_sum.log()
            if self.label_smoothing:
                mean = problem.at_targets(problem.total_column_logits()) / max(problem.total_rows, 1)
                column_loss = column_loss + self.label_smoothing * (positive * steep - mean)
            loss = (loss + column_loss) / 2
        return loss

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, Tensor | None]:
        smoothing = self.label_smoothing
        weight = grad_rows / 2 if self.symmetric else grad_rows
        row_max, row_sum, _ = row_table
        positive_weight, offset = grad_rows * (1 - smoothing), weight * (smoothing / max(problem.width, 1))
        rows = torch.stack([row_max, row_sum.log(), weight, positive_weight, offset])
        if not self.symmetric:
            return rows, None
        column_max, column_sum = column_table
        # A column that is no row's positive has weight 0, one that is several rows' has their sum.
        weight = problem.sum_at_targets(weight)
        offset = weight * (smoothing / max(problem.total_rows, 1))
        return rows, torch.stack([column_max, column_sum.log(), weight, torch.zeros_like(weight), offset])

    # -- sweep 2 ---------------------------------------------------------------------------------------------

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        w = probabilities(self._masked(s * sign(pairs.scale), pairs), pairs, row_table, column_table)
        if pairs.target is not None:
            inside, column = pairs.inside(s.shape[1])
            w.scatter_add_(1, column, torch.where(inside, -row_table[3], 0).unsqueeze(1))
        out.copy_(w)

    def _masked(self, v: Tensor, pairs: Pairs) -> Tensor:
        """``v`` with the entries that count in no sum at -inf."""
        if not self.groups_ignored or pairs.row_group is None:
            return v
        inside, column = pairs.inside(v.shape[1])
        kept = v.gather(1, column)
        v = v.masked_fill(pairs.same_group(), -torch.inf)
        return v.scatter(1, column, torch.where(inside.unsqueeze(1), kept, v.gather(1, column)))


def fold_sum_exp(
    v: Tensor, steep: float | Tensor, dim: int, table: Tensor, weighted: Sequence[Tensor] = ()
) -> None:
    """Merge the sum of ``exp(steep (v - max))`` along ``dim`` into ``table = (max, sum, ...)``, and into what follows
    the sum of that times each of the ``weighted``."""
    old_max, sums = table[0], table[1 : 2 + len(weighted)]
    new_max = torch.maximum(old_max, v.amax(dim))
    exps = ((v - new_max.unsqueeze(dim)) * steep).exp_()
    sums.mul_(((old_max - new_max) * steep).exp_())
    sums[0].add_(exps.sum(dim))
    for total, values in zip(sums[1:], weighted):
        total.add_((exps * values).sum(dim))
    old_max.copy_(new_max)


def logarithms(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(max, log of sum) of coefficients, where rows may be alone, with an empty sum.

    Its logarithm times a weight of 0 would be NaN. The highest max in place of the lowest makes all probabilities 0.
    """
    empty = total == 0
    return torch.where(empty, torch.finfo(top.dtype).max, top), torch.where(empty, 1, total).log()


def merge_sum_exp(table: Tensor, other: Tensor, steep: float | Tensor, weighted: int = 0) -> None:
    """Merge two tables ``(max, sum, ...)`` of one column each, in place. The next ``weighted`` quantities are sums
    against the same max; what follows them adds up."""
    new_max, sums = torch.maximum(table[0], other[0]), slice(1, 2 + weighted)
    table[sums].mul_(((table[0] - new_max) * steep).exp_()).add_(other[sums] * ((other[0] - new_max) * steep).exp_())
    table[0].copy_(new_max)
    table[2 + weighted :] += other[2 + weighted :]


def pick_targets(v: Tensor, pairs: Pairs, positive: Tensor) -> None:
    """``positive[i] = v[i, target]`` for the rows that have their target in this tile."""
    inside, column = pairs.inside(v.shape[1])
    positive.copy_(torch.where(inside, v.gather(1, column).squeeze(1), positive))


def probabilities(v: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> Tensor:
    """W without its positives: the weighted softmax of rows and columns, less the offsets."""
    steep = steepness(pairs.scale)
    row_max, log_sum, weight, _, offset = row_table.unsqueeze(2)
    w = ((v - row_max) * steep - log_sum).exp_() * weight - offset
    if column_table is not None:
        column_max, log_sum, weight, _, offset = column_table
        w += ((v - column_max) * steep - log_sum).exp_() * weight - offset
    return w
