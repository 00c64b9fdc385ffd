"""Losses that own a classifier's weight, as modules: ArcFace, CosFace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional as F
from .engine import validation
from .engine.class_shards import own_classes
from .engine.world import World
from .functional.call import check_pair
from .functional.classification import CLASSIFIER_BUDGET, LARGEST_ARCFACE_MARGIN, LARGEST_COSFACE_MARGIN
from .losses import _Loss
from .reference import unit_rows


class _MarginLoss(_Loss):
    """A classifier with a margin: it owns the class centres, ``weight[classes, dim]``, a parameter.

    With a ``group`` and ``shard_classes`` those of this rank, about ``classes / R``: the first ranks have one more each
    where R does not divide ``classes``. ``classes`` and labels are those of all ranks, and ``first_class`` is the label
    of ``weight[0]``. It starts as normal numbers of variance ``2 / (classes + dim)``.
    """

    def __init__(self, dim: int, classes: int, *, scale: float, group, shard_classes: bool, **options):
        self.dim = dim = validation.check_count("dim", dim, 1)
        classes = validation.check_count("classes", classes, 1)
        validation.check_flag("shard_classes", shard_classes)
        super().__init__(
            scale=validation.check_positive("scale", scale), group=group, shard_classes=shard_classes, **options
        )
        world = World.of(group) if shard_classes else None
        own = range(classes) if world is None else own_classes(classes, world)
        self.classes, self.first_class = classes, own.start
        self.weight = nn.Parameter(torch.empty(len(own), dim))
        generator, device = None, self.weight.device
        if world is not None and device.type != "meta":
            # Ranks that were seeded alike must not have the same centres, nor another state after it.
            seed = int(torch.randint(2**62, (), device="cpu")) + world.rank
            generator = torch.Generator(device).manual_seed(seed)
        nn.init.normal_(self.weight, std=(2 / (classes + dim)) ** 0.5, generator=generator)  # Glorot, of all classes

    def logits(self, embeddings: Tensor) -> Tensor:
        """``scale * cos`` to the own classes, ``[B, C]``, without the margin: for inference, where C x B does fit.

        Raises:
            TypeError, ValueError: embeddings that are not ``[B, dim]`` of the weight's dtype and device.
        """
        embeddings, weight = check_pair({"embeddings": embeddings, "weight": self.weight})
        return self.options["scale"] * unit_rows(embeddings) @ unit_rows(weight).t()


class ArcFaceLoss(_MarginLoss):
    """:func:`~replearn_kernels.arcface_loss` as a module that owns the weight of ``classes`` centres of width ``dim``.

    Its parameter belongs in the optimizer, beside the encoder's; :meth:`logits` are for inference. With a ``group``
    each rank owns a part of the ``classes``, which are those of all ranks: keep the module out of
    DistributedDataParallel, save its state_dict on every rank, and for clipping and gradient scalers see
    docs/design.md, "Classes and prototypes".
    ``shard_classes=False``: every rank has all of them, as a part of the model that DistributedDataParallel wraps.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        margin: float = 0.5,
        scale: float = 64.0,
        reduction: str = "mean",
        backend: str = "auto",
        memory_budget: int = CLASSIFIER_BUDGET,
        group=None,
        shard_classes: bool = True,
    ):
        super().__init__(
            dim,
            classes,
            margin=validation.check_margin(margin, LARGEST_ARCFACE_MARGIN),
            scale=scale,
            reduction=reduction,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            shard_classes=shard_classes,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[B, dim]`` with ``labels[B]``, integers in ``[0, classes)``."""
        return F.arcface_loss(embeddings, self.weight, labels, classes=self.classes, **self.options)


class CosFaceLoss(_MarginLoss):
    """:func:`~replearn_kernels.cosface_loss` as a module that owns the weight of ``classes`` centres of width ``dim``.

    Its parameter belongs in the optimizer, beside the encoder's; :meth:`logits` are for inference. With a ``group``
    each rank owns a part of the ``classes``, which are those of all ranks: keep the module out of
    DistributedDataParallel, save its state_dict on every rank, and for clipping and gradient scalers see
    docs/design.md, "Classes and prototypes".
    ``shard_classes=False``: every rank has all of them, as a part of the model that DistributedDataParallel wraps.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        margin: float = 0.35,
        scale: float = 64.0,
        reduction: str = "mean",
        backend: str = "auto",
        memory_budget: int = CLASSIFIER_BUDGET,
        group=None,
        shard_classes: bool = True,
    ):
        super().__init__(
            dim,
            classes,
            margin=validation.check_margin(margin, LARGEST_COSFACE_MARGIN),
            scale=scale,
            reduction=reduction,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            shard_classes=shard_classes,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[B, dim]`` with ``labels[B]``, integers in ``[0, classes)``."""
        return F.cosface_loss(embeddings, self.weight, labels, classes=self.classes, **self.options)
