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
from .versions import require

require("torchmetrics", "1.4", "2")

from torchmetrics import Metric  # noqa: E402
from torchmetrics.utilities import dim_zero_cat  # noqa: E402


class _OfRows(Metric):
    """Keeps tensors by name, row by row, until ``compute``."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    names: tuple[str, ...]

    def __init__(self, **options):
        super().__init__(**options)
        for name in self.names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def keep(self, **rows: Tensor | None) -> None:
        for name, of_batch in rows.items():
            if of_batch is not None:
                getattr(self, name).append(of_batch.detach())

    def kept(self) -> dict[str, Tensor]:
        """All of every name that there is something of."""
        lists = {name: getattr(self, name) for name in self.names}
        return {name: dim_zero_cat(batches) for name, batches in lists.items() if len(batches)}


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
        super().__init__(**options)
        self.metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        self.options = {"missing": missing, "similarity": similarity, "backend": backend}

    def update(
        self,
        query: Tensor | None = None,
        query_labels: Tensor | None = None,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
        query_ids: Tensor | None = None,
        gallery_ids: Tensor | None = None,
    ) -> None:
        """A batch of queries ``[B, d]`` with their labels, of the gallery, or of both; without any gallery the queries
        are compared with each other. Ids are optional."""
        self.keep(
            query=query,
            query_labels=query_labels,
            gallery=gallery,
            gallery_labels=gallery_labels,
            query_ids=query_ids,
            gallery_ids=gallery_ids,
        )

    def compute(self) -> dict[str, Tensor]:
        found = retrieval.evaluate(**self.kept(), metrics=self.metrics, **self.options)
        return {name: torch.tensor(found[name], dtype=torch.float64, device=self.device) for name in self.metrics}


class PairedRecall(_OfRows):
    """Recall@K of pairs in both directions, as of images and their texts: row i of one belongs to row i of the other.

    Args:
        k: one or several. Default 1, 5 and 10.
        similarity, backend: as of :func:`~replearn_kernels.retrieval.evaluate`.
        options: torchmetrics' own.

    ``compute`` returns ``{"first_to_second_recall@1": 0-d tensor, ..., "second_to_first_recall@1": ...}``.
    """

    names = "first", "second"

    def __init__(
        self, k: int | Sequence[int] = (1, 5, 10), similarity: str = "cosine", backend: str = "auto", **options
    ):
        super().__init__(**options)
        self.k = [k] if isinstance(k, int) else list(k)
        self.options = {"similarity": similarity, "backend": backend}

    def update(self, first: Tensor, second: Tensor) -> None:
        """Rows ``[B, d]`` of both, pair by pair."""
        self.keep(first=first, second=second)

    def compute(self) -> dict[str, Tensor]:
        rows = self.kept()
        pairs = torch.arange(len(rows["first"]), device=self.device)
        found = {}
        for query, gallery in (("first", "second"), ("second", "first")):
            recalls = retrieval.recall_at_k(rows[query], rows[gallery], self.k, target=pairs, **self.options)
            for k, recall in zip(self.k, recalls):
                found[f"{query}_to_{gallery}_recall@{k}"] = torch.tensor(recall, device=self.device)
        return found


class KNNAccuracy(_OfRows):
    """:func:`~replearn_kernels.retrieval.knn_accuracy` of queries by the votes of a gallery, as DINO is evaluated.

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
        super().__init__(**options)
        self.options = {"k": k, "temperature": temperature, "similarity": similarity, "backend": backend}

    def update(
        self,
        query: Tensor | None = None,
        query_labels: Tensor | None = None,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
    ) -> None:
        """A batch of queries ``[B, d]`` with their labels, of the gallery, or of both."""
        self.keep(query=query, query_labels=query_labels, gallery=gallery, gallery_labels=gallery_labels)

    def compute(self) -> Tensor:
        accuracy = retrieval.knn_accuracy(**self.kept(), **self.options)
        return torch.tensor(accuracy, dtype=torch.float64, device=self.device)
