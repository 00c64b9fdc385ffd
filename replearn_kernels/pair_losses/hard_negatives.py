"""InfoNCE whose negatives count by their hardness, and are corrected for those that are positives unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..declare import PairLoss, logsumexp, total
from ..declare.compute import pair_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group, takes_logit_scale
from ..losses import _Loss


@dataclass(frozen=True)
class HardNegatives(PairLoss):
    """Robinson et al. 2021, and for ``beta = 0`` Chuang et al. 2020."""

    beta: float
    tau_plus: float

    scaled = True

    def terms(self, logit, pair):
        negative = ~pair.target
        return {
            "weighted": logsumexp((1 + self.beta) * logit, where=negative),
            "weights": logsumexp(self.beta * logit, where=negative),
            "count": total(1, where=negative),
            "positive": total(logit, where=pair.target),
        }

    def loss(self, row):
        """``log(1 + g / exp(positive))``: of the logarithm of g / exp(positive), as exp(positive) can overflow."""
        any_negative = row.count > 0
        log_count = row.count.clamp(min=1).log()
        ratio = torch.where(any_negative, row.weighted - row.weights, -math.inf) + log_count - row.positive
        if self.tau_plus:
            of_positives = math.log(self.tau_plus) + log_count - ratio  # their part in the sum, as a logarithm
            exceeded = of_positives < 0
            rest = (-torch.where(exceeded, of_positives, -1).expm1()).log() - math.log(1 - self.tau_plus)
            floor = torch.where(any_negative, log_count - row.logit_scale - row.positive, -math.inf)
            ratio = torch.where(exceeded, torch.maximum(ratio + rest, floor), floor)
        return -F.logsigmoid(-ratio)  # F.softplus is x from 20 on


@in_group
@takes_logit_scale
def hard_negative_loss(
    query: Tensor,
    key: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    target: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""InfoNCE with hard negatives: a negative counts by exp(beta l), and debiased by tau_plus.

    With ``l_ij = logit_scale * <query_i, key_j>``, i's positive t, and its M - 1 other keys for negatives:

        w_ij = exp(beta l_ij) / mean_{k != t} exp(beta l_ik)
        g_i = max((sum_{j != t} w_ij exp(l_ij) - tau_plus (M - 1) exp(l_it)) / (1 - tau_plus),
                  (M - 1) exp(-logit_scale))                                        the maximum for tau_plus > 0 alone
        L_i = log(1 + g_i / exp(l_it))

    Robinson et al., "Contrastive Learning with Hard Negative Samples", ICLR 2021 (arXiv:2010.04592); with ``beta=0``
    the loss of Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020 (arXiv:2007.00224). With ``beta=0`` and
    ``tau_plus=0`` it is :func:`~replearn_kernels.info_nce_loss`.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        key: ``[M, d]``, of the same dtype and device.
        beta: at least 0: how much harder negatives count for more. Default 1.
        tau_plus: in [0, 1): the probability that a negative is a positive unknown. Default 0.
        target: int64 ``[N]``, the row of ``key`` that is each query's positive, in ``[0, M)``. Default: query i belongs
            to key i, which needs M >= N.
        logit_scale: the inverse temperature; a float, or a tensor of one element, 0-d or ``[1]``, which gets a
            gradient.
        reduction: "mean" over the queries, "sum", or "none": ``[N]``.
        normalize: L2-normalise query and key first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs); 0 of a query without negatives. Without queries 0, with zero
        gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, target out of range, a scale that is not finite, a
            beta or tau_plus out of range, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        hard_negative_loss(query, key, beta=0.5, tau_plus=0.1, logit_scale=2.0, normalize=True).backward()
    """
    return pair_loss(
        HardNegatives(**_checked(beta, tau_plus)), query, key, target=target, logit_scale=logit_scale,
        reduction=reduction, normalize=normalize, backend=backend, memory_budget=memory_budget, group=group,
        strategy=strategy,
    )  # fmt: skip


def _checked(beta: float, tau_plus: float) -> dict[str, float]:
    beta, tau_plus = validation.check_real("beta", beta), validation.check_fraction("tau_plus", tau_plus)
    if beta < 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    if tau_plus == 1:
        raise ValueError("tau_plus must be below 1, got 1.0")
    return {"beta": beta, "tau_plus": tau_plus}


class HardNegativeLoss(_Loss):
    """:func:`~replearn_kernels.hard_negative_loss` as a module."""

    @takes_logit_scale
    def __init__(
        self,
        beta: float = 1.0,
        tau_plus: float = 0.0,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            **_checked(beta, tau_plus),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    @takes_logit_scale
    def forward(
        self, query: Tensor, key: Tensor, *, target: Tensor | None = None, logit_scale: float | Tensor = 1.0
    ) -> Tensor:
        """The loss of ``query[N, d]`` against ``key[M, d]``."""
        return hard_negative_loss(query, key, target=target, logit_scale=logit_scale, **self.options)
