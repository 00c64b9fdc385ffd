"""The ``triton`` backend: similarities that stay on chip. Its kernels are in :mod:`replearn_kernels.triton_kernels`."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from ...triton_kernels import (
    COEFFICIENTS,
    STATE,
    Points,
    Side,
    TileInputs,
    accumulate_gradient,
    begin_sums,
    columns_of_half,
    combine_losses,
    combine_statistics,
    finish_gradients,
    form_shares,
    form_weights,
    group_ranges,
    launch_gradient,
    launch_weights,
    ranges_of,
    shared_reference,
    update_by_sums,
    update_statistics,
)
from ...triton_kernels.configs import Ring, by_tma, kernel_settings, ring_of
from ...triton_kernels.tiles import aligned, mirrored
from .. import products
from ..columns import BatchColumns, OwnColumns, Source, Step, Tile, run
from ..counters import count_product, is_counting
from ..distances import TileSums, finish_tile_
from ..plan import TileShape
from ..problem import Inputs, Problem
from .base import Backend, coefficients_of, statistics_of
from .dense import TorchBackend
from .kernel_choice import diagonal_of, epilogue_of, is_by_sums, is_fused, is_small, pieces_of
from .replay import replay

# The bytes of W: the memory budget, within these bounds. On an H200 the products with W of a tile of 4096 x 4096 reach
# 581 TFLOP/s at d = 512, of 8192 x 8192 744, of 16,384 x 16,384 787 (measured 2026-11-26, bench/results/gpu), and every
# tile takes the host some 0.2 ms. The smallest stays in L2.
_WEIGHTS_BYTES = (32 * 2**20, 2**30)
_WEIGHTS_ALIGNMENT = 16  # elements: rows of W start where vector loads can
_REPLAYS = os.environ.get("REPLEARN_KERNELS_REPLAY") != "0"
_WIDEST_OUTPUT = 16384  # features that the kernel of outputs holds in registers; of wider ones, PyTorch's take the end
# Columns of a tile at most: a classifier's are copied, normalised, one tile's at a time.
_COLUMNS, _NORMALISED_COLUMNS = 2**19, 2**15


class TritonBackend(Backend):
    """Adapts the engine's tiles to the kernels."""

    name = "triton"
    keeps_tiles = False

    def __init__(self, objective):
        super().__init__(objective)
        self._epilogue = epilogue_of(objective)
        self._roles = objective.roles if self._epilogue.takes_roles else ()
        self._own = TorchBackend(objective)
        self._weights: Tensor | None = None
        self._partials: tuple[Tensor, ...] = ()
        self._largest: tuple[Problem, int, Tensor] | None = None
        self._reference: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._shares: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None
        self._counter: Tensor | None = None
        self._uniform = False  # rows of a group have the same positive weight
        self._ranges: tuple[Tensor, Tensor] | None = None
        self._aligned: tuple[Problem, Tensor, Tensor] | None = None

    @staticmethod
    def repeats(query: Tensor) -> bool:
        return _REPLAYS and query.is_cuda and not is_counting() and torch._C._len_torch_dispatch_stack() == 0

    @staticmethod
    def repeat(key, tensors, call):
        settings = kernel_settings(tensors[0].dtype)
        return call() if settings is None else replay((settings, key), tensors, call)

    @staticmethod
    def tile_shape(sweep, rows, d, dtype, device, objective, is_batch, memory_budget) -> tuple[int, int]:
        if sweep == "gradients" and is_fused(rows, d, dtype, objective, is_batch):
            return 65536, 65536  # no buffer: as many rows as fill any GPU
        # High enough to fill a GPU and, in a batch, low enough that little is on the diagonal.
        if sweep == "gradients":
            low, most = _WEIGHTS_BYTES
            entries = min(max(memory_budget, low), most) // dtype.itemsize
            high = 8192 if entries >= 8192 * 8192 else 4096
        elif is_by_sums(objective, dtype):
            # Partial sums take 34 or 67 MB, of a batch 34 and with those of positives 67.
            high, entries = 32768 if is_batch else 65536, 2**30
        else:
            # Partial statistics of a tile take 17 MB; merging them, 4 % of the time of its product (modelled).
            high, entries = 4096 if is_batch else 16384, 2**28
        if rows is not None:  # few rows take wide tiles
            high = min(high, max(rows, 16))
        most_columns = _NORMALISED_COLUMNS if objective.unit_features else _COLUMNS
        return high, min(entries // high // _WEIGHTS_ALIGNMENT * _WEIGHTS_ALIGNMENT, most_columns)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def statistics_steps(self, problem: Problem, tile: Tile, kept: Tensor | None, statistics) -> list[Step]:
        return [partial(self._update_statistics, problem, tile, statistics)]

    def _update_statistics(self, problem: Problem, tile: Tile, statistics) -> None:
        if isinstance(tile.source, OwnColumns):
            return run(self._own.statistics_steps(problem, _upcast(tile, problem), None, statistics))
        key = tile.source.block(tile)
        for tables in self._parts(*statistics_of(tile, *statistics)):
            read = self._read_on(tile, *tables) if self._epilogue.reads_tables else (None, None)
            self._partials = ()
            inputs, points = self._inputs(problem, tile, *read), self._points(problem, tile)
            diagonal = diagonal_of(tile, inputs)
            if diagonal is not None and is_by_sums(self.objective, tile.query.dtype):
                self._update_by_sums(problem, tile, key, inputs, diagonal, *tables)
                continue
            count_product(tile.query, tile.shape[1])
            self._partials = update_statistics(self._epilogue, tile.query, key, inputs, *points, *tables)

    def _update_by_sums(self, problem: Problem, tile: Tile, key, inputs, diagonal, row_table, column_table) -> None:
        largest = self._largest_squares(problem, tile)
        update, ring = partial(update_by_sums, self._epilogue, largest=largest), self._ring("sums", tile)
        half = ring and tile.diagonal and inputs.row_group is not None
        met = columns_of_half(tile.shape[1], ring) if half else tile.shape[1]
        count_product(tile.query, min(met, tile.shape[1]))
        if ring or inputs.row_group is None or column_table is None:
            ranges = self._ranges_of(problem, tile) if ring and not is_small(tile) else (None, None)
            self._partials = update(
                tile.query, key, inputs, diagonal=diagonal, row_table=row_table, column_table=column_table,
                ranges=ranges,
            )  # fmt: skip
            return
        self._partials = update(
            tile.query, key, inputs, diagonal=diagonal, row_table=row_table, column_table=None
        )
        # The tile's mirror image: by TMA positives by group are summed for rows alone.
        count_product(tile.query, tile.shape[1])
        self._partials = ()
        self._partials = update(
            key, tile.query, mirrored(inputs), diagonal=-diagonal, row_table=column_table, column_table=None
        )

    def _shared_reference(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor | None:
        """Read once for all tiles of a sweep."""
        if not self._epilogue.by_reference or self.objective.has_offsets:
            return None
        known = self._reference
        if known is None or known[0] is not row_table or known[1] is not column_table:
            shape = row_table.shape[1], 0 if column_table is None else column_table.shape[1]
            tables = TileInputs.of(shape, problem.scale, row_table=row_table, column_table=column_table)
            self._reference = known = row_table, column_table, shared_reference(tables)
        return known[2]

    def _shares_of(
        self, problem: Problem, tile: Tile, coefficients, reference: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The tile's, as the kernels in Gluon read them: formed once for all tiles of a sweep."""
        if self._shares is None or self._shares[0] is not reference:
            row_table, column_table = coefficients
            shape = row_table.shape[1], 0 if column_table is None else column_table.shape[1]
            tables = TileInputs.of(
                shape, problem.scale, row_table=row_table, column_table=column_table, reference=reference
            )
            self._shares = reference, form_shares(tables)
        return coefficients_of(tile, *self._shares[1])

    def _ranges_of(self, problem: Problem, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """Of the tile's groups, as the kernels in Gluon read them: formed once for all tiles of a sweep."""
        if not isinstance(tile.source, BatchColumns):
            return None, None
        groups = problem.group_numbers
        if self._ranges is None or self._ranges[0] is not groups:
            self._ranges = groups, group_ranges(groups)
        return ranges_of(self._ranges[1], tile.rows), ranges_of(self._ranges[1], tile.columns)

    def _largest_squares(self, problem: Problem, tile: Tile) -> Tensor:
        """Of the rows and of the tile's source, read once."""
        if self._largest is None or self._largest[0] is not problem or self._largest[1] != tile.position:
            largest = begin_sums(self._epilogue, problem.query, tile.source.features)
            self._largest = problem, tile.position, largest
        return self._largest[2]

    def new_statistics(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        source = problem.sources[0]
        if isinstance(source, OwnColumns) or not is_by_sums(self.objective, problem.query.dtype):
            return super().new_statistics(problem)
        row_table = problem.query.new_empty(3, problem.rows, dtype=problem.statistics_dtype)
        column_table = None
        if self.objective.needs_columns and not problem.is_batch:
            column_table = row_table.new_empty(2, source.width)
        tables = row_table, column_table
        self._largest = problem, 0, begin_sums(self._epilogue, problem.query, source.features, *tables)
        return tables

    @staticmethod
    def combines(objective, dtype: torch.dtype, has_target: bool) -> bool:
        """Not where logits are summed for label smoothing, nor where a row's column is not that of its own number; nor
        where sums of one sweep are gradients already, scaled in place: fp32 features'."""
        if epilogue_of(objective).combine is None or objective.has_offsets:
            return False
        if not objective.needs_statistics:
            return dtype.itemsize < 4
        return not (has_target and objective.needs_columns)

    @staticmethod
    def new_combined(inputs: Inputs, objective) -> list[Tensor]:
        query, rows = inputs.query, inputs.query.shape[0]
        state = query.new_empty(STATE, dtype=torch.float32)
        if not objective.needs_statistics:
            return [state, query.new_empty((), dtype=torch.float64)]
        saved = [state, query.new_empty(COEFFICIENTS, rows, dtype=torch.float32)]
        if inputs.is_batch:
            return [*saved, query.new_empty(rows, dtype=torch.int32)]
        if objective.needs_columns:
            saved.append(query.new_empty(COEFFICIENTS, inputs.widths[0], dtype=torch.float32))
        return saved

    def combine(self, problem: Problem, row_table, column_table, mean: bool) -> tuple[Tensor, list[Tensor]]:
        shape = problem.rows, 0 if column_table is None else column_table.shape[1]
        inputs = TileInputs.of(shape, problem.scale, row_table=row_table, column_table=column_table)
        if not self.objective.needs_statistics:
            loss, *sums = combine_losses(self._epilogue, inputs, mean)
            return loss, sums
        counts = 0
        if problem.is_batch:
            counts = problem.group_size - 1 if problem.group_size else problem.positive_counts
        loss, state, rows, columns = combine_statistics(self._epilogue, inputs, counts, mean)
        others = problem.group_numbers if problem.is_batch else columns
        return loss, [state, rows] if others is None else [state, rows, others]

    def combined(self, problem: Problem, saved: list[Tensor]) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        state, rows, *others = saved
        columns = None
        if problem.is_batch:
            problem.know_group_numbers(*others)
        elif others:
            [columns] = others
        self._reference, self._uniform = (rows, columns, state), True
        return (rows, columns), self.share_of(state)

    def share_of(self, state: Tensor) -> Tensor:
        self._counter = state[3:]
        return state[2]

    def _weights_of(
        self, problem: Problem, tile: Tile, row_table: Tensor, column_table: Tensor | None,
        coefficients: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """W of the tile, whose part of the tables these are.

        ``coefficients``: of the whole problem, of which what rows and columns share can be read.
        """
        out = self._weights_buffer(tile)
        count_product(tile.query, tile.shape[1])
        folded: tuple[Tensor | None, ...] = (None, None)
        if not self.objective.needs_statistics:
            folded = row_table, column_table if self._epilogue.folds_columns else None
        inputs = self._inputs(problem, tile, *self._read_on(tile, row_table, column_table))
        key = tile.source.block(tile)
        reference = diagonal = None
        if coefficients is not None and by_tma("weights", self._epilogue.name, tile.query.dtype):
            reference = self._shared_reference(problem, *coefficients)
        if self._epilogue.off_diagonal is not None and not (self._epilogue.by_reference and reference is None):
            inputs, diagonal = inputs._replace(reference=reference), diagonal_of(tile, inputs)
        ring = self._ring("weights", tile)
        if ring and reference is not None and diagonal is not None and not is_small(tile):
            ranges = self._ranges_of(problem, tile)
            shares = self._shares_of(problem, tile, coefficients, reference)
            launch_weights(tile.query, key, inputs, ranges, shares, self._uniform, diagonal, out, ring)
        else:
            points = self._points(problem, tile)
            form_weights(self._epilogue, tile.query, key, inputs, *points, out, *folded, diagonal)
        return out

    def _parts(self, row_table: Tensor, column_table: Tensor | None):
        return self.objective.parts(row_table, column_table, most=self._epilogue.per_part)

    @staticmethod
    def _read_on(tile: Tile, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tables that a kernel reads: a tile on the diagonal is its own mirror image."""
        return row_table, row_table if tile.diagonal else column_table

    def gradient_steps(
        self, problem: Problem, tile: Tile, kept: Tensor | None, coefficients, d_query, d_source
    ) -> list[Step]:
        return [partial(self._accumulate_gradients, problem, tile, coefficients, d_query, d_source)]

    def _accumulate_gradients(self, problem: Problem, tile: Tile, coefficients, d_query, d_source) -> None:
        if isinstance(tile.source, OwnColumns):
            tile = _upcast(tile, problem)
            return run(self._own.gradient_steps(problem, tile, None, coefficients, d_query, d_source))
        if self.objective.by_distance:
            return self._accumulate_over_distances(problem, tile, coefficients, d_query)
        sums, pieces = (d_query, d_source), [tile]
        if is_fused(problem.rows, tile.query.shape[1], tile.query.dtype, self.objective, problem.is_batch):
            if self._accumulate_fused(problem, tile, coefficients, *sums):
                return
            pieces = pieces_of(tile)
        product = self.mm_ if self.overwrites else self.addmm_
        for piece in pieces:
            w = self._weights_of(problem, piece, *statistics_of(piece, *coefficients), coefficients)
            run(piece.source.output_products(piece, w, product, *sums))

    def _accumulate_fused(self, problem: Problem, tile: Tile, coefficients, d_query, d_source) -> bool:
        """Products with W that stays in registers, formed for either gradient; False if no kernel can form this W."""
        inputs = self._inputs(problem, tile, *coefficients_of(tile, *coefficients))
        query, key, ring = tile.query, tile.source.block(tile), self._ring("gradient", tile)
        if isinstance(tile.source, BatchColumns):
            d_source = d_query if tile.mirrored else None
        launch = partial(accumulate_gradient, self._epilogue, inputs=inputs)
        if ring:
            diagonal = diagonal_of(tile, inputs)
            if diagonal is None:
                return False
            reference = self._shared_reference(problem, *coefficients)
            launch = partial(
                launch_gradient, inputs=inputs._replace(reference=reference), ranges=self._ranges_of(problem, tile),
                shares=self._shares_of(problem, tile, coefficients, reference), uniform=self._uniform,
                diagonal=diagonal, ring=ring,
            )  # fmt: skip
        for own, other, sums, rows, transposed in (
            (query, key, d_query, tile.rows, False), (key, query, d_source, tile.columns, True)
        ):  # fmt: skip
            if sums is not None:
                count_product(query, 2 * len(key))
                launch(own, other, gradient=sums[rows], transposed=transposed)
        return True

    def _ring(self, kernel: str, tile: Tile) -> Ring | None:
        return ring_of(kernel, self._epilogue.name, tile.query.dtype, tile.query.shape[1])

    def _accumulate_over_distances(self, problem: Problem, tile: Tile, coefficients, d_query: Tensor) -> None:
        """``d_query[i] += sum_j w_ij (x_j - x_i)``, by the sums of the w that the products took, as they were rounded.

        So the rounding of w to half precision leaves an error of the order of w (x_j - x_i) only. A near pair goes
        through the products too: its gradient has an error of some eps |x| / D of itself, with fp32's eps (or, where
        the user allowed it, TF32's), and the |x| of centred points where they are in fp32.
        """
        for tables in self._parts(*statistics_of(tile, *coefficients)):
            self._accumulate_weights(problem, tile, self._weights_of(problem, tile, *tables), d_query)

    def _accumulate_weights(self, problem: Problem, tile: Tile, w: Tensor, d_query: Tensor) -> None:
        run(tile.source.output_products(tile, w, self.addmm_, d_query, None))
        of_columns = w.sum(0, dtype=d_query.dtype) if tile.mirrored else None
        none = torch.empty(0, dtype=torch.int64, device=w.device)
        sums = TileSums(w.sum(1, dtype=d_query.dtype), of_columns, none, none, none)
        finish_tile_(problem.given_rows, problem.query, tile, sums, d_query)

    def _inputs(self, problem: Problem, tile: Tile, row_table: Tensor | None, column_table: Tensor | None):
        numbered = self.objective.uses_target and problem.given_target is None and tile.source.has_positives
        pairs = problem.pairs(tile, self.objective.uses_target and not numbered)
        own = tile.rows.start - tile.columns.start if numbered else None
        if isinstance(tile.source, BatchColumns) and is_by_sums(self.objective, tile.query.dtype):
            numbers = problem.group_numbers  # of 32 bits, of the own rows
            pairs = pairs._replace(row_group=numbers[tile.rows], column_group=numbers[tile.columns])
        given = None
        if self._epilogue.takes_given:
            given = pairs.row_values, pairs.column_values, *self._guides(problem, tile)
        return TileInputs.of(
            tile.shape, *pairs.of_any_loss, row_table, column_table, self._roles, own=own, given=given
        )

    def _guides(self, problem: Problem, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        """The guide's features of the tile, whose rows vector loads can read: a copy where they could not."""
        if problem.row_guide is None:
            return None, None
        if self._aligned is None or self._aligned[0] is not problem:
            rows = aligned(problem.row_guide)
            columns = rows if problem.column_guide is problem.row_guide else aligned(problem.column_guide)
            self._aligned = problem, rows, columns
        _, rows, columns = self._aligned
        return rows[tile.rows], columns[tile.columns]

    def _points(self, problem: Problem, tile: Tile) -> tuple[Points | None, bool]:
        """The points of a loss over distances, and whether over their squares."""
        if not self.objective.by_distance:
            return None, False
        rows, columns = (problem.given_rows[part] for part in (tile.rows, tile.columns))
        squares = problem.squares[tile.rows], problem.squares[tile.columns]
        return Points.of(rows, columns, *squares), self.objective.by_distance == "square"

    addmm_ = staticmethod(products.addmm_)
    mm_ = staticmethod(products.mm_)

    def can_overwrite(self, problem: Problem, shape: TileShape) -> bool:
        source, *others = problem.sources
        if others or isinstance(source, OwnColumns) or self.objective.by_distance:
            return False
        if is_fused(problem.rows, problem.query.shape[1], problem.query.dtype, self.objective, problem.is_batch):
            return False
        return 0 < problem.rows <= shape.rows and 0 < source.width <= shape.columns

    def finish(self, problem, gradients, factors, needs_grad, needs_scale, weight_sum=None, dtype=None):
        if problem.query.shape[1] > _WIDEST_OUTPUT:
            return super().finish(problem, gradients, factors, needs_grad, needs_scale, weight_sum, dtype)
        assert not (needs_scale and self.objective.unit_features), "every side's features would tell of the scale"

        def new_scalar(needed: bool, given) -> Tensor | None:
            """For a gradient of the dtype of what is given, but fp64 for one to be scaled further."""
            of_given = given.dtype if isinstance(given, Tensor) and dtype is not None else torch.float64
            return problem.query.new_empty((), dtype=of_given) if needed else None

        of_scale = new_scalar(needs_scale, problem.scale)
        of_bias = new_scalar(weight_sum is not None, problem.bias)
        results, sides = [], []
        compared = (problem, *(() if problem.is_batch else problem.sources))
        for sums, rows, needs in zip((gradients.query, *gradients.sources), compared, needs_grad):
            result = None
            if sums is not None and needs:
                result = sums if dtype in (None, sums.dtype) else sums.new_empty(sums.shape, dtype=dtype)
            results.append(result)
            reads = needs_scale and sums is not None and (gradients.query is None or rows is problem)
            if result is not None or reads:
                sides.append(_side_of(sums, result, rows, reads))
        halves = 2 if problem.is_batch else 1
        finish_gradients(sides, problem.scale, factors, of_scale, weight_sum, of_bias, halves, self._counter)
        return results, of_scale, of_bias

    def workspace(self) -> tuple[Tensor, ...]:
        weights = () if self._weights is None else (self._weights,)
        return (*weights, *self._partials, *self._own.workspace())

    def _weights_buffer(self, tile: Tile) -> Tensor:
        """``[R, C]``, the same memory for all tiles."""
        rows, columns = tile.shape
        stride = -(-columns // _WEIGHTS_ALIGNMENT) * _WEIGHTS_ALIGNMENT
        if self._weights is None or self._weights.numel() < rows * stride:
            self._weights = tile.query.new_empty(rows * stride)
        return self._weights[: rows * stride].view(rows, stride)[:, :columns]


def _side_of(sums: Tensor, result: Tensor | None, rows: Problem | Source, reads: bool) -> Side:
    """``rows``: of which the sums are; ``reads``: the scale's gradient is read off them."""
    features = rows.query if isinstance(rows, Problem) else rows.features
    given = features if reads or rows.inverse_norms is not None else None
    if sums.dim() == 3:  # a row's own columns are rows, too
        sums, result, given = (None if t is None else t.flatten(0, 1) for t in (sums, result, given))
    if given is not None and given.stride(1) != 1:
        given = given.contiguous()
    return Side.of(sums, result, given, rows.inverse_norms)


def _upcast(tile: Tile, problem: Problem) -> Tile:
    """The plain passes over a row's own columns, which share no product, form their similarities in fp32."""
    return tile._replace(query=tile.query.to(problem.statistics_dtype))
