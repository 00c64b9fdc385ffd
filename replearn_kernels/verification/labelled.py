"""The curve of all pairs of a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine import validation
from ..engine.columns import blocks
from ..engine.schedules import on_device_of
from ..functional.call import in_group
from ..retrieval.arguments import Arguments, Galleries, check_labels, progress_bar
from ..retrieval.bounds import DISTANCES, Filter
from ..retrieval.walk import renumbered
from .counting import BINS, CELLS, MOST_BINS, Cells, Counts, LabelledPairs
from .curve import OBJECTIVES, Curve, apart, check_both_kinds, listed

_PER_DECADE = 20  # FARs of a curve that is asked for none


@in_group
@torch._disable_dynamo
@torch.no_grad()
def roc_of_labels(
    query: Tensor,
    gallery: Tensor | None = None,
    *,
    query_labels: Tensor,
    gallery_labels: Tensor | None = None,
    far: float | Iterable[float] | None = None,
    best: str | Sequence[str] = (),
    similarity: str = "cosine",
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    backend: str = "auto",
    group=None,
    progress: bool = False,
) -> Curve:
    r"""The curve of all pairs of a labelled set, 10^9 and more, none of which is kept.

    Every pair is counted by its score in fp64, from the rows as they are. The curve has points about the FARs that are
    asked for, the EER, and the best thresholds; what it says there is exact, but for scores in one cell, which count as
    ties (``resolution``):

        cosine             2^-26 = 1.5e-8
        product            2^-26 of the largest length of a query times that of a row of the gallery
        distances          2^-27 of the largest squared distance that rows of the largest length can have
                           (products and distances: or up to twice as much, as a cell is a power of two)

    Of the area, ``auc``, it has bounds, and a value between them. Tiles of the similarities are walked over twice. Time
    is that of two N x M x d products (of half of them without a gallery), one in fp32 and one in bf16 where that is
    faster, and of scores of the pairs near a point, a few per cent of all; of all pairs where rows differ by less than
    fp32 can tell, as in a collapsed model. Memory is O((N + M) d), and up to 130 MB of counts.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64.
        gallery: ``[M, d]``. None (default): the pairs i < j of queries.
        query_labels, gallery_labels: integers ``[N]`` and ``[M]``; without a gallery ``query_labels`` alone.
        far: FARs in [0, 1] at which the curve is wanted. None (default): 20 per decade, from 1 down to that of a pair.
        best: of :meth:`Curve.best`: "accuracy", "balanced_accuracy", "f1", or several. Default none. In an untrained
            model a best threshold may be anywhere, and takes a walk for each 1,024th of the range where it can be.
        similarity: "cosine" (default), "product", "distance" or "squared_distance", as in :func:`~..retrieval.topk`.
        exclude_self, query_ids, gallery_ids: which pairs do not count, as in :func:`~..retrieval.topk`.
        backend: "auto" (default), "cpp" (CPU) or "torch" (any device).
        group: a ``torch.distributed`` process group, each of whose ranks passes its queries and its part of the
            gallery; the curve is that of all ranks' pairs, on every rank.
        progress: show a bar of each walk's finished queries (needs rich). Default False.

    Returns:
        A :class:`Curve`.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: as :func:`~..retrieval.topk`; no pair of one label, or none of different ones; a FAR outside [0, 1];
            an unknown ``best``.
        RuntimeError: the backend asked for is not available here.

    >>> curve = roc_of_labels(embeddings, query_labels=labels, far=(1e-3, 1e-4))
    >>> curve.tar_at_far(1e-4), curve.threshold_at_far(1e-4), curve.eer
    """
    far, best = _check_far(far), _check_best(best)
    validation.check_flag("progress", progress)
    options = dict(exclude_self=exclude_self, query_ids=query_ids, gallery_ids=gallery_ids, backend=backend)
    arguments = Arguments.of(query, gallery, similarity=similarity, world=group, **options)
    labels = check_labels(query, gallery, query_labels, gallery_labels)
    galleries, told = arguments.meet({"longest": _longest(arguments.query.lengths)}, far=far, best=best)
    with on_device_of(query):
        longest_query = max(each["longest"] for each in told)
        pairs = _pairs(arguments, labels, galleries, longest_query, half=gallery is None)
        nothing = torch.empty(0, dtype=torch.int64, device=query.device)
        counts = _count(pairs, nothing, pairs.fine, galleries, progress)
        seen = _Seen.of(counts.histogram, galleries.most(pairs.reach(pairs.fine)))
        check_both_kinds(*seen.totals)
        far = (0.0, *(seen.all_fars if far is None else far))
        wanted = seen.bins_about(far, best)
        parts = [seen.ends]
        for some in blocks(len(wanted), MOST_BINS):
            filter = pairs.filter_for(wanted[some], seen.histogram.sum(1))
            parts.append(_points(_count(pairs, wanted[some], filter, galleries, progress)))
        return _curve(parts, pairs.cells, similarity, far, best, *seen.auc)


def _check_far(far: float | Iterable[float] | None) -> tuple[float, ...] | None:
    if far is None:
        return None
    several = listed(far)
    several = several if isinstance(several, list) else [several]
    return tuple(validation.check_fraction("far", each) for each in several)


def _check_best(best: str | Sequence[str]) -> tuple[str, ...]:
    several = (best,) if isinstance(best, str) else tuple(best)
    for each in several:
        validation.check_choice("best", each, tuple(OBJECTIVES))
    return several


def _longest(lengths: Tensor) -> float:
    return float(lengths.max()) if len(lengths) else 0.0


def _pairs(arguments: Arguments, labels, galleries: Galleries, longest_query: float, half: bool) -> LabelledPairs:
    search = arguments.search(galleries)
    scores = search.scores
    longest = _longest(scores.gallery.lengths)
    if scores.is_distance:
        longest = max(longest, longest_query)
    cells = Cells.of(scores.similarity, longest_query, longest)
    labels = renumbered(labels[0], galleries.of_all(labels[1]))
    return LabelledPairs(scores, labels, search.excluded, half, galleries.first, cells, search.backend)


def _count(pairs: LabelledPairs, wanted: Tensor, filter: Filter, galleries: Galleries, progress: bool) -> Counts:
    """Of all ranks' pairs."""
    with progress_bar(progress, len(pairs.scores.query)) as on_rows:
        counts = pairs.count(wanted, filter, on_rows)
    galleries.sum_(counts.histogram)
    galleries.sum_(counts.cells)
    return counts


