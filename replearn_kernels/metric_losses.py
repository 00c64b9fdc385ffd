"""The losses over distances as modules."""

from __future__ import annotations

from torch import Tensor

from . import functional as F
from .engine import validation
from .engine.plan import DEFAULT_MEMORY_BUDGET
from .functional.triplet import MINING, REDUCTIONS, Triplets, check_margin_of
from .losses import _Loss
from .objectives.triplet_distance import DISTANCES


class LiftedStructureLoss(_Loss):
    """:func:`~replearn_kernels.lifted_structure_loss` as a module."""

    def __init__(
        self,
        margin: float = 1.0,
        *,
        smooth: bool = True,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            margin=validation.check_margin(margin),
            smooth=validation.check_flag("smooth", smooth),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[N, d]`` with ``labels[N]``."""
        return F.lifted_structure_loss(embeddings, labels, **self.options)


class ContrastiveLoss(_Loss):
    """:func:`~replearn_kernels.contrastive_loss` as a module."""

    def __init__(
        self,
        margin: float = 1.0,
        *,
        squared: bool = True,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            margin=validation.check_margin(margin),
            squared=validation.check_flag("squared", squared),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[N, d]`` with ``labels[N]``."""
        return F.contrastive_loss(embeddings, labels, **self.options)


class TripletMarginLoss(_Loss):
    """:func:`~replearn_kernels.triplet_margin_loss` as a module."""

    reductions = REDUCTIONS

    def __init__(
        self,
        margin: float | None = 0.2,
        *,
        mining: str = "semi_hard",
        distance: str = "euclidean",
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            mining=validation.check_choice("mining", mining, MINING),
            margin=check_margin_of(mining, margin),
            distance=validation.check_choice("distance", distance, DISTANCES),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    def forward(self, embeddings: Tensor, labels: Tensor | None = None, *, triplets: Triplets | None = None) -> Tensor:
        """The loss of the triplets mined by labels, or of the given ones."""
        return F.triplet_margin_loss(embeddings, labels, triplets=triplets, **self.options)
