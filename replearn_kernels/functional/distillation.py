"""Self-distillation with no labels: the DINO losses, from logits or from features and prototypes.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine import prototypes, validation
from ..engine.problem import statistics_dtype
from .call import autocast, in_group
from .gathered import dino_head_loss_in_group

DINO_BACKENDS = ("auto", "eager")


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""The DINO loss: each student view predicts the teacher's assignment of every other view to K prototypes.

    The teacher's U views are the student's first U (the global crops), and a view does not predict itself. With the
    P = U V - min(U, V) pairs of teacher view u and student view v != u, sample b has the loss

        L_b = -1 / P sum_{u != v} sum_k p_t(u, b)_k log p_s(v, b)_k
        p_t = softmax((teacher_logits - center) / teacher_temp),  p_s = softmax(student_logits / student_temp)

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv:2104.14294).

    The backward pass makes the gradient a few samples at a time; besides it, no tensor of B x K elements is formed.

    Args:
        student_logits: ``[V, B, K]``, fp16, bf16, fp32 or fp64, any strides; V >= 1 views of B samples.
        teacher_logits: ``[U, B, K]``, of the same dtype and device; U >= 1. Gets no gradient.
        center: ``[K]``, floating-point, on the same device. Gets no gradient.
        student_temp: the student's temperature, positive.
        teacher_temp: the teacher's temperature, positive.
        reduction: "mean" over the batch, "sum" over it, or "none": ``[B]``. Each is a mean over pairs of views.
        backend: "auto" (fused, any device), or "eager": the plain formula, which can be differentiated twice.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without samples, or without pairs (V = U = 1), 0 with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or student and teacher differ in dtype.
        ValueError: wrong rank or shape, different devices, a temperature that is not positive and finite, an unknown
            reduction or backend.
        NotImplementedError: a second derivative, or a torch.func transform (``backend="eager"`` has both).
    """
    student, teacher = {"student_logits": student_logits}, {"teacher_logits": teacher_logits}
    _check_views(student, teacher, "[V, B, K]")
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            "teacher_logits and student_logits must have the same number of prototypes K, "
            f"got {teacher_logits.shape[-1]} and {student_logits.shape[-1]}"
        )
    _check_alike(student | teacher)
    tensors = student_logits, teacher_logits.detach(), _check_center(center, student_logits, student_logits.shape[-1])
    config = check_dino_options(student_temp, teacher_temp, reduction, backend, student_logits.dtype)
    if backend == "eager":
        return reference.dino_loss(*tensors, *config)
    return prototypes.dino_loss(*tensors, *config)


