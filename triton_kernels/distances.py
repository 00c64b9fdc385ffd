"""Similarities that are distances, where the loss is over them: products on their way in, W on its way out.

The formulas, and what makes a pair near, are in ``engine/distances.py``. Here a near pair's distance is formed again
inside its block, all of whose pairs then go through the features one by one: some twenty times the block's product,
for blocks that hold such a pair. The fp32 of a product by TF32, where the user allowed it, has TF32's error.
"""

import triton
import triton.language as tl

from .tiles import inside_tile, load_vector

NEAR = tl.constexpr(2**-8)
"""As in ``engine/distances.py``."""
_MOST_FP16 = tl.constexpr(65504.0)


@triton.jit
def negative_distances(s, row, column, inputs):
    """``v = -|x_i - x_j|``, or its square, from products; 0 where there is no pair."""
    points = inputs.points
    pairs = inside_tile(row, column, inputs)
    norms = load_vector(points.row_squares, row, inputs.rows)
    norms = norms + load_vector(points.column_squares, column, inputs.columns)
    squares = norms - 2.0 * s
    near = pairs & (squares < NEAR * norms)
    if tl.max(near.to(tl.int32)) > 0:
        squares = tl.where(near, _squares_of_differences(s, row, column, inputs), squares)
    squares = tl.where(pairs, squares, 0.0)
    if points.squared:
        return -squares
    else:
        return -tl.sqrt(squares)


@triton.jit
def _squares_of_differences(s, row, column, inputs):
    """``|x_i - x_j|^2`` of all entries, from the points as given, a feature at a time."""
    points = inputs.points
    x, of_x = _block(points.rows, points.row_stride, row)
    y, of_y = _block(points.columns, points.column_stride, column)
    total = tl.zeros_like(s)
    for k in range(points.width):
        of_rows = tl.load(x + (of_x + k), mask=row < inputs.rows, other=0.0).to(tl.float32)
        of_columns = tl.load(y + (of_y + k), mask=column < inputs.columns, other=0.0).to(tl.float32)
        difference = of_rows - of_columns
        total += difference * difference
    return total


@triton.jit
def _block(features, stride, index):
    """Where a block's rows start, and from there on each of them, in int32: an address is two registers, and all of a
    thread's columns have theirs at once."""
    first = tl.min(index)
    return features + first.to(tl.int64) * stride, (index - first) * stride


@triton.jit
def chained(w, v, points, DTYPE: tl.constexpr):
    """``W dv/d<x_i, x_j>``, to be stored in DTYPE: 0 at a distance of 0.

    In fp16 ``1 / D`` can be too large, for points within 1e-5 of each other or weights of thousands: such a W is the
    largest that there is, so that the pair counts for less, and no row's gradient is NaN.
    """
    if points.squared:
        w = 2.0 * w
    else:
        w = w / tl.where(v == 0.0, float("inf"), -v)
    if DTYPE == tl.float16:
        w = tl.clamp(w, -_MOST_FP16, _MOST_FP16, propagate_nan=tl.PropagateNan.ALL)
    return w
