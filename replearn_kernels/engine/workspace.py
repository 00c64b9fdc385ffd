"""The large buffers of a run on a CPU, held from one step to the next.

A fresh one of 256 MiB has to be mapped and zeroed page by page, which takes as long as the product that it saves; and
products read tiles faster in pages of 2 MiB, which only mapped memory has (2 to 3 % of a step at d = 128). So the
largest that was asked for stays, as PyTorch's allocator does on a GPU, until :func:`empty_cache`.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

_HUGE_PAGE = 2**21


class Held:
    """One buffer for one purpose, which is asked for again and again."""

    def __init__(self, least_bytes: int):
        self._least_bytes = least_bytes  # less is left to the C library's allocator, which keeps freed memory itself
        self._lock = Lock()  # two threads must not find the same buffer free
        self._buffer: Tensor | None = None
        self._uses_when_free = 0

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, ``[elements]``: the held buffer, or where that is in use or too small a new one."""
        size = elements * dtype.itemsize
        if size < self._least_bytes:
            return torch.empty(elements, dtype=dtype)
        with self._lock:
            free = self._buffer is None or _uses(self._buffer) == self._uses_when_free
            if free and (self._buffer is None or self._buffer.numel() < size):
                self._buffer = None  # before the new one is there
                self._buffer = _new(size)
                self._uses_when_free = _uses(self._buffer)
            buffer = self._buffer if free else _new(size)
            return buffer[:size].view(dtype)

    def drop(self) -> None:
        with self._lock:
            self._buffer = None


kept = Held(least_bytes=32 * 2**20)  # similarities, from one sweep to the other
tile = Held(least_bytes=_HUGE_PAGE)  # the products of one tile, or their W
distances = Held(least_bytes=_HUGE_PAGE)  # the distances of one tile, where they are needed beside W


def empty_cache() -> None:
    """Give back the memory that is held between steps on the CPU: the largest ``memory_budget`` of a loss, and tiles.

    A loss whose backward pass is still to come keeps what it needs.
    """
    for held in (kept, tile, distances):
        held.drop()


def _new(size: int) -> Tensor:
    """At least ``size`` bytes, from the start of a huge page on."""
    room = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    torch.ops.replearn_kernels.advise_huge_pages_.default(room)
    start = -room.data_ptr() % _HUGE_PAGE
    return room[start : start + size]


def _uses(buffer: Tensor) -> int:
    """Of the memory, by any tensor."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)
