"""torchmetrics' interface to :mod:`replearn_kernels.retrieval`: embeddings by batch, scores at the end of an epoch.

::

    from replearn_kernels.integrations.torchmetrics import RetrievalMetrics

    metric = RetrievalMetrics(metrics=["recall@1", "map@r"])
    for images, labels in validation:
        metric.update(model(images), labels)
    metric.compute()                                                 # {"recall@1": tensor(0.93), "map@r": tensor(0.71)}

torchmetrics' own retrieval metrics take a score of every pair, N x M of them; these take the rows. In several processes
torchmetrics gathers the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import retrieval
from ..engine import validation
from ..retrieval.arguments import as_columns
from ..retrieval.bounds import SIMILARITIES
from ..retrieval.metrics import metrics_of
from .versions import require

require("torchmetrics", "1.4", "2")

from torchmetrics import Metric  # noqa: E402
from torchmetrics.utilities import dim_zero_cat  # noqa: E402


class _OfRows(Metric):
    """Keeps tensors by name, row by row, until ``compute``. Calling the metric updates it: of one batch there is no
    value, as its rows alone are another retrieval."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    names: tuple[str, ...]

    def __init__(self, similarity: str, backend: str, **options):
        super().__init__(**options)
        validation.check_choice("similarity", similarity, SIMILARITIES)
        self.options = {"similarity": similarity, "backend": backend}  # of the retrieval
        for name in self.names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def forward(self, *rows: Tensor, **more: Tensor) -> None:
        self.update(*rows, **more)

    def keep(self, features: str, of_batch: Tensor | None, **of_rows: Tensor | None) -> None:
        """Features ``[B, d]``, and what each of their rows has: integers ``[B]``, of ids ``[B, C]`` too."""
        given = {name: values for name, values in of_rows.items() if values is not None}
        if of_batch is None:
            if given:
                raise ValueError(f"{next(iter(given))} must be given with {features}, whose rows they are of")
            return
        validation.check_features(features, of_batch)
        for name, values in given.items():
            if name.endswith("ids"):
                as_columns(name, values, of_batch)
            else:
                validation.check_labels(name, values, of_batch.shape[0], of_batch)
        for name, values in {features: of_batch, **given}.items():
            getattr(self, name).append(values.detach())

    def kept(self, *needed: str) -> dict[str, Tensor]:
        """All of every name that there is something of."""
        lists = {name: getattr(self, name) for name in self.names}
        kept = {name: dim_zero_cat(batches) for name, batches in lists.items() if len(batches)}
        for name in needed:
            if name not in kept:
                raise ValueError(f"{name} must be given to update() before compute(), and was not")
        return kept


def _number(value: float, metric: Metric) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=metric.device)


class RetrievalMetrics(_OfRows):
    """:func:`~replearn_kernels.retrieval.evaluate` over the rows of an epoch.

    Args:
        metrics, missing, similarity, backend: as of :func:`~replearn_kernels.retrieval.evaluate`.
        options: torchmetrics' own.

    ``compute`` returns ``{metric: fp64 0-d tensor}``.
    """

    names = "query", "query_labels", "gallery", "gallery_labels", "query_ids", "gallery_ids"

    def __init__(
        self,
        metrics: Sequence[str] = ("recall@1", "recall@5", "recall@10", "map@r", "r_precision", "mrr"),
        missing: str = "error",
        similarity: str = "cosine",
        backend: str = "auto",
        **options,
    ):
        super().__init__(similarity, backend, **options)
        self.metrics = list(metrics_of(metrics))
        self.options["missing"] = validation.check_choice("missing", missing, ("error", "skip"))

    def update(
        self,
        query: Tensor | None = None,
        query_labels: Tensor | None = None,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
        query_ids: Tensor | None = None,
        gallery_ids: Tensor | None = None,
    ) -> None:
        """A batch of queries ``[B, d]`` with their labels ``[B]``, of a gallery with its, or of both; without any
        gallery the queries are compared with each other. Ids, ``[B]`` or ``[B, C]``, are optional."""
        self.keep("query", query, query_labels=query_labels, query_ids=query_ids)
        self.keep("gallery", gallery, gallery_labels=gallery_labels, gallery_ids=gallery_ids)

    def compute(self) -> dict[str, Tensor]:
        found = retrieval.evaluate(**self.kept("query", "query_labels"), metrics=self.metrics, **self.options)
        return {name: _number(found[name], self) for name in self.metrics}


