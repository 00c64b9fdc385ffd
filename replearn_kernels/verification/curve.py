"""What thresholds are worth: how many pairs of one label, and of different ones, each of them accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import validation

Objective = Callable[[Tensor, Tensor, int, int], Tensor]
"""Of accepted pairs of one label and of others, and of how many there are of each. More of the first are never worse,
nor fewer of the others."""

OBJECTIVES: dict[str, Objective] = {
    "accuracy": lambda same, other, of_same, of_other: (same + of_other - other) / (of_same + of_other),
    "balanced_accuracy": lambda same, other, of_same, of_other: (same / of_same + 1 - other / of_other) / 2,
    "f1": lambda same, other, of_same, of_other: 2 * same / (same + other + of_same),
}


def apart(same: Tensor, other: Tensor, of_same: int, of_other: int) -> Tensor:
    """FAR - FRR: ascends from -1, of a threshold that accepts no pair, to 1. Counts are fp64."""
    return other / of_other - (1 - same / of_same)


class Best(NamedTuple):
    """What :meth:`Curve.best` returns."""

    value: float
    threshold: float


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    r"""The receiver operating characteristic of a test whether two rows have one label, point by point.

    A threshold accepts the pairs whose similarity is at least the threshold, or whose distance is at most it. Of the
    pairs of one label it accepts the share *TAR* (true accept rate; FRR, the false reject rate, is 1 - TAR), of the
    others the share *FAR* (false accept rate). :func:`roc` makes a curve of given pairs, with a point for every value
    that occurs; :func:`roc_of_labels` makes one of all pairs of a labelled set, with the points that it was asked for.

    Attributes:
        thresholds: fp64 ``[T]``, the strictest first, which accepts no pair (infinite); the last accepts all.
        same, other: int64 ``[T]``, how many pairs of one label, and of different ones, are accepted: exact.
        auc: the area under TAR over FAR: how often a pair of one label comes before one of different ones, ties counted
            half.
        auc_bounds: what the area lies between: of :func:`roc` twice the same number.
        resolution: scores in [k resolution, (k + 1) resolution) count as one, for an integer k; 0 if all are told
            apart. A score is a similarity, or the square of a distance.
    """

    thresholds: Tensor
    same: Tensor
    other: Tensor
    auc: float
    auc_bounds: tuple[float, float]
    resolution: float
    fars: tuple[float, ...] | None  # the FARs whose points are among these, with 0 and 1; None: all
    objectives: tuple[str, ...]  # whose best points are among these

    def __repr__(self) -> str:
        pairs = f"{self.same_pairs} pairs of one label, {self.other_pairs} of different ones"
        return f"Curve({len(self.thresholds)} points of {pairs}, EER {self.eer:.4g}, AUC {self.auc:.4g})"

    @property
    def _counts(self) -> tuple[Tensor, Tensor, int, int]:
        return self.same.double(), self.other.double(), self.same_pairs, self.other_pairs

    @property
    def same_pairs(self) -> int:
        """How many pairs have one label."""
        return int(self.same[-1])

    @property
    def other_pairs(self) -> int:
        """How many pairs have different labels."""
        return int(self.other[-1])

    @property
    def tar(self) -> Tensor:
        """fp64 ``[T]``"""
        return self.same.double() / self.same_pairs

    @property
    def far(self) -> Tensor:
        """fp64 ``[T]``"""
        return self.other.double() / self.other_pairs

    def tar_at_far(self, far: float | Iterable[float]) -> float | list[float]:
        """The largest TAR of a threshold whose FAR is at most ``far``, in [0, 1]; of several FARs a list.

        Of a FAR below 1 / ``other_pairs`` it is the TAR without a false acceptance.

        Raises:
            TypeError, ValueError: ``far`` is no number in [0, 1].
            ValueError: a curve of :func:`roc_of_labels` that was not asked for this FAR.
        """
        return _of_each(far, lambda each: float(self.tar[self.at_far(each)]))

    def threshold_at_far(self, far: float | Iterable[float]) -> float | list[float]:
        """A threshold of that TAR, infinite where it accepts no pair. Raises what :meth:`tar_at_far` does."""
        return _of_each(far, lambda each: float(self.thresholds[self.at_far(each)]))

    def at_far(self, far: float) -> int:
        """The point of :meth:`tar_at_far`."""
        far = self._asked_for(validation.check_fraction("far", far))
        return int((self.far <= far).sum()) - 1

    def _asked_for(self, far: float) -> float:
        """The same, or the one that this is in fp32, say."""
        if self.fars is None or far == 1 or far * self.other_pairs < 1:
            return far
        nearest = min(self.fars, key=lambda asked: abs(asked - far), default=0.0)
        if not math.isclose(nearest, far, rel_tol=1e-6):
            raise ValueError(
                f"this curve was not asked for a FAR of {far:g}: roc_of_labels(..., far=({far:g},)) finds it"
            )
        return nearest

    @property
    def eer(self) -> float:
        """The equal error rate: FAR = FRR, on the line between the two points about it."""
        before, after, share = self.at_eer
        return float(torch.lerp(self.far[before], self.far[after], share))

    @property
    def eer_threshold(self) -> float:
        """Of these two points, that of which FAR and FRR are nearest to each other."""
        before, after, share = self.at_eer
        return float(self.thresholds[before if share < 0.5 else after])

    @cached_property
    def at_eer(self) -> tuple[int, int, float]:
        """The points about it, and what part of the way from the first to the second it lies."""
        more = apart(*self._counts)
        after = int((more < 0).sum())
        before = after - 1
        return before, after, float(more[before] / (more[before] - more[after]))

    def best(self, objective: str = "accuracy") -> Best:
        """The largest value of an objective, and the strictest threshold that has it.

            "accuracy"            the share of pairs that are told rightly
            "balanced_accuracy"   (TAR + 1 - FAR) / 2
            "f1"                  2 precision TAR / (precision + TAR): precision is the share of accepted pairs that
                                  have one label

        Raises:
            ValueError: another objective, or one that a curve of :func:`roc_of_labels` was not asked for.
        """
        point, value = self.at_best(objective)
        return Best(value, float(self.thresholds[point]))

    def at_best(self, objective: str) -> tuple[int, float]:
        """The point of :meth:`best`, and its value."""
        validation.check_choice("objective", objective, tuple(OBJECTIVES))
        if objective not in self.objectives:
            raise ValueError(
                f"this curve was not asked for the best {objective}: roc_of_labels(..., best={objective!r}) finds it"
            )
        values = OBJECTIVES[objective](*self._counts)
        point = int((values == values.max()).nonzero()[0])
        return point, float(values[point])


def _of_each(values: float | Iterable[float], of: Callable[[float], float]) -> float | list[float]:
    values = listed(values)
    return [of(value) for value in values] if isinstance(values, list) else of(values)


def listed(values: float | Iterable[float]) -> float | list[float]:
    """Several as a list; tensors and arrays may have one."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values