def _accepted(counts: Tensor) -> Tensor:
    """Of counts from the lowest score on, along dimension -2: how many pairs the lower edge of each accepts."""
    return counts.flip(-2).cumsum(-2).flip(-2)


def _by_edges(histogram: Tensor) -> Tensor:
    """The same of bins, int64 ``[BINS + 1, 2]``: the last edge accepts none."""
    return torch.nn.functional.pad(_accepted(histogram), (0, 0, 0, 1))


@dataclass(frozen=True)
class _Points:
    """Of a curve: cells at whose lower edge a threshold lies, and what it accepts."""

    cell: Tensor  # int64 [P]
    accepted: Tensor  # int64 [P, 2]: of different labels, of one


@dataclass(frozen=True)
class _Seen:
    """What the first walk tells: of the lower edge of every bin, and of none, how many pairs it accepts at least and at
    most, int64 ``[BINS + 1, 2]`` of different labels and of one."""

    histogram: Tensor
    accepted: Tensor
    reach: int

    @staticmethod
    def of(histogram: Tensor, reach: int) -> _Seen:
        return _Seen(histogram, _by_edges(histogram), reach)

    def _by(self, bins: int) -> Tensor:
        """What edges accept that are so many bins higher."""
        edges = torch.arange(BINS + 1, device=self.accepted.device) + bins
        return self.accepted[edges.clamp(0, BINS)]

    @property
    def totals(self) -> tuple[int, int]:
        """How many pairs are of one label, and of different ones."""
        of_other, of_same = self.accepted[0].tolist()
        return of_same, of_other

    @property
    def all_fars(self) -> Iterator[float]:
        far, step = 1.0, 0
        while far * self.totals[1] >= 1:
            yield far
            step += 1
            far = 10 ** (-step / _PER_DECADE)

    def bins_about(self, fars: Iterable[float], best: tuple[str, ...]) -> Tensor:
        """Where these points, and that of equal errors, may be: int64 ``[W]``, ascending.

        A threshold in a bin accepts no fewer pairs than the bin's upper edge does at least, and no more than its lower
        edge does at most.
        """
        of_kinds = self.totals
        fewest_other, fewest_same = self._by(self.reach).double().unbind(1)
        most_other, most_same = self._by(-self.reach).double().unbind(1)
        wanted = (apart(fewest_same, fewest_other, *of_kinds)[1:] < 0) & (
            apart(most_same, most_other, *of_kinds)[:-1] >= 0
        )
        for far in fars:
            wanted |= (fewest_other[1:] / of_kinds[1] <= far) & (most_other[:-1] / of_kinds[1] > far)
        for name in best:
            value = OBJECTIVES[name]
            reached = value(fewest_same, most_other, *of_kinds).max()
            may_be = value(most_same[:-1], fewest_other[1:], *of_kinds) >= reached
            wanted |= may_be & (most_same[:-1] > fewest_same[1:])  # without a pair of one label none is better
        return wanted.nonzero().squeeze(1)

    @property
    def ends(self) -> _Points:
        """Thresholds that accept no pair, and all."""
        cell = torch.tensor([BINS * CELLS, 0], device=self.accepted.device)
        return _Points(cell, self.accepted[[BINS, 0]])

    @property
    def auc(self) -> tuple[float, tuple[float, float]]:
        """The area, and its bounds: of scores ``2 reach`` bins apart or less, it is not known which is larger."""
        other = self.histogram[:, 0].double()
        of_both = self.totals[0] * self.totals[1]

        def area(bins: int) -> float:
            return float((other * self._by(bins)[:-1, 1]).sum() / of_both)

        return (area(0) + area(1)) / 2, (area(2 * self.reach + 1), area(-2 * self.reach))