class PairedRecall(_OfRows):
    """Recall@K of pairs in both directions, as of images and their texts.

    Args:
        k: one or several. Default 1, 5 and 10.
        similarity, backend: as of :func:`~replearn_kernels.retrieval.evaluate`.
        options: torchmetrics' own.

    ``compute`` returns ``{"first_to_second_recall@1": fp64 0-d tensor, ..., "second_to_first_recall@1": ...}``.
    """

    names = "first", "second", "first_group", "second_group"

    def __init__(
        self, k: int | Sequence[int] = (1, 5, 10), similarity: str = "cosine", backend: str = "auto", **options
    ):
        super().__init__(similarity, backend, **options)
        self.k = [validation.check_count("k", each, 1) for each in ([k] if isinstance(k, int) else k)]

    def update(
        self,
        first: Tensor,
        second: Tensor,
        first_group: Tensor | None = None,
        second_group: Tensor | None = None,
    ) -> None:
        """Rows ``[B, d]`` and ``[C, d]``. Without groups row i of one belongs to row i of the other, and B = C; with
        groups, integers ``[B]`` and ``[C]``, rows of equal ones, as five texts of an image have its number. A group may
        be spread over batches."""
        if (first_group is None) != (second_group is None):
            raise ValueError("first_group and second_group must be given together, got only one of them")
        if first_group is None:
            validation.check_features("first", first)
            validation.check_features("second", second)
            validation.check_same_rows("second", second, "first", first)
        self.keep("first", first, first_group=first_group)
        self.keep("second", second, second_group=second_group)

    def compute(self) -> dict[str, Tensor]:
        rows = self.kept("first", "second")
        numbers = {side: torch.arange(len(rows[side]), device=self.device) for side in ("first", "second")}
        groups = {side: rows.get(f"{side}_group", numbers[side]) for side in numbers}
        for side in groups:
            if len(groups[side]) != len(rows[side]):
                raise ValueError(f"{side}_group must be given with every batch, or with none")
        found = {}
        for query, gallery in (("first", "second"), ("second", "first")):
            labels = {"query_labels": groups[query], "gallery_labels": groups[gallery]}
            recalls = retrieval.recall_at_k(rows[query], rows[gallery], self.k, **labels, **self.options)
            for k, recall in zip(self.k, recalls):
                found[f"{query}_to_{gallery}_recall@{k}"] = _number(recall, self)
        return found


class KNNAccuracy(_OfRows):
    """:func:`~replearn_kernels.retrieval.knn_accuracy` of queries by the votes of a gallery, as DINO is evaluated;
    without any gallery, by those of the other queries.

    Args:
        k, temperature, similarity, backend: as of :func:`~replearn_kernels.retrieval.knn_accuracy`.
        options: torchmetrics' own.
    """

    names = "query", "query_labels", "gallery", "gallery_labels"

    def __init__(
        self,
        k: int = 20,
        temperature: float | None = 0.07,
        similarity: str = "cosine",
        backend: str = "auto",
        **options,
    ):
        super().__init__(similarity, backend, **options)
        self.options |= {"k": validation.check_count("k", k, 1), "temperature": temperature}

    def update(
        self,
        query: Tensor | None = None,
        query_labels: Tensor | None = None,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
    ) -> None:
        """A batch of queries ``[B, d]`` with their labels ``[B]``, of the gallery with its, or of both."""
        self.keep("query", query, query_labels=query_labels)
        self.keep("gallery", gallery, gallery_labels=gallery_labels)

    def compute(self) -> Tensor:
        rows = self.kept("query", "query_labels")
        rows = {"gallery": None, "gallery_labels": rows["query_labels"], **rows}
        return _number(retrieval.knn_accuracy(**rows, **self.options), self)