def check_both_kinds(same: int, other: int) -> None:
    if not same or not other:
        raise ValueError(f"there must be pairs of one label and pairs of different ones, got {same} and {other}")


def roc(values: Tensor, same: Tensor, *, distance: bool = False) -> Curve:
    r"""The curve of given pairs, exact: a point for every value.

    Args:
        values: ``[P]``, fp16, bf16, fp32 or fp64: similarities of pairs, of whatever model.
        same: bool ``[P]``, whether a pair has one label.
        distance: whether ``values`` are distances, the smaller the more alike. Default False.

    Returns:
        A :class:`Curve`.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: another shape or device; NaN or infinity; no pair of one label, or none of different ones.

    >>> curve = roc(pair_similarities(first, second), same)
    >>> curve.eer, curve.tar_at_far(1e-3), curve.best("accuracy")
    """
    values, same = check_pairs(values, same)
    validation.check_flag("distance", distance)
    check_both_kinds(int(same.sum()), int((~same).sum()))
    sign = -1.0 if distance else 1.0
    scores, order = (sign * values + 0.0).sort(descending=True)
    last = torch.nn.functional.pad(scores[1:] != scores[:-1], (0, 1), value=True)  # of those of one score
    of_kinds = (same[order].cumsum(0)[last], (~same[order]).cumsum(0)[last])
    of_same, of_other = (torch.nn.functional.pad(counts, (1, 0)) for counts in of_kinds)
    thresholds = sign * torch.nn.functional.pad(scores[last], (1, 0), value=torch.inf) + 0.0  # no zero below zero
    between = (of_same[1:] + of_same[:-1]).double() / 2
    auc = float((between * of_other.diff()).sum() / float(of_same[-1] * of_other[-1].double()))
    return Curve(thresholds, of_same, of_other, auc, (auc, auc), 0.0, None, tuple(OBJECTIVES))


def check_pairs(values: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Values of pairs as fp64, and their kinds."""
    validation.check_features("values", values, ndim=1, shape="1 dimension [P]")
    validation.check_tensor("same", same)
    if same.dtype != torch.bool:
        raise TypeError(f"same must be bool, got {same.dtype} (same.bool() of 0 and 1)")
    if same.shape != values.shape:
        raise ValueError(f"same must have shape {tuple(values.shape)}, one per value, got {tuple(same.shape)}")
    if same.device != values.device:
        raise ValueError(f"same must be on the values' device {values.device}, got {same.device}")
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        raise ValueError(f"values must be finite, got NaN or infinity at {int(wrong[0])}, and {len(wrong)} such in all")
    return values.detach().double(), same
