"""What a retrieval is worth, by the ranks of every query's positives: one walk for any number of metrics."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import validation
from ..engine.schedules import on_device_of
from ..functional.call import in_group
from .arguments import Arguments, Galleries, Search, as_columns, check_labels, progress_bar
from .ranking import BEYOND, ByLabel, ByTarget, PositivesSource, Ranks, ascending, places, ranks

METRICS = ("recall@k", "precision@k", "r_precision", "map@r", "map", "mrr", "mean_rank", "median_rank")


@in_group
def evaluate(
    query: Tensor,
    gallery: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    target: Tensor | None = None,
    metrics: Sequence[str] = ("recall@1", "recall@5", "recall@10", "map@r", "r_precision", "mrr"),
    missing: str = "error",
    reduction: str = "mean",
    similarity: str = "cosine",
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    backend: str = "auto",
    group=None,
    progress: bool = False,
) -> dict[str, float] | dict[str, Tensor]:
    r"""Retrieval metrics of all queries in one walk over tiles of the N x M similarities, which are never formed.

    A query's *positives* are the rows of the gallery with its label, or those that ``target`` names. With r_1 < r_2 <
    ... the ranks of its R positives among the rows of the gallery, from 1, the metrics are means over queries of

        "recall@k"       1 if r_1 <= k                      Recall@K of metric learning and of image-text retrieval: a
                                                            hit, as CMC's rank-k, not the share of positives found
        "precision@k"    #{i: r_i <= k} / k
        "r_precision"    #{i: r_i <= R} / R
        "map@r"          sum of i / r_i over r_i <= R, / R  Musgrave et al. 2020 (arXiv:2003.08505)
        "map"            sum of i / r_i, / R                mean average precision, re-identification's mAP
        "mrr"            1 / r_1
        "mean_rank"      r_1
        "median_rank"    r_1, of which the median over queries is taken

    Exact, as :func:`topk` is: ranks are counts of scores in fp64, of equal ones the lower index comes first.

    Time is that of the N x M x d product in bf16 or fp32, and of a score per positive. "map" looks at every rank, "mrr"
    and the ranks at the first positive's, the others no farther than they count. Memory is O((N + M) d), and 40 bytes
    per positive of some thousand queries at a time.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64.
        gallery: ``[M, d]``. None (default): the queries, each without itself.
        query_labels, gallery_labels: integers ``[N]`` and ``[M]``; without a gallery ``query_labels`` alone.
        target: integers ``[N]``, or ``[N, P]`` where a query has several positives, -1 for none; in place of labels. A
            row that is named twice is one positive; one that ids leave out, and without a gallery the query itself, is
            none. With a ``group`` they count through the galleries of all ranks.
        metrics: names as above, any k >= 1; of a k beyond the gallery, places without a row are misses. Default recall
            at 1, 5 and 10, MAP@R, R-precision and MRR.
        missing: what becomes of queries without a positive: "error" (default), or "skip", which leaves them out of
            every mean (with ``reduction="none"`` their values are NaN) and counts them.
        reduction: "mean" (default), or "none": a value of every query.
        similarity, exclude_self, query_ids, gallery_ids, backend, group, progress: as of :func:`topk`. A row that ids
            leave out is no positive, and has no rank. With a ``group`` the means are those over all ranks' queries.

    Returns:
        ``{metric: value}`` in the order of ``metrics``: floats, and then ``"queries"`` and ``"skipped"``, how many the
        means are over and how many have no positive; with ``reduction="none"`` fp64 ``[N]`` each, and no more.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: as :func:`topk`; neither labels nor target, or both; a target outside [-1, M); an unknown metric,
            ``missing`` or ``reduction``; a query without a positive, or with "skip" none with one.
        RuntimeError: the backend asked for is not available here.

    >>> evaluate(embeddings, query_labels=labels, metrics=["recall@1", "map@r"])
    {'recall@1': 0.93, 'map@r': 0.71, 'queries': 5000, 'skipped': 0}
    >>> evaluate(text, image, target=torch.arange(len(text)), metrics=["recall@1", "recall@5", "recall@10"])
    """
    return _evaluate(
        query,
        gallery,
        query_labels,
        gallery_labels,
        target,
        metrics,
        missing,
        reduction,
        progress,
        dict(
            similarity=similarity,
            exclude_self=exclude_self,
            query_ids=query_ids,
            gallery_ids=gallery_ids,
            backend=backend,
            world=group,
        ),
    )


@torch._disable_dynamo
@torch.no_grad()
def _evaluate(query, gallery, query_labels, gallery_labels, target, metrics, missing, reduction, progress, options):
    wanted = metrics_of(metrics)
    names = list(wanted)
    validation.check_choice("missing", missing, ("error", "skip"))
    validation.check_choice("reduction", reduction, ("mean", "none"))
    validation.check_flag("progress", progress)
    arguments = Arguments.of(query, gallery, **options)
    given = _GivenPositives.of(query, gallery, query_labels, gallery_labels, target)
    galleries, told = arguments.meet({"target": given.range, "queries": len(query)}, metrics=", ".join(names))
    given.check_ranges([each["target"] for each in told], sum(galleries.counts))
    with on_device_of(query), progress_bar(progress, len(query)) as on_rows:
        search = arguments.search(galleries)
        source = given.source(search)
        queries, skipped = _count_queries(source, galleries, missing)
        values = _values(search, source, wanted.values(), on_rows)
    if reduction == "none":
        return dict(zip(names, values))
    values = galleries.of_all_queries(values, [each["queries"] for each in told])
    values = values[:, ~values[0].isnan()]  # the value of a query without a positive
    means = [metric.over_queries(of_queries).item() for metric, of_queries in zip(wanted.values(), values)]
    return {**dict(zip(names, means)), "queries": queries, "skipped": skipped}


@dataclass(frozen=True)
class _GivenPositives:
    """Labels, int64 ``[N]`` and ``[M]``, or a target, int64 ``[N, P]``."""

    query_labels: Tensor | None
    gallery_labels: Tensor | None
    target: Tensor | None

    @staticmethod
    def of(query, gallery, query_labels, gallery_labels, target) -> _GivenPositives:
        if target is None and query_labels is None:
            raise ValueError("query_labels or a target must be given: they tell a query's positives")
        if target is not None and query_labels is not None:
            raise ValueError("query_labels must not be given with target, which names the positives")
        if target is not None:
            if gallery_labels is not None:
                raise ValueError("gallery_labels must not be given with target, which names the positives")
            return _GivenPositives(None, None, _check_target(target, query))
        return _GivenPositives(*check_labels(query, gallery, query_labels, gallery_labels), None)

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest target."""
        if self.target is None or not self.target.numel():
            return -1, -1
        return int(self.target.min()), int(self.target.max())

    @staticmethod
    def check_ranges(ranges: list[tuple[int, int]], columns: int) -> None:
        """Those of all ranks, so that all find the same."""
        for low, high in ranges:
            if low < -1 or high >= columns:
                raise ValueError(f"target must be in [-1, {columns}), got {low if low < -1 else high}")

    def source(self, search: Search) -> PositivesSource:
        if self.target is not None:
            return ByTarget(self.target, search.excluded)
        return ByLabel(self.query_labels, search.galleries.of_all(self.gallery_labels), search.excluded)


