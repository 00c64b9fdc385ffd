r"""The sigmoid family: SigLIP, a binary classification of every pair.

With logits ``l_ij = logit_scale * <x_i, y_j> + logit_bias`` and ``z_ij`` = 1 for a positive pair, -1 for all others::

    L_i = sum_j softplus(-z_ij l_ij)
    W_ij = dL_i / dl_ij = -z_ij sigmoid(-z_ij l_ij)

An entry needs nothing but itself, so one sweep yields losses and gradients. One exponential serves both: with
``u = exp(-|l|)``, softplus(l) = max(l, 0) + log1p(u) and sigmoid(l) is 1 / (1 + u) or u / (1 + u); nothing overflows,
and a loss of 1e-30 keeps its digits. Logits are formed from fp32 products, whatever the features' dtype.

    row table  [3, N]  loss and weight_sum (sum_j W_ij, for the bias), which the passes add to; weight (dL/dL_i)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective


@dataclass(frozen=True)
class Sigmoid(Objective):
    """Positives are the targets, or with ``by_group`` all pairs of one group."""

    by_group: bool = False

    name = "sigmoid"
    family = "sigmoid"
    needs_statistics = False

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> Sigmoid:
        return cls(bool(parameters[0]))

    @property
    def parameters(self) -> list[float]:
        return [float(self.by_group)]

    @property
    def uses_target(self) -> bool:
        return not self.by_group

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        table = like.new_zeros((3, rows))
        table[2].fill_(1)
        return table, None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        wrong, z = _wrong_side(s, pairs)
        row_table[0] -= F.logsigmoid(-wrong).sum(1)
        row_table[1] -= (z * wrong.sigmoid()).sum(1)

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        return row_table[0].clone()

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        return torch.stack([torch.zeros_like(grad_rows), torch.zeros_like(grad_rows), grad_rows]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Adds to the losses and sums of W in ``row_table``, too."""
        self.update_statistics(s, pairs, row_table, column_table)
        wrong, z = _wrong_side(s, pairs)
        out.copy_(wrong.sigmoid_().mul_(z).mul_(-row_table[2].unsqueeze(1)))

    def bias_gradient(self, row_coefficients: Tensor) -> Tensor:
        _, weight_sum, weight = row_coefficients.double()
        return weight_sum @ weight


def _wrong_side(s: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``-z l``, how far every logit is on the wrong side of 0, and ``z``."""
    if pairs.row_group is not None:
        positive = pairs.same_group()
    else:
        inside, column = pairs.inside(s.shape[1])
        positive = torch.zeros_like(s, dtype=torch.bool).scatter_(1, column, inside.unsqueeze(1))
    z = torch.where(positive, 1, -1).to(s.dtype)
    return -z * (s * pairs.scale + pairs.bias), z
