"""Similarities that are distances, where the loss is over them: products on their way in, W on its way out.

The formulas, and what makes a pair near, are in ``engine/distances.py``. Here a block forms its near pairs again, one
row after another of those that have any, each against all the block's columns. At d = 512 such a row costs about as
much as the block's product (counted in sm_90's instructions, not measured): little for a few duplicates, but where most
rows have near ones, as with labels that have collapsed to points, a sweep takes many times as long.

Products in TF32, where the user allowed them, leave distances with TF32's error.
"""

import triton
import triton.language as tl

from .tiles import inside_tile, load_vector

NEAR = tl.constexpr(2**-8)
"""As in ``engine/distances.py``."""
_MOST_FP16 = tl.constexpr(65504.0)


@triton.jit
def negative_distances(s, row, column, inputs, points, SQUARED: tl.constexpr, BLOCK_K: tl.constexpr):
    """``v = -|x_i - x_j|``, or SQUARED, from products ``s[M, N]``; 0 where there is no pair."""
    pairs = inside_tile(row, column, inputs)
    norms = load_vector(points.row_squares, row, inputs.rows)
    norms = norms + load_vector(points.column_squares, column, inputs.columns)
    squares = norms - 2.0 * s
    has_near = tl.max((pairs & (squares < NEAR * norms)).to(tl.int32), 1, keep_dims=True) > 0
    next = tl.min(tl.where(has_near, row, inputs.rows))
    while next < inputs.rows:
        near = pairs & (squares < NEAR * norms) & (row == next)
        squares = tl.where(near, _squares_of_row(next, column, inputs, points, BLOCK_K), squares)
        next = tl.min(tl.where(has_near & (row > next), row, inputs.rows))
    squares = tl.where(pairs, squares, 0.0)
    if SQUARED:
        return -squares
    else:
        return -tl.sqrt(squares)


@triton.jit
def _squares_of_row(i, column, inputs, points, BLOCK_K: tl.constexpr):
    """``|x_i - x_j|^2``, ``[1, N]``, of one row with the block's columns ``[1, N]``, from the points as given."""
    k, column = tl.arange(0, BLOCK_K), column.trans()
    x = points.rows + i.to(tl.int64) * points.row_stride + k  # [K]
    y = points.columns + column.to(tl.int64) * points.column_stride + k[None, :]  # [N, K]
    total = tl.zeros([column.shape[0], BLOCK_K], tl.float32)
    for start in range(0, points.width, BLOCK_K):
        inside = k < points.width - start
        of_row = tl.load(x + start, mask=inside, other=0.0).to(tl.float32)
        of_columns = tl.load(y + start, mask=inside[None, :] & (column < inputs.columns), other=0.0).to(tl.float32)
        difference = of_row[None, :] - of_columns
        total += difference * difference
    return tl.sum(total, 1)[None, :]


@triton.jit
def chained(w, v, SQUARED: tl.constexpr, DTYPE: tl.constexpr):
    """``W dv/d<x_i, x_j>``, to be stored in DTYPE: 0 at a distance of 0.

    In fp16 ``1 / D`` can be too large, for points within 1e-5 of each other or weights of thousands: such a W is the
    largest that there is, so that the pair counts for less, and no row's gradient is NaN.
    """
    if SQUARED:
        w = 2.0 * w
    else:
        w = w / tl.where(v == 0.0, float("inf"), -v)
    if DTYPE == tl.float16:
        w = tl.clamp(w, -_MOST_FP16, _MOST_FP16, propagate_nan=tl.PropagateNan.ALL)
    return w