def _check_target(target: Tensor, query: Tensor) -> Tensor:
    """The target of every query, as int64 ``[N, P]``."""
    rows = query.shape[0]
    if isinstance(target, Tensor):
        if target.ndim not in (1, 2) or target.shape[0] != rows:
            raise ValueError(f"target must have shape ({rows},) or ({rows}, P), got {tuple(target.shape)}")
        if target.ndim == 2 and not target.shape[1]:
            raise ValueError(f"target must name at least one row of each query, got shape {tuple(target.shape)}")
    return as_columns("target", target, query)


def _count_queries(source: PositivesSource, galleries: Galleries, missing: str) -> tuple[int, int]:
    """How many queries of all ranks have a positive, and how many have none."""
    have = source.counts > 0
    counts = galleries.sum(torch.stack((have.sum(), (~have).sum())))
    queries, skipped = counts.tolist()
    if not queries + skipped:
        raise ValueError("query must have at least one row, got none")
    if not queries or (missing == "error" and skipped):
        raise ValueError(
            f"every query must have a positive among the rows that it is compared with, and {skipped} of "
            f"{queries + skipped} have none: missing='skip' leaves them out, where there are others"
        )
    return queries, skipped


def _values(search: Search, source: PositivesSource, wanted: Collection[Metric], on_rows) -> Tensor:
    """Every metric of every query, fp64 ``[metrics, N]``; NaN of a query without a positive."""
    counts = source.counts
    cutoff = torch.zeros_like(counts)
    for metric in wanted:
        cutoff = torch.maximum(cutoff, metric.depth(counts))
    first_always = any(metric.first_always for metric in wanted)
    values = torch.full((len(wanted), len(counts)), torch.nan, dtype=torch.float64, device=counts.device)
    for found in ranks(search.scores, source, search.excluded, cutoff, first_always, search.backend, on_rows):
        with_positive = _OfQueries.of(found)
        rows = torch.arange(found.rows.start, found.rows.stop, device=counts.device)[found.offsets.diff() > 0]
        for metric, of_queries in zip(wanted, values):
            of_queries[rows] = metric.value(with_positive)
    return values


