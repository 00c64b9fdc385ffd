"""The losses as modules: configuration in the constructor, tensors in the call."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional as F
from .engine.plan import DEFAULT_MEMORY_BUDGET


class InfoNCELoss(nn.Module):
    """:func:`~replearn_kernels.info_nce_loss` as a module; every keyword of it but the tensors is set here."""

    def __init__(
        self,
        *,
        symmetric: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ):
        super().__init__()
        self.options = dict(
            symmetric=symmetric,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        target: Tensor | None = None,
        negatives: Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
    ) -> Tensor:
        return F.info_nce_loss(
            query, key, target=target, negatives=negatives, logit_scale=logit_scale, **self.options
        )

    def extra_repr(self) -> str:
        return _repr(self.options)


class ClipLoss(nn.Module):
    """:func:`~replearn_kernels.clip_loss` with the constructor and the call of open_clip's ``ClipLoss``.

    ``local_loss``, ``gather_with_grad``, ``cache_labels``, ``rank`` and ``use_horovod`` are open_clip's settings for
    a batch spread over processes. They change nothing in one process, and ``world_size > 1`` is refused: a loss over
    the local rows alone would be a different loss.

    Raises:
        NotImplementedError: ``world_size > 1`` or ``use_horovod``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ):
        super().__init__()
        if world_size != 1 or use_horovod:
            raise NotImplementedError(
                f"ClipLoss computes the batch of one process, got world_size={world_size}, use_horovod={use_horovod}"
            )
        self.options = dict(
            label_smoothing=label_smoothing, reduction=reduction, backend=backend, memory_budget=memory_budget
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``. ``logit_bias`` is taken, as open_clip passes it on: a constant
        added to every logit leaves a softmax as it is, so it changes nothing and gets no gradient."""
        loss = F.clip_loss(image_features, text_features, logit_scale, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return _repr(self.options)


def _repr(options: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
