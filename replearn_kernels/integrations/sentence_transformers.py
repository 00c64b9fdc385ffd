"""sentence-transformers' losses over all pairs of a batch, computed by this library: the same classes and values.

::

    from replearn_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)               # in the place of sentence_transformers.losses'
    SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss).train()

or ``apply()`` once, and ``sentence_transformers.sentence_transformer.losses`` has these. Each is a subclass of theirs
with its constructor, and takes ``backend``, ``memory_budget`` and ``strategy`` besides. ``MatryoshkaLoss`` and the like
take it as they take theirs. Losses are fp32 for half-precision embeddings, where theirs have the embeddings' dtype.

All other losses stay theirs. (CoSENT and AnglE compare numbers, not rows, and need no N x N matrix there either.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import functional as F
from ..engine.problem import statistics_dtype
from ..engine.world import World
from ..functional.rows import unit_rows
from ..functional.supervised import own_samples
from ..pair_losses import gist_loss, pair_logsumexp
from ..ranks import default_group
from .labelled_pairs import as_integers
from .options import TakesOptions
from .replacing import Replacement
from .versions import require

require("sentence-transformers", "6.2", "7")

from sentence_transformers.base.losses.merged_forward import embed_columns  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import batch_to_device, cos_sim, dot_score  # noqa: E402


class MultipleNegativesRankingLoss(TakesOptions, theirs.MultipleNegativesRankingLoss):
    """InfoNCE of queries and documents, with every option of sentence-transformers' class.

    With ``gather_across_devices`` the documents are those of all processes, as there, and so are the gradients.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
        NotImplementedError: in the call, a ``similarity_fct`` that is neither ``cos_sim`` nor ``dot_score``.
    """

    entry = "compute_loss_from_embeddings"

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of queries ``[N, d]``, their documents ``[N, d]`` and each one's hard negatives ``[N, d]``."""
        return _ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(TakesOptions, theirs.CachedMultipleNegativesRankingLoss):
    """The same with sentence-transformers' gradient cache, which embeds a large batch some rows at a time.

    ``mini_batch_size`` is that of the model's calls alone: the loss is one call for the whole batch, in O(N d) memory.

    Raises:
        TypeError, ValueError, NotImplementedError: as :class:`MultipleNegativesRankingLoss`.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the columns' embeddings, in parts ``[n, d]``; with its gradients in them, where asked."""
        loss = _ranking_loss(self, [torch.cat(parts) for parts in reps])
        return _with_gradients(loss) if with_backward else loss


def _ranking_loss(settings, embeddings: list[Tensor]) -> Tensor:
    """``settings``: a loss with the attributes of sentence-transformers'."""
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must be queries, documents and maybe hard negatives, got {len(embeddings)}")
    query, *documents = embeddings
    if settings.similarity_fct is cos_sim:
        query, *documents = map(unit_rows, embeddings)
    elif settings.similarity_fct is not dot_score:
        raise NotImplementedError(f"similarity_fct must be cos_sim or dot_score, got {settings.similarity_fct!r}")
    group = default_group(settings.gather_across_devices)
    options = {"logit_scale": settings.scale, "group": group, **settings.options}
    directions = set(settings.directions)
    has_hardness = settings.hardness_mode is not None and settings.hardness_strength > 0
    if not has_hardness and (len(directions) == 1 or settings.partition_mode == "per_direction"):
        symmetric = "doc_to_query" in directions
        return F.info_nce_loss(query, torch.cat(documents), symmetric=symmetric, **options)
    return _loss_of_parts(settings, query, documents, options)


