"""The launchers of this folder's kernels, in place of those of ``..sums`` and ``..gradients``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..configs import Ring, cdiv, even_regions, next_power_of_2
from ..launching import run_kernel
from ..tiles import TileInputs, aligned
from ..tma import resident_programs
from .gradients import gradients_kernel
from .ring import BLOCK_K
from .sums import sums_kernel
from .weights import weights_kernel

Ranges = tuple[Tensor | None, Tensor | None]
"""``..groups.group_ranges`` of a tile's rows and of its columns, where there are groups."""

_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # of a consumer


class Sums(NamedTuple):
    """Of a tile's rows, or of its columns, as ``..sums.finish_kernel`` reads them: folded over the first dimension."""

    sums: Tensor  # [parts, N]
    positives: Tensor  # [N], or of groups [parts, N]


def launch_sums(
    query: Tensor, key: Tensor, inputs: TileInputs, ranges: Ranges, largest: Tensor, diagonal: int, with_columns: bool,
    ring: Ring, headroom: float, largest_shift: float,
) -> tuple[Sums, Sums | None, Tensor]:  # fmt: skip
    """Sums of rows, of columns if asked, and the shift.

    A batch with itself (``inputs.diagonal``) has its rows' alone, of which it visits every pair of blocks once.
    """
    (rows, d), columns, grouped = query.shape, key.shape[0], inputs.row_group is not None
    half = bool(grouped and inputs.diagonal)
    row_blocks, column_blocks = cdiv(rows, ring.other), cdiv(columns, ring.own)
    parts = column_blocks
    if half:
        parts = columns_of_half(columns, ring) // ring.own
        row_blocks = parts * (ring.own // ring.other)
    regions, height = _regions(column_blocks, row_blocks, ring, query.device)
    of_rows, of_columns = _new_sums(largest, parts + 2 * regions * half, rows, grouped), None
    if half:
        of_columns = Sums(*(table[parts:] for table in of_rows))
    elif with_columns:
        of_columns = _new_sums(largest, 2 * regions, columns, grouped, of_rows.positives)
    sums, positives = (None, None) if of_columns is None else of_columns
    shift = largest.new_empty(1)
    run_kernel(
        sums_kernel, (column_blocks, regions),
        *_described(query, key, ring), largest, inputs.scale, shift, of_rows.sums, sums,
        of_rows.positives, positives if grouped else None, inputs.row_group, inputs.column_group, *ranges,
        rows, columns, diagonal, height,
        HEADROOM=headroom, LARGEST_SHIFT=largest_shift, PROGRAMS=largest.shape[1], CHUNKS=cdiv(d, int(BLOCK_K)),
        STAGES=ring.stages, BLOCK_M=ring.other, BLOCK_N=ring.own, HALF=half, **_OPTIONS,
    )  # fmt: skip
    return of_rows, None if half else of_columns, shift


def _new_sums(like: Tensor, parts: int, size: int, grouped: bool, positives: Tensor | None = None) -> Sums:
    """``positives``: those of the rows, where there are no groups and of which the columns' are the same."""
    if grouped or positives is None:
        positives = like.new_empty(parts, size) if grouped else like.new_empty(size)
    return Sums(like.new_empty(parts, size), positives)


def columns_of_half(columns: int, ring: Ring) -> int:
    """How many a row of a batch meets, in whole blocks, where every pair of blocks is visited once (``.sums``)."""
    return (cdiv(columns, ring.own) // 2 + 1) * ring.own


def launch_weights(
    query: Tensor, key: Tensor, inputs: TileInputs, ranges: Ranges, shares: tuple[Tensor, Tensor | None], uniform: bool,
    diagonal: int, out: Tensor, ring: Ring,
) -> None:  # fmt: skip
    """``out[R, C] = W``; ``inputs`` with its tables and its reference.

    ``shares``: of rows and columns, as ``..reference.form_shares`` has them; ``uniform``: rows of a group have the same
    positive weight.
    """
    query, key = aligned(query), aligned(key)
    rows, columns = out.shape
    row_blocks, column_blocks = cdiv(rows, ring.other), cdiv(columns, ring.own)
    regions, height = _regions(column_blocks, row_blocks, ring, out.device)
    run_kernel(
        weights_kernel, (column_blocks, regions),
        *_described(query, key, ring), _descriptor(out, ring.other, ring.own), *shares,
        inputs.row_table, inputs.row_stride, inputs.column_table, inputs.column_stride, *_positives(inputs, uniform),
        inputs.row_group, inputs.column_group, *ranges, inputs.scale, inputs.reference, rows, columns, diagonal, height,
        CHUNKS=cdiv(query.shape[1], int(BLOCK_K)), STAGES=ring.stages, BLOCK_M=ring.other, BLOCK_N=ring.own,
        **_OPTIONS,
    )  # fmt: skip


def launch_gradient(
    own: Tensor, other: Tensor, inputs: TileInputs, ranges: Ranges, shares: tuple[Tensor, Tensor | None], uniform: bool,
    diagonal: int, gradient: Tensor, ring: Ring, *, transposed: bool,
) -> None:  # fmt: skip
    """``gradient += W @ other``, or ``W.T @ other`` if ``own`` are the columns (``transposed``)."""
    own, other, d = aligned(own), aligned(other), gradient.shape[1]
    tables = (inputs.row_table, inputs.row_stride), (inputs.column_table, inputs.column_stride)
    groups, (of_rows, of_columns), offset = (inputs.row_group, inputs.column_group), _positives(inputs, uniform), 0
    if transposed:
        shares, tables, groups, ranges = shares[::-1], tables[::-1], groups[::-1], ranges[::-1]
        diagonal = offset = -diagonal
        if groups[0] is not None:
            of_rows, of_columns, offset = inputs.column_table[3], None if uniform else of_rows, 0
    width = max(int(BLOCK_K), next_power_of_2(d))
    own_blocks, other_blocks = cdiv(len(own), ring.own), cdiv(len(other), ring.other)
    regions, height = _regions(own_blocks, other_blocks, ring, own.device)
    into = gradient if regions == 1 else gradient.new_empty(regions, len(own), d)
    run_kernel(
        gradients_kernel, (own_blocks, regions),
        _descriptor(own, ring.own // 2, width), _descriptor(other, ring.other, width), into, into.stride(-2),
        *shares, *tables[0], *tables[1], of_rows, offset, of_columns, *groups, *ranges,
        inputs.scale, inputs.reference, len(own), len(other), diagonal, d, height,
        STAGES=ring.stages, BLOCK_M=ring.own // 2, BLOCK_N=ring.other, BLOCK_K=width, ADD=regions == 1, **_OPTIONS,
    )  # fmt: skip
    if regions > 1:
        gradient += into.sum(0)


def _positives(inputs: TileInputs, uniform: bool) -> tuple[Tensor, Tensor | None]:
    """Weights of the positives of rows and columns; None where the rows' tell of both, or columns have none."""
    alone = uniform or inputs.column_group is None
    return inputs.row_table[3], None if alone else inputs.column_table[3]


def _regions(own_blocks: int, other_blocks: int, ring: Ring, device: torch.device) -> tuple[int, int]:
    """Into how many regions the other blocks are cut, none of them empty, and the blocks of one."""
    height = cdiv(other_blocks, even_regions(own_blocks, other_blocks, resident_programs(ring, device)))
    return cdiv(other_blocks, height), height


def _described(query: Tensor, key: Tensor, ring: Ring) -> tuple[TensorDescriptor, TensorDescriptor]:
    """In chunks: of the rows that pass through the ring, and of the columns that stay."""
    return _descriptor(query, ring.other, int(BLOCK_K)), _descriptor(key, ring.own, int(BLOCK_K))


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix in half precision, in blocks of ``rows x columns``."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], _LAYOUT)
