"""InfoNCE whose targets are the probabilities of a teacher: distillation of similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..declare import PairLoss, exp, logsumexp, total
from ..declare.compute import pair_loss
from ..declare.given import check_guide
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import check_pair, in_group, takes_logit_scale
from ..functional.rows import unit_rows
from ..losses import _Loss
from .log_sum_exp import PairLogSumExp


@dataclass(frozen=True)
class SoftTargets(PairLoss):
    """Cross entropy of a row's softmax against the guide's. Calls give its scale, and the logarithms of its sums."""

    scaled, guide, row_values = True, "product", ("scale", "log_total")

    def terms(self, logit, pair):
        probability = exp(pair.row.scale * pair.guide - pair.row.log_total)
        return {"all": logsumexp(logit), "expected": total(probability * logit)}

    def loss(self, row):
        return row.all - row.expected


@dataclass(frozen=True)
class SymmetricSoftTargets(PairLoss):
    """The mean of the cross entropies of rows and of columns, each against the guide's."""

    scaled, symmetric, guide = True, True, "product"
    row_values, column_values = ("scale", "log_total"), ("log_total",)

    def terms(self, logit, pair):
        guide = pair.row.scale * pair.guide
        return {
            "all": logsumexp(logit),
            "by_row": total(exp(guide - pair.row.log_total) * logit),
            "by_column": total(exp(guide - pair.column.log_total) * logit),
        }

    def loss(self, row, column):
        return (row.all - row.by_row + column.all - column.by_column) / 2


@takes_logit_scale
def soft_target_loss(
    query: Tensor,
    key: Tensor,
    query_guide: Tensor,
    key_guide: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    guide_scale: float | Tensor = 1.0,
    symmetric: bool = False,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""InfoNCE with the probabilities that a teacher gives to the keys in place of one target: distillation.

    With the logits ``l_ij = logit_scale * <query_i, key_j>``, and the teacher's probabilities, of its own features,

        p_ij = softmax_j(guide_scale * <query_guide_i, key_guide_j>)
        L_i  = - sum_j p_ij log softmax_j(l_ij)  =  logsumexp_j l_ij - sum_j p_ij l_ij

    ``symmetric``: the mean of that and of the same over columns, as CLIP has it. The least that the loss can be is the
    entropy of p, which it reaches where the student's probabilities are the teacher's: its gradient is that of their
    Kullback-Leibler divergence. Neither matrix is ever formed.

    Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021 (arXiv:2101.04731); with
    ``symmetric`` the distillation of open_clip's ``DistillClipLoss``.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        key: ``[M, d]``, of the same dtype and device; ``symmetric`` needs M = N.
        query_guide: ``[N, g]``, the teacher's features of the queries, of any floating dtype. They get no gradient, nor
            do ``key_guide`` and ``guide_scale``.
        key_guide: ``[M, g]``, of the same dtype as ``query_guide``.
        logit_scale: the student's inverse temperature, a float, or a tensor of one element, which gets a gradient.
            Default 1.
        guide_scale: the teacher's inverse temperature, a float or a tensor of one element. Default 1.
        symmetric: over columns too. Default False.
        reduction: "mean" over the queries, "sum", or "none": ``[N]``.
        normalize: L2-normalise all four first, each rounded to its own dtype: at large scales the guides' should be
            fp32. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; keys are those of all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 features). Without queries 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or features, or guides, differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a guide that requires a gradient, a scale
            that is not finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        with torch.no_grad():
            teacher_image, teacher_text = teacher(images, texts)
        soft_target_loss(
            image, text, teacher_image, teacher_text, logit_scale=log_scale.exp(), guide_scale=100.0, symmetric=True
        ).backward()
    """
    how = {"backend": backend, "memory_budget": memory_budget, "group": group, "strategy": strategy}
    given = query, key, query_guide, key_guide, guide_scale, normalize
    row_total = _soft_target_loss_total(*given, symmetric, False, **how)
    column_total = _soft_target_loss_total(*given, symmetric, True, **how) if symmetric else None
    return _soft_target_loss_of(*given, row_total, column_total, logit_scale, reduction, **how)


def _checked_teacher(query, key, query_guide, key_guide, guide_scale, normalize) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's features of queries and keys, as they are compared, and its scale, once all are checked."""
    query, key = check_pair({"query": query, "key": key})
    query_guide, key_guide = check_pair({"query_guide": query_guide, "key_guide": key_guide})
    query_guide, key_guide = check_guide("query_guide", query_guide, query), check_guide("key_guide", key_guide, key)
    scale = validation.check_scale("guide_scale", guide_scale, query)
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("guide_scale requires a gradient, which it does not get: pass guide_scale.detach()")
    if validation.check_flag("normalize", normalize):
        query_guide, key_guide = unit_rows(query_guide), unit_rows(key_guide)
    return query_guide, key_guide, scale


@in_group
def _soft_target_loss_total(
    query, key, query_guide, key_guide, guide_scale, normalize, symmetric, of_columns: bool, *,
    backend, memory_budget, group=None, strategy,
) -> Tensor:  # fmt: skip
    """``logsumexp_j guide_scale <query_guide_i, key_guide_j>``, ``[N]``; or the same of columns, ``[M]``."""
    if validation.check_flag("symmetric", symmetric) and isinstance(query, Tensor) and isinstance(key, Tensor):
        validation.check_same_rows("query", query, "key", key)
    *guides, scale = _checked_teacher(query, key, query_guide, key_guide, guide_scale, normalize)
    with torch.no_grad():
        return pair_loss(
            PairLogSumExp(), *(reversed(guides) if of_columns else guides), logit_scale=scale, reduction="none",
            normalize=False, backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
        )  # fmt: skip


@in_group
def _soft_target_loss_of(
    query, key, query_guide, key_guide, guide_scale, normalize, row_total: Tensor, column_total: Tensor | None,
    logit_scale, reduction, *, backend, memory_budget, group=None, strategy,
) -> Tensor:  # fmt: skip
    query_guide, key_guide, scale = _checked_teacher(query, key, query_guide, key_guide, guide_scale, normalize)
    row_values = {"scale": scale.expand(query.shape[0]), "log_total": row_total}
    return pair_loss(
        SoftTargets() if column_total is None else SymmetricSoftTargets(), query, key, logit_scale=logit_scale,
        row_values=row_values, column_values=None if column_total is None else {"log_total": column_total},
        row_guide=query_guide, column_guide=key_guide, reduction=reduction, normalize=normalize,
        backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


class SoftTargetLoss(_Loss):
    """:func:`~replearn_kernels.soft_target_loss` as a module."""

    @takes_logit_scale
    def __init__(
        self,
        *,
        symmetric: bool = False,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            symmetric=validation.check_flag("symmetric", symmetric),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    @takes_logit_scale
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_guide: Tensor,
        key_guide: Tensor,
        *,
        logit_scale: float | Tensor = 1.0,
        guide_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss of N queries and M keys, by the features that a teacher has for them."""
        scales = {"logit_scale": logit_scale, "guide_scale": guide_scale}
        return soft_target_loss(query, key, query_guide, key_guide, **scales, **self.options)
