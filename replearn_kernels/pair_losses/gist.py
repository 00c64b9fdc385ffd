"""GISTEmbed: in-batch negatives that a guide holds to be positives are left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..declare import PairLoss, logsumexp, total
from ..declare.compute import batch_loss, pair_loss
from ..declare.given import check_guide
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import statistics_dtype
from ..engine.shards import agree
from ..functional.call import check_pair, in_group, takes_logit_scale
from ..functional.gathered import reduced
from ..functional.rows import stacked, unit_rows
from ..functional.supervised import own_samples
from ..losses import _Loss


@dataclass(frozen=True)
class GistAmong(PairLoss):
    """Of the rows of anchors and positives with each other: the logarithm of a row's sum over what counts as its
    negatives, and with ``between`` over its positive, less the logit of anchor and positive."""

    between: bool  # anchors with positives, too
    anchors: bool  # anchors with anchors
    positives: bool  # positives with positives

    batch, scaled, similarity, guide, row_values = True, True, "cosine", "product", ("threshold", "is_anchor")

    def terms(self, logit, pair):
        kept = ~(pair.guide > pair.row.threshold)
        row_is_anchor, column_is_anchor = pair.row.is_anchor > 0, pair.column.is_anchor > 0
        sets = [
            (self.between, row_is_anchor & ~column_is_anchor & (pair.same | kept)),
            (self.anchors, row_is_anchor & column_is_anchor & kept),
            (self.positives, ~row_is_anchor & ~column_is_anchor & kept),
        ]
        counted = reduce(or_, (condition for is_asked, condition in sets if is_asked))
        return {"all": logsumexp(logit, where=counted), "own": total(logit, where=pair.same)}

    def loss(self, row):
        return row.all - row.own


@dataclass(frozen=True)
class GistBetween(PairLoss):
    """InfoNCE without the keys that the guide takes to be nearer to the query than its own."""

    scaled, similarity, guide, row_values = True, "cosine", "product", ("threshold",)

    def terms(self, logit, pair):
        kept = ~(pair.guide > pair.row.threshold)
        return {"all": logsumexp(logit, where=pair.target | kept), "own": total(logit, where=pair.target)}

    def loss(self, row):
        return row.all - row.own


@takes_logit_scale
def gist_loss(
    anchor: Tensor,
    positive: Tensor,
    anchor_guide: Tensor,
    positive_guide: Tensor,
    *,
    negative: Tensor | None = None,
    negative_guide: Tensor | None = None,
    margin: float = 0.0,
    relative_margin: bool = False,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    logit_scale: float | Tensor = 100.0,
    reduction: str = "mean",
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""GISTEmbed: InfoNCE whose in-batch negatives a guide has looked through.

    Anchor i is compared with all positives and negatives, and with the other anchors; positive i with the other
    positives. Who is nearer in the guide's features than anchor i and its positive are, is no negative. With cosines
    ``s``, the guide's cosines ``g`` and the threshold ``t_i = g(anchor_i, positive_i) - margin`` (with
    ``relative_margin`` ``g - margin |g|``), and sums over all pairs (u, v) of these kinds with ``g(u, v) <= t_i``:

        L_i = log(exp(z_i) + sum exp(logit_scale * s(u, v))) - z_i        z_i = logit_scale * s(anchor_i, positive_i)

    Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024
    (arXiv:2402.16829); sentence-transformers' ``GISTEmbedLoss(temperature=1 / logit_scale)``.

    Args:
        anchor: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; any length: cosines are compared.
        positive: ``[N, d]``, of the same dtype and device: row i belongs to anchor i.
        anchor_guide, positive_guide: ``[N, g]`` each, the guide's features of the same, of one floating dtype, to which
            rows of length 1 are rounded. They get no gradient.
        negative, negative_guide: ``[M, d]`` and ``[M, g]``: hard negatives, each compared with every anchor. Default:
            none.
        margin: what is taken off the threshold. Default 0.
        relative_margin: as a fraction of it. Default False.
        contrast_anchors, contrast_positives: compare anchors with anchors, positives with positives. Default True.
        logit_scale: the inverse temperature; a float, or a tensor of one element, which gets a gradient. Default 100.
        reduction: "mean" over the anchors, "sum", or "none": ``[N]``.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; all are compared over all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 features). Without anchors 0, with zero gradients. Pairs whose guide's cosine
        is that of the threshold to 1e-6 (fp64: 1e-13) count as negatives, as they do where both are computed alike.

    Raises:
        TypeError: an argument is not of the type or dtype above, or features, or guides, differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a guide that requires a gradient, negatives
            without their guide, a scale that is not finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        with torch.no_grad():
            guides = guide(anchors), guide(positives)
        gist_loss(model(anchors), model(positives), *guides).backward()
    """
    among = _gist_loss_among_whom(contrast_anchors, contrast_positives, reduction, group=group)
    how = {"backend": backend, "memory_budget": memory_budget, "group": group, "strategy": strategy}
    given = anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin
    has_negatives = negative is not None or negative_guide is not None
    parts = []
    if has_negatives or not any(among):
        parts.append(_gist_loss_between(*given, logit_scale, **how))
    if any(among):
        of_both = _gist_loss_among(*given, logit_scale, not has_negatives, *among, **how)
        parts += of_both[: anchor.shape[0]], of_both[anchor.shape[0] :]
    losses = parts[0]
    for part in parts[1:]:
        losses = torch.logaddexp(losses, part)
    return _gist_loss_reduced(losses, reduction, group=group)


