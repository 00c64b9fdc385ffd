"""What the losses of labelled rows in other libraries have and this library's own have not: references, which are other
rows with labels of their own, and lists of the positive pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..declare import PairLoss, logsumexp, relu, total
from ..declare.compute import batch_loss, pair_loss
from ..functional.rows import unit_rows
from ..pair_losses.circle import Circle
from ..pair_losses.multi_similarity import MultiSimilarity


@dataclass(frozen=True)
class SupConOfReferences(PairLoss):
    """SupCon of rows against other rows; 0 of a row without a positive."""

    scaled = True

    def terms(self, logit, pair):
        positives = {"own": total(logit, where=pair.same), "count": total(1, where=pair.same)}
        return {"all": logsumexp(logit), **positives}

    def loss(self, row):
        return torch.where(row.count > 0, row.all - row.own / row.count.clamp(min=1), 0.0)


@dataclass(frozen=True)
class CircleOfReferences(Circle):
    """Circle loss of rows against other rows."""

    batch, similarity = False, "product"


@dataclass(frozen=True)
class MultiSimilarityOfReferences(MultiSimilarity):
    """Multi-similarity loss of rows against other rows."""

    batch, similarity = False, "product"


@dataclass(frozen=True, kw_only=True)
class Compared(PairLoss):
    """Losses of distances, where near means small, and of similarities, in a batch and of rows against other rows."""

    batch: bool
    similarity: str

    @property
    def sign(self) -> int:
        """1 where near means small, else -1."""
        return 1 if self.similarity == "distance" else -1


@dataclass(frozen=True)
class Hinges(Compared):
    """The hinges of a row's positive pairs, or of its negative ones, with the mean over pairs or those above 0."""

    side: str  # "same" or "other"
    above_zero: bool
    margin: float

    def terms(self, s, pair):
        beyond = self.sign * ((s - self.margin) if self.side == "same" else (self.margin - s))
        where = getattr(pair, self.side)
        counted = where & (beyond > 0) if self.above_zero else where
        return {"sum": total(relu(beyond), where=where), "counted": total(1, where=counted)}

    def loss(self, row):
        return row.sum

    def counted(self, row):
        return row.counted


@dataclass(frozen=True)
class Lifted(Compared):
    """Soft maxima of a row's positive distances and, negative, of its negative ones; 0 over none."""

    positive_margin: float
    negative_margin: float

    def terms(self, s, pair):
        near, far = s - self.positive_margin, self.negative_margin - s
        return {
            "positives": logsumexp(self.sign * near, where=pair.same),
            "negatives": logsumexp(self.sign * far, where=pair.other),
        }

    def loss(self, row):
        maxima = (torch.where(one > -torch.inf, one, 0.0) for one in (row.positives, row.negatives))
        return sum(maxima).relu()


@dataclass(frozen=True)
class Negatives(Compared):
    """The soft maximum of a row's negative distances, taken from the margin; -inf over none."""

    margin: float

    def terms(self, s, pair):
        return {"all": logsumexp(self.sign * (self.margin - s), where=pair.other)}

    def loss(self, row):
        return row.all


def as_integers(labels: Tensor) -> Tensor:
    """Labels as integers: others by their rank among the values that occur, so that equal ones stay equal."""
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels if is_integer else labels.unique(return_inverse=True)[1]


class LabelledPairs:
    """Rows and columns, each with labels. ``own``: they are the same, and no row is compared with itself.

    Args:
        rows, labels: ``[N, d]``, ``[N]``.
        references, ref_labels: ``[M, d]``, ``[M]``, or the same tensors.
        normalize: compare rows of length 1.
    """

    def __init__(self, rows: Tensor, labels: Tensor, references: Tensor, ref_labels: Tensor, normalize: bool):
        self.own = references is rows
        if self.own:
            self.labels = self.ref_labels = as_integers(labels)
        else:
            together = as_integers(torch.cat([labels, ref_labels]))
            self.labels, self.ref_labels = together.split([len(labels), len(ref_labels)])
        self.rows = unit_rows(rows) if normalize else rows
        if self.own:
            self.columns = self.rows
        else:
            self.columns = unit_rows(references) if normalize else references

    @property
    def groups(self) -> dict[str, Tensor]:
        return {"query_group": self.labels, "key_group": self.ref_labels}

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns in the order of their labels; for every row where there its label begins, and how often it occurs."""
        order = self.ref_labels.argsort(stable=True)
        labels = self.ref_labels[order]
        first = torch.searchsorted(labels, self.labels)
        return order, first, torch.searchsorted(labels, self.labels, right=True) - first

    @cached_property
    def counts(self) -> tuple[int, int]:
        """How many positive pairs there are, and how many negative ones."""
        n, m = len(self.labels), len(self.ref_labels)
        of_one_label = int(self._runs[2].sum())
        return of_one_label - n * self.own, n * m - of_one_label

    @cached_property
    def positives(self) -> tuple[Tensor, Tensor]:
        """All positive pairs, ``[P]`` rows and ``[P]`` columns, row by row."""
        order, first, counts = self._runs
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        place = torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]
        column = order[first[row] + place]
        if self.own:
            other = row != column
            row, column = row[other], column[other]
        return row, column

    def losses(self, loss: PairLoss, options: dict, **how) -> Tensor:
        """A declared loss of every row or reduced; it is one of a batch if the columns are the rows."""
        how = {"normalize": False, "reduction": "none", **how, **options}
        if loss.batch:
            return batch_loss(loss, self.rows, self.labels, **how)
        return pair_loss(loss, self.rows, self.columns, **self.groups, **how)
