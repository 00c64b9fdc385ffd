"""Toy losses whose parameters are tensors, and their formulas row by row: what learns is the ``scale`` of a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from declared_toys import Contrastive, numbers_of, stacked
from metric_oracle import distances, others
from torch import Tensor

from replearn_kernels.declare import PairLoss, fuse, logsumexp, relu, softplus, total, where


@dataclass(frozen=True)
class Bias(PairLoss):
    """One sweep, whose only sums over pairs are the loss and the bias's derivative."""

    bias: float | Tensor = -1.0

    scaled = True

    def terms(self, logit, pair):
        biased = logit + self.bias
        return {"loss": total(softplus(where(pair.same, -biased, biased)))}


@dataclass(frozen=True)
class Steep(PairLoss):
    """A batch: a factor, an offset and what is neither, in sums and totals; and the formula reads a parameter."""

    margin: float | Tensor = 0.2
    gamma: float | Tensor = 3.0

    batch, similarity = True, "cosine"

    def terms(self, s, pair):
        m = self.margin
        near, far = relu(1 + m - s) * (1 - m - s), relu(s + m) * (s - m)
        return {
            "positives": logsumexp(self.gamma * near, where=pair.same),
            "negatives": logsumexp(self.gamma * far + 2 * m, where=pair.other),
            "squares": total(m * s**2, where=pair.same),
        }

    def loss(self, row):
        return F.softplus(row.positives + row.negatives) + self.margin * row.squares / 9


@dataclass(frozen=True)
class Columns(PairLoss):
    """Statistics of the columns, too, of numbers of rows and columns."""

    gamma: float | Tensor = 3.0
    power: float | Tensor = 0.5

    symmetric, row_values, column_values = True, ("weight",), ("weight",)

    def terms(self, s, pair):
        return {
            "every": logsumexp(self.gamma * s - self.power * pair.row.weight * pair.column.weight * s**2),
            "own": total(self.gamma * s, where=pair.target),
        }

    def loss(self, row, column):
        return (row.every + column.every) / 2 - row.own


@dataclass(frozen=True)
class Sides(PairLoss):
    """A batch in which a pair is another one seen from its column."""

    power: float | Tensor = 1.5

    batch, row_values = True, ("grade",)

    def terms(self, s, pair):
        return {"every": logsumexp(s * (1 + self.power * pair.column.grade))}

    def loss(self, row):
        return where_finite(row.every) * row.grade


@dataclass(frozen=True)
class Totals(PairLoss):
    """One sweep over a batch of products."""

    power: float | Tensor = 1.5
    shift: float | Tensor = 0.1

    batch = True

    def terms(self, s, pair):
        return {"t": total(softplus(self.power * s - self.shift)), "u": total(self.shift * s**2, where=pair.same)}


def where_finite(x: Tensor) -> Tensor:
    return torch.where(x > -torch.inf, x, 0)


# -- calls and oracles, which declared_cases.py has in its table ----------------------------------------------------


def call_bias(x, y, labels, scale, **options):
    return fuse(Bias(-scale), **options)(x, y, scale, query_group=labels, key_group=labels)


def bias(x, y, labels, scale):
    losses = []
    for i in range(len(x)):
        signs = torch.where(labels == labels[i], -1, 1)
        losses.append(F.softplus(signs * scale * (y @ x[i] - 1), threshold=1000).sum())
    return stacked(x, losses), len(x)


def call_steep(x, y, labels, scale, **options):
    return fuse(Steep(0.2 / (1 + scale**2).sqrt(), scale.reshape(1)), **options)(x, labels)


def steep(x, y, labels, scale):
    s, losses, m = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t(), [], 0.2 / (1 + scale**2).sqrt()
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        p, n = s[i, positives], s[i, negatives]
        near = (scale * (1 + m - p).clamp(min=0) * (1 - m - p)).logsumexp(0)
        far = (scale * (n + m).clamp(min=0) * (n - m) + 2 * m).logsumexp(0)
        losses.append(torch.logaddexp(near + far, near.new_zeros(())) + m**2 * (p**2).sum() / 9)
    return stacked(x, losses), len(x)


def call_columns(x, y, labels, scale, **options):
    (weight,) = numbers_of(labels, 1)
    loss = fuse(Columns(scale, (scale + 1) / 8), **options)
    return loss(x, y, row_values={"weight": weight}, column_values={"weight": weight.flip(0)})


def columns(x, y, labels, scale):
    s, (weight,) = x @ y.t(), numbers_of(labels, 1)
    terms = scale * s - (scale + 1) / 8 * weight.unsqueeze(1) * weight.flip(0) * s**2
    return (terms.logsumexp(1) + terms.logsumexp(0)) / 2 - scale * s.diagonal(), len(x)


def call_sides(x, y, labels, scale, **options):
    return fuse(Sides(scale), **options)(x, row_values={"grade": numbers_of(labels, 1)[0]})


def sides(x, y, labels, scale):
    s, (grade,), losses = x @ x.t(), numbers_of(labels, 1), []
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        losses.append((s[i, rest] * (1 + scale * grade[rest])).logsumexp(0) * grade[i] if rest else scale * s[i, i] * 0)
    return stacked(x, losses), len(x)


def call_totals(x, y, labels, scale, **options):
    return fuse(Totals(scale, scale / 4), **options)(x, labels)


def totals(x, y, labels, scale):
    s, losses = x @ x.t(), []
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        rest = sorted(positives + negatives)
        losses.append(F.softplus(scale * s[i, rest] - scale / 4, threshold=1000).sum())
        losses[i] = losses[i] + (scale / 4 * s[i, positives] ** 2).sum()
    return stacked(x, losses), len(x)


def call_contrastive(x, y, labels, scale, **options):
    return fuse(Contrastive(scale * 0.4), **options)(x, labels)


def contrastive(x, y, labels, scale):
    d, losses = distances(x), []
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        losses.append((d[i, positives] ** 2).sum() + ((scale * 0.4 - d[i, negatives]).clamp(min=0) ** 2).sum())
    return stacked(x, losses), len(x)
