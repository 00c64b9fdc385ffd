"""Toy losses of single pairs, the largest or smallest of a row, and their formulas row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from declared_toys import numbers_of, stacked
from metric_oracle import distances, others
from torch import Tensor

from replearn_kernels.declare import PairLoss, fuse, largest, logsumexp, relu, smallest, total


@dataclass(frozen=True)
class Triplets(PairLoss):
    """A batch's farthest positive and nearest negative, with the soft margin."""

    batch, similarity = True, "distance"

    def terms(self, d, pair):
        return {"far": largest(d, where=pair.same), "near": smallest(d, where=pair.other)}

    def loss(self, row):
        return torch.where(self.counted(row), F.softplus(row.far - row.near), 0)

    def counted(self, row):
        return (row.far > -math.inf) & (row.near < math.inf)


@dataclass(frozen=True)
class Violation(PairLoss):
    """The hardest negative of a row and of its target's column, by what reads two parameters and the scale."""

    margin: float | Tensor = 0.2
    power: float | Tensor = 0.3

    scaled, symmetric = True, True

    def terms(self, logit, pair):
        return {
            "own": total(logit, where=pair.target),
            "hardest": largest(self.power * logit + self.margin * relu(logit) ** 2 + self.margin, where=~pair.target),
        }

    def loss(self, row, column):
        hardest = torch.where(row.hardest > -math.inf, row.hardest, 0) + column.hardest.clamp(min=-10)
        return F.softplus(self.margin + hardest - row.own)


@dataclass(frozen=True)
class Among(PairLoss):
    """Statistics of rows alone: sums of exponentials beside a smallest with a negative factor."""

    scaled = True

    def terms(self, logit, pair):
        return {"every": logsumexp(logit), "least": smallest(3 - 2 * logit, where=pair.same)}

    def loss(self, row):
        return row.every + torch.where(row.least < math.inf, row.least, 0)


@dataclass(frozen=True)
class Grades(PairLoss):
    """A batch in which a pair is another one seen from its column."""

    power: float | Tensor = 1.0

    batch, row_values = True, ("grade",)

    def terms(self, s, pair):
        return {"most": largest(self.power * s * pair.column.grade - s**2 * pair.row.grade), "every": logsumexp(s)}

    def loss(self, row):
        return torch.where(row.most > -math.inf, row.most * row.grade + row.every, 0)


@dataclass(frozen=True)
class Shifted(PairLoss):
    """By numbers of the rows: where these are NaN, pairs are that have finite rows."""

    power: float | Tensor = 1.0

    batch, row_values = True, ("shift",)

    def terms(self, s, pair):
        shifted = self.power * s + pair.row.shift + pair.column.shift
        return {"most": largest(shifted, where=pair.same), "every": total(s)}

    def loss(self, row):
        return torch.where(row.most == -math.inf, 0, row.most) + row.every


@dataclass(frozen=True)
class Scaled(PairLoss):
    """A factor that may be 0: then all values are alike."""

    power: float | Tensor

    def terms(self, s, pair):
        return {"most": largest(self.power * s)}

    def loss(self, row):
        return row.most * 2.0


# -- calls and oracles, which declared_cases.py has in its table ----------------------------------------------------


def triplets(x, y, labels, scale):
    d, losses, counted = distances(x), [], 0
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        counts = bool(positives and negatives)
        losses.append(F.softplus(d[i, positives].max() - d[i, negatives].min()) if counts else d[i].sum() * 0)
        counted += counts
    return stacked(x, losses), counted


def call_violation(x, y, labels, scale, **options):
    return fuse(Violation(0.2 / (1 + scale**2), 1 / (1 + scale**2).reshape(1)), **options)(x, y, scale)


def violation(x, y, labels, scale):
    logits, losses, margin, power = scale * x @ y.t(), [], 0.2 / (1 + scale**2), 1 / (1 + scale**2)
    f = power * logits + margin * logits.relu() ** 2 + margin
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        hardest = f[i, rest].max() + f[rest, i].max() if rest else logits[i, i] * 0 - 10
        losses.append(F.softplus(margin + hardest - logits[i, i]))
    return stacked(x, losses), len(x)


def call_among(x, y, labels, scale, **options):
    return fuse(Among(), **options)(x, y, scale, query_group=labels, key_group=labels.flip(0))


def among(x, y, labels, scale):
    logits, losses = scale * x @ y.t(), []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if labels.flip(0)[j] == labels[i]]
        losses.append(logits[i].logsumexp(0) + ((3 - 2 * logits[i, same]).min() if same else 0))
    return stacked(x, losses), len(x)


def call_graded(x, y, labels, scale, **options):
    return fuse(Grades(scale), **options)(x, row_values={"grade": numbers_of(labels, 1)[0]})


def graded(x, y, labels, scale):
    s, (grade,), losses = x @ x.t(), numbers_of(labels, 1), []
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        if not rest:
            losses.append(scale * s[i, i] * 0)
            continue
        most = (scale * s[i, rest] * grade[rest] - s[i, rest] ** 2 * grade[i]).max()
        losses.append(most * grade[i] + s[i, rest].logsumexp(0))
    return stacked(x, losses), len(x)
