"""Sources of columns: what the rows of a batch are compared with.

A row of the (never materialised) similarity matrix is the concatenation of its sources: the keys, a queue of extra
negatives, negatives of its own; or the batch itself. A source knows which columns a block of rows has to visit, how
to form a tile of products, and how to turn a tile of dL/dS into gradients; it knows nothing of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .counters import count_product

Step = Callable[[], object]
"""A call that is ready to be made: sweeps.py tells why."""

# Of a tile on the diagonal, 1024 x 1024 at d = 512 on two cores: 3.3 ms whole, 2.8 by strips of 512 rows, 2.6 of 256;
# at d = 128 0.82, 0.75, 0.77.
_STRIP_ROWS = 256


@dataclass(slots=True, eq=False)
class SharedColumns:
    """Columns that every row sees: ``features[M, d]``."""

    features: Tensor
    needs_grad: bool
    has_positives: bool = False  # targets and groups are about this source
    inverse_norms: Tensor | None = None  # [M]: the columns are the features times these
    _normalised: tuple[slice, torch.dtype, Tensor] | None = None  # the last block: a tile's passes ask one by one

    @property
    def width(self) -> int:
        return self.features.shape[0]

    def of_rows(self, rows: slice) -> SharedColumns:
        """The columns that a chunk of rows sees: all."""
        return self

    def column_blocks(self, rows: slice, size: int) -> Iterator[slice]:
        """The blocks of columns that a block of rows visits: all."""
        return blocks(self.width, size)

    def total(self, dtype: torch.dtype) -> Tensor:
        """Sum over the columns, ``[1, d]``: the same for every row."""
        return self.features.sum(0, dtype=dtype, keepdim=True)

    def block(self, tile: Tile) -> Tensor:
        features, dtype = part(self.features, tile.columns), tile.query.dtype
        if self.inverse_norms is None:
            return features.to(dtype)
        if self._normalised is None or self._normalised[:2] != (tile.columns, dtype):
            self._normalised = None  # before there is another
            # Formed in fp32, so that half precision rounds once.
            block = torch.empty(features.shape, dtype=dtype, device=features.device)
            torch.mul(features, part(self.inverse_norms, tile.columns).unsqueeze(1), out=block)
            self._normalised = tile.columns, dtype, block
        return self._normalised[2]

    def products(self, tile: Tile, out: Tensor) -> Iterator[Step]:
        """``out[R, C] = query[R, d] @ features[C, d].T``."""
        count_product(tile.query, out.shape[1])
        yield partial(torch.mm, tile.query, self.block(tile).t(), out=out)

    def output_products(
        self, tile: Tile, weights: Tensor, addmm_, d_query: Tensor | None, d_features: Tensor | None
    ) -> Iterator[Step]:
        """``d_query[rows] += W @ features``, ``d_features[columns] += W.T @ query``."""
        if d_query is not None:
            count_product(tile.query, weights.shape[1])
            yield partial(addmm_, part(d_query, tile.rows), weights, self.block(tile))
        if d_features is not None:
            count_product(tile.query, weights.shape[1])
            yield partial(addmm_, part(d_features, tile.columns), weights.t(), tile.query)


@dataclass(slots=True, eq=False)
class BatchColumns(SharedColumns):
    """The rows themselves as columns: every pair of a batch, and of (i, j) and (j, i) only one is visited.

    The matrix of similarities is symmetric, so tiles on and above its diagonal tell all. A tile above it stands for
    its mirror image too: its row and column statistics, and its two products, go to the same tables and the same
    accumulator. A tile on the diagonal holds both images, and pairs of a row with itself, which do not count.
    """

    def column_blocks(self, rows: slice, size: int) -> Iterator[slice]:
        """The tile on the diagonal, and what is to the right of it."""
        yield rows
        for columns in blocks(self.width - rows.stop, size):
            yield slice(columns.start + rows.stop, columns.stop + rows.stop)

    def products(self, tile: Tile, out: Tensor) -> Iterator[Step]:
        """On the diagonal, what is on and above it, by strips of rows; the rest is the mirror image of that."""
        if not tile.diagonal:
            yield from SharedColumns.products(self, tile, out)
            return
        columns = self.block(tile).t()
        for strip in blocks(out.shape[0], _STRIP_ROWS if out.is_cpu else len(out)):
            query = tile.query[strip]
            count_product(query, out.shape[1] - strip.start)
            yield partial(torch.mm, query, columns[:, strip.start :], out=out[strip, strip.start :])
            yield partial(mirror_, out[strip, strip])
            if strip.stop < out.shape[0]:
                yield partial(out[strip.stop :, strip].copy_, out[strip, strip.stop :].t())

    def output_products(
        self, tile: Tile, weights: Tensor, addmm_, d_query: Tensor | None, d_features: Tensor | None
    ) -> Iterator[Step]:
        """``d_query[rows] += W @ features``, and above the diagonal ``d_query[columns] += W.T @ query``."""
        mirror = None if tile.diagonal else d_query
        return SharedColumns.output_products(self, tile, weights, addmm_, d_query, mirror)


@dataclass(slots=True, eq=False)
class VisitingRows(BatchColumns):
    """Rows of two ranks, of which those from ``first`` on are visiting: the tiles that compare one's with the other's.

    What turns products into distances knows rows of one batch, and mirror images; so the two are one batch here.
    """

    first: int = 0

    def column_blocks(self, rows: slice, size: int) -> Iterator[slice]:
        for columns in blocks(self.width - self.first, size):
            yield slice(columns.start + self.first, columns.stop + self.first)


@dataclass(eq=False)
class OwnColumns:
    """Columns that belong to one row each: ``features[N, K, d]`` holds K for every row."""

    features: Tensor
    needs_grad: bool
    has_positives: bool = False  # the first of every row's is its positive
    inverse_norms = None

    @property
    def width(self) -> int:
        return self.features.shape[1]

    def of_rows(self, rows: slice) -> OwnColumns:
        """The columns that a chunk of rows sees: its own."""
        return OwnColumns(self.features[rows], self.needs_grad, self.has_positives)

    def column_blocks(self, rows: slice, size: int) -> Iterator[slice]:
        return blocks(self.width, size)

    def total(self, dtype: torch.dtype) -> Tensor:
        """Sum over the columns, ``[N, d]``: every row has its own."""
        return self.features.sum(1, dtype=dtype)

    def block(self, tile: Tile) -> Tensor:
        return self.features[tile.rows, tile.columns].to(tile.query.dtype)

    def products(self, tile: Tile, out: Tensor) -> Iterator[Step]:
        count_product(tile.query, out.shape[1])
        yield partial(torch.bmm, self.block(tile), tile.query.unsqueeze(2), out=out.unsqueeze(2))

    def output_products(
        self, tile: Tile, weights: Tensor, addmm_, d_query: Tensor | None, d_features: Tensor | None
    ) -> Iterator[Step]:
        if d_query is not None:
            count_product(tile.query, weights.shape[1])
            yield partial(_add_own_products_, d_query[tile.rows], weights, self.block(tile))
        if d_features is not None:
            count_product(tile.query, weights.shape[1])
            outer = d_features[tile.rows, tile.columns]
            yield partial(torch.mul, weights.unsqueeze(2), tile.query.unsqueeze(1), out=outer)


def mirror_(square: Tensor) -> None:
    """What is above the diagonal, over what is below it.

    BLAS may round <x_i, x_j> and <x_j, x_i> differently (MKL: up to 11 rows in fp32, at most sizes in fp64). One is the
    other's in W, which subtracts the maxima of both rows: at logits of 1e5 they must not differ by a unit.
    """
    if square.is_cpu and native.available():
        return torch.ops.replearn_kernels.mirror_.default(square)
    below = torch.ones_like(square, dtype=torch.bool).tril_(-1)
    square.copy_(torch.where(below, square.t(), square))


def _add_own_products_(d_query: Tensor, weights: Tensor, block: Tensor) -> None:
    """``d_query[R, d] += W[R, C] block[R, C, d]``, row by row."""
    d_query += torch.bmm(weights.unsqueeze(1), block).squeeze(1)


Source = SharedColumns | BatchColumns | OwnColumns


class Tile(NamedTuple):
    """One block of the similarity matrix: ``query`` rows against the ``columns`` of ``source``."""

    query: Tensor  # [R, d], in the backend's compute dtype
    rows: slice
    source: Source
    position: int  # of the source among the problem's
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def diagonal(self) -> bool:
        """Whether the columns are the rows, so that the entries (i, i) are no pairs."""
        return isinstance(self.source, BatchColumns) and self.columns == self.rows

    @property
    def mirrored(self) -> bool:
        """Whether the tile stands for its mirror image too: its columns are rows elsewhere."""
        return isinstance(self.source, BatchColumns) and self.columns != self.rows


def part(tensor: Tensor, of: slice, dim: int = 0) -> Tensor:
    """Some of the rows, or of ``dim``; all of them as they are: looking at them anew would take 1.3 us."""
    if of.start == 0 and of.stop == tensor.shape[dim]:
        return tensor
    return tensor.narrow(dim, of.start, of.stop - of.start)


def run(steps: Iterable[Step]) -> None:
    for step in steps:
        step()


def blocks(count: int, size: int, first: int = 0) -> Iterator[slice]:
    """Cut ``range(first, count)`` into slices of at most ``size``."""
    for start in range(first, count, size):
        yield slice(start, min(start + size, count))
