"""Toy losses, which use what the shipped ones do not, and what calls give them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from replearn_kernels.declare import (
    PairLoss,
    clamp,
    exp,
    log,
    logsumexp,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    total,
    where,
)


@dataclass(frozen=True)
class Clip(PairLoss):
    """A statistic of the columns alone beside the rows'."""

    scaled, symmetric = True, True

    def terms(self, logit, pair):
        return {"every": logsumexp(logit), "own": total(logit, where=pair.target)}

    def loss(self, row, column):
        return (row.every + column.every) / 2 - row.own


@dataclass(frozen=True)
class SigLip(PairLoss):
    """One sweep over pairs."""

    scaled = True

    def terms(self, logit, pair):
        return {"loss": total(softplus(where(pair.same, -logit, logit)))}


@dataclass(frozen=True)
class Contrastive(PairLoss):
    """One sweep over a batch, of distances; two totals, an option and a parameter."""

    margin: float = 1.0
    squared: bool = True

    batch, similarity = True, "distance"

    def terms(self, d, pair):
        power = 2 if self.squared else 1
        return {
            "near": total(d**power, where=pair.same),
            "far": total(relu(self.margin - d) ** power, where=pair.other),
        }


@dataclass(frozen=True)
class Squares(PairLoss):
    """A batch of squared distances: terms with an offset and a negative factor, a mean over weights."""

    weight: float = 0.7

    batch, similarity = True, "squared_distance"

    def terms(self, d, pair):
        return {
            "near": total(self.weight * (d - 1), where=pair.same),
            "far": logsumexp(2 - self.weight * d, where=pair.other),
            "count": total(1, where=pair.same),
        }

    def loss(self, row):
        return torch.where(row.count > 0, row.near, 0) + torch.where(row.far > -math.inf, row.far, 0)

    def counted(self, row):
        return row.count


@dataclass(frozen=True)
class Margin(PairLoss):
    """The positive's cosine less a margin: the loss reads the scale itself."""

    margin: float = 0.2

    scaled = True

    def terms(self, logit, pair):
        return {"rest": logsumexp(logit, where=~pair.target), "own": total(logit, where=pair.target)}

    def loss(self, row):
        own = row.own - self.margin * row.logit_scale
        return torch.logaddexp(own, row.rest) - own


@dataclass(frozen=True)
class Everything(PairLoss):
    """Every function that an author can write."""

    a: float = 0.3
    b: float = -0.4

    scaled = True

    def terms(self, logit, pair):
        u = clamp(logit / 4, self.b, self.a) + minimum(logit, self.a) + maximum(logit / 3, self.b)
        v = sqrt(logit * logit + 1) - abs(logit) + log(1.5 + sigmoid(logit)) + softplus(u) - exp(self.b * u / 8)
        return {
            "v": total(v.detach() * u - v**3 / 10, where=(logit > self.b) | pair.target),
            "w": logsumexp(where(pair.same & (logit <= self.a), u, v), where=~(pair.target & (logit >= 0))),
        }

    def loss(self, row):
        return row.v / 10 + row.w


@dataclass(frozen=True)
class Graded(PairLoss):
    """A batch by numbers of its rows: terms that are others seen from a pair's row than from its column."""

    gamma: float = 3.0

    batch, similarity, row_values = True, "cosine", ("grade", "weight")

    def terms(self, s, pair):
        near = abs(pair.row.grade - pair.column.grade) < 0.6
        return {
            "near": logsumexp(self.gamma * (pair.column.weight - s), where=near),
            "far": logsumexp(self.gamma * s + pair.row.grade / 4, where=~near),
            "above": total(s * s * pair.column.weight, where=near & (pair.row.grade > pair.column.grade)),
        }

    def loss(self, row):
        near, far = (torch.where(term > -math.inf, term, 0) for term in (row.near, row.far))
        return row.weight * F.softplus(near + far) + row.above

    def counted(self, row):
        return row.weight


