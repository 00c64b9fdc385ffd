"""open_clip's losses, computed by this library: the same classes, constructors, values and gradients.

::

    import open_clip
    from replearn_kernels.integrations import open_clip as fused

    fused.apply()                                          # from here on open_clip.create_loss(args) makes ours
    loss = fused.ClipLoss(rank=rank, world_size=world_size, local_loss=True, gather_with_grad=True)

or open_clip's own training script, as it is (it needs ``pip install open_clip_torch[training]``)::

    python -m replearn_kernels.integrations.open_clip_train --train-data ... --model ViT-B-32

Each class is a subclass of open_clip's, with another ``forward``. Losses are fp32 for half-precision features, where
open_clip's have the features' dtype. Feature gradients of several processes depend on how open_clip is told to gather
them, and so they do here (W processes; all before DistributedDataParallel averages them):

=========== ================ =========================================================================================
local_loss  gather_with_grad the gradient of a rank's features
=========== ================ =========================================================================================
any         True             W times that of the mean over all rows
False       False            that of the mean over all rows: after averaging W times smaller than with gather_with_grad
True        False            of the own rows' loss, with all that they are compared with held constant
=========== ================ =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.contrastive import with_unseen
from ..pair_losses import soft_target_loss
from ..ranks import group_of, with_mean_over_ranks
from .options import TakesOptions, checked_options
from .replacing import Replacement
from .versions import require

require("open_clip_torch", "3.0", "5")

import open_clip.loss as theirs  # noqa: E402


class _Fused(TakesOptions):
    """What is checked of the arguments that all of open_clip's losses take.

    Raises:
        NotImplementedError: ``use_horovod``.
        TypeError, ValueError: ``rank``, ``world_size`` or an option is not of its type or range.
    """

    not_called = ("get_ground_truth", "get_logits", "_loss", "dist_loss")

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        if getattr(self, "use_horovod", False):
            raise NotImplementedError("features are exchanged by torch.distributed, got use_horovod=True")
        self.rank = validation.check_count("rank", self.rank, 0)
        self.world_size = validation.check_count("world_size", self.world_size, 1)


class ClipLoss(_Fused, theirs.ClipLoss):
    """:func:`~replearn_kernels.clip_loss` in open_clip's ``ClipLoss``.

    ``logit_bias``, a constant added to every logit, leaves a softmax as it is: its gradient is 0.
    """

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        """The loss of ``[N, d]`` with ``[N, d]``, or ``{"contrastive_loss": loss}``; fp32, fp64 for fp64 features."""
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive(self, image_features, text_features, logit_scale, logit_bias=None) -> Tensor:
        if self.world_size == 1:
            return F.clip_loss(image_features, text_features, logit_scale, logit_bias=logit_bias, **self.options)

        def loss(query, key, **how):
            return F.info_nce_loss(*query, *key, logit_scale=logit_scale, **how, **self.options)

        return with_unseen(self._over_ranks(loss, [image_features], [text_features]), logit_bias)

    def _over_ranks(self, loss: Callable, image: list[Tensor], text: list[Tensor]) -> Tensor:
        """``loss(query, key, symmetric=, group=)`` of all ranks' images and texts, as open_clip gathers them.

        Args:
            image, text: features, and what goes with them.
        """
        group = group_of(self.world_size)
        if group is None or self.gather_with_grad:
            value = loss(image, text, symmetric=True, group=group)
        elif self.local_loss:
            of_image = loss(image, _constant(text), symmetric=False, group=group)
            value = (of_image + loss(text, _constant(image), symmetric=False, group=group)) / 2
        else:
            image, text = ([_ScaledGradient.apply(first, 1 / self.world_size), *rest] for first, *rest in (image, text))
            value = loss(image, text, symmetric=True, group=group)
        return value if group is None or self.local_loss else with_mean_over_ranks(value, group)


def _constant(side: list[Tensor]) -> list[Tensor]:
    return [features.detach() for features in side]


class _ScaledGradient(torch.autograd.Function):
    """Features as they are; their gradient times ``factor``."""

    @staticmethod
    def forward(ctx, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.factor, None


class CoCaLoss(theirs.CoCaLoss, ClipLoss):
    """open_clip's ``CoCaLoss`` with our ``ClipLoss`` in it; its caption loss is open_clip's."""

    def __init__(self, *args, backend="auto", memory_budget=DEFAULT_MEMORY_BUDGET, strategy="auto", **keywords):
        super().__init__(*args, **keywords)
        self.options = checked_options(backend, memory_budget, strategy)


class DistillClipLoss(ClipLoss, theirs.DistillClipLoss):
    """:func:`~replearn_kernels.clip_loss` and :func:`~replearn_kernels.soft_target_loss` in ``DistillClipLoss``.

    The teacher's features and scale get no gradient: compute them under ``torch.no_grad()``, as open_clip does.
    """

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        dist_image_features,
        dist_text_features,
        dist_logit_scale,
        output_dict=False,
    ):
        """The contrastive loss and that against the teacher's probabilities, as a pair or by their names."""
        given = dict(
            dist_image_features=dist_image_features, dist_text_features=dist_text_features,
            dist_logit_scale=dist_logit_scale,
        )  # fmt: skip
        for name, value in given.items():
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires a gradient, which the teacher does not get: pass {name}.detach()")

        def loss(query, key, **how):
            (query, query_guide), (key, key_guide) = query, key
            scales = {"logit_scale": logit_scale, "guide_scale": dist_logit_scale}
            return soft_target_loss(query, key, query_guide, key_guide, **scales, **how, **self.options)

        contrastive = self._contrastive(image_features, text_features, logit_scale)
        distill = self._over_ranks(loss, [image_features, dist_image_features], [text_features, dist_text_features])
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)


class SigLipLoss(_Fused, theirs.SigLipLoss):
    """:func:`~replearn_kernels.siglip_loss` in open_clip's ``SigLipLoss``.

    The loss is that of the own images with the texts of all processes, whichever way ``dist_impl`` says.
    """

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        """The loss of ``[N, d]`` with ``[N, d]``, or ``{"contrastive_loss": loss}``; fp32, fp64 for fp64 features."""
        group = group_of(self.world_size)
        loss = F.siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


_classes = Replacement(("open_clip", "open_clip_train"), theirs, (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss))


def apply() -> None:
    """Put these classes in the place of open_clip's: what asks open_clip for a loss from here on gets ours.

    So do the modules of open_clip and of its training script that have imported them, ``open_clip.create_loss`` among
    them. A name that another module has imported before stays what it was. :func:`undo` takes it back.
    """
    _classes.apply()


def undo() -> None:
    """Put open_clip's own classes back."""
    _classes.undo()
