"""The buffer of kept similarities on a CPU, held from one step to the next.

A fresh one of 256 MiB has to be mapped and zeroed page by page, which takes as long as the product that it saves. So
the largest that was asked for stays, as PyTorch's allocator does on a GPU, until :func:`empty_cache`.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

# Below this the C library's allocator keeps freed memory itself.
_LEAST_BYTES = 32 * 2**20

_lock = Lock()  # two threads must not find the same buffer free
_held: Tensor | None = None
_uses_when_free = 0


def kept_buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, ``[elements]``: the held buffer, or where that is in use or too small a new one."""
    global _held, _uses_when_free
    size = elements * dtype.itemsize
    if size < _LEAST_BYTES:
        return torch.empty(elements, dtype=dtype)
    with _lock:
        free = _held is None or _uses(_held) == _uses_when_free
        if free and (_held is None or _held.numel() < size):
            _held = None  # before the new one is there
            _held = _new(size)
            _uses_when_free = _uses(_held)
        buffer = _held if free else _new(size)
        return buffer[:size].view(dtype)


def empty_cache() -> None:
    """Give back the memory that is held between steps: up to the largest ``memory_budget`` of a loss on the CPU.

    A loss whose backward pass is still to come keeps what it needs.
    """
    global _held
    with _lock:
        _held = None


def _new(size: int) -> Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    torch.ops.replearn_kernels.advise_huge_pages_.default(buffer)
    return buffer


def _uses(buffer: Tensor) -> int:
    """Of the memory, by any tensor."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)
