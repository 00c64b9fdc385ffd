"""Circle loss: every row's positives and negatives, each weighted by how far it is from where it should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..declare import PairLoss, logsumexp, relu
from ..declare.compute import batch_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group
from ..losses import _Loss


@dataclass(frozen=True)
class Circle(PairLoss):
    """Sun et al. 2020, equation 6."""

    margin: float
    gamma: float

    batch, similarity = True, "cosine"

    def terms(self, s, pair):
        m = self.margin
        near, far = relu(1 + m - s).detach() * (1 - m - s), relu(s + m).detach() * (s - m)
        return {
            "positives": logsumexp(self.gamma * near, where=pair.same),
            "negatives": logsumexp(self.gamma * far, where=pair.other),
        }

    def loss(self, row):
        return -F.logsigmoid(-(row.positives + row.negatives))  # F.softplus is x from 20 on

    def counted(self, row):
        return (row.positives > -float("inf")) & (row.negatives > -float("inf"))


@in_group
def circle_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.4,
    gamma: float = 80.0,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Circle loss: rows of one label attract each other and all others repel, those most that are furthest off.

    With cosines s, P_i the other rows of row i's label, N_i the rows of other labels, and weights a that take no
    gradient:

        L_i = log(1 + sum_{p in P_i} exp(gamma a_p (1 - margin - s_ip)) sum_{n in N_i} exp(gamma a_n (s_in - margin)))
        a_p = max(0, 1 + margin - s_ip),    a_n = max(0, s_in + margin)

    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020 (arXiv:2002.10857).

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``; any values: -1 is a label as any other, and none is ignored.
        margin: the paper's m, in units of cosine: 0.25 for faces, 0.4 for retrieval. A number, which does not learn.
            Default 0.4.
        gamma: the scale, a positive number: the paper's 256 for faces, 80 for retrieval. Default 80.
        reduction: "mean" over the rows that have a positive and a negative, "sum", or "none": ``[N]``, 0 for others.
        normalize: L2-normalise the embeddings first. False: they have unit length already. Default True.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; the rows are those of all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without a pair of each kind 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device, a margin that is not finite, a gamma that is not positive and
            finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        circle_loss(embeddings, labels, gamma=80.0).backward()
    """
    loss = Circle(validation.check_real("margin", margin), validation.check_positive("gamma", gamma))
    return batch_loss(
        loss, embeddings, labels, reduction=reduction, normalize=normalize, backend=backend,
        memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


class CircleLoss(_Loss):
    """:func:`~replearn_kernels.circle_loss` as a module."""

    def __init__(
        self,
        margin: float = 0.4,
        gamma: float = 80.0,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            margin=validation.check_real("margin", margin),
            gamma=validation.check_positive("gamma", gamma),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[N, d]`` with ``labels[N]``."""
        return circle_loss(embeddings, labels, **self.options)
