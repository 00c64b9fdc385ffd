"""Prototypes that are spread over the ranks of a process group: :mod:`.class_shards` for the DINO head.

The features of all ranks meet each rank's own prototypes; between the sweeps the ranks tell each other every sample's
statistics, 2 (V + U) + U V numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.dino import Dino, Statistics
from . import prototypes
from .operators import differentiable_once, save_for_backward
from .schedules import on_device_of
from .world import World


class _HeadLosses(torch.autograd.Function):
    """``[B]``, of the samples of all ranks."""

    @staticmethod
    def forward(ctx, world: World, counts: list[int], temperatures: tuple[float, float], *tensors: Tensor) -> Tensor:
        student, _, teacher, _, _ = tensors
        with on_device_of(student):
            source, objective = prototypes.Heads(*tensors), Dino(*temperatures)
            shape = student.shape[0], teacher.shape[0], student.shape[1]
            own = prototypes.sweep_statistics(source, objective, *shape)
            parts = [world.gather(table, [table.shape[-1]] * world.size) for table in own]
            statistics, *others = (Statistics(*tables) for tables in zip(*parts))
            for other in others:
                objective.merge_statistics(statistics, other)
        ctx.world, ctx.counts, ctx.temperatures = world, counts, temperatures
        save_for_backward(ctx, statistics.student, statistics.teacher, *tensors)
        return objective.losses(statistics)

    @staticmethod
    def backward(ctx, grad_losses: Tensor):
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        ctx.world.meet_again("backward")
        with torch.no_grad():
            gradients = _HeadLosses._gradients(ctx, saved, grad_losses)
        gradients = differentiable_once([grad_losses, *saved[2:4]], gradients)
        return None, None, None, *gradients, None, None, None

    @staticmethod
    def _gradients(ctx, saved: tuple[Tensor, ...], grad_losses: Tensor) -> list[Tensor | None]:
        world = ctx.world
        own = grad_losses.split(ctx.counts)[world.rank].contiguous()
        upstream = torch.cat(world.gather(own, ctx.counts))
        needs_grad = list(ctx.needs_input_grad[3:5])
        gradients = prototypes.backward(prototypes.Heads, upstream, *saved, *ctx.temperatures, "none", needs_grad)
        d_features, d_weight = (gradient if needs else None for gradient, needs in zip(gradients, needs_grad))
        return [d_features, None if d_weight is None else d_weight / world.size]


def dino_head_losses(world: World, counts: list[int], temperatures: tuple[float, float], *tensors: Tensor) -> Tensor:
    """The losses of all samples, ``[B]``, the same on every rank.

    Args:
        counts: the samples of every rank.
        temperatures: the student's and the teacher's.
        tensors: all ranks' student features ``[V, B, d]``, this rank's prototypes for them ``[K, d]``; the same of the
            teacher; the center of these prototypes, ``[K]``.
    """
    return _HeadLosses.apply(world, counts, temperatures, *tensors)
