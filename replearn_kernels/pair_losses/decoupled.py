"""Decoupled contrastive learning: NT-Xent whose denominator leaves the positive out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..declare import PairLoss, logsumexp, total
from ..declare.compute import batch_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group
from ..functional.rows import stacked
from ..functional.supervised import check_views
from ..losses import _Loss


@dataclass(frozen=True)
class Decoupled(PairLoss):
    """Yeh et al. 2022, equation 6."""

    batch, scaled, similarity = True, True, "cosine"

    def terms(self, logit, pair):
        return {"negatives": logsumexp(logit, where=pair.other), "positive": total(logit, where=pair.same)}

    def loss(self, row):
        return row.negatives - row.positive


@in_group
def decoupled_contrastive_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Decoupled contrastive loss (DCL): each of 2N views attracts its other view and repels those of other samples.

    Over the rows ``z = [z_i; z_j]``, with p(i) the other view of row i's sample:

        L_i = logsumexp_{k not in {i, p(i)}} (<z_i, z_k> / temperature) - <z_i, z_p(i)> / temperature

    That is :func:`~replearn_kernels.nt_xent_loss` without the positive in the denominator, whose gradient small batches
    need not wait for. Yeh et al., "Decoupled Contrastive Learning", ECCV 2022 (arXiv:2110.06848).

    Args:
        z_i: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        z_j: ``[N, d]``: row i is another view of z_i's row i; of the same dtype and device.
        temperature: divides the similarities; a positive float, or a tensor of one element, 0-d or ``[1]``, which gets
            a gradient. Default 0.1.
        reduction: "mean" over the 2N views, "sum", or "none": ``[2N]``, those of z_i first.
        normalize: L2-normalise both first. Default True.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; the rows are those of all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs); it can be negative. Without rows 0, with zero gradients; a single
        sample has no negatives, and the loss -inf.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a temperature that is not positive and
            finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        decoupled_contrastive_loss(encoder(view_1), encoder(view_2)).backward()
    """
    views, sample = check_views(z_i, z_j, group)
    logit_scale = validation.check_temperature("temperature", temperature, views[0])
    return batch_loss(
        Decoupled(), stacked(*views), sample, logit_scale=logit_scale, reduction=reduction, normalize=normalize,
        backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
    )  # fmt: skip


class DecoupledContrastiveLoss(_Loss):
    """:func:`~replearn_kernels.decoupled_contrastive_loss` as a module."""

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            temperature=validation.check_positive("temperature", temperature),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """The loss of two views, ``[N, d]`` each, of every sample."""
        return decoupled_contrastive_loss(z_i, z_j, **self.options)
