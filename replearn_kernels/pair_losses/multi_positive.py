"""CLIP with several positives: images and texts of one id all belong together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..declare import PairLoss, logsumexp, total
from ..declare.compute import pair_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group, takes_logit_scale
from ..losses import _Loss


@dataclass(frozen=True)
class MultiPositiveClip(PairLoss):
    """Cross entropies of rows and columns against a distribution that is even over all pairs of one group."""

    scaled, symmetric = True, True

    def terms(self, logit, pair):
        return {
            "every": logsumexp(logit),
            "positives": total(logit, where=pair.same),
            "count": total(1, where=pair.same),
        }

    def loss(self, row, column):
        return sum(side.every - side.positives / side.count for side in (row, column)) / 2


@in_group
@takes_logit_scale
def multi_positive_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    image_group: Tensor,
    text_group: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""CLIP with several positives: every text of an image's group is right, in equal parts, and the reverse.

    With ``l_ij = logit_scale * <image_i, text_j>`` and P_i the texts of image i's group (Q_i the images of text i's):

        L_i = 1/2 (logsumexp_j l_ij - 1 / |P_i| sum_{p in P_i} l_ip)
            + 1/2 (logsumexp_j l_ji - 1 / |Q_i| sum_{q in Q_i} l_qi)

    Where every group is one pair it is :func:`~replearn_kernels.clip_loss`. With labels for groups it is the loss of
    UniCL: Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022 (arXiv:2204.03610).

    Args:
        image_features: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        text_features: ``[N, d]``, of the same dtype and device. Image i and text i belong together.
        logit_scale: the inverse temperature, already exponentiated; a float, or a tensor of one element, 0-d or
            ``[1]``, which gets a gradient.
        image_group: integers ``[N]``, any values (-1 is a group as any other): of the caption, label, or sample.
        text_group: integers ``[N]``; every text's has to be that of some image and the reverse, or its loss is NaN.
            Default: ``image_group``.
        reduction: "mean" over the pairs (i, i), "sum", or "none": ``[N]``.
        normalize: L2-normalise both features first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; groups count over all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without images 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a scale that is not finite, an unknown
            reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        multi_positive_clip_loss(image, text, logit_scale.exp(), image_group=labels).backward()
    """
    if isinstance(image_features, Tensor) and isinstance(text_features, Tensor):
        validation.check_same_rows("image_features", image_features, "text_features", text_features)
    return pair_loss(
        MultiPositiveClip(), image_features, text_features, query_group=image_group,
        key_group=image_group if text_group is None else text_group, logit_scale=logit_scale, reduction=reduction,
        normalize=normalize, backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
        names=("image_features", "text_features", "image_group", "text_group"),
    )  # fmt: skip


class MultiPositiveClipLoss(_Loss):
    """:func:`~replearn_kernels.multi_positive_clip_loss` as a module."""

    @takes_logit_scale
    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
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
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        *,
        image_group: Tensor,
        text_group: Tensor | None = None,
    ) -> Tensor:
        """The loss of N images and their texts, by group."""
        groups = {"image_group": image_group, "text_group": text_group}
        return multi_positive_clip_loss(image_features, text_features, logit_scale, **groups, **self.options)
