"""The DINO losses as modules: they keep the center of the teacher's logits, and know the teacher's warm-up.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import functional as F
from .engine import validation
from .engine.recomputation import computed_again, state_of_call
from .engine.shards import agree
from .engine.world import SharesGroup, World, telling
from .functional.distillation import check_dino_options, check_dino_temperature
from .shown_options import ShowsOptions

_SUM_ROWS = 4096  # prototypes whose mean logits are formed at once


class DINOLoss(ShowsOptions, SharesGroup, nn.Module):
    """:func:`~replearn_kernels.dino_loss` with a center that follows the teacher, and a warm-up of its temperature.

    In training mode every call, after its loss, moves the center to
    ``center_momentum * center + (1 - center_momentum) * mean``, with the mean of the teacher's logits over views and
    batch, over all processes of ``group`` where torch.distributed is initialised: all call in the same mode, as each
    training step exchanges the mean (one that evaluates keeps the others waiting until the group's timeout). An error
    on one is an error on all, and such a step a break of torch.compile's graph. The center is a buffer of fp32, also
    where features are fp64 (``double()`` makes it fp64), and does not follow the module to half precision. A mean that
    is not finite moves it nowhere.

    With ``defer_center=True`` the calls only add up the teacher's logits, and :meth:`update_center` moves the center by
    their mean: once an optimizer step, for a step of several micro-batches, all of which meet the same center::

        for student_views, teacher_views in micro_batches:
            loss(student(student_views), teacher(teacher_views), epoch).div(len(micro_batches)).backward()
        loss.update_center()
        optimizer.step()

    So it is also inside ``torch.utils.checkpoint``, whose calls are computed again in the backward pass: they need the
    center that they took first, and add up nothing. Without ``defer_center`` a call that is computed again is a
    RuntimeError, as the center has moved since.

    Centering keeps the teacher from one prototype, its low temperature from the uniform distribution. A loss that rises
    to log K and stays has collapsed to the latter: the head's outputs share too large a mean for the temperature.

    In epochs 0 to E - 1, for E = ``warmup_teacher_temp_epochs``, the teacher's temperature rises linearly from
    ``warmup_teacher_temp`` (epoch 0) to ``teacher_temp`` (epoch E - 1, and all after).

    Args:
        out_dim: K, the number of prototypes.
        student_temp, teacher_temp, reduction, backend: as in :func:`dino_loss`.
        warmup_teacher_temp: the teacher's temperature in epoch 0.
        warmup_teacher_temp_epochs: E; 0 for no warm-up.
        center_momentum: in [0, 1].
        defer_center: the center moves in :meth:`update_center` alone. Default False: in every training call.
        group: a torch.distributed process group. Default None: the default group, if there is one.

    Raises:
        TypeError, ValueError: as :func:`dino_loss`, or an argument is not of the type or range above; or the processes
            differ in ``out_dim``, ``center_momentum``, ``defer_center``, the center's dtype or the teacher's width.
    """

    def __init__(
        self,
        out_dim: int,
        *,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        center_momentum: float = 0.9,
        defer_center: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        group=None,
    ):
        super().__init__()
        World.of(group)
        self.out_dim = out_dim = validation.check_count("out_dim", out_dim, 1)
        self.warmup_teacher_temp = check_dino_temperature("warmup_teacher_temp", warmup_teacher_temp, torch.float32)
        self.warmup_teacher_temp_epochs = validation.check_count(
            "warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0
        )
        self.center_momentum = validation.check_fraction("center_momentum", center_momentum)
        self.defer_center = validation.check_flag("defer_center", defer_center)
        self.student_temp, self.teacher_temp, _ = check_dino_options(
            student_temp, teacher_temp, reduction, backend, torch.float32
        )
        self.reduction, self.backend, self.group = reduction, backend, group
        self.register_buffer("center", torch.zeros(out_dim, dtype=torch.float32))
        self._deferred: Tensor | None = None  # the sum of the teacher's logits since the last move, and their rows

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: float = 0) -> Tensor:
        """The loss of ``[V, B, K]`` and ``[U, B, K]`` in this epoch, counted from 0."""
        return self._step(student_logits, teacher_logits, epoch=epoch)

    @torch.no_grad()
    def update_center(self) -> None:
        """With ``defer_center``: move the center by the mean over all training calls since the last move, of all ranks.

        Without calls it stays. Where calls are computed again (torch.utils.checkpoint), after their backward passes.
        With more than one process every rank calls it, after any number of calls. What the calls have added up is not
        in the ``state_dict``.

        Raises:
            RuntimeError: the center moves with every call, as ``defer_center`` is False.
            ValueError: the ranks differ in what they must have alike.
        """
        if not self.defer_center:
            raise RuntimeError("update_center() is for defer_center=True: here the center moves with every call")
        world = self._world(".update_center") if not self._loss_meets else None
        if world is not None:
            agree(world, self._center_alike, {})
        total, self._deferred = self._deferred, None
        if total is None:
            total = self.center.new_zeros(len(self.center) + 1)
        if world is not None:
            world.sum_(total)
        self._move_center(total)

    def _step(self, *tensors: Tensor, epoch: float) -> Tensor:
        """The loss, and in training mode the center's move after it; the first two tensors are the two sides."""
        if self._meets and self._has_group:
            return self._step_in_group(tensors, epoch)
        return self._step_of(None, tensors, epoch)

    @torch._disable_dynamo
    def _step_in_group(self, tensors: tuple[Tensor, ...], epoch: float) -> Tensor:
        return self._step_of(None if computed_again() else self._world(), tensors, epoch)

    def _step_of(self, world: World | None, tensors: tuple[Tensor, ...], epoch: float) -> Tensor:
        with telling(world):
            options = self._options(epoch)
        with telling(None if self._loss_meets else world):
            if self.training:
                center, is_first = state_of_call(self.center, self._has_moved)
            else:
                center = self.center.clone()  # the backward pass needs it as it was
            loss = self._loss(*tensors, center, options)
        if world is not None:
            agree(world, self._alike(tensors), {})
        if self.training:
            with torch.no_grad():
                total = self._teacher_total(world, tensors)
                self._take_in(torch.where(is_first, total, 0))
        return loss

    def _teacher_total(self, world: World | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """The sum of the teacher's logits over views, batch and the ranks of a world; and the number of these rows."""
        teacher, dtype = tensors[1], self.center.dtype
        count = self.center.new_ones(teacher.shape[:2]).sum().reshape(1)  # a number would stay in torch.jit.trace
        total = torch.cat([teacher.sum((0, 1), dtype=dtype).to(dtype), count])
        if world is not None:
            world.sum_(total)
        return torch.cat([self._logits_of(total[:-1], tensors).to(dtype), total[-1:]])

    def _take_in(self, total: Tensor) -> None:
        if not self.defer_center:
            self._move_center(total)
        elif self._deferred is None:
            self._deferred = total
        else:
            self._deferred = self._deferred + total

    def _move_center(self, total: Tensor) -> None:
        """Towards the mean of some rows of logits, from their sum and number. No rows, or no finite mean: it stays."""
        count = total[-1]
        mean = total[:-1] / count.clamp(min=1)
        target = torch.where((count > 0) & mean.isfinite().all(), mean, self.center)
        self.center.lerp_(target, 1 - self.center_momentum)

    @property
    def _has_moved(self) -> bool:
        """Whether the center has moved by the time that the present call is computed again, if it is: with every call,
        or in an update_center() since, which leaves nothing added up (a graph cannot tell: it outlives its first call).
        """
        return not self.defer_center or (not torch.compiler.is_compiling() and self._deferred is None)

    @property
    def _has_group(self) -> bool:
        return self.group is not None or (dist.is_available() and dist.is_initialized())

    def _world(self, method: str = "") -> World | None:
        if not self._has_group:
            return None
        return World.of(dist.group.WORLD if self.group is None else self.group, type(self).__name__ + method)

    @property
    def _loss_meets(self) -> bool:
        """Whether the loss itself exchanges something with the ranks of the group."""
        return False

    @property
    def _meets(self) -> bool:
        return (self.training and not self.defer_center) or self._loss_meets

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor, center: Tensor, options: dict) -> Tensor:
        return F.dino_loss(student_logits, teacher_logits, center, **options)

    def _logits_of(self, total: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """The sum of the teacher's logits from the sum of its rows."""
        return total

    def _alike(self, tensors: tuple[Tensor, ...]) -> dict:
        """What all ranks must have alike, to move the center together."""
        return {
            "training": self.training,
            "teacher's width": tensors[1].shape[-1],
            **self._center_alike,
        }

    @property
    def _center_alike(self) -> dict:
        return {
            "out_dim": len(self.center),
            "center_momentum": self.center_momentum,
            "defer_center": self.defer_center,
            "center.dtype": str(self.center.dtype),
        }

    def teacher_temp_at(self, epoch: float) -> float:
        """The teacher's temperature in this epoch, counted from 0."""
        epoch = validation.check_number("epoch", epoch, "a number")
        if not epoch >= 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if epoch >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        progress = min(epoch / max(self.warmup_teacher_temp_epochs - 1, 1), 1)
        return self.warmup_teacher_temp + progress * (self.teacher_temp - self.warmup_teacher_temp)

    def _options(self, epoch: float) -> dict:
        return dict(
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp_at(epoch),
            reduction=self.reduction,
            backend=self.backend,
        )

    def _apply(self, fn, recurse=True):
        """To another device, but not to half precision: the steps of a running mean would be rounded away."""
        center = self.center
        super()._apply(fn, recurse)
        if self.center.dtype in (torch.float16, torch.bfloat16):
            self.center = center.to(self.center.device)
        if self._deferred is not None:
            self._deferred = self._deferred.to(self.center)
        return self


class DINOHeadLoss(DINOLoss):
    """:func:`~replearn_kernels.dino_head_loss` with the constructor, the center and the warm-up of :class:`DINOLoss`.

    Features are the head's outputs before its last layer, normalised as the head does it, one view stacked on the
    other, and weights that layer's prototypes (normalised where the layer is weight-normalised)::

        student = torch.stack([backbone(view) for view in views])
        with torch.no_grad():
            teacher = torch.stack([teacher_backbone(view) for view in views[:2]])
        loss = dino(student, teacher, prototypes.weight, teacher_prototypes.weight, epoch)

    The mean of the teacher's logits is ``mean(teacher_features) @ teacher_weight.T``: O(K d), without logits.

    Args:
        group: of :func:`~replearn_kernels.dino_head_loss` too. Default None: the loss is that of this process, and the
            center's mean is over the default group, whose ranks have the same teacher.
        shard_prototypes: with a group, the weights are this rank's part of the prototypes, and ``out_dim`` is the
            number of this part, not of all K. Default True.
    """

    def __init__(self, out_dim: int, *, shard_prototypes: bool = True, **options):
        super().__init__(out_dim, **options)
        self.shard_prototypes = validation.check_flag("shard_prototypes", shard_prototypes)

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        student_weight: Tensor,
        teacher_weight: Tensor,
        epoch: float = 0,
    ) -> Tensor:
        """The loss of ``[V, B, d]`` and ``[U, B, d]`` under each side's ``[K, d]`` in this epoch, counted from 0."""
        return self._step(student_features, teacher_features, student_weight, teacher_weight, epoch=epoch)

    @property
    def _loss_meets(self) -> bool:
        return self.group is not None

    def _loss(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        student_weight: Tensor,
        teacher_weight: Tensor,
        center: Tensor,
        options: dict,
    ) -> Tensor:
        return F.dino_head_loss(
            student_features, teacher_features, student_weight, teacher_weight, center,
            group=self.group, shard_prototypes=self.shard_prototypes, **options,
        )  # fmt: skip

    def _logits_of(self, total: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        # Not a matrix product, which autocast would round; a tile, which keeps half weights from a whole copy.
        return torch.cat([(weight * total).sum(1) for weight in tensors[3].split(_SUM_ROWS)])

    def _alike(self, tensors: tuple[Tensor, ...]) -> dict:
        alike = super()._alike(tensors)
        if self.group is not None and self.shard_prototypes:
            del alike["out_dim"]
        return alike