class _Given(NamedTuple):
    """What a call compares, checked; guides are of length 1. ``threshold``: of every anchor."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor | None
    guides: list[Tensor]
    threshold: Tensor

    @classmethod
    def of(
        cls, anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin
    ) -> _Given:
        anchor, positive = check_pair({"anchor": anchor, "positive": positive})
        validation.check_same_rows("anchor", anchor, "positive", positive)
        guides = list(check_pair({"anchor_guide": anchor_guide, "positive_guide": positive_guide}))
        if (negative is None) != (negative_guide is None):
            raise ValueError("negative and negative_guide must be given together, got only one of them")
        if negative is not None:
            _, negative = check_pair({"anchor": anchor, "negative": negative})
            guides.append(check_pair({"anchor_guide": anchor_guide, "negative_guide": negative_guide})[1])
        names, features = ("anchor_guide", "positive_guide", "negative_guide"), (anchor, positive, negative)
        guides = [unit_rows(check_guide(*each)) for each in zip(names, guides, features)]
        dtype, margin = statistics_dtype(anchor.dtype), validation.check_number("margin", margin)
        validation.check_finite("margin", margin, dtype)
        cosine = (guides[0].to(dtype) * guides[1].to(dtype)).sum(1)
        relative = validation.check_flag("relative_margin", relative_margin)
        threshold = cosine - (margin * cosine.abs() if relative else margin)
        alike = 2.0**-43 if dtype == torch.float64 else 2.0**-20  # what another order of the same sum may add
        return cls(anchor, positive, negative, guides, threshold + alike)


@in_group
def _gist_loss_among_whom(contrast_anchors, contrast_positives, reduction, *, group=None) -> tuple[bool, bool]:
    """The flags, checked where the other ranks are told of an error."""
    validation.check_reduction(reduction)
    of_anchors = validation.check_flag("contrast_anchors", contrast_anchors)
    return of_anchors, validation.check_flag("contrast_positives", contrast_positives)


@in_group
def _gist_loss_among(
    anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin, logit_scale,
    between: bool, contrast_anchors, contrast_positives, *, backend, memory_budget, group=None, strategy,
) -> Tensor:  # fmt: skip
    """Of anchors, then of positives, ``[2N]``: what :class:`GistAmong` says."""
    given = _Given.of(
        anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin
    )  # fmt: skip
    is_anchor = torch.cat([torch.ones_like(given.threshold), torch.zeros_like(given.threshold)])
    row_values = {"threshold": given.threshold.repeat(2), "is_anchor": is_anchor}
    samples = own_samples(given.anchor.shape[0], given.anchor, group).repeat(2)
    return batch_loss(
        GistAmong(between, contrast_anchors, contrast_positives), stacked(given.anchor, given.positive), samples,
        logit_scale=logit_scale, row_values=row_values, row_guide=torch.cat(given.guides[:2]), reduction="none",
        normalize=True, backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


@in_group
def _gist_loss_between(
    anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin, logit_scale, *,
    backend, memory_budget, group=None, strategy,
) -> Tensor:  # fmt: skip
    """Of anchors with positives and negatives, ``[N]``: what :class:`GistBetween` says."""
    given = _Given.of(
        anchor, positive, anchor_guide, positive_guide, negative, negative_guide, margin, relative_margin
    )  # fmt: skip
    keys = [given.positive] if given.negative is None else [given.positive, given.negative]
    query_guide, *key_guides = given.guides
    return pair_loss(
        GistBetween(), given.anchor, torch.cat(keys), logit_scale=logit_scale,
        row_values={"threshold": given.threshold}, row_guide=query_guide, column_guide=torch.cat(key_guides),
        reduction="none", normalize=True, backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


@in_group
def _gist_loss_reduced(losses: Tensor, reduction: str, *, group=None) -> Tensor:
    """The mean is over the anchors of all ranks."""
    if group is None:
        return reference.reduce(losses, reduction)
    counts = (told["anchors"] for told in agree(group, {}, {"anchors": losses.shape[0]}))
    return reduced(losses, sum(counts), reduction, group)


class GistLoss(_Loss):
    """:func:`~replearn_kernels.gist_loss` as a module."""

    @takes_logit_scale
    def __init__(
        self,
        *,
        margin: float = 0.0,
        relative_margin: bool = False,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            margin=validation.check_number("margin", margin),
            relative_margin=validation.check_flag("relative_margin", relative_margin),
            contrast_anchors=validation.check_flag("contrast_anchors", contrast_anchors),
            contrast_positives=validation.check_flag("contrast_positives", contrast_positives),
            reduction=reduction,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    @takes_logit_scale
    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        anchor_guide: Tensor,
        positive_guide: Tensor,
        *,
        negative: Tensor | None = None,
        negative_guide: Tensor | None = None,
        logit_scale: float | Tensor = 100.0,
    ) -> Tensor:
        """The loss of N anchors and their positives, by the features that a guide has for them."""
        given = {"negative": negative, "negative_guide": negative_guide, "logit_scale": logit_scale}
        return gist_loss(anchor, positive, anchor_guide, positive_guide, **given, **self.options)
