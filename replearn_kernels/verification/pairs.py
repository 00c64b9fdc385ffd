"""Given pairs: their similarities, and thresholds that are judged on pairs they were not chosen on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import validation
from ..engine.operators import refuse_transforms
from ..engine.schedules import on_device_of
from ..retrieval.arguments import finite_rows, resolve_backend
from ..retrieval.bounds import SIMILARITIES, Scores, as_values
from .curve import Curve, check_pairs, roc


@torch._disable_dynamo
@torch.no_grad()
def pair_similarities(
    query: Tensor,
    gallery: Tensor | None = None,
    *,
    pairs: Tensor | tuple[Tensor, Tensor] | None = None,
    similarity: str = "cosine",
    backend: str = "auto",
) -> Tensor:
    r"""Similarities of given pairs of rows, or distances, which have no gradient.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64.
        gallery: ``[M, d]``. None (default): the queries, of which ``pairs`` names two.
        pairs: integers ``[P, 2]``, or two ``[P]``: a row of the queries, from 0, and one of the gallery. Rows are not
            copied. None (default): row i of the queries with row i of the gallery (N = M).
        similarity: "cosine" (default), "product", "distance" or "squared_distance", as in :func:`~..retrieval.topk`.
        backend: "auto" (default), "cpp" (CPU) or "torch" (any device).

    Returns:
        fp64 ``[P]``, formed in fp64 from the rows as they are.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device or dtype; NaN or infinity in a row; neither a gallery nor pairs;
            a pair of a row that there is not; an unknown similarity or backend.
        RuntimeError: the backend asked for is not available here.

    >>> curve = roc(pair_similarities(first, second), same)               # [P, d] each
    >>> curve = roc(pair_similarities(templates, pairs=(p1, p2)), same)   # IJB's list of pairs
    """
    validation.check_features("query", query)
    validation.check_choice("similarity", similarity, SIMILARITIES)
    refuse_transforms()
    backend = resolve_backend(backend, query.device)
    if gallery is not None:
        validation.check_features("gallery", gallery)
        validation.check_alike("gallery", gallery, "query", query)
    elif pairs is None:
        raise ValueError("gallery or pairs must be given: they tell which rows are compared")
    row, column = _rows_of(pairs, query, gallery)
    with on_device_of(query):
        of_query = finite_rows("query", query)
        of_gallery = of_query if gallery is None or gallery is query else finite_rows("gallery", gallery)
        scores = Scores.of(of_query, of_gallery, similarity)
        if backend == "cpp":
            values = torch.empty(len(row), dtype=torch.float64)
            torch.ops.replearn_kernels.listed_scores_(*scores.arguments, row, column, values)
        else:
            values = scores.listed(row, column)
        return as_values(values, similarity)


def _rows_of(
    pairs: Tensor | tuple[Tensor, Tensor] | None, query: Tensor, gallery: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A row of each for every pair, int64 ``[P]``."""
    if pairs is None:
        validation.check_same_rows("gallery", gallery, "query", query)
        rows = torch.arange(query.shape[0], device=query.device)
        return rows, rows
    sides = pairs
    if not isinstance(pairs, tuple):
        validation.check_tensor("pairs", pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must have shape (P, 2), got {tuple(pairs.shape)}")
        sides = pairs.unbind(1)
    elif len(pairs) != 2:
        raise ValueError(f"pairs must be two tensors, or one of shape (P, 2), got {len(pairs)}")
    count = len(sides[0]) if isinstance(sides[0], Tensor) and sides[0].ndim else 0
    row, column = (validation.check_labels("pairs", side, count, query).contiguous() for side in sides)
    gallery, name = (query, "queries") if gallery is None else (gallery, "gallery")
    for side, index, rows in (("queries", row, query.shape[0]), (name, column, gallery.shape[0])):
        if count and (int(index.min()) < 0 or int(index.max()) >= rows):
            wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
            raise ValueError(f"pairs must be of rows in [0, {rows}) of the {side}, got {wrong}")
    return row, column


@dataclass(frozen=True, eq=False)
class Folds:
    """What :func:`k_fold` finds, of each of K folds in their order.

    Attributes:
        accuracy: fp64 ``[K]``: the share of the fold's pairs that are told rightly, by a threshold of the other folds.
        thresholds: fp64 ``[K]``
        tar, far: fp64 ``[K]``, of the fold's pairs, at a threshold whose FAR on the other folds is at most the one
            that was asked for; None if none was.
    """

    accuracy: Tensor
    thresholds: Tensor
    tar: Tensor | None
    far: Tensor | None

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return float(self.accuracy.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, as LFW reports it: the accuracies' standard deviation (of a sample) / sqrt(K). (InsightFace
        reports ``accuracy.std(correction=0)``.)"""
        return float(self.accuracy.std()) / len(self.accuracy) ** 0.5


def k_fold(
    values: Tensor, same: Tensor, *, folds: int | Tensor = 10, far: float | None = None, distance: bool = False
) -> Folds:
    r"""Accuracy of verification, each fold's at the threshold that is best on the other ones: the protocol of LFW.

    Huang et al., "Labeled Faces in the Wild", 2007 (UMass Amherst, technical report 07-49): 6,000 pairs in ten folds,
    in the order of the list. A threshold lies halfway between the two values that it parts; of equally good ones the
    strictest is taken.

    Args:
        values: ``[P]``, fp16, bf16, fp32 or fp64: similarities of pairs.
        same: bool ``[P]``, whether a pair has one label.
        folds: a number K >= 2 of parts of the list, as equal as they can be, or integers ``[P]``, equal ones of one
            fold. Default 10.
        far: in [0, 1]: TAR and FAR are wanted, too, at such a FAR on the other folds. Default None.
        distance: whether ``values`` are distances, the smaller the more alike. Default False.

    Returns:
        :class:`Folds`

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: as :func:`roc`; fewer than 2 folds, or more than pairs; a fold without a pair of one label, or
            without one of different ones, as of a list that is sorted by ``same``.

    >>> result = k_fold(pair_similarities(first, second), same)
    >>> f"{result.mean:.2%} +- {result.standard_error:.2%}"
    """
    values, same = check_pairs(values, same)
    validation.check_flag("distance", distance)
    if far is not None:
        far = validation.check_fraction("far", far)
    members = _members(folds, values)
    for number, of_fold in enumerate(members):
        kinds = same[of_fold]
        if kinds.all() or not kinds.any():
            raise ValueError(
                f"every fold must have pairs of one label and of different ones, and fold {number} has "
                f"{int(kinds.sum())} and {int((~kinds).sum())}: unless folds are given, they are parts of the list in "
                "its order"
            )
    found = [_on_fold(values, same, of_fold, far, distance) for of_fold in members]
    accuracy, thresholds, tar, false = torch.tensor(found, dtype=torch.float64).unbind(1)
    return Folds(accuracy, thresholds, *((None, None) if far is None else (tar, false)))


def _members(folds: int | Tensor, values: Tensor) -> list[Tensor]:
    """bool ``[P]`` of every fold."""
    if isinstance(folds, Tensor):
        number = validation.check_labels("folds", folds, len(values), values).unique(return_inverse=True)[1]
        count = int(number.max()) + 1 if len(number) else 0
    else:
        count = validation.check_count("folds", folds, 2)
        sizes = [len(part) for part in torch.arange(len(values)).tensor_split(min(count, len(values) + 1))]
        number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(values.device)
    if not 2 <= count <= len(values):
        raise ValueError(f"folds must be at least 2 and at most the {len(values)} pairs, got {count}")
    return [number == fold for fold in range(count)]


def _on_fold(
    values: Tensor, same: Tensor, held_out: Tensor, far: float | None, distance: bool
) -> tuple[float, float, float, float]:
    curve = roc(values[~held_out], same[~held_out], distance=distance)
    values, same = values[held_out], same[held_out]
    point, _ = curve.at_best("accuracy")
    threshold = _halfway(curve, point)
    accuracy = float((_accepts(threshold, values, distance) == same).double().mean())
    if far is None:
        return accuracy, threshold, 0.0, 0.0
    accepted = _accepts(_halfway(curve, curve.at_far(far)), values, distance)
    return accuracy, threshold, float(accepted[same].double().mean()), float(accepted[~same].double().mean())


def _halfway(curve: Curve, point: int) -> float:
    """A threshold that accepts what this point does, as far from values on either side as it can be."""
    here, *beyond = curve.thresholds[point : point + 2].tolist()
    if not beyond:
        return here
    middle = here / 2 + beyond[0] / 2
    return here if middle == beyond[0] else middle


def _accepts(threshold: float, values: Tensor, distance: bool) -> Tensor:
    return values <= threshold if distance else values >= threshold
