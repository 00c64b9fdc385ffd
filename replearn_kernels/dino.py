"""The DINO losses as modules: they keep the center of the teacher's logits, and know the teacher's warm-up.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import functional as F
from .engine import validation
from .engine.shards import agree
from .engine.world import SharesGroup, World, telling
from .functional.distillation import check_dino_options, check_dino_temperature

_SUM_ROWS = 4096  # prototypes whose mean logits are formed at once


class DINOLoss(SharesGroup, nn.Module):
    """:func:`~replearn_kernels.dino_loss` with a center that follows the teacher, and a warm-up of its temperature.

    In training mode every call, after its loss, moves the center to
    ``center_momentum * center + (1 - center_momentum) * mean``, with the mean of the teacher's logits over views and
    batch, over all processes of ``group`` where torch.distributed is initialised: all call in the same mode, as each
    training step exchanges the mean (one that evaluates keeps the others waiting until the group's timeout). An error
    on one is an error on all. The center is a buffer of fp32, also where features are fp64 (``double()`` makes it
    fp64), and does not follow the module to half precision.

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
        group: a torch.distributed process group. Default None: the default group, if there is one.

    Raises:
        TypeError, ValueError: as :func:`dino_loss`, or an argument is not of the type or range above; or the processes
            differ in K, in ``center_momentum`` or in the center's dtype.
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
        reduction: str = "mean",
        backend: str = "auto",
        group=None,
    ):
        super().__init__()
        World.of(group)
        out_dim = validation.check_count("out_dim", out_dim, 1)
        self.warmup_teacher_temp = check_dino_temperature("warmup_teacher_temp", warmup_teacher_temp, torch.float32)
        validation.check_count("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0)
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.center_momentum = validation.check_fraction("center_momentum", center_momentum)
        self.student_temp, self.teacher_temp, _ = check_dino_options(
            student_temp, teacher_temp, reduction, backend, torch.float32
        )
        self.reduction, self.backend, self.group = reduction, backend, group
        self.register_buffer("center", torch.zeros(out_dim, dtype=torch.float32))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: float = 0) -> Tensor:
        """The loss of ``[V, B, K]`` and ``[U, B, K]`` in this epoch, counted from 0."""
        center, world = self.center.clone(), self._world()  # the backward pass needs it as it was
        with telling(world):
            loss = F.dino_loss(student_logits, teacher_logits, center, **self._options(epoch))
        if self.training:
            with torch.no_grad():
                total = teacher_logits.sum((0, 1), dtype=self.center.dtype)
                self._move_center(*self._over_ranks(total, teacher_logits.shape[:2].numel(), world))
        return loss

    def teacher_temp_at(self, epoch: float) -> float:
        """The teacher's temperature in this epoch, counted from 0."""
        if isinstance(epoch, bool) or not isinstance(epoch, (int, float)):
            raise TypeError(f"epoch must be a number, got {type(epoch).__name__}")
        if not epoch >= 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if epoch >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        progress = min(epoch / max(self.warmup_teacher_temp_epochs - 1, 1), 1)
        return self.warmup_teacher_temp + progress * (self.teacher_temp - self.warmup_teacher_temp)

    def extra_repr(self) -> str:
        names = "student_temp", "teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs", "center_momentum"
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "reduction", "backend"))
        return f"{len(self.center)}, {options}"

    def _options(self, epoch: float) -> dict:
        return dict(
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp_at(epoch),
            reduction=self.reduction,
            backend=self.backend,
        )

    def _world(self) -> World | None:
        """Those who move the center together."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        return World.of(self.group or dist.group.WORLD)

    def _over_ranks(self, total: Tensor, rows: int, world: World | None) -> tuple[Tensor, Tensor]:
        """The mean of rows that sum to ``total``, and their number; over all processes, as all ranks have them."""
        total = torch.cat([total.to(self.center.dtype), self.center.new_full((1,), rows)])
        if world is not None:
            self._exchange(total, world)
        return total[:-1] / total[-1].clamp(min=1), total[-1]

    @torch._disable_dynamo
    def _exchange(self, total: Tensor, world: World) -> None:
        name, width = type(self).__name__, len(total) - 1
        alike = {"loss": name, "teacher's width": width, "center_momentum": self.center_momentum}
        agree(world, {**alike, "center.dtype": str(total.dtype)}, {})
        dist.all_reduce(total, group=world.group)

    def _move_center(self, mean: Tensor, count: Tensor) -> None:
        """Towards the mean of ``count`` rows of logits. No rows: it stays."""
        self.center.lerp_(torch.where(count > 0, mean.to(self.center.dtype), self.center), 1 - self.center_momentum)

    def _apply(self, fn, recurse=True):
        """To another device, but not to half precision: the steps of a running mean would be rounded away."""
        center = self.center
        super()._apply(fn, recurse)
        if self.center.dtype in (torch.float16, torch.bfloat16):
            self.center = center.to(self.center.device)
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
        center, world = self.center.clone(), self._world()  # the backward pass needs it as it was
        with telling(world if self.group is None else None):  # with a group the loss does
            loss = F.dino_head_loss(
                student_features, teacher_features, student_weight, teacher_weight, center,
                group=self.group, shard_prototypes=self.shard_prototypes, **self._options(epoch),
            )  # fmt: skip
        if self.training:
            with torch.no_grad():
                total = teacher_features.sum((0, 1), dtype=self.center.dtype)
                mean, count = self._over_ranks(total, teacher_features.shape[:2].numel(), world)
                # Not a matrix product, which autocast would round; a tile, which keeps half weights from a whole copy.
                means = [(weight * mean).sum(1) for weight in teacher_weight.split(_SUM_ROWS)]
                self._move_center(torch.cat(means), count)
        return loss
