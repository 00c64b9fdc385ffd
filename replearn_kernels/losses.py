"""The losses as modules: configuration in the constructor, tensors in the call."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional as F
from .engine import validation
from .engine.plan import DEFAULT_MEMORY_BUDGET
from .engine.world import SharesGroup, World
from .functional.call import takes_logit_scale
from .functional.contrastive import refuse_symmetric
from .functional.cosine import COSINE_BACKENDS
from .ranks import group_of, with_mean_over_ranks
from .shown_options import ShowsOptions

DIST_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")
"""Of open_clip's SigLipLoss."""


class _Loss(ShowsOptions, SharesGroup, nn.Module):
    """A loss function with its keywords set: ``self.options``."""

    reductions = validation.REDUCTIONS

    def __init__(self, **options):
        super().__init__()
        validation.check_choice("reduction", options["reduction"], self.reductions)
        validation.check_backend_name(options["backend"])
        options["memory_budget"] = validation.check_memory_budget(options["memory_budget"])
        validation.check_flag("normalize", options.get("normalize", False))
        validation.check_strategy(options.get("strategy", "auto"))
        World.of(options.get("group"))
        self.options = options


class _OpenClipLoss(_Loss):
    """What the losses with open_clip's constructors have in common: its settings, which are attributes as there."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, group, **options):
        super().__init__(**options)
        self.cache_labels = validation.check_flag("cache_labels", cache_labels)
        self.rank = validation.check_count("rank", rank, 0)
        self.world_size = validation.check_count("world_size", world_size, 1)
        World.of(group)
        self.group = group

    def _group(self):
        """The group of a call: the given one, or with ``world_size > 1`` the default group."""
        return group_of(self.world_size, self.group)

    @staticmethod
    def _output(loss: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
        return {"contrastive_loss": loss} if validation.check_flag("output_dict", output_dict) else loss


class InfoNCELoss(_Loss):
    """:func:`~replearn_kernels.info_nce_loss` as a module; every keyword of it but the tensors is set here.

    MoCo's loss is ``InfoNCELoss(batch_negatives=False)``, called with ``negatives=queue.negatives()``.
    """

    @takes_logit_scale
    def __init__(
        self,
        *,
        symmetric: bool = False,
        batch_negatives: bool = True,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            symmetric=validation.check_flag("symmetric", symmetric),
            batch_negatives=validation.check_flag("batch_negatives", batch_negatives),
            label_smoothing=validation.check_fraction("label_smoothing", label_smoothing),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )
        if not batch_negatives:
            refuse_symmetric(symmetric)

    @takes_logit_scale
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        target: Tensor | None = None,
        negatives: Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss of ``query[N, d]`` with ``key[M, d]``; the other tensors as the function takes them."""
        return F.info_nce_loss(
            query, key, target=target, negatives=negatives, logit_scale=logit_scale, **self.options
        )