@dataclass(frozen=True)
class _OfQueries:
    """Ranks of the queries that have positives."""

    offsets: Tensor  # int64 [Q + 1]
    ranks: Tensor  # fp64 [P], inf beyond what was asked for
    number: Tensor  # fp64 [P]: 1 for the first of a query, 2 for the second, ...

    @staticmethod
    def of(found: Ranks) -> _OfQueries:
        counts = found.offsets.diff()
        offsets = ascending(counts[counts > 0])
        ranks = found.ranks.double().masked_fill_(found.ranks == BEYOND, torch.inf)
        return _OfQueries(offsets, ranks, places(offsets) + 1.0)

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff()

    @property
    def first(self) -> Tensor:
        return self.ranks[self.offsets[:-1]]

    def sum(self, values: Tensor) -> Tensor:
        """Of each query's positives."""
        return torch.segment_reduce(values.double(), "sum", offsets=self.offsets)

    @property
    def among_r(self) -> Tensor:
        return self.ranks <= self.counts.repeat_interleave(self.counts)


@dataclass(frozen=True)
class Metric:
    """One value of every query."""

    value: Callable[[_OfQueries], Tensor]
    depth: Callable[[Tensor], Tensor]
    """Of the numbers of positives: the rank up to which ranks matter."""
    first_always: bool = False
    """Whether the first positive's rank matters whatever it is."""
    over_queries: Callable[[Tensor], Tensor] = torch.mean

    @staticmethod
    def named(name: str) -> Metric:
        if not isinstance(name, str):
            raise TypeError(f"metrics must be names, got {type(name).__name__}")
        if at := re.fullmatch(r"(recall|precision)@([1-9][0-9]*)", name):
            k = min(int(at[2]), BEYOND - 1)
            if at[1] == "recall":
                return Metric(lambda q: (q.first <= k).double(), lambda counts: torch.full_like(counts, k))
            return Metric(lambda q: q.sum(q.ranks <= k) / k, lambda counts: torch.full_like(counts, k))
        if name not in _NAMED:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, with a number k of at least 1, got {name!r}")
        return _NAMED[name]


def metrics_of(names: str | Iterable[str]) -> dict[str, Metric]:
    """The metrics by their names, in order, each once.

    Raises:
        TypeError: not names.
        ValueError: an unknown name, or none.
    """
    if not isinstance(names, Iterable):
        raise TypeError(f"metrics must be names, got {type(names).__name__}")
    metrics = {name: Metric.named(name) for name in ([names] if isinstance(names, str) else names)}
    if not metrics:
        raise ValueError("metrics must name at least one metric, got none")
    return metrics