@in_group
def dino_head_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    student_weight: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    reduction: str = "mean",
    backend: str = "auto",
    group=None,
    shard_prototypes: bool = True,
) -> Tensor:
    r"""The DINO loss from features and prototypes: :func:`dino_loss` of ``features @ weight.T``, of which only a tile
    of some prototypes is ever formed.

    Extra memory is O((V + U) B d), the gradient of ``student_weight`` and a fixed budget. In units of one product of
    V B x K x d, the forward call does 1 + U / V and the backward call 3 + U / V, or 2 + U / V where only one of
    ``student_features`` and ``student_weight`` needs a gradient (:func:`~replearn_kernels.count_work`).

    Args:
        student_features: ``[V, B, d]``, fp16, bf16, fp32 or fp64, any strides; V >= 1 views of B samples.
        teacher_features: ``[U, B, d]``, of the same dtype and device; U >= 1. Gets no gradient.
        student_weight: ``[K, d]``, the last layer's prototypes, of the same dtype and device.
        teacher_weight: ``[K, d]``, of the same dtype and device. Gets no gradient.
        center: ``[K]``, floating-point, on the same device. Gets no gradient.
        group: a torch.distributed process group, each of whose ranks passes its shard of the samples, of any size, and
            calls backward. Default None: this process alone. The value of rank r is R times its own samples' part of
            the mean over all ranks' samples (docs/design.md, "Many ranks").
        shard_prototypes: with a group, the K weights and centers of a rank are its own part of the prototypes: the
            features are gathered, and the weights stay where they are. ``student_weight`` gets the gradient of the mean
            of the ranks' values: nothing has to be averaged, so keep it out of DistributedDataParallel. False: every
            rank has them all, whose gradients DistributedDataParallel averages. Default True.

    Under autocast features and weights enter the products in its dtype, while logits stay fp32. The other arguments,
    the result and the exceptions are those of :func:`dino_loss`.
    """
    _check_views({"student_features": student_features}, {"teacher_features": teacher_features}, "[V, B, d]")
    for name, weight in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
        _check_tensor(name, weight, "[K, d]")
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            "teacher_weight and student_weight must have the same number of prototypes K, "
            f"got {teacher_weight.shape[0]} and {student_weight.shape[0]}"
        )
    names = "student_features", "student_weight", "teacher_features", "teacher_weight"
    features = autocast(student_features, student_weight, teacher_features, teacher_weight)
    _check_alike(dict(zip(names, features)))
    student, student_weight, teacher, teacher_weight = features
    center = _check_center(center, student, student_weight.shape[0])
    config = check_dino_options(student_temp, teacher_temp, reduction, backend, student.dtype)
    tensors = student, student_weight, teacher.detach(), teacher_weight.detach(), center
    validation.check_flag("shard_prototypes", shard_prototypes)
    if group is not None:
        return dino_head_loss_in_group(group, tensors, *config, backend, shard_prototypes)
    if backend == "eager":
        return reference.dino_head_loss(*tensors, *config)
    return prototypes.dino_head_loss(*tensors, *config)


# -- what is checked ---------------------------------------------------------------------------------------------------


def _check_tensor(name: str, tensor: Tensor, layout: str) -> None:
    """A floating-point tensor with the dimensions of ``layout``, such as "[V, B, K]"."""
    validation.check_features(name, tensor, ndim=getattr(tensor, "ndim", 0))
    ndim = layout.count(",") + 1
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_views(student: dict[str, Tensor], teacher: dict[str, Tensor], layout: str) -> None:
    """Two tensors under their names: of that layout, with at least one view each, of as many samples."""
    for name, tensor in (student | teacher).items():
        _check_tensor(name, tensor, layout)
        if tensor.shape[0] == 0:
            raise ValueError(f"{name} must have at least one view, got shape {tuple(tensor.shape)}")
    (student_name, student), (teacher_name, teacher) = *student.items(), *teacher.items()
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{teacher_name} and {student_name} must have the same number of samples B, "
            f"got {teacher.shape[1]} and {student.shape[1]}"
        )


def _check_alike(tensors: dict[str, Tensor]) -> None:
    """All of the first one's width, dtype and device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        validation.check_alike(name, tensor, first_name, first)


def _check_center(center: Tensor, student: Tensor, count: int) -> Tensor:
    """``[K]`` for a count K >= 1 of prototypes, on the student's device; returned without gradient."""
    if count == 0:
        raise ValueError("there must be at least one prototype, got K = 0")
    _check_tensor("center", center, "[K]")
    if center.shape[0] != count:
        raise ValueError(f"center must have shape ({count},), one value per prototype, got {tuple(center.shape)}")
    if center.device != student.device:
        raise ValueError(f"center must be on the student's device {student.device}, got {center.device}")
    return center.detach()


def check_dino_options(student_temp, teacher_temp, reduction, backend, dtype) -> tuple[float, float, str]:
    student_temp = check_dino_temperature("student_temp", student_temp, statistics_dtype(dtype))
    teacher_temp = check_dino_temperature("teacher_temp", teacher_temp, statistics_dtype(dtype))
    validation.check_reduction(reduction)
    validation.check_backend_name(backend, DINO_BACKENDS)
    return student_temp, teacher_temp, reduction


def check_dino_temperature(name: str, value: float, dtype: torch.dtype) -> float:
    """A normal number of the statistics' dtype: a smaller one would make 0 / 0 of a logit that is its row's maximum."""
    value = validation.check_number(name, value)
    limits = torch.finfo(dtype)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(f"{name} must be positive and finite in {dtype}, got {value}")
    return float(value)
