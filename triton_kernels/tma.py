"""Tiles moved by TMA, the copy engine of Hopper and later GPUs: to and from shared memory, by one instruction each.

The matrices are described on the host: where one lies, and the shape of its tiles. Reads past an edge give zeros, and
writes past it are dropped. Rows start at multiples of 16 bytes, as :func:`.tiles.aligned` has it for features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config, Ring
from .tiles import product


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix, in tiles of ``rows x columns``."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def described_rows(query: Tensor, key: Tensor, config: Config) -> tuple[TensorDescriptor, TensorDescriptor]:
    """For :func:`described_tile`."""
    return descriptor(query, config.block_m, config.block_k), descriptor(key, config.block_n, config.block_k)


def resident_programs(config: Config | Ring, device: torch.device) -> int:
    """As many as the GPU holds at once."""
    return config.programs * _multiprocessors(device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter, and where nothing is launched, 3."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def described_tile(
    query, key, row, column, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``S[M, N]`` of the rows from ``row`` on and the columns from ``column`` on; 0 past the edges."""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, d, BLOCK_K):
        s = product(query.load([row, k]), key.load([column, k]).trans(), s, PRECISION, UPCAST)
    return s
