"""VSE++: images and texts against the hardest negative of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..declare import PairLoss, largest, total
from ..declare.compute import pair_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group
from ..losses import _Loss


@dataclass(frozen=True)
class Vse(PairLoss):
    """Two hinges for every pair, of the largest similarity with another's text, and with another's image."""

    margin: float = 0.2

    symmetric = True

    def terms(self, s, pair):
        return {"own": total(s, where=pair.target), "hardest": largest(s, where=pair.other & ~pair.target)}

    def loss(self, row, column):
        return sum((self.margin + side.hardest - row.own).relu() for side in (row, column))


@in_group
def vse_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    margin: float = 0.2,
    image_group: Tensor | None = None,
    text_group: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""The max of hinges of VSE++: every image and text against its hardest negative in the batch.

    With ``s_ij = <image_i, text_j>``::

        L_i = [margin + max_{j != i} s_ij - s_ii]+ + [margin + max_{j != i} s_ji - s_ii]+

    Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", BMVC 2018 (arXiv:1707.05612). The
    gradient is that of the pairs found, of equal ones the first.

    Args:
        image_features: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        text_features: ``[N, d]``, of the same dtype and device. Image i and text i belong together.
        margin: a number of at least 0. Default 0.2.
        image_group, text_group: integers ``[N]``, any values: pairs of one group are no negatives, as texts of one
            picture are none. ``text_group``'s default is ``image_group``. Default of both: all other pairs are.
        reduction: "mean" over the pairs (i, i), "sum" (the authors'), or "none": ``[N]``.
        normalize: L2-normalise both features first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; negatives are found over all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). An image or text without negatives has no hinge. Without images 0,
        with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a margin that is negative or not finite, an
            unknown reduction or backend, a negative budget; of half precision and fp32 more than 2^24 rows.
        RuntimeError: the backend asked for is not available here.

    Example::

        vse_loss(image, text, image_group=picture, normalize=True).backward()
    """
    if isinstance(image_features, Tensor) and isinstance(text_features, Tensor):
        validation.check_same_rows("image_features", image_features, "text_features", text_features)
    return pair_loss(
        Vse(validation.check_margin(margin)), image_features, text_features, query_group=image_group,
        key_group=image_group if text_group is None else text_group, reduction=reduction, normalize=normalize,
        backend=backend, memory_budget=memory_budget, group=group, strategy=strategy,
        names=("image_features", "text_features", "image_group", "text_group"),
    )  # fmt: skip


class VSELoss(_Loss):
    """:func:`~replearn_kernels.vse_loss` as a module."""

    def __init__(
        self,
        *,
        margin: float = 0.2,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            margin=validation.check_margin(margin),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *,
        image_group: Tensor | None = None,
        text_group: Tensor | None = None,
    ) -> Tensor:
        """The loss of N images and their texts."""
        groups = {"image_group": image_group, "text_group": text_group}
        return vse_loss(image_features, text_features, **groups, **self.options)
