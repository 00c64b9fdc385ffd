"""Which of the triton backend's kernels a problem and its tiles take."""

from __future__ import annotations

import torch

from ...triton_kernels import EPILOGUES, TileInputs
from ...triton_kernels.configs import by_tma, ring_of
from ..columns import BatchColumns, Tile, blocks

# Up to this width the fused gradient kernel takes its 4 products in registers; above it, W is written and read.
# In half precision W costs 3 x 2 B of L2 traffic an entry, where the fused kernel takes one more product of 2 d FLOPs:
# at d = 128 1.1 ps and 0.4 ps, at d = 512 1.5 ps for the product (modelled: 5.5 TB/s of L2, 700 TFLOP/s on an H100).
# Beyond 128 the fused kernel's rows no longer fit on chip.
FUSED_WIDTH = 128
# Kernels in Gluon need another launch, of what they read of the coefficients: 2048 rows take as long without them.
FEW_ROWS = 2048
# Those kernels know a row's positive by its number, or by groups of one batch. Elsewhere W is formed by pieces of a
# tile, of so many rows and columns: 32 MiB each.
PIECE = 4096

NOWHERE = 2**30  # a diagonal that no tile has an entry of


def epilogue_of(objective):
    return objective.epilogue or EPILOGUES[objective.name if objective.name in EPILOGUES else objective.family]


def is_fused(rows: int | None, d: int, dtype: torch.dtype, objective, is_batch: bool) -> bool:
    """Whether the products with W are taken in registers: not where W's sweep has more to do than its products, nor
    where W takes a guide's product, which would be formed twice; nor, without a kernel in Gluon for it, where TMA moves
    W, or blocks of a batch's rows are too few to fill a GPU."""
    if d > FUSED_WIDTH or not objective.needs_statistics:
        return False
    name = epilogue_of(objective).name
    if name == "declared_guided":
        return False
    if ring_of("gradient", name, dtype, d):
        return not objective.has_offsets and (rows is None or rows > FEW_ROWS)
    return not is_batch and not by_tma("weights", name, dtype)


def is_by_sums(objective, dtype: torch.dtype) -> bool:
    """Whether sums of one exponential can be the statistics, of tiles without groups."""
    epilogue = epilogue_of(objective)
    return epilogue.by_sums and by_tma("sums", epilogue.name, dtype)


def diagonal_of(tile: Tile, inputs: TileInputs) -> int | None:
    """The column of the tile that has its first row's own number, and may lie outside of it; None where entries off
    this diagonal can be positives, or not count, for all that a block of them can tell.

    A batch's meeting with another rank's rows, whose numbers are theirs, has ``is_batch``, too: the source tells.
    """
    if isinstance(tile.source, BatchColumns):
        return tile.rows.start - tile.columns.start
    if inputs.own is not None and inputs.row_group is None:
        return inputs.own
    return NOWHERE if inputs.row_group is None and inputs.target is None else None


def is_small(tile: Tile) -> bool:
    """So few entries that one launch more is not worth it (FEW_ROWS)."""
    return tile.shape[0] * tile.shape[1] <= FEW_ROWS**2


def pieces_of(tile: Tile) -> list[Tile]:
    """The tile, cut into pieces of which each has a small W: where no W was planned for."""
    rows, columns = tile.shape
    return [
        tile._replace(
            query=tile.query[of_rows], rows=slice(tile.rows.start + of_rows.start, tile.rows.start + of_rows.stop),
            columns=slice(tile.columns.start + of_columns.start, tile.columns.start + of_columns.stop),
        )
        for of_rows in blocks(rows, PIECE)
        for of_columns in blocks(columns, PIECE)
    ]  # fmt: skip