@dataclass(frozen=True)
class OwnMargins(PairLoss):
    """One sweep over the distances of a batch, where every row has a margin of its own."""

    batch, similarity, row_values = True, "distance", ("margin",)

    def terms(self, d, pair):
        return {
            "near": total(d * pair.column.margin, where=pair.same),
            "far": total(relu(pair.row.margin - d) ** 2, where=pair.other),
        }


@dataclass(frozen=True)
class Spread(PairLoss):
    """A batch of distances without labels."""

    batch, similarity = True, "distance"

    def terms(self, d, pair):
        return {"near": logsumexp(-2 * d)}

    def loss(self, row):
        return torch.where(row.near > -math.inf, row.near, 0)


@dataclass(frozen=True)
class Regression(PairLoss):
    """One sweep over a batch, of terms that are the same from either side of a pair."""

    batch, scaled, row_values = True, True, ("grade",)

    def terms(self, logit, pair):
        return {"error": total((logit - exp(-abs(pair.row.grade - pair.column.grade))) ** 2)}


@dataclass(frozen=True)
class Sampled(PairLoss):
    """Queries and keys with values of either, in the terms of rows and columns and in the formula."""

    scaled, symmetric, row_values, column_values = True, True, ("weight", "skipped"), ("log_q", "weight")

    def terms(self, logit, pair):
        corrected = logit - where(pair.target, 0, pair.column.log_q)
        return {
            "every": logsumexp(corrected, where=pair.target | (pair.row.skipped < 0.5)),
            "own": total(logit, where=pair.target),
        }

    def loss(self, row, column):
        return row.weight * (row.every - row.own) + column.weight * (column.every - column.own)

    def counted(self, row):
        return row.weight > 1.2


@dataclass(frozen=True)
class Filtered(PairLoss):
    """Rows and columns by the similarities of a guide, in conditions, terms and slopes."""

    scaled, symmetric, guide, row_values = True, True, "cosine", ("threshold",)

    def terms(self, logit, pair):
        return {
            "every": logsumexp(logit + pair.guide / 2, where=pair.target | (pair.guide < pair.row.threshold)),
            "own": total(logit * exp(pair.guide), where=pair.target),
        }

    def loss(self, row, column):
        return (row.every + column.every) / 2 - row.own


@dataclass(frozen=True)
class Guided(PairLoss):
    """A batch of distances, with products of a guide."""

    batch, similarity, guide, row_values = True, "distance", "product", ("weight",)

    def terms(self, d, pair):
        return {
            "near": total(d**2 * pair.guide * pair.row.weight, where=pair.same),
            "far": logsumexp(-d * (1 + pair.guide**2), where=pair.every & (pair.guide > -0.5)),
        }

    def loss(self, row):
        return row.near + torch.where(row.far > -math.inf, row.far, 0)


@dataclass(frozen=True)
class Imitation(PairLoss):
    """One sweep over a batch whose products are to be those of a guide."""

    batch, guide = True, "product"

    def terms(self, s, pair):
        return {"error": total((s - pair.guide) ** 2)}


def stacked(x: Tensor, losses: list[Tensor]) -> Tensor:
    """The losses of the rows x as one tensor; of no rows an empty one, through which gradients go."""
    return torch.stack(losses) if losses else x.sum(1)


def guides_of(labels: Tensor, width: int = 3) -> tuple[Tensor, Tensor]:
    """Features of rows and columns that no other input has, in which rows of one label are near."""
    place = torch.arange(len(labels), device=labels.device).double().unsqueeze(1)
    k = torch.arange(1, width + 1, device=labels.device)
    rows, columns = ((labels.unsqueeze(1) + shift + 0.3 * place * k).sin() + 0.1 * k for shift in (0.0, 0.5))
    return rows, columns


def numbers_of(labels: Tensor, count: int) -> list[Tensor]:
    """Some numbers for every row: quarters from 1 on, in which rows of one label differ."""
    place = torch.arange(len(labels), device=labels.device)
    return [1 + ((place * (3 + 2 * k) + labels) % 6).double() / 4 for k in range(count)]
