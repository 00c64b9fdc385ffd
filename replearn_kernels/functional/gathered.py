"""Losses over a process group that compare rows with classes or prototypes: every rank gathers the rows of all.

Each meets its own classes with all rows, or, where every rank has all classes, with its own rows. Values and gradients
are those of :mod:`..engine.distributed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import prototypes
from ..engine.class_shards import ClassShards
from ..engine.operators import differentiable_once, pair_loss
from ..engine.problem import Inputs
from ..engine.prototype_shards import dino_head_losses
from ..engine.shards import Layout, agree, meet
from ..engine.validation import check_inside
from ..engine.world import World
from ..objectives import Objective
from .call import Options, config_of, refuse_eager, run


def loss_over_class_shards(
    inputs: Inputs, objective: Objective, options: Options, classes: int | None = None
) -> Tensor:
    """The loss of the own rows against the classes of all ranks; ``inputs`` has the own ones, and targets in all.

    ``classes``: how many there must be.
    """
    world = options.world
    layout = _meet(world, inputs, objective, {"reduction": options.reduction})
    if classes not in (None, sum(layout.columns)):
        raise ValueError(f"the weights of all ranks must have {classes} classes, got {layout.columns}")
    target = torch.cat(world.gather(inputs.target, layout.rows))
    batch = inputs._replace(
        query=gather_rows(inputs.query, world, layout.rows), target=target - layout.first_column(world.rank)
    )
    config = config_of(batch, objective, options._replace(reduction="none"))
    losses = pair_loss(batch, config, ClassShards(layout))
    return reduced(losses.split(layout.rows)[world.rank], len(target), options.reduction, world)


def loss_of_every_rank(inputs: Inputs, objective: Objective, options: Options) -> Tensor:
    """The loss of the own rows, where every rank has all that they are compared with."""
    world, alike = options.world, {"reduction": options.reduction}
    if inputs.target is not None:
        alike["classes"] = columns = inputs.widths[0]
        check_inside(objective.target_name, inputs.target, columns)
    layout = _meet(world, inputs._replace(target=None), objective, alike)
    inputs = inputs._replace(logit_scale=_MeanGradient.apply(inputs.logit_scale, world))
    own = "none" if options.reduction == "none" else "sum"  # of which one upstream gradient scales all rows
    losses = run(inputs, objective, options._replace(world=None, reduction=own), None)
    return reduced(losses, sum(layout.rows), options.reduction, world)


def dino_head_loss_in_group(
    world: World,
    tensors: tuple[Tensor, ...],
    student_temp: float,
    teacher_temp: float,
    reduction: str,
    backend: str,
    shard_prototypes: bool,
) -> Tensor:
    """The loss of the own samples, under the prototypes of all ranks, or under all of them on every rank.

    Args:
        tensors: features and weight of the student and of the teacher, and the center, checked.
    """
    refuse_eager(backend)
    student, student_weight, teacher, *rest = tensors
    enabled = torch.is_grad_enabled()
    alike = {
        "views": (len(student), len(teacher)),
        "d": student.shape[2],
        "dtype": str(student.dtype),
        "device": student.device.type,
        "requires_grad": [enabled and tensor.requires_grad for tensor in (student, student_weight)],
        "prototypes": None if shard_prototypes else len(student_weight),
    }
    counts = [told["samples"] for told in agree(world, alike, {"samples": student.shape[1]})]
    if shard_prototypes:
        student, teacher = (_gather_samples(features, world, counts) for features in (student, teacher))
        temperatures = student_temp, teacher_temp
        losses = dino_head_losses(world, counts, temperatures, student, student_weight, teacher, *rest)
        losses = losses.split(counts)[world.rank]
    else:
        losses = prototypes.dino_head_loss(*tensors, student_temp, teacher_temp, "none")
    return reduced(losses, sum(counts), reduction, world)


def _gather_samples(features: Tensor, world: World, counts: list[int]) -> Tensor:
    """``[V, B, d]``, of the samples of all ranks."""
    views, _, width = features.shape
    rows = gather_rows(features.transpose(0, 1).flatten(1), world, counts)
    return rows.unflatten(1, (views, width)).transpose(0, 1)


def gather_rows(rows: Tensor, world: World, counts: list[int]) -> Tensor:
    """The rows of all ranks, in their order, differentiable: all ranks must call backward."""
    return _GatherRows.apply(rows, world, counts)


def _meet(world: World, inputs: Inputs, objective: Objective, alike: dict) -> Layout:
    enabled = torch.is_grad_enabled()
    needs_grad = [enabled and tensor.requires_grad for tensor in inputs.differentiable]
    return meet(world, inputs, objective, {"requires_grad": needs_grad, **alike}, "gather")


def reduced(own: Tensor, counted: Tensor | int, reduction: str, world: World) -> Tensor:
    """A rank's losses, reduced; ``counted``: what the mean is over, of all ranks."""
    if reduction == "none":
        return own
    if reduction == "sum":
        return own.sum()
    counted = torch.as_tensor(counted, device=own.device, dtype=own.dtype)
    return own.sum() * (world.size / counted.clamp(min=1))


class _MeanGradient(torch.autograd.Function):
    """A scalar that all ranks share, as it is; its gradient is the mean over them."""

    @staticmethod
    def forward(ctx, scalar: Tensor, world: World) -> Tensor:
        ctx.world = world
        return scalar.view_as(scalar)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.world.meet_again("backward (scale)")
        with torch.no_grad():
            mean = ctx.world.sum(gradient) / ctx.world.size
        return *differentiable_once([gradient], [mean]), None


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in their order; the gradient of a rank's rows is the sum over what all ranks made of them."""

    @staticmethod
    def forward(ctx, rows: Tensor, world: World, counts: list[int]) -> Tensor:
        ctx.world, ctx.counts = world, counts
        return torch.cat(world.swap([rows.contiguous()] * world.size, counts))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.world.meet_again("backward (gathered rows)")
        with torch.no_grad():
            total = _GatherRows._sent_back(ctx, gradient)
        return *differentiable_once([gradient], [total]), None, None

    @staticmethod
    def _sent_back(ctx, gradient: Tensor) -> Tensor:
        world = ctx.world
        shares = [share.contiguous() for share in gradient.split(ctx.counts)]
        arriving = world.swap(shares, [ctx.counts[world.rank]] * world.size)
        wide = torch.promote_types(gradient.dtype, torch.float32)  # half-precision shares add up in fp32
        return sum(share.to(wide) for share in arriving).to(gradient.dtype)
