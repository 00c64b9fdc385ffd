r"""Supervised contrastive losses over the pairs of a batch: SupCon, and NT-Xent where every group is one pair.

With logits ``l_ij = <z_i, z_j> / temperature``, i != j, and ``P_i`` the other rows of row i's group::

    L_i = lse_{j != i} l_ij - 1 / |P_i| sum_{p in P_i} l_ip          0 for a row without positives
    dL_i / dl_ij = softmax_j(l_ij) - [j in P_i] / |P_i|

The mean is over the rows that have a positive. Numerics are those of :mod:`.softmax`; S is symmetric, so a tile serves
its columns as it serves its rows, from one table:

    statistics   [3, N]  max, sum, positive (the sum of v over P_i)
    coefficients [5, N]  max, log_sum, weight, positive_weight, offset (0)

    W_ij + W_ji = weight_i softmax_i(v_ij) + weight_j softmax_j(v_ij)
                - [same group] (positive_weight_i + positive_weight_j)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective, empty_table, sign, steepness
from .softmax import fold_sum_exp, logarithms, merge_sum_exp, probabilities


@dataclass(frozen=True)
class SupCon(Objective):
    """``L_out`` of Khosla et al.; positives by group, a row never compared with itself."""

    group_size: int = 0

    name = "sup_con"
    family = "softmax"
    needs_columns = True
    uses_target = False
    by_temperature = True
    roles = (False, False)

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> SupCon:
        return cls(int(parameters[0]))

    @property
    def parameters(self) -> list[float]:
        return [float(self.group_size)]

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        return empty_table(3, rows, like), None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        v = s * sign(pairs.scale)
        positives = v.masked_fill(~pairs.same_group(), 0)
        for dim, table in ((1, row_table), (0, column_table)):
            if table is not None:
                table[2] += positives.sum(dim)
                fold_sum_exp(_without_self(v, pairs), steepness(pairs.scale), dim, table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        merge_sum_exp(table, other, steepness(scale))

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        row_max, row_sum, positive = row_table
        counts = problem.positive_counts
        loss = (row_max - positive / counts.clamp(min=1)) * abs(problem.scale) + row_sum.log()
        return torch.where((counts > 0) | row_sum.isnan(), loss, 0)  # a NaN shows, whatever its row counts for

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> Tensor:
        return (problem.positive_counts > 0).sum().to(problem.statistics_dtype)

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        row_max, row_sum, _ = row_table
        counts = problem.positive_counts
        weight = torch.where(counts > 0, grad_rows, 0)
        row_max, log_sum = logarithms(row_max, row_sum)
        positive_weight = weight / counts.clamp(min=1)
        return torch.stack([row_max, log_sum, weight, positive_weight, torch.zeros_like(weight)]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        w = probabilities(_without_self(s * sign(pairs.scale), pairs), pairs, row_table, column_table)
        w -= (row_table[3].unsqueeze(1) + column_table[3]).masked_fill_(~pairs.same_group(), 0)
        out.copy_(w)


def _without_self(v: Tensor, pairs: Pairs) -> Tensor:
    return v.clone().fill_diagonal_(-torch.inf) if pairs.diagonal else v