def _loss_of_parts(settings, query: Tensor, documents: list[Tensor], options: dict) -> Tensor:
    """Softmaxes over a query's own documents, logit by logit, and sums over what is of other queries."""
    positive, document = documents[0], torch.cat(documents)
    sample = own_samples(query.shape[0], query, World.of(options["group"]))
    wide = statistics_dtype(query.dtype)
    own = torch.stack([(query.to(wide) * each.to(wide)).sum(1) for each in documents], 1)
    strength = settings.hardness_strength if settings.hardness_mode is not None else 0.0
    of_own = strength if settings.hardness_mode in ("hard_negatives", "all_negatives") else 0.0
    of_others = strength if settings.hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0

    def others(rows: Tensor, columns: Tensor, hardness: float = 0.0) -> Tensor:
        """``[N, 1]``: the log-sum-exp over the columns of other queries."""
        of_columns = sample.repeat(len(documents)) if columns is document else sample
        groups = {"query_group": sample, "key_group": of_columns}
        return pair_logsumexp(rows, columns, over="other", hardness=hardness, **groups, **options)[:, None]

    logit = settings.scale * own[:, :1]
    hard = settings.scale * own[:, 1:] + of_own * own[:, 1:].detach()
    parts = [logit, hard, others(query, document, float(of_others / settings.scale))]
    if "query_to_query" in settings.directions:
        parts.append(others(query, query))
    if "doc_to_doc" in settings.directions:
        parts.append(others(positive, document))
    if "doc_to_query" not in settings.directions:
        log_total = torch.cat(parts, 1).logsumexp(1)
    elif settings.partition_mode == "joint":
        log_total = torch.cat([*parts, logit, others(positive, query)], 1).logsumexp(1)
    else:
        of_query, of_document = torch.cat(parts, 1), torch.cat([logit, others(positive, query)], 1)
        log_total = (of_query.logsumexp(1) + of_document.logsumexp(1)) / 2
    return (log_total - logit[:, 0]).mean()