def _median(values: Tensor) -> Tensor:
    """Of an even number the mean of the middle two, as NumPy has it."""
    values = values.sort().values
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


_NAMED = {
    "r_precision": Metric(lambda q: q.sum(q.among_r) / q.counts, torch.clone),
    "map@r": Metric(lambda q: q.sum(q.number / q.ranks * q.among_r) / q.counts, torch.clone),
    "map": Metric(lambda q: q.sum(q.number / q.ranks) / q.counts, lambda counts: torch.full_like(counts, BEYOND)),
    "mrr": Metric(lambda q: q.first.reciprocal(), torch.zeros_like, first_always=True),
    "mean_rank": Metric(lambda q: q.first, torch.zeros_like, first_always=True),
    "median_rank": Metric(lambda q: q.first, torch.zeros_like, first_always=True, over_queries=_median),
}

OPTIONS = [name for name in inspect.signature(evaluate).parameters if name not in ("query", "gallery", "metrics")]


def _one(function: str, metric: str, query: Tensor, gallery: Tensor | None, options: dict) -> float | Tensor:
    return _several(function, [metric], query, gallery, options)[0]


def _several(function: str, metrics: list[str], query: Tensor, gallery: Tensor | None, options: dict) -> list:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function} got an unexpected argument {name!r}: it takes {', '.join(OPTIONS)}")
    values = evaluate(query, gallery, metrics=metrics, **options)
    return [values[metric] for metric in metrics]


def recall_at_k(query: Tensor, gallery: Tensor | None = None, k: int | Iterable[int] = 1, **options):
    """Recall@K: the share of queries with a positive among their k nearest rows. ``options`` are those of
    :func:`evaluate`: ``query_labels`` and ``gallery_labels``, or ``target``, and the rest.

    Returns:
        A float, or of several k a list of them; with ``reduction="none"`` fp64 ``[N]`` each.

    >>> recall_at_k(embeddings, query_labels=labels, k=(1, 2, 4, 8))
    """
    return _at_k("recall", query, gallery, k, options)


def precision_at_k(query: Tensor, gallery: Tensor | None = None, k: int | Iterable[int] = 1, **options):
    """The mean share of positives among a query's k nearest rows; as :func:`recall_at_k`."""
    return _at_k("precision", query, gallery, k, options)


def _at_k(name: str, query: Tensor, gallery: Tensor | None, k: int | Iterable[int], options: dict):
    several = isinstance(k, Iterable) and not isinstance(k, Tensor)
    metrics = [f"{name}@{validation.check_count('k', each, 1)}" for each in (k if several else [k])]
    values = _several(f"{name}_at_k", metrics, query, gallery, options)
    return values if several else values[0]


def map_at_r(query: Tensor, gallery: Tensor | None = None, **options) -> float | Tensor:
    """MAP@R (Musgrave et al., "A Metric Learning Reality Check", 2020); ``options`` are those of :func:`evaluate`."""
    return _one("map_at_r", "map@r", query, gallery, options)


def r_precision(query: Tensor, gallery: Tensor | None = None, **options) -> float | Tensor:
    """The mean share of positives among a query's R nearest rows, R its number of positives; ``options`` are those of
    :func:`evaluate`."""
    return _one("r_precision", "r_precision", query, gallery, options)


def mean_average_precision(query: Tensor, gallery: Tensor | None = None, **options) -> float | Tensor:
    """mAP over all ranks; ``options`` are those of :func:`evaluate`."""
    return _one("mean_average_precision", "map", query, gallery, options)


def mrr(query: Tensor, gallery: Tensor | None = None, **options) -> float | Tensor:
    """The mean reciprocal rank of a query's first positive; ``options`` are those of :func:`evaluate`."""
    return _one("mrr", "mrr", query, gallery, options)
