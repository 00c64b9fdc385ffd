r"""Classification with a margin on the true class: ArcFace and CosFace.

With cosines ``c_ij`` of row i to class j, ``t_i`` its class, and phi the cosine under a margin m::

    l_ij = scale c_ij,  l_i,t_i = scale phi(c_i,t_i)
    L_i  = lse_j l_ij - l_i,t_i
    dL_i / dl_ij = softmax_j(l_ij) - [j = t_i],  times phi'(c) at the true class

    ArcFace  phi(c) = cos(arccos c + m) while arccos c + m <= pi, beyond it c - m sin m, so that phi keeps falling
             phi'(c) = sin(arccos c + m) / sin(arccos c), or 1
    CosFace  phi(c) = c - m

phi' grows without bound as c approaches 1, while the gradient of c with respect to the features shrinks as
sin(arccos c): only their product is meant. In phi', sin^2 is kept above the rounding of c, so that it stays finite.

The true class takes no part in the sweep's sums. It joins them afterwards, per row, so that 1 - P is the others' share,
without a rounding. Statistics and coefficients are those of :mod:`.softmax`; ``positive_weight`` is the true class's W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from .base import Objective, empty_table
from .softmax import fold_sum_exp, merge_sum_exp, pick_targets, probabilities


@dataclass(frozen=True)
class MarginSoftmax(Objective):
    """A margin added to the angle (``angular``) or taken from the cosine."""

    margin: float
    angular: bool

    name = "margin_softmax"
    family = "softmax"
    unit_keys = True
    target_name = "labels"
    roles = (True, False)

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> MarginSoftmax:
        margin, angular = parameters
        return cls(margin, bool(angular))

    @property
    def parameters(self) -> list[float]:
        return [float(self.margin), float(self.angular)]

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, None]:
        return empty_table(3, rows, like), None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        pick_targets(s, pairs, row_table[2])
        fold_sum_exp(_without_target(s, pairs), pairs.scale, 1, row_table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        """Of the same rows, over other classes: the true class's cosine is in one table, and 0 in the others."""
        merge_sum_exp(table, other, scale)

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        phi, _, top, others, total = self._joined(problem, row_table)
        return (top - phi) * problem.scale + total.log()

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        _, slope, top, others, total = self._joined(problem, row_table)
        positive = -grad_rows * (others / total) * slope
        return torch.stack([top, total.log(), grad_rows, positive, torch.zeros_like(top)]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        w = probabilities(_without_target(s, pairs), pairs, row_table, column_table)
        inside, column = pairs.inside(s.shape[1])
        out.copy_(w.scatter_add_(1, column, torch.where(inside, row_table[3], 0).unsqueeze(1)))

    def _joined(self, problem: Problem, row_table: Tensor) -> tuple[Tensor, ...]:
        """phi, phi', and with the true class: the max, the others' sum and the whole sum of exp."""
        others_max, others_sum, cosine = row_table
        phi, slope = self._with_margin(cosine)
        top = torch.maximum(others_max, phi)
        others = others_sum * ((others_max - top) * problem.scale).exp()
        return phi, slope, top, others, others + ((phi - top) * problem.scale).exp()

    def _with_margin(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """phi and phi'."""
        if not self.angular:
            return cosine - self.margin, torch.ones_like(cosine)
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        inside = cosine.clamp(-1, 1)  # a product of unit rows may round beyond 1
        squared_sine = (1 - inside) * (1 + inside)
        within = cosine > -cos_m
        phi = torch.where(within, inside * cos_m - squared_sine.sqrt() * sin_m, cosine - self.margin * sin_m)
        sine = squared_sine.clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
        return phi, torch.where(within, cos_m + sin_m * inside / sine, 1)


def _without_target(s: Tensor, pairs: Pairs) -> Tensor:
    """``s`` with every row's true class at -inf."""
    inside, column = pairs.inside(s.shape[1])
    return s.scatter(1, column, torch.where(inside.unsqueeze(1), -torch.inf, s.gather(1, column)))
