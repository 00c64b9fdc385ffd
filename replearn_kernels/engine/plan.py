"""The plan of a run: which schedule, which tiles, what is kept. A function of shapes alone.

Forward, backward and the fake kernels that torch.compile traces all call :func:`make_plan` with the same
shapes, so the plan never travels between them. In a graph that serves many sizes the fake kernels' shapes are symbols,
and a question of where one lies would tie the graph to the answer; its calls say ``any_size``, and the plan asks none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .columns import OwnColumns, Source

DEFAULT_MEMORY_BUDGET = 256 * 2**20
"""Bytes of similarities kept between the sweeps: 8192 x 8192 in fp32, where eager PyTorch holds four or more."""

# A chunk of rows of the single-sweep schedule holds its rows' similarities to all columns. It may take as much
# as the gradients themselves, within these bounds: below 16 MiB nothing is saved that matters, and above 64 MiB
# it would be the largest buffer of the run.
_CHUNK_BYTES = (16 * 2**20, 64 * 2**20)
# Fewer rows than this, and reading and writing the [M, d] gradient once per chunk costs as much as the
# product that the single sweep saves.
_MIN_CHUNK_ROWS = 128
# Up to this size a single chunk holds all rows, so that it sees whole columns too, and one pass through the engine's
# Python, not two, is what counts: at 16 x 16 it is most of the time.
_SMALL_ELEMENTS = 2**20
# Columns of an own source are read together with their features, so a tile is bounded by R * C * d elements.
_OWN_TILE_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class Plan:
    """``schedule``: "two_sweeps", "row_chunks" or "one_sweep": see :mod:`.schedules`."""

    schedule: str
    statistics_tile: TileShape | None  # None of symbols, for any size: no sweep walks those
    gradient_tile: TileShape | None
    kept_elements: int
    combined: bool = False  # the backend forms loss and coefficients, or losses' total, in one launch


class TileShape(NamedTuple):
    """Most rows and columns of a tile."""

    rows: int
    columns: int

    def fit(self, source: Source) -> TileShape:
        """The shape for tiles of ``source``: narrower where the columns' features are the rows' own."""
        if isinstance(source, OwnColumns):
            columns = _OWN_TILE_ELEMENTS // max(self.rows * source.features.shape[2], 1)
            return TileShape(self.rows, max(min(columns, self.columns), 1))
        return self


def make_plan(
    rows: int,
    widths: tuple[int, ...],
    d: int,
    *,
    itemsize: int,
    tile_shapes: tuple[tuple[int, int], tuple[int, int]],
    memory_budget: int,
    needs_grad: bool,
    one_gradient: bool,
    needs_columns: bool,
    needs_statistics: bool = True,
    sweeps_gradients: bool = True,
    is_batch: bool = False,
    combined: bool = False,
    any_size: bool = False,
) -> Plan:
    """Choose the schedule that does the least work within ``memory_budget``.

    Args:
        widths: the columns of each source.
        itemsize: the bytes of one kept similarity, 0 if the backend keeps none.
        tile_shapes: the most rows and columns of a tile in either sweep, equal if tiles are kept between them.
        one_gradient: one upstream gradient scales the gradients of all rows.
        needs_columns: W needs the statistics of whole columns.
        needs_statistics: W needs statistics at all.
        sweeps_gradients: there is a second sweep, for which tiles can be kept.
        is_batch: the columns are the rows, and only tiles on and above the diagonal are visited.
        combined: the backend combines the statistics of two sweeps, or the sums of one.
        any_size: let the options alone choose the schedule, and keep what one expression in the sizes says.
    """
    width = sum(widths)
    keeps = needs_grad and needs_statistics and sweeps_gradients and itemsize
    room = memory_budget // itemsize if keeps else 0
    one_sweep = not needs_statistics and needs_grad and one_gradient
    combined = combined and (one_sweep or needs_statistics)
    if any_size and isinstance(rows + width, torch.SymInt):
        kept = torch.sym_min(visited_pairs(rows, width, tile_shapes[0][0], is_batch), room) if room else 0
        return Plan("one_sweep" if one_sweep else "two_sweeps", None, None, kept, combined)
    statistics_tile, gradient_tile = (
        TileShape(balanced_block(rows, most_rows), balanced_block(max(widths), most_columns))
        for most_rows, most_columns in tile_shapes
    )
    if one_sweep:
        return Plan("one_sweep", gradient_tile, gradient_tile, 0, combined)
    # For any size, of the highest tiles, where balanced ones need a little less.
    row_block = tile_shapes[0][0] if any_size else statistics_tile.rows
    kept = min(visited_pairs(rows, width, row_block, is_batch), room)
    if keeps and one_gradient and rows and width and not any_size:
        chunk_rows = 0
        if rows <= tile_shapes[0][0] and rows * width == kept <= _SMALL_ELEMENTS:
            chunk_rows = rows
        elif not needs_columns and kept < rows * width:
            low, high = _CHUNK_BYTES
            chunk_rows = min(max((rows + width) * d * itemsize, low), high) // (width * itemsize)
        if chunk_rows >= min(rows, _MIN_CHUNK_ROWS):
            chunk = TileShape(balanced_block(rows, chunk_rows), statistics_tile.columns)
            return Plan("row_chunks", chunk, chunk, chunk.rows * width)
    return Plan("two_sweeps", statistics_tile, gradient_tile, kept, combined)


def visited_pairs(rows: int, width: int, row_block: int, is_batch: bool) -> int:
    """The entries of all tiles that a sweep visits.

    Of a batch, half of the square and of the tiles on its diagonal. No walk over blocks: ``rows`` may be a symbol.
    """
    if not is_batch:
        return rows * width
    full, last = rows // row_block, rows % row_block
    return (rows * rows + full * row_block * row_block + last * last) // 2


def balanced_block(size: int, limit: int) -> int:
    """The block that cuts ``size`` into the fewest blocks of at most ``limit``, all of about the same size.

    1,025 rows under a limit of 1,024 become 528 + 497, not 1,024 + 1; blocks are multiples of 16.
    """
    count = -(-size // limit)
    if count <= 1:
        return max(size, 1)
    return min(-(-size // (count * 16)) * 16, limit)
