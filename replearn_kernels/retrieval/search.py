"""Nearest neighbours, and what they vote for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import validation
from ..engine.operators import needs_dispatcher
from ..engine.problem import statistics_dtype
from ..engine.schedules import on_device_of
from ..engine.world import World
from ..functional.call import in_group
from .arguments import Arguments, Galleries, progress_bar
from .bounds import DISTANCES, as_values
from .nearest import nearest


class Neighbours(NamedTuple):
    """What :func:`topk` returns, as ``torch.topk`` names it."""

    values: Tensor
    indices: Tensor


@in_group
def topk(
    query: Tensor,
    gallery: Tensor | None = None,
    k: int = 10,
    *,
    similarity: str = "cosine",
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    backend: str = "auto",
    group=None,
    progress: bool = False,
) -> Neighbours:
    r"""The k nearest rows of a gallery for every query, without ever forming the N x M similarities.

    Exact: neighbours are decided by scores in fp64 of the rows as they are, whatever the filter that spares forming
    most of them; of equal scores the lower index comes first. So the result does not depend on tiles, threads, or the
    number of ranks, and rows that are copies of each other tie exactly.

        "cosine"             x . y / (|x| |y|), 0 of a row of zeros
        "product"            x . y
        "distance"           |x - y|, the smallest first
        "squared_distance"   |x - y|^2, the smallest first

    Time is that of the N x M x d product, in bf16 where the processor multiplies it, and of O(k) scores a query; where
    the filter cannot tell many rows from the k-th nearest, as in a collapsed model, of their scores too. Memory is
    O((N + M) (d + k)): beside the result a copy of the rows in the filter's dtype.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides. Neighbours have no gradient.
        gallery: ``[M, d]``, of the query's dtype and device. None (default): the queries, each without itself.
        k: at least 1, at most M, or M - 1 where a query is not compared with itself. Default 10.
        similarity: as above. Default "cosine".
        exclude_self: row i of the gallery is no neighbour of query i (N = M). Default False.
        query_ids, gallery_ids: integers ``[N]`` and ``[M]``, or ``[N, C]`` and ``[M, C]``. A row of the gallery whose
            ids all equal the query's is no neighbour: in re-identification, ids of person and camera. Without a gallery
            ``query_ids`` alone.
        backend: "auto" (default), "cpp" (CPU) or "torch" (any device).
        group: a ``torch.distributed`` process group, each of whose ranks passes its queries and its part of the
            gallery. Indices count through the galleries of all ranks, in their order; meanwhile every rank holds all of
            them. Under ``torch.compile`` a break of the graph.
        progress: show a bar of finished queries (needs rich). Default False.

    Returns:
        ``(values, indices)``, ``[N, k]`` each, the nearest first: similarities or distances, fp32 (fp64 of fp64 rows),
        and int64. Where ids leave a query fewer than k rows, the rest is -inf (distances: inf) and -1.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device or dtype; NaN or infinity in a row, or in fp64 a length other
            than 0 outside of [2^-500, 2^500]; k below 1, or more rows than a query is compared with;
            ids of one side alone, or beside ``exclude_self``; an unknown similarity or backend.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: inside a ``torch.func`` transform.

    >>> values, indices = topk(embeddings, k=5)                      # in a batch, each row without itself
    >>> values, indices = topk(text, images, k=10)                   # of texts among images
    """
    k = validation.check_count("k", k, 1)
    validation.check_flag("progress", progress)
    options = similarity, exclude_self, query_ids, gallery_ids, backend
    if group is None:
        validation.check_features("query", query)
        if needs_dispatcher(query):
            gallery = gallery.detach() if isinstance(gallery, Tensor) else gallery
            return Neighbours(*torch.ops.replearn_kernels.topk(query.detach(), gallery, k, *options))
    return _topk(query, gallery, k, *options, group, progress)


def _topk(query, gallery, k, similarity, *options) -> Neighbours:
    scores, indices, _ = _nearest(query, gallery, k, similarity, *options)
    return Neighbours(as_values(scores, similarity).to(statistics_dtype(query.dtype)), indices)


@torch.no_grad()
def _nearest(
    query, gallery, k, similarity, exclude_self, query_ids, gallery_ids, backend, world: World | None, progress: bool
) -> tuple[Tensor, Tensor, Galleries]:
    """Scores and columns, ``[N, k]`` each, of the galleries."""
    options = dict(exclude_self=exclude_self, query_ids=query_ids, gallery_ids=gallery_ids, backend=backend)
    arguments = Arguments.of(query, gallery, similarity=similarity, world=world, **options)
    galleries, _ = arguments.meet({})
    if k > (most := arguments.most_neighbours(galleries)):
        raise ValueError(f"k must be at most {most}, the number of rows that a query is compared with, got {k}")
    with on_device_of(query), progress_bar(progress, len(query)) as on_rows:
        search = arguments.search(galleries)
        return *nearest(search.scores, k, search.excluded, search.backend, on_rows), galleries


@in_group
@torch._disable_dynamo
def knn_predict(
    query: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor,
    k: int = 20,
    *,
    temperature: float | None = 0.07,
    similarity: str = "cosine",
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    backend: str = "auto",
    group=None,
    progress: bool = False,
) -> Tensor:
    r"""The label that a query's k nearest rows of the gallery vote for.

    A neighbour's vote counts ``exp(similarity / temperature)``, with distances ``exp(-distance / temperature)``; with
    ``temperature=None`` each counts 1. Of labels with as many votes the lowest is taken. The vote is that of Wu et al.,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018 (arXiv:1805.01978), with which DINO
    is evaluated (k 20, temperature 0.07).

    Args:
        query, gallery, k: as :func:`topk` takes them, but for the default of k, 20. A gallery that holds the queries
            needs ``exclude_self``, or is None, where they are compared with each other: else each votes for itself.
        gallery_labels: integers ``[M]``, any values; without a gallery, of the queries.
        temperature: positive, or None. Default 0.07.
        similarity, exclude_self, query_ids, gallery_ids, backend, group, progress: as of :func:`topk`.

    Returns:
        int64 ``[N]``, labels.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`topk`; labels that are no integers, or not one per row; a
            temperature that is not positive; a query that its ids leave no row.
    """
    validation.check_features("query", query)
    columns = query
    if gallery is not None:
        validation.check_features("gallery", gallery)
        columns = gallery
    labels = validation.check_labels("gallery_labels", gallery_labels, columns.shape[0], columns)
    if temperature is not None:
        temperature = validation.check_positive("temperature", temperature)
    k = validation.check_count("k", k, 1)
    validation.check_flag("progress", progress)
    options = similarity, exclude_self, query_ids, gallery_ids, backend
    scores, indices, galleries = _nearest(query, gallery, k, *options, group, progress)
    labels = galleries.of_all(labels)
    alone = (indices[:, 0] < 0).nonzero()
    if len(alone):
        raise ValueError(f"every query needs a row of the gallery that ids leave it, query {int(alone[0])} has none")
    similarities = as_values(scores, similarity) * (-1 if similarity in DISTANCES else 1)
    weights = torch.ones_like(similarities)
    if temperature is not None:
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return _winners(labels[indices.clamp(min=0)], weights.masked_fill(indices < 0, 0))


def _winners(labels: Tensor, weights: Tensor) -> Tensor:
    """The label with the largest sum of weights in each row, of equal ones the lowest."""
    labels, order = labels.sort(dim=1)
    number = torch.zeros_like(labels)  # of each one's label among those of its row, in their order
    number[:, 1:] = (labels[:, 1:] != labels[:, :-1]).cumsum(1)
    votes = torch.zeros_like(weights).scatter_add_(1, number, weights.gather(1, order))
    of_number = torch.zeros_like(labels).scatter_(1, number, labels)
    return of_number.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)


def knn_accuracy(
    query: Tensor,
    gallery: Tensor | None,
    query_labels: Tensor,
    gallery_labels: Tensor,
    k: int = 20,
    *,
    temperature: float | None = 0.07,
    **options,
) -> float:
    """The share of queries whose k nearest rows of the gallery vote for their label.

    With a ``group``, of the rank's own queries. ``options`` are those of :func:`knn_predict`.

    >>> knn_accuracy(test_features, train_features, test_labels, train_labels, k=20)    # DINO's k-NN evaluation
    >>> knn_accuracy(features, None, labels, labels, k=20)                              # leave one out
    """
    validation.check_features("query", query)
    query_labels = validation.check_labels("query_labels", query_labels, query.shape[0], query)
    if not len(query):
        raise ValueError("query must have at least one row, got none")
    predicted = knn_predict(query, gallery, gallery_labels, k, temperature=temperature, **options)
    return float((predicted == query_labels).double().mean())


def _run_topk(*arguments):
    return tuple(_topk(*arguments, None, False))


def _fake_topk(query, gallery, k, *options):
    shape = query.shape[0], k
    return query.new_empty(shape, dtype=statistics_dtype(query.dtype)), query.new_empty(shape, dtype=torch.int64)


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(
    "topk(Tensor query, Tensor? gallery, int k, str similarity, bool exclude_self, Tensor? query_ids, "
    "Tensor? gallery_ids, str backend) -> (Tensor values, Tensor indices)"
)
_library.impl("topk", _run_topk, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::topk", _fake_topk, lib=_library)
