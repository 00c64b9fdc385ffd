"""Where the ranks of a group tell each other what they call."""

from types import SimpleNamespace

import pytest
import torch

from replearn_kernels.engine.world import World


def world_of(*kinds: str, device: str) -> World:
    world = World.__new__(World)
    world.group = SimpleNamespace(_device_types=[torch.device(kind) for kind in kinds])
    world.device = torch.device(device)
    return world


@pytest.mark.parametrize(
    "kinds, device, expected",
    [
        (["cuda"], "cuda:1", "cuda:1"),  # NCCL: the features' GPU, and not the current one
        (["cpu", "cuda"], "cuda:1", "cpu"),  # no GPU is waited for where the group can exchange from the CPU
        (["cpu"], "cpu", "cpu"),
        (["cuda"], "cpu", "cuda"),  # features in the wrong place: the exchange itself will tell
    ],
)
def test_messages_travel_from(kinds, device, expected):
    assert world_of(*kinds, device=device)._device == torch.device(expected)
