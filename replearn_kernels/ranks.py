"""What other libraries say of several processes: the group that is meant, and the value that its ranks report."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .engine.world import World, telling


def group_of(world_size: int, group=None):
    """The group of a call with open_clip's arguments: ``group``, or else, if ``world_size > 1``, the default group.

    Raises:
        RuntimeError: ``world_size > 1`` without torch.distributed's default group.
        ValueError: ``world_size`` is more than 1 and not the group's; the other ranks are told.
    """
    if world_size == 1:
        return group
    if group is None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"world_size={world_size} needs torch.distributed.init_process_group")
    group = dist.group.WORLD if group is None else group
    if world_size != dist.get_world_size(group):
        _refuse_world_size(world_size, group)
    return group


def default_group(gathers: bool):
    """torch.distributed's default group if a loss gathers features and there is one; else None."""
    return dist.group.WORLD if gathers and dist.is_available() and dist.is_initialized() else None


def with_mean_over_ranks(loss: Tensor, group) -> Tensor:
    """The mean of the ranks' losses, to the bit, with the gradient of the own one."""
    return _mean_over_ranks(loss, group).detach() + (loss - loss.detach())


@torch._disable_dynamo
def _refuse_world_size(given: int, group) -> None:
    with telling(World.of(group)):
        raise ValueError(f"world_size must be the group's, {dist.get_world_size(group)}, got {given}")


@torch._disable_dynamo
def _mean_over_ranks(loss: Tensor, group) -> Tensor:
    world = World.of(group, "ClipLoss")
    if world is None:
        return loss
    world.meet({}, "mean")
    return world.sum(loss.detach()) / world.size
