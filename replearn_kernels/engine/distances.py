r"""Similarities that are distances: ``v_ij = -|x_i - x_j|``, or its square, from the products that the sweeps form.

An objective over distances is a function of v, as others are of products, and W = dL/dv. Two steps of a tile know the
difference: products become v before the pass, and W becomes dL/d<x_i, x_j> after it.

    |x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 <x_i, x_j>                        (squares, a tile of products)
    dL/dx_i = sum_j w_ij (x_j - x_i) = (w X)_i - (sum_j w_ij) x_i          w = W / D, or 2 W for squares

Both lines cancel where points are near each other beside their distance from the origin, which is why the points are
centred first (fp32, fp64), and why a pair is *near* where ``|x_i - x_j|^2 < NEAR (|x_i|^2 + |x_j|^2)``: its distance is
formed again from the difference of its rows, and its gradient is added from it, outside the products. The products
leave |x_i - x_j|^2 with an error of some eps (|x_i|^2 + |x_j|^2), which grows with the square root of the terms that
they sum: 4 standard deviations of a sum in turn are sqrt(d) / 2. Hence the bound of a distance's relative error, and of
the error of its gradient, a unit vector::

    (1 + sqrt(d) / 2) eps / (2 NEAR)        1e-4 in fp32 at d = 128; 7e-5 is the largest seen, at d = 1,152

A near pair has some eps. A distance of 0 has the gradient 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .columns import Tile
from .listed_pairs import add_differences_

NEAR = 2**-8


class Points(NamedTuple):
    """What a tile has to know to turn products into distances."""

    rows: Tensor  # [R, d], as given, in the dtype of the statistics: their differences are exact where they matter
    columns: Tensor  # [C, d]
    row_squares: Tensor  # [R]: |x|^2 of the centred rows, whose products the tile holds
    column_squares: Tensor  # [C]
    squared: bool  # v is the negative square of the distance
    diagonal: bool  # the columns are the rows


def negative_distances_(s: Tensor, points: Points) -> None:
    """``v`` from products ``s[R, C]``, in place; 0 for a row with itself."""
    norms = points.row_squares.unsqueeze(1) + points.column_squares
    s.mul_(-2).add_(norms)
    near = s < norms * NEAR
    if points.diagonal:
        near.fill_diagonal_(False)
    i, j = near.nonzero(as_tuple=True)
    if len(i):
        s[i, j] = (points.rows[i] - points.columns[j]).square().sum(1)
    if not points.squared:
        s.sqrt_()
    s.neg_()
    if points.diagonal:
        s.fill_diagonal_(0)


class TileSums(NamedTuple):
    """Of a tile of weights w: its sums, and the near pairs taken out of it."""

    of_rows: Tensor  # [R]: sum_j w_ij
    of_columns: Tensor | None  # [C]: sum_i w_ij; of a tile that stands for its mirror image
    near_rows: Tensor  # [P] int64, counted within the tile
    near_columns: Tensor  # [P]
    near_weights: Tensor  # [P]


def chain_(w: Tensor, v: Tensor, points: Points) -> TileSums:
    """``w[R, C] = W dv/d<x_i, x_j>`` in place of W = dL/dv; near pairs are taken out."""
    if points.squared:
        w.mul_(2)
        squares = -v
    else:
        w.div_(-v).masked_fill_(v == 0, 0)
        squares = v.square()
    if points.diagonal:
        w.fill_diagonal_(0)
    norms = points.row_squares.unsqueeze(1) + points.column_squares
    i, j = ((squares < norms * NEAR) & (w != 0)).nonzero(as_tuple=True)
    near = w[i, j]
    w[i, j] = 0
    return TileSums(w.sum(1), w.sum(0), i, j, near)


def finish_tile_(x: Tensor, centred: Tensor, tile: Tile, sums: TileSums, d_query: Tensor) -> None:
    """From the sums ``W X`` of a tile to ``sum_j w_ij (x_j - x_i)``, in place; and the near pairs'.

    ``x``: all rows as given, ``centred``: as they entered the products. A tile on the diagonal holds both images of a
    pair: its rows' sums, and one image, are all.
    """
    d_query[tile.rows].addcmul_(centred[tile.rows], sums.of_rows.unsqueeze(1), value=-1)
    if tile.mirrored:
        d_query[tile.columns].addcmul_(centred[tile.columns], sums.of_columns.unsqueeze(1), value=-1)
    i, j, w = sums.near_rows, sums.near_columns, sums.near_weights
    if tile.diagonal and len(i):
        once = i < j
        i, j, w = i[once], j[once], w[once]
    if len(i):
        add_differences_(d_query, x, i + tile.rows.start, j + tile.columns.start, -w)
