"""Sweep 2: ``W = dL/dl`` of a tile, formed again from the features, and what becomes of it.

weights_kernel    writes W, for two products by cuBLAS: 3 products in all, and W goes through L2.
gradient_kernel   multiplies W with the features in registers. W goes nowhere, but each of the two gradients forms
                  its similarities again: 4 products in all, so only for small d, where writing W costs more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, cdiv, launch_options, pick
from .distances import chained, negative_distances
from .launching import run_kernel
from .statistics import merge
from .tiles import Epilogue, Points, TileInputs, aligned, product, similarity_tile, store_quantities
from .tma import described_rows, described_tile, descriptor, resident_programs

# Programs that run at the same time share 8 blocks of rows, whose features (8 x 128 rows) then stay in L2.
_GROUP = 8


@triton.jit
def weights_kernel(
    query, query_stride,  # [R, d]
    key, key_stride,  # [C, d]
    weights, weights_stride,  # [R, C]
    row_partials,  # [column blocks, QUANTITIES, R], or None
    column_partials,  # [row blocks, QUANTITIES, C], or None
    d,
    inputs,
    points,  # where similarities are distances (SQUARED: their squares), or None
    SQUARED: tl.constexpr, WEIGHTS: tl.constexpr, REDUCE: tl.constexpr, QUANTITIES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of W, and where one sweep does all, the block's statistics of its rows, and columns."""
    row_blocks, column_blocks = tl.cdiv(inputs.rows, BLOCK_M), tl.cdiv(inputs.columns, BLOCK_N)
    program = tl.program_id(0)
    row_block, column_block = tl.swizzle2d(
        program // column_blocks, program % column_blocks, row_blocks, column_blocks, GROUP
    )
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    near_row, near_column = tl.minimum(row, inputs.rows - 1), tl.minimum(column, inputs.columns - 1)
    s = similarity_tile(query, query_stride, near_row, key, key_stride, near_column, d, BLOCK_K, PRECISION, UPCAST)
    w = weights_of_block(
        s, row, column, row_block, column_block, row_partials, column_partials, inputs, points,
        SQUARED, WEIGHTS, REDUCE, QUANTITIES, BLOCK_K, weights.dtype.element_ty,
    )  # fmt: skip
    inside = (row < inputs.rows)[:, None] & (column < inputs.columns)[None, :]
    place = weights + row.to(tl.int64)[:, None] * weights_stride + column[None, :]
    tl.store(place, w, mask=inside)


