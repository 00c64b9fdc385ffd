"""The curve of all pairs of a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import validation
from ..engine.columns import blocks
from ..engine.schedules import on_device_of
from ..functional.call import in_group
from ..retrieval.arguments import Arguments, Galleries, check_labels, progress_bar
from ..retrieval.bounds import DISTANCES, Filter, as_values
from ..retrieval.walk import renumbered
from .counting import BINS, CELLS, MOST_BINS, Cells, Counts, LabelledPairs
from .curve import OBJECTIVES, Curve, apart, check_both_kinds, listed

_PER_DECADE = 20  # FARs of a curve that is asked for none
_BINS_AT_ONCE = 64  # whose cells become points, 260,000 at most: 6 MB, and some more while they are sorted


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

    Of the area it has bounds, ``auc_bounds``, and with ``auc`` a value between them: 2^14 steps of score from 0 to the
    largest are told apart. Where scores fill few of them, as where all rows are much alike, or one far longer than the
    others, the bounds are wide and tell so. Tiles of the similarities are walked over twice. Time
    is that of two N x M x d products (of half of them without a gallery), one in fp32 and one in bf16 where that is
    faster, and of scores of the pairs near a point, a few per cent of all; of all pairs where rows differ by less than
    fp32 can tell, as in a collapsed model. Memory is O((N + M) d), and up to 100 MB of counts.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64.
        gallery: ``[M, d]``. None (default): the pairs i < j of queries.
        query_labels, gallery_labels: integers ``[N]`` and ``[M]``; without a gallery ``query_labels`` alone.
        far: FARs in [0, 1] at which the curve is wanted. None (default): 20 per decade, from 1 down to that of a pair.
        best: of :meth:`Curve.best`: "accuracy", "balanced_accuracy", "f1", or several. Default none. In an untrained
            model a best threshold may be anywhere, and takes a walk for each 32nd part of the range where it can be.
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
        asked = _Asked((0.0, *(seen.all_fars if far is None else far)), best, *seen.totals)
        wanted = seen.bins_about(asked)
        parts = [seen.ends]
        for some in blocks(len(wanted), MOST_BINS):
            filter = pairs.filter_for(wanted[some], seen.histogram.sum(1))
            parts += _points(_count(pairs, wanted[some], filter, galleries, progress), asked)
        return _curve(asked.of(_Points.joined(parts)), pairs.cells, similarity, asked, *seen.auc)


def _check_far(far: float | Iterable[float] | None) -> tuple[float, ...] | None:
    if far is None:
        return None
    several = listed(far)
    several = several if isinstance(several, list) else [several]
    return tuple(validation.check_fraction("far", each) for each in several)


def _check_best(best: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(best, Iterable):
        raise TypeError(f"best must be names, got {type(best).__name__}")
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
    """Of a curve, the strictest first: cells at whose lower edge a threshold lies, and what it accepts."""

    cell: Tensor  # int64 [P]
    accepted: Tensor  # int64 [P, 2]: of different labels, of one

    @staticmethod
    def joined(parts: list[_Points]) -> _Points:
        """Each once: cells between which there are no pairs accept the same."""
        cell, order = torch.cat([part.cell for part in parts]).sort(descending=True)
        accepted = torch.cat([part.accepted for part in parts])[order]
        return _Points(cell, accepted)[torch.nn.functional.pad(accepted.diff(dim=0).any(1), (1, 0), value=True)]

    def __getitem__(self, points: Tensor) -> _Points:
        return _Points(self.cell[points], self.accepted[points])


@dataclass(frozen=True)
class _Asked:
    """What a curve is asked for."""

    fars: tuple[float, ...]
    best: tuple[str, ...]
    of_same: int  # pairs of one label, and of different ones
    of_other: int

    def apart(self, accepted: Tensor) -> Tensor:
        other, same = accepted.double().unbind(1)
        return apart(same, other, self.of_same, self.of_other)

    def value(self, objective: str, same: Tensor, other: Tensor) -> Tensor:
        return OBJECTIVES[objective](same.double(), other.double(), self.of_same, self.of_other)

    def of(self, points: _Points) -> _Points:
        """The points of the FARs, of equal errors, the best ones, the first and the last: all that a curve has."""
        other, same = points.accepted.unbind(1)
        far = other.double() / self.of_other
        at = torch.searchsorted(far, torch.tensor(self.fars, dtype=far.dtype, device=far.device), right=True) - 1
        after = int((self.apart(points.accepted) < 0).sum())
        values = (self.value(objective, same, other) for objective in self.best)
        best = [int((value == value.max()).nonzero()[0]) for value in values]
        others = torch.tensor([0, len(far) - 1, after - 1, after, *best], device=far.device)
        return points[torch.cat((at, others)).clamp(0, len(far) - 1).unique()]


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
        _, of_other = self.totals
        far, step = 1.0, 0
        while far * of_other >= 1:
            yield far
            step += 1
            far = 10 ** (-step / _PER_DECADE)

    def bins_about(self, asked: _Asked) -> Tensor:
        """Where the points that are asked for may be, and that of equal errors: int64 ``[W]``, ascending.

        A threshold in a bin accepts no fewer pairs than the bin's upper edge does at least, and no more than its lower
        edge does at most.
        """
        fewest, most = self._by(self.reach)[1:], self._by(-self.reach)[:-1]
        fewest_other, fewest_same = fewest.unbind(1)
        most_other, most_same = most.unbind(1)
        fewest_far, most_far = (other.double() / asked.of_other for other in (fewest_other, most_other))
        wanted = (asked.apart(fewest) < 0) & (asked.apart(most) >= 0)
        for far in asked.fars:
            wanted |= (fewest_far <= far) & (most_far > far)
        for name in asked.best:
            reached = asked.value(name, self._by(self.reach)[:, 1], self._by(-self.reach)[:, 0]).max()
            may_be = asked.value(name, most_same, fewest_other) >= reached
            wanted |= may_be & (most_same > fewest_same)  # without a pair of one label none is better
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
        of_both = float(self.totals[0] * self.totals[1])  # more than an integer of torch's holds

        def area(bins: int) -> float:
            return float((other * self._by(bins)[:-1, 1]).sum() / of_both)

        return (area(0) + area(1)) / 2, (area(2 * self.reach + 1), area(-2 * self.reach))


def _points(counts: Counts, asked: _Asked) -> Iterator[_Points]:
    """Those asked for, of some at a time of the bins whose cells were counted: of the upper edge of each, and all its
    cells that have pairs."""
    edges = _by_edges(counts.histogram)
    for some in blocks(len(counts.wanted), _BINS_AT_ONCE):
        wanted, cells = counts.wanted[some], counts.cells[some]
        upper = edges[wanted + 1]
        row, cell = cells.any(2).nonzero(as_tuple=True)
        from_here = torch.nn.functional.pad(
            _accepted(cells[row, cell]), (0, 0, 0, 1)
        )  # in this bin, and those after it
        after = torch.searchsorted(row, torch.arange(len(wanted), device=row.device), right=True)
        accepted = from_here[:-1] - from_here[after[row]] + upper[row]
        first = wanted * CELLS
        yield asked.of(_Points.joined([_Points(first + CELLS, upper), _Points(first[row] + cell, accepted)]))


def _curve(
    points: _Points, cells: Cells, similarity: str, asked: _Asked, auc: float, auc_bounds: tuple[float, float]
) -> Curve:
    accepts_none = -torch.inf if similarity in DISTANCES else torch.inf
    thresholds = as_values(cells.score(points.cell), similarity)
    thresholds[points.cell == 0] = -accepts_none  # as what is below all cells is counted there
    thresholds[0] = accepts_none
    other, same = points.accepted.unbind(1)
    return Curve(thresholds, same, other, auc, auc_bounds, 1 / cells.per_score, asked.fars, asked.best)
