r"""Classification with a margin on the true class: ArcFace and CosFace.

With cosines ``c_ij`` of row i to class j, ``t_i`` its class, and phi the cosine under a margin m::

    l_ij = scale c_ij,  l_i,t_i = scale phi(c_i,t_i)
    L_i  = lse_j l_ij - l_i,t_i
    dL_i / dl_ij = softmax_j(l_ij) - [j = t_i],  times phi'(c) at the true class

    ArcFace  phi(c) = cos(arccos c + m) while arccos c + m <= pi, beyond it c - max(m sin m, 1 - cos m), so that phi
             keeps falling: c - m sin m, as published, would jump up where m is above 2.33
             phi'(c) = sin(arccos c + m) / sin(arccos c), or 1
    CosFace  phi(c) = c - m

phi' grows without bound as c approaches 1, while the gradient of c shrinks as sin(arccos c): their product is of order
1, and neither can be had from a cosine: rounding it in fp32 is an error of 6 % in the square of an angle of 1e-3.
So the true class has nothing to do with the tiles. With u and v the unit rows of the features and of the class, it is
read off ``q = |u - v|^2``, formed from the difference, as are its gradients::

    c = 1 - q / 2,   sin^2 = q (1 - q / 4),   dc/du = v - c u = (v - u) + q / 2 u,   dc/dv the same with u and v changed

(Zeros, and what is too short to be normalised, have no length of 1: there c is the product, and q is 2 - 2 c.) The true
class joins the sweep's sums afterwards, per row, so that 1 - P is the others' share, without a rounding. Statistics and
coefficients are those of :mod:`.softmax`, but that q takes the positive's place; ``positive_weight`` is the true
class's W, which the passes leave at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.columns import blocks
from ..engine.listed_pairs import BLOCK_ELEMENTS, add_rows_
from ..engine.problem import Pairs, Problem, is_whole
from .base import Objective, empty_table
from .softmax import fold_sum_exp, merge_sum_exp, probabilities


@dataclass(frozen=True)
class MarginSoftmax(Objective):
    """A margin added to the angle (``angular``) or taken from the cosine."""

    margin: float
    angular: bool

    name = "margin_softmax"
    family = "softmax"
    unit_features = True
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

    def prepared(self, problem: Problem, row_table: Tensor, column_table: None) -> tuple[Tensor, None]:
        """With q of the true classes that are here."""
        for rows, here, *pairs in _true_pairs(problem):
            row_table[2, rows] = torch.where(here, chord_squares(*pairs), 0)
        return row_table, None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        fold_sum_exp(_without_target(s, pairs), pairs.scale, 1, row_table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        """Merge statistics of the same rows over other classes. The true class's q is in one table, 0 in the others."""
        merge_sum_exp(table, other, scale)

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        phi, _, top, others, total = self._joined(problem, row_table)
        return (top - phi) * problem.scale + total.log()

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, None]:
        _, slope, top, others, total = self._joined(problem, row_table)
        positive = -grad_rows * (others / total) * slope
        return torch.stack([top, total.log(), grad_rows, positive, torch.zeros_like(top)]), None

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        out.copy_(probabilities(_without_target(s, pairs), pairs, row_table, column_table))

    def add_target_gradients(self, problem: Problem, row_table: Tensor, d_query: Tensor | None, d_keys: Tensor | None):
        for rows, here, unit, true, normalised in _true_pairs(problem):
            difference, half = unit - true, chord_squares(unit, true, normalised).unsqueeze(1) / 2
            weight = torch.where(here, row_table[3, rows], 0).unsqueeze(1)
            whole = normalised.unsqueeze(1)
            if d_query is not None:
                d_query[rows] += weight * torch.where(whole, half * unit - difference, true)
            if d_keys is not None:
                of_class = weight * torch.where(whole, half * true + difference, unit)
                add_rows_(d_keys, torch.where(here, problem.target[rows], 0), of_class)

    def _joined(self, problem: Problem, row_table: Tensor) -> tuple[Tensor, ...]:
        """phi, phi', and with the true class: the max, the others' sum and the whole sum of exp."""
        others_max, others_sum, square = row_table
        phi, slope = self._with_margin(square)
        top = torch.maximum(others_max, phi)
        others = others_sum * ((others_max - top) * problem.scale).exp()
        return phi, slope, top, others, others + ((phi - top) * problem.scale).exp()

    def _with_margin(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """phi and phi', of q."""
        square = above_rounding(square)
        cosine = 1 - square / 2
        if not self.angular:
            return cosine - self.margin, torch.ones_like(cosine)
        sine = (square * (1 - square / 4).clamp(min=0)).sqrt()
        within = cosine > -math.cos(self.margin)
        phi = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        slope = math.cos(self.margin) + math.sin(self.margin) * cosine / torch.where(sine > 0, sine, torch.inf)
        return torch.where(within, phi, cosine - angular_drop(self.margin)), torch.where(within, slope, 1)


def chord_squares(unit: Tensor, true: Tensor, normalised: Tensor) -> Tensor:
    """q of pairs of rows, ``[R]``; ``normalised``: which pairs are both of length 1."""
    return torch.where(normalised, (unit - true).square().sum(1), 2 - 2 * (unit * true).sum(1))


def above_rounding(square: Tensor) -> Tensor:
    """``|u - v|^2`` of unit rows; 0 where it is no more than the rounding of u and v, whose direction tells nothing.

    There the gradient of the angle, of length 1 however small that is, is taken as 0.
    """
    return torch.where(square <= (4 * torch.finfo(square.dtype).eps) ** 2, 0, square)


def angular_drop(margin: float) -> float:
    """What is taken from the cosine where angle and margin exceed pi."""
    return max(margin * math.sin(margin), 1 - math.cos(margin))


def _true_pairs(problem: Problem) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Some rows at a time: (rows, whose true class is here, u, v, which of them are both of length 1)."""
    (classes,) = problem.sources
    dtype = problem.statistics_dtype
    for rows in blocks(problem.rows, max(BLOCK_ELEMENTS // max(problem.query.shape[1], 1), 1)):
        target = problem.target[rows]
        here = (target >= 0) & (target < classes.width)
        unit = problem.unit_query(rows, dtype)
        if not classes.width:  # a rank without classes
            yield rows, here, unit, torch.zeros_like(unit), here
            continue
        target = torch.where(here, target, 0)
        true = classes.features[target].to(dtype) * classes.inverse_norms[target].unsqueeze(1)
        normalised = [is_whole(norms) for norms in (problem.inverse_norms[rows], classes.inverse_norms[target])]
        yield rows, here, unit, true, normalised[0] & normalised[1]


def _without_target(s: Tensor, pairs: Pairs) -> Tensor:
    """``s`` with every row's true class at -inf."""
    inside, column = pairs.inside(s.shape[1])
    return s.scatter(1, column, torch.where(inside.unsqueeze(1), -torch.inf, s.gather(1, column)))
