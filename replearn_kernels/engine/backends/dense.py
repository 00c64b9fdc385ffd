"""Backends that write a tile's products to a cache-resident buffer and pass over it: ``torch`` and ``cpp``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import distances, workspace
from ..columns import Step, Tile, mirror_, part
from ..counters import count_product
from ..problem import Pairs, Problem, statistics_dtype
from .base import Backend, coefficients_of, statistics_of

# Rows a power of two apart fall into the same few cache sets, and W.T @ X reads W down its columns: at 1024 x 1024 and
# d = 128 that product runs at 50 GFLOP/s a core without padding, and at 69 with it; at 1024 x 512 at 87.
_ROW_PADDING = 16


class TorchBackend(Backend):
    """The objective's own passes, in plain PyTorch: any device, no compiler. The oracle of the others."""

    name = "torch"
    keeps_tiles = True

    def __init__(self, objective):
        super().__init__(objective)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple, Tensor] = {}

    @staticmethod
    def tile_shape(sweep, rows, d, dtype, device, objective, is_batch, memory_budget) -> tuple[int, int]:
        # On a GPU a tile has to fill the machine; on a CPU it has to stay in the caches.
        if device != "cpu":
            return (1024, 4096) if is_batch else (4096, 4096)
        return (512, 512) if is_batch else (1024, 512)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return statistics_dtype(dtype)

    def statistics_steps(self, problem: Problem, tile: Tile, kept: Tensor | None, statistics) -> Iterator[Step]:
        s = self._tile_buffer(tile) if kept is None else kept
        yield from tile.source.products(tile, s)
        yield from self._guide_steps(problem, tile)
        yield self._statistics_pass(problem, tile, s, *statistics_of(tile, *statistics))

    def gradient_steps(
        self, problem: Problem, tile: Tile, kept: Tensor | None, coefficients, d_query, d_source
    ) -> Iterator[Step]:
        w, s = self._tile_buffer(tile), kept
        if kept is None:
            # Distances are needed beside the weights.
            s = self._tile_buffer(tile, "distances") if self.objective.by_distance else w
            yield from tile.source.products(tile, s)
        yield from self._guide_steps(problem, tile)
        tables = coefficients_of(tile, *coefficients)
        if self.objective.by_distance:
            yield self._distance_weights_pass(problem, tile, s, kept is not None, w, d_query, *tables)
        else:
            yield self._weights_pass(problem, tile, s, w, *tables)
        yield from tile.source.output_products(tile, w, self.addmm_, d_query, d_source)

    def workspace(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())

    def _statistics_pass(self, problem: Problem, tile: Tile, s: Tensor, row_table, column_table) -> Step:
        """Folds products ``s`` into the tables; where similarities are distances, leaves those in ``s``."""
        if self.objective.by_distance:
            return partial(self._fold_distances, problem, tile, s, row_table, column_table)
        return partial(self.objective.update_statistics, s, self._pairs(problem, tile), row_table, column_table)

    def _fold_distances(self, problem: Problem, tile: Tile, s: Tensor, row_table, column_table) -> None:
        distances.negative_distances_(s, self._points(problem, tile))
        self.objective.update_statistics(s, self._pairs(problem, tile), row_table, column_table)

    def _weights_pass(self, problem: Problem, tile: Tile, s: Tensor, out: Tensor, row_table, column_table) -> Step:
        """``out`` = W of products ``s``."""
        return partial(self.objective.weights, s, out, self._pairs(problem, tile), row_table, column_table)

    def _distance_weights_pass(
        self, problem: Problem, tile: Tile, v: Tensor, formed: bool, out: Tensor, d_query, row_table, column_table
    ) -> Step:
        """``out`` = dL/d products, of distances ``v`` or of products; the rest of the gradient goes to d_query."""
        return partial(self._weigh_distances, problem, tile, v, formed, out, d_query, row_table, column_table)

    def _weigh_distances(
        self, problem: Problem, tile: Tile, v: Tensor, formed: bool, out: Tensor, d_query, row_table, column_table
    ) -> None:
        points = self._points(problem, tile)
        if not formed:
            distances.negative_distances_(v, points)
        self.objective.weights(v, out, self._pairs(problem, tile), row_table, column_table)
        sums = distances.chain_(out, v, points)
        distances.finish_tile_(problem.given_rows, problem.query, tile, sums, d_query)

    def _points(self, problem: Problem, tile: Tile) -> distances.Points:
        return problem.points(tile, self.objective.by_distance == "square")

    def _pairs(self, problem: Problem, tile: Tile) -> Pairs:
        pairs = problem.pairs(tile, self.objective.uses_target)
        return pairs if problem.row_guide is None else pairs._replace(guide=self._tile_buffer(tile, "guide"))

    def _guide_steps(self, problem: Problem, tile: Tile) -> Iterator[Step]:
        """The guide's products, to where :meth:`_pairs` says that they are."""
        if problem.row_guide is not None:
            rows, columns = part(problem.row_guide, tile.rows), part(problem.column_guide, tile.columns)
            yield partial(self._form_guide, rows, columns, tile.diagonal, self._tile_buffer(tile, "guide"))

    @staticmethod
    def _form_guide(rows: Tensor, columns: Tensor, diagonal: bool, out: Tensor) -> None:
        count_product(rows, len(columns))
        torch.mm(rows.to(out.dtype), columns.to(out.dtype).t(), out=out)
        if diagonal:  # what the sweeps ask of a pair they ask it from either end
            mirror_(out)

    def _tile_buffer(self, tile: Tile, purpose: str = "tile") -> Tensor:
        """Room for the tile, the same memory for all: a fresh buffer per tile would leave the caches."""
        rows, columns = tile.shape
        stride = columns + _ROW_PADDING
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < rows * stride:
            buffer = self._buffers[purpose] = self._new_buffer(tile.query, rows * stride, purpose)
            self._views.clear()
        view = self._views.get((purpose, rows, columns))
        if view is None:
            view = self._views[purpose, rows, columns] = buffer[: rows * stride].view(rows, stride)[:, :columns]
        return view

    def _new_buffer(self, like: Tensor, elements: int, purpose: str) -> Tensor:
        return like.new_empty(elements)