class ClipLoss(_OpenClipLoss):
    """:func:`~replearn_kernels.clip_loss` with the constructor and the call of open_clip's ``ClipLoss``.

    With ``world_size > 1`` the batch is that of all processes of torch.distributed's default group, or of ``group``.
    As in open_clip the loss is the mean over the own rows with ``local_loss``, over all rows without. The gradients are
    those of open_clip with ``gather_with_grad``, whatever it is here: DistributedDataParallel averages them to those of
    the mean over all rows. ``rank`` and ``cache_labels`` change nothing: the group knows, and no labels are formed.

    Raises:
        TypeError, ValueError: an option is not of its type or range: a temperature, say, which is no option.
        NotImplementedError: ``use_horovod``.
        RuntimeError: in the call, ``world_size > 1`` without torch.distributed's default group.
        ValueError: in the call, ``world_size`` is not the group's.
    """

    @takes_logit_scale
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
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        if validation.check_flag("use_horovod", use_horovod):
            raise NotImplementedError("ClipLoss exchanges features by torch.distributed, got use_horovod=True")
        super().__init__(
            cache_labels,
            rank,
            world_size,
            group,
            label_smoothing=validation.check_fraction("label_smoothing", label_smoothing),
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            strategy=strategy,
        )
        self.local_loss = validation.check_flag("local_loss", local_loss)
        self.gather_with_grad = validation.check_flag("gather_with_grad", gather_with_grad)

    @takes_logit_scale
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``. ``logit_bias`` is taken, as open_clip passes it on: a constant
        added to every logit leaves a softmax as it is, so it changes nothing, and its gradient is 0."""
        group = self._group()
        loss = F.clip_loss(
            image_features, text_features, logit_scale, logit_bias=logit_bias, group=group, **self.options
        )
        if group is not None and not self.local_loss and self.options["reduction"] == "mean":
            loss = with_mean_over_ranks(loss, group)
        return self._output(loss, output_dict)


class SigLipLoss(_OpenClipLoss):
    """:func:`~replearn_kernels.siglip_loss` with the constructor and the call of open_clip's ``SigLipLoss``.

    With ``world_size > 1`` the batch is that of all processes of torch.distributed's default group, or of ``group``:
    the loss is that of the own images with all texts, and DistributedDataParallel averages its gradients to those of
    the whole batch, as in open_clip. ``rank``, ``cache_labels``, ``dist_impl`` ("bidir", "shift", "reduce", "gather")
    and ``chunk_size`` (rows of logits at a time) change nothing: ``strategy`` is ours, and logits are never formed.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
        RuntimeError: in the call, ``world_size > 1`` without torch.distributed's default group.
        ValueError: in the call, ``world_size`` is not the group's.
    """

    @takes_logit_scale
    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            cache_labels,
            rank,
            world_size,
            group,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            strategy=strategy,
        )
        if dist_impl is not None:
            validation.check_choice("dist_impl", dist_impl, DIST_IMPLEMENTATIONS)
        self.dist_impl, self.chunk_size = dist_impl, validation.check_count("chunk_size", chunk_size, 0)

    @takes_logit_scale
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``. The groups are ours: pairs of equal group are positives."""
        groups = dict(query_group=query_group, key_group=key_group, group=self._group())
        loss = F.siglip_loss(image_features, text_features, logit_scale, logit_bias, **groups, **self.options)
        return self._output(loss, output_dict)


class NPairLoss(_Loss):
    """:func:`~replearn_kernels.n_pair_loss` as a module."""

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

    def forward(self, anchor: Tensor, positive: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of ``anchor[N, d]`` with ``positive[N, d]``, and ``labels[N]`` where rows may share a class."""
        return F.n_pair_loss(anchor, positive, labels=labels, **self.options)


class NTXentLoss(_Loss):
    """:func:`~replearn_kernels.nt_xent_loss` as a module; a learnable temperature needs the function."""

    def __init__(
        self,
        temperature: float = 0.5,
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
        """The loss of two views ``[N, d]`` of N samples."""
        return F.nt_xent_loss(z_i, z_j, **self.options)


class SupConLoss(_Loss):
    """:func:`~replearn_kernels.sup_con_loss` as a module; a learnable temperature needs the function."""

    def __init__(
        self,
        temperature: float = 0.07,
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

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of rows ``[N, d]`` with ``labels[N]``, or of views ``[B, V, d]`` with ``labels[B]`` or without."""
        return F.sup_con_loss(features, labels, **self.options)


class CosineSimilarityLoss(ShowsOptions, nn.Module):
    """:func:`~replearn_kernels.cosine_similarity_loss` as a module."""

    def __init__(self, *, reduction: str = "mean", backend: str = "auto"):
        super().__init__()
        validation.check_reduction(reduction)
        validation.check_backend_name(backend, COSINE_BACKENDS)
        self.options = dict(reduction=reduction, backend=backend)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings[N, d]`` with ``labels[N]``."""
        return F.cosine_similarity_loss(embeddings, labels, **self.options)
