"""A call that moves its module's state, and that activation checkpointing (torch.utils.checkpoint) computes again.

In the backward pass it is the same call with the same inputs, but the state has moved on: its gradient would be that of
another loss. Nothing tells a call which one it repeats, so what it would need cannot be found; it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def computed_again() -> bool:
    """Whether the present call runs inside a backward pass."""
    return torch._C._current_graph_task_id() >= 0


def state_of_call(state: Tensor, has_moved: bool) -> tuple[Tensor, Tensor]:
    """A copy of the state, and whether the call that takes it is computed for the first time: a 0-d bool.

    Args:
        has_moved: were this call computed again, its state would be another one by now.

    Raises:
        RuntimeError: it is, and has.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # what is traced once asks whenever it runs
        return torch.ops.replearn_kernels.state_of_call(state, has_moved)
    return _state_of_call(state, has_moved)


def _state_of_call(state: Tensor, has_moved: bool) -> tuple[Tensor, Tensor]:
    again = computed_again()
    if again and has_moved:
        raise RuntimeError(
            "a loss was computed again inside a backward pass, as activation checkpointing does, but its center has "
            "moved since: construct it with defer_center=True and call update_center() after the backward pass, or "
            "call it outside of torch.utils.checkpoint"
        )
    return state.clone(), state.new_full((), not again, dtype=torch.bool)


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
# A graph that CUDA replays would not ask again.
_library.define("state_of_call(Tensor state, bool has_moved) -> (Tensor, Tensor)", tags=(torch.Tag.cudagraph_unsafe,))
_library.impl("state_of_call", _state_of_call, "CompositeExplicitAutograd")
torch.library.register_fake(
    "replearn_kernels::state_of_call",
    lambda state, has_moved: (torch.empty_like(state), state.new_empty((), dtype=torch.bool)),
    lib=_library,
)