class CppBackend(TorchBackend):
    """The same passes as one vectorised, multi-threaded C++ loop each (``csrc/cpu``)."""

    name = "cpp"

    def __init__(self, objective):
        super().__init__(objective)
        self._groups: tuple[Problem, Tensor, Tensor] | None = None

    @staticmethod
    def tile_shape(sweep, rows, d, dtype, device, objective, is_batch, memory_budget) -> tuple[int, int]:
        # The three products of N = 8,192 on two cores: d = 128: 0.30 s at 2048 x 512, 0.33 s at 2048 x 1024;
        # d = 512: 1.20 s and 1.13 s, where one tile of 8 MB is still small beside the gradients.
        # Half of a symmetric matrix, N = 8,192, without keeping: d = 128: 0.28 s at 1024 x 1024, 0.31 s at 512 x 512;
        # d = 512: 0.86 s and 0.90 s. 2048 x 2048 is no better.
        if is_batch:
            return 1024, 1024
        return 2048, 512 if d < 256 else 1024

    def _statistics_pass(self, problem: Problem, tile: Tile, s: Tensor, row_table, column_table) -> Step:
        points = self._points(problem, tile)[:5] if self.objective.by_distance else ()
        return self._native("statistics", (s,), problem, tile, row_table, column_table, *points)

    def _weights_pass(self, problem: Problem, tile: Tile, s: Tensor, out: Tensor, row_table, column_table) -> Step:
        return self._native("weights", (s, out), problem, tile, row_table, column_table)

    def _distance_weights_pass(
        self, problem: Problem, tile: Tile, v: Tensor, formed: bool, out: Tensor, d_query, row_table, column_table
    ) -> Step:
        of_columns = (None, None) if tile.diagonal else (tile.source.block(tile), d_query[tile.columns])
        points = self._points(problem, tile)[:5]
        return self._native(
            "weights", (v, out), problem, tile, row_table, column_table,
            *points, formed, tile.query, d_query[tile.rows], *of_columns,
        )  # fmt: skip

    def _native(self, sweep: str, matrices: tuple[Tensor, ...], problem: Problem, tile: Tile, *rest) -> Step:
        operator = getattr(torch.ops.replearn_kernels, f"{self.objective.family}_{sweep}_").default
        pairs = self._pairs(problem, tile)
        roles = self.objective.native_roles(matrices[0].dtype, pairs)
        return partial(operator, *matrices, *pairs.of_any_loss, *roles, *rest)

    def _pairs(self, problem: Problem, tile: Tile) -> Pairs:
        pairs = super()._pairs(problem, tile)
        if pairs.row_group is None:
            return pairs
        if self._groups is None or self._groups[0] is not problem:  # a chunk of rows is a problem of its own
            self._groups = problem, *_narrow_groups(problem)
        _, rows, columns = self._groups
        return pairs._replace(row_group=rows[tile.rows], column_group=columns[tile.columns])

    def new_kept(self, problem: Problem, elements: int) -> Tensor:
        return workspace.kept.take(elements, problem.statistics_dtype)

    def _new_buffer(self, like: Tensor, elements: int, purpose: str) -> Tensor:
        return getattr(workspace, purpose).take(elements, like.dtype)

    def one_tile(self, problem: Problem, share: float, needs_query: bool) -> tuple[Tensor, list[Tensor]] | None:
        source, *others = problem.sources
        parameters = self.objective.one_tile_parameters
        if others or parameters is None or problem.query.dtype != problem.statistics_dtype:
            return None
        if not (needs_query or source.needs_grad):
            return None
        count_product(problem.query, source.width * (1 + needs_query + source.needs_grad))
        loss, *gradients = self._one_tile_pass(
            problem.query, source.features, problem.given_target, problem.scale, share,
            *parameters, needs_query, source.needs_grad,
        )  # fmt: skip
        return loss, gradients

    @property
    def _one_tile_pass(self):
        return getattr(torch.ops.replearn_kernels, f"{self.objective.family}_one_tile").default


def _narrow_groups(problem: Problem) -> tuple[Tensor, Tensor]:
    """Group ids as wide as the tile's entries, as the passes compare vectors of both."""
    rows, columns = problem.row_group, problem.column_group
    if problem.statistics_dtype == torch.float64:
        return rows, columns
    both = rows if columns is rows else torch.cat([rows, columns])
    narrow = torch.iinfo(torch.int32)
    if both.numel() and (both.min() < narrow.min or both.max() > narrow.max):
        both = both.unique(return_inverse=True)[1]
    both = both.to(torch.int32)
    return (both, both) if columns is rows else (both[: len(rows)], both[len(rows) :])
