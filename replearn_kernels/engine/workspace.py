"""The large buffers of a run on a CPU, held from one step to the next.

A fresh one of 256 MiB has to be mapped and zeroed page by page, which takes as long as the product that it saves; and
products read tiles faster in pages of 2 MiB, which only mapped memory has (2 to 3 % of a step at d = 128). So the
largest that was asked for stays, as PyTorch's allocator does on a GPU, until :func:`empty_cache`.
"""

from __future__ import annotations

import sys
from threading import Lock

import torch
from torch import Tensor

from . import native

_HUGE_PAGE = 2**21


class Held:
    """Buffers for one purpose, which is asked for again and again: ``count`` at most."""

    def __init__(self, least_bytes: int, count: int = 1):
        self._least_bytes = least_bytes  # less is left to the C library's allocator, which keeps freed memory itself
        self._count = count
        self._lock = Lock()  # two threads must not find the same buffer free
        self._buffers: list[_Buffer] = []

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, ``[elements]``: a held buffer, or where those are in use or too small a new one."""
        size = elements * dtype.itemsize
        if size < self._least_bytes:
            return torch.empty(elements, dtype=dtype, device="cpu")
        with self._lock:
            return self._take(size).view(dtype)

    def _take(self, size: int) -> Tensor:
        free = [k for k, buffer in enumerate(self._buffers) if buffer.is_free]
        for k in free:
            if self._buffers[k].tensor.numel() >= size:
                return self._buffers[k].tensor[:size]
        if free:
            del self._buffers[free[0]]  # before the new one is there
        buffer = _Buffer(size)
        if len(self._buffers) < self._count:
            self._buffers.append(buffer)
        return buffer.tensor[:size]

    def drop(self) -> None:
        with self._lock:
            self._buffers.clear()


class _Buffer:
    """``size`` bytes, from the start of a huge page on."""

    def __init__(self, size: int):
        with torch._C.DisableTorchFunction():  # a TorchFunctionMode may keep all that it sees
            room = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
            if native.available():
                torch.ops.replearn_kernels.advise_huge_pages_.default(room)
            start = -room.data_ptr() % _HUGE_PAGE
            self.tensor = room[start : start + size]
            del room
            self._storage = self.tensor.untyped_storage()
        self._uses_when_free = self._uses()

    @property
    def is_free(self) -> bool:
        return self._uses() == self._uses_when_free

    def _uses(self) -> tuple[int, int]:
        """Of the memory, by tensors; and of its one Python object, which any tensor's ``untyped_storage()`` returns."""
        return torch._C._storage_Use_Count(self._storage._cdata), sys.getrefcount(self._storage)


kept = Held(least_bytes=32 * 2**20)  # similarities, from one sweep to the other
tile = Held(least_bytes=_HUGE_PAGE)  # the products of one tile, or their W
distances = Held(least_bytes=_HUGE_PAGE)  # the distances of one tile, where they are needed beside W
guide = Held(least_bytes=_HUGE_PAGE)  # the guide's similarities of one tile
rows = Held(least_bytes=_HUGE_PAGE, count=2)  # normalised or stacked, of both sides, from the forward call to the other


def empty_cache() -> None:
    """Give back the memory that is held between steps on the CPU: the largest ``memory_budget`` of a loss, tiles, and
    normalised rows.

    A loss whose backward pass is still to come keeps what it needs.
    """
    for held in (kept, tile, distances, guide, rows):
        held.drop()