class GISTEmbedLoss(TakesOptions, theirs.GISTEmbedLoss):
    """:func:`~replearn_kernels.gist_loss` with sentence-transformers' guide model.

    A row is never its own negative. (There it is one, among anchors and positives, where the guide's cosine of a pair
    is 1 + margin or more.) The guide's cosines are compared in fp32, also those of half-precision features.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
        NotImplementedError: ``gather_across_devices`` with ``contrast_anchors``, which there compares the anchors of
            one process: ``gist_loss(group=...)`` compares those of all.
    """

    not_called = ("sim_matrix",)

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        _check_gathering(self)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of tokenised anchors, positives and maybe negatives."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"sentence_features must be anchors, positives and maybe negatives, got {len(features)}")
        of_guide = [dict(column) for column in features]  # modules write their results into them
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                of_guide = [self._tokenised_for_guide(column) for column in features]
            guides = embed_columns(self.guide, of_guide)
        return _gist_loss(self, embeddings, guides)

    def _tokenised_for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = column["input_ids"]
        if "cu_seq_lens_q" in column:  # texts one after the other in one row
            lengths = column["cu_seq_lens_q"].diff().tolist()
            ids = [text.tolist() for text in ids[0].split(lengths)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(TakesOptions, theirs.CachedGISTEmbedLoss):
    """The same with sentence-transformers' gradient cache, and any number of hard negatives.

    Raises:
        TypeError, ValueError, NotImplementedError: as :class:`GISTEmbedLoss`.
    """

    entry, not_called = "calculate_loss", ("sim_matrix",)

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        _check_gathering(self)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the columns' embeddings, in parts ``[n, d]``; with its gradients in them, where asked."""
        loss = _gist_loss(self, *([torch.cat(parts) for parts in columns] for columns in (reps, reps_guided)))
        return _with_gradients(loss) if with_backward else loss


def _check_gathering(settings) -> None:
    if settings.gather_across_devices and settings.contrast_anchors:
        raise NotImplementedError(
            "gather_across_devices=True takes contrast_anchors=False: anchors of one process alone are not compared "
            "here; replearn_kernels.gist_loss(group=...) compares those of all"
        )


def _gist_loss(settings, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
    (anchor, positive, *negatives), (anchor_guide, positive_guide, *negative_guides) = embeddings, guides
    given = dict(negative=torch.cat(negatives), negative_guide=torch.cat(negative_guides)) if negatives else {}
    return gist_loss(
        anchor, positive, anchor_guide, positive_guide, **given, margin=settings.margin,
        relative_margin=settings.margin_strategy == "relative", contrast_anchors=settings.contrast_anchors,
        contrast_positives=settings.contrast_positives, logit_scale=1 / settings.temperature,
        group=default_group(settings.gather_across_devices), **settings.options,
    )  # fmt: skip


def _with_gradients(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


class _TripletLoss(TakesOptions):
    """What sentence-transformers' losses over the triplets of a batch have in common.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
        NotImplementedError: in the call, a ``distance_metric`` that is none of
            ``BatchHardTripletLossDistanceFunction``'s two.
    """

    def _triplet_loss(self, embeddings: Tensor, labels: Tensor, **how) -> Tensor:
        functions = theirs.BatchHardTripletLossDistanceFunction
        distances = {functions.euclidean_distance: "euclidean", functions.cosine_distance: "cosine"}
        if self.distance_metric not in distances:
            raise NotImplementedError(
                "distance_metric must be euclidean_distance or cosine_distance of "
                f"BatchHardTripletLossDistanceFunction, got {self.distance_metric!r}"
            )
        return F.triplet_margin_loss(
            embeddings, labels, distance=distances[self.distance_metric], **how, **self.options
        )


    def _hardest_triplet_loss(self, labels: Tensor, embeddings: Tensor, margin: float | None) -> Tensor:
        """As there, an anchor without a positive has one at distance 0, and in a batch of one label both distances are
        the same."""
        labels = _labels_of(self, labels, embeddings)
        _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        if len(counts) == 1:
            of_no_gap = math.log(2) if margin is None else margin
            return (embeddings * 0).sum(dtype=statistics_dtype(embeddings.dtype)) + of_no_gap
        alone = (counts[inverse] == 1).nonzero()[:, 0]  # each gets a copy of itself, the positive at distance 0
        losses = self._triplet_loss(
            torch.cat([embeddings, embeddings[alone]]), torch.cat([labels, labels[alone]]), mining="batch_hard",
            margin=margin, reduction="none",
        )  # fmt: skip
        return losses[: len(labels)].mean()


class BatchHardTripletLoss(_TripletLoss, theirs.BatchHardTripletLoss):
    """Every anchor with its farthest positive and its nearest negative, with the mean over all rows."""

    def batch_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of ``[N, d]`` with labels ``[N]``."""
        return self._hardest_triplet_loss(labels, embeddings, self.triplet_margin)


class BatchHardSoftMarginTripletLoss(_TripletLoss, theirs.BatchHardSoftMarginTripletLoss):
    """The same with the soft margin, ``log(1 + exp(D_ap - D_an))``."""

    def batch_hard_triplet_soft_margin_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of ``[N, d]`` with labels ``[N]``."""
        return self._hardest_triplet_loss(labels, embeddings, None)


class BatchAllTripletLoss(_TripletLoss, theirs.BatchAllTripletLoss):
    """Every triplet of a batch, with the mean over those that have a loss, without a list of them."""

    def batch_all_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of ``[N, d]`` with labels ``[N]``."""
        labels = _labels_of(self, labels, embeddings)
        return self._triplet_loss(
            embeddings, labels, mining="batch_all", margin=self.triplet_margin, reduction="mean_nonzero"
        )


class BatchSemiHardTripletLoss(_TripletLoss, theirs.BatchSemiHardTripletLoss):
    """Every positive pair with the nearest negative beyond it, or the farthest.

    A batch of one label has the loss 0 (there it is the mean of the margin and the pairs' distances).
    """

    def batch_semi_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of ``[N, d]`` with labels ``[N]``."""
        labels = _labels_of(self, labels, embeddings)
        return self._triplet_loss(embeddings, labels, mining="semi_hard", margin=self.margin)


def _labels_of(loss, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Integers ``[N]``; other numbers by their rank."""
    if labels.numel() != embeddings.shape[0]:
        raise ValueError(
            f"{type(loss).__name__} needs {embeddings.shape[0]} labels, one per row, got {tuple(labels.shape)}"
        )
    return as_integers(labels.view(-1))


_classes = Replacement(
    ("sentence_transformers",), theirs,
    (
        MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss, GISTEmbedLoss, CachedGISTEmbedLoss,
        BatchHardTripletLoss, BatchHardSoftMarginTripletLoss, BatchAllTripletLoss, BatchSemiHardTripletLoss,
    ),
)  # fmt: skip


def apply() -> None:
    """Put these classes in the place of sentence-transformers': ``sentence_transformers.losses`` has them from here on.

    A name that a module of another package has imported before stays what it was. :func:`undo` takes it back.
    """
    _classes.apply()


def undo() -> None:
    """Put sentence-transformers' own classes back."""
    _classes.undo()
