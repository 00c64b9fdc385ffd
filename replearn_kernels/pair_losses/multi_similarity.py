"""Multi-similarity loss: soft maxima of a row's negatives and, negative, of its positives."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..declare import PairLoss, logsumexp
from ..declare.compute import batch_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group
from ..losses import _Loss


@dataclass(frozen=True)
class MultiSimilarity(PairLoss):
    """Wang et al. 2019, equation 7, over all pairs."""

    alpha: float
    beta: float
    base: float

    batch, similarity = True, "cosine"

    def terms(self, s, pair):
        return {
            "positives": logsumexp(-self.alpha * (s - self.base), where=pair.same),
            "negatives": logsumexp(self.beta * (s - self.base), where=pair.other),
        }

    def loss(self, row):
        # F.softplus is x from 20 on.
        return -F.logsigmoid(-row.positives) / self.alpha - F.logsigmoid(-row.negatives) / self.beta


@in_group
def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Multi-similarity loss, over all pairs: the paper's equation 7 without its mining of pairs.

    With cosines s, P_i the other rows of row i's label, and N_i the rows of other labels:

        L_i = 1 / alpha log(1 + sum_{p in P_i} exp(-alpha (s_ip - base)))
            + 1 / beta log(1 + sum_{n in N_i} exp(beta (s_in - base)))

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019
    (arXiv:1904.06627).

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``; any values: -1 is a label as any other, and none is ignored.
        alpha: the positives' scale, positive. Default 2.
        beta: the negatives' scale, positive. Default 50.
        base: the cosine that is neither near nor far; the paper's lambda. Default 0.5.
        reduction: "mean" over the rows, "sum", or "none": ``[N]``.
        normalize: L2-normalise the embeddings first. False: they have unit length already. Default True.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; the rows are those of all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without rows 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device, an alpha or beta that is not positive and finite, a base that
            is not finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        multi_similarity_loss(embeddings, labels, beta=40.0).backward()
    """
    return batch_loss(
        MultiSimilarity(**_checked(alpha, beta, base)), embeddings, labels, reduction=reduction, normalize=normalize,
        backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


def _checked(alpha: float, beta: float, base: float) -> dict[str, float]:
    return {
        "alpha": validation.check_positive("alpha", alpha),
        "beta": validation.check_positive("beta", beta),
        "base": validation.check_real("base", base),
    }


class MultiSimilarityLoss(_Loss):
    """:func:`~replearn_kernels.multi_similarity_loss` as a module."""

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            **_checked(alpha, beta, base),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[N, d]`` with ``labels[N]``."""
        return multi_similarity_loss(embeddings, labels, **self.options)