@triton.jit
def weights_of_block(
    s, row, column, row_block, column_block, row_partials, column_partials, inputs, points,
    SQUARED: tl.constexpr, WEIGHTS: tl.constexpr, REDUCE: tl.constexpr, QUANTITIES: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W of a block of products, in DTYPE; where one sweep does all, the block's statistics are written."""
    if points is not None:
        s = negative_distances(s, row[:, None], column[None, :], inputs, points, SQUARED, BLOCK_K)
    # Statistics first: what they share with W is then all that has to stay in registers. And nothing is stored before
    # both are there: the compiler could not tell that what it has loaded is still the same, and would form it twice.
    if row_partials is not None:
        of_rows = REDUCE(s, row[:, None], column[None, :], inputs, 1)
    if column_partials is not None:
        of_columns = REDUCE(s, row[:, None], column[None, :], inputs, 0)
    w = WEIGHTS(s, row[:, None], column[None, :], inputs)
    if row_partials is not None:
        partials = row_partials + column_block.to(tl.int64) * QUANTITIES * inputs.rows
        store_quantities(partials, inputs.rows, row, row < inputs.rows, of_rows)
    if column_partials is not None:
        partials = column_partials + row_block.to(tl.int64) * QUANTITIES * inputs.columns
        store_quantities(partials, inputs.columns, column, column < inputs.columns, of_columns)
    if points is not None:
        w = chained(w, s, SQUARED, DTYPE)
    return w.to(DTYPE)


@triton.jit
def column_parts(s, PARTS: tl.constexpr):
    """A block's columns as a tuple of PARTS blocks, a power of two, from left to right."""
    if PARTS == 1:
        return (s,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(s, [s.shape[0], 2, s.shape[1] // 2]), [0, 2, 1]))
        return column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)


@triton.jit
def resident_weights_kernel(
    query, key,  # descriptors of [R, d], [C, d]
    weights,  # a descriptor of [R, C]
    row_partials,  # [column blocks * PARTS, QUANTITIES, R], or None
    column_partials,  # [row blocks, QUANTITIES, C], or None
    d,
    inputs,
    points,
    diagonal,  # the column of this tile that has row 0's own number; None: blocks are not told apart
    SQUARED: tl.constexpr, WEIGHTS: tl.constexpr, REDUCE: tl.constexpr, QUANTITIES: tl.constexpr, GROUP: tl.constexpr,
    OFF_WEIGHTS: tl.constexpr, OFF_REDUCE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same by programs that visit one block after another, features and W moved by TMA.

    TMA reads zeros past the edges and writes nothing there. While one program of a multiprocessor forms W, the other's
    products run. Blocks off the diagonal, nearly all, take the epilogue that has less to do.
    """
    row_blocks, column_blocks = tl.cdiv(inputs.rows, BLOCK_M), tl.cdiv(inputs.columns, BLOCK_N)
    told_apart = True
    if inputs.reference is not None:
        told_apart = tl.load(inputs.reference + 1) != 0
    for block in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        i, j = tl.swizzle2d(block // column_blocks, block % column_blocks, row_blocks, column_blocks, GROUP)
        s = described_tile(query, key, i * BLOCK_M, j * BLOCK_N, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
        if diagonal is None:
            store_weights(
                s, i, j, weights, row_partials, column_partials, inputs, points, SQUARED, WEIGHTS, REDUCE, QUANTITIES,
                PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            near = i * BLOCK_M + diagonal - j * BLOCK_N
            if told_apart & ((near >= BLOCK_N) | (near + BLOCK_M <= 0)):
                store_weights(
                    s, i, j, weights, row_partials, column_partials, inputs, points, SQUARED, OFF_WEIGHTS, OFF_REDUCE,
                    QUANTITIES, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                store_weights(
                    s, i, j, weights, row_partials, column_partials, inputs, points, SQUARED, WEIGHTS, REDUCE,
                    QUANTITIES, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip


@triton.jit
def store_weights(
    s, i, j, weights, row_partials, column_partials, inputs, points,
    SQUARED: tl.constexpr, WEIGHTS: tl.constexpr, REDUCE: tl.constexpr, QUANTITIES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W of block (i, j), some of its columns at a time, into the matrix that ``weights`` describes."""
    row, parts = i * BLOCK_M + tl.arange(0, BLOCK_M), column_parts(s, PARTS)
    width: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        start = j * BLOCK_N + part * width
        w = weights_of_block(
            parts[part], row, start + tl.arange(0, width), i, j * PARTS + part, row_partials, column_partials,
            inputs, points, SQUARED, WEIGHTS, REDUCE, QUANTITIES, BLOCK_K, weights.dtype,
        )  # fmt: skip
        weights.store([i * BLOCK_M, start], w)


@triton.jit
def gradient_kernel(
    own, own_stride,  # [rows, d], or [columns, d] where TRANSPOSED
    other, other_stride,  # [columns, d], or [rows, d]
    gradient, gradient_stride,  # like own, fp32
    d,
    inputs,
    WEIGHTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``gradient += W @ other`` (TRANSPOSED: ``W.T @ other``) for BLOCK_M rows of ``own`` that no other program has."""
    owned, others = inputs.rows, inputs.columns
    if TRANSPOSED:
        owned, others = others, owned
    k = tl.arange(0, BLOCK_K)
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    near_index = tl.minimum(index, owned - 1)
    x = tl.load(own + near_index.to(tl.int64)[:, None] * own_stride + k[None, :], mask=(k < d)[None, :], other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, others, BLOCK_N):
        other_index = start + tl.arange(0, BLOCK_N)
        near_other = tl.minimum(other_index, others - 1)
        y_block = other + near_other.to(tl.int64)[:, None] * other_stride + k[None, :]
        y = tl.load(y_block, mask=(k < d)[None, :], other=0.0)  # [N, K]
        s = product(x, y.trans(), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        if TRANSPOSED:
            w = WEIGHTS(s, other_index[None, :], index[:, None], inputs)
        else:
            w = WEIGHTS(s, index[:, None], other_index[None, :], inputs)
        w = tl.where((other_index < others)[None, :], w, 0.0)  # past the edge W may be anything, even NaN
        total = product(w.to(y.dtype), y, total, PRECISION, UPCAST)
    place = gradient + near_index.to(tl.int64)[:, None] * gradient_stride + k[None, :]
    inside = (index < owned)[:, None] & (k < d)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def form_weights(
    epilogue: Epilogue,
    query: Tensor,  # [R, d]
    key: Tensor,  # [C, d]
    inputs: TileInputs,
    points: Points | None,  # where similarities are distances
    squared: bool,  # they are their squares
    out: Tensor,
    row_table: Tensor | None = None,  # [quantities, R]
    column_table: Tensor | None = None,  # [quantities, C]
    diagonal: int | None = None,
) -> None:
    """``out[R, C] = W`` of the tile, in ``out``'s dtype; given tables, its statistics are folded in, too.

    ``diagonal``: the column of the tile that has its first row's own number, which may lie outside, if entries off that
    diagonal are what the epilogue's ``off_diagonal`` takes them for; with ``inputs.reference`` where it reads that.
    """
    query, key = aligned(query), aligned(key)
    functions = squared, epilogue.weights, epilogue.reduce, 0 if row_table is None else row_table.shape[0], _GROUP

    def launch(config: Config) -> tuple[Tensor | None, Tensor | None]:
        row_blocks, column_blocks = cdiv(out.shape[0], config.block_m), cdiv(out.shape[1], config.block_n)
        parts = column_blocks * max(config.parts, 1)
        of_rows = None if row_table is None else row_table.new_empty(parts, *row_table.shape)
        of_columns = None if column_table is None else column_table.new_empty(row_blocks, *column_table.shape)
        blocks, options = row_blocks * column_blocks, launch_options(config, query)
        if config.parts:
            off = epilogue.off_diagonal, epilogue.off_diagonal_reduce
            into = descriptor(out, config.block_m, config.block_n // config.parts)
            run_kernel(
                resident_weights_kernel, (min(blocks, resident_programs(config, out.device)),),
                *described_rows(query, key, config), into, of_rows, of_columns, query.shape[1],
                inputs, points, diagonal, *functions, *off, PARTS=config.parts, **options,
            )  # fmt: skip
        else:
            run_kernel(
                weights_kernel, (blocks,),
                query, query.stride(0), key, key.stride(0), out, out.stride(0), of_rows, of_columns,
                query.shape[1], inputs, points, *functions, **options,
            )  # fmt: skip
        return of_rows, of_columns

    partials = launch(pick("weights", epilogue.name, query, launch))
    for table, partial in zip((row_table, column_table), partials):
        if table is not None:
            merge(epilogue, partial, inputs, table)


def accumulate_gradient(
    epilogue: Epilogue, own: Tensor, other: Tensor, inputs: TileInputs, gradient: Tensor, *, transposed: bool
) -> None:
    """``gradient += W @ other``, or ``W.T @ other`` if ``own`` are the columns (``transposed``). For small d.

    Where the features are padded, so are the sums.
    """
    d, sums = own.shape[1], gradient
    own, other = aligned(own), aligned(other)
    if own.shape[1] != d:
        sums = gradient.new_zeros(own.shape)

    def launch(config: Config, into: Tensor) -> None:
        run_kernel(
            gradient_kernel, (cdiv(own.shape[0], config.block_m),),
            own, own.stride(0), other, other.stride(0), into, into.stride(0),
            own.shape[1], inputs,
            epilogue.weights, transposed, **launch_options(config, own),
        )  # fmt: skip

    launch(pick("gradient", epilogue.name, own, lambda config: launch(config, torch.empty_like(sums))), sums)
    if sums is not gradient:
        gradient += sums[:, :d]