def _points(counts: Counts) -> _Points:
    """Of the bins whose cells were counted: the upper edge of each, and all its cells that have pairs."""
    upper = _by_edges(counts.histogram)[counts.wanted + 1]
    row, cell = counts.cells.any(2).nonzero(as_tuple=True)
    accepted = (_accepted(counts.cells) + upper[:, None])[row, cell]
    first = counts.wanted * CELLS
    return _Points(torch.cat((first + CELLS, first[row] + cell)), torch.cat((upper, accepted)))


def _curve(
    parts: list[_Points],
    cells: Cells,
    similarity: str,
    fars: tuple[float, ...],
    best: tuple[str, ...],
    auc: float,
    auc_bounds: tuple[float, float],
) -> Curve:
    cell, order = torch.cat([part.cell for part in parts]).sort(descending=True)
    accepted = torch.cat([part.accepted for part in parts])[order]
    kept = torch.nn.functional.pad((accepted[1:] != accepted[:-1]).any(1), (1, 0), value=True)
    scores = cells.score(cell[kept])
    scores[0] = torch.inf
    other, same = accepted[kept].unbind(1)
    thresholds = scores
    if similarity in DISTANCES:
        thresholds = 0.0 - scores
        if similarity == "distance":
            thresholds[1:] = thresholds[1:].sqrt()
    curve = Curve(thresholds, same, other, auc, auc_bounds, 1 / cells.per_score, fars, best)
    points = _asked_for(curve)
    return replace(curve, thresholds=thresholds[points], same=same[points], other=other[points])


def _asked_for(curve: Curve) -> Tensor:
    """The points of the FARs, of equal errors and the best ones, the first and the last."""
    fars = torch.tensor(curve.fars, dtype=torch.float64, device=curve.same.device)
    of_fars = torch.searchsorted(curve.far, fars, right=True) - 1
    of_best = [curve.at_best(objective)[0] for objective in curve.objectives]
    others = [0, len(curve.same) - 1, *curve.at_eer[:2], *of_best]
    return torch.cat((of_fars, torch.tensor(others, device=fars.device))).unique()
