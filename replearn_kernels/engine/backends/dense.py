"""Backends that write a tile's products to a cache-resident buffer and pass over it: ``torch`` and ``cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distances
from ..columns import Tile
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
    def tile_shape(sweep: str, d: int, dtype: torch.dtype, device: str, objective, is_batch: bool) -> tuple[int, int]:
        # On a GPU a tile has to fill the machine; on a CPU it has to stay in the caches.
        if device != "cpu":
            return (1024, 4096) if is_batch else (4096, 4096)
        return (512, 512) if is_batch else (1024, 512)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return statistics_dtype(dtype)

    def update_statistics(self, problem: Problem, tile: Tile, kept: Tensor | None, statistics) -> None:
        s = self._similarities(problem, tile, self._tile_buffer(tile) if kept is None else kept)
        self._statistics_pass(s, self._pairs(problem, tile), *statistics_of(tile, *statistics))

    def weights(self, problem: Problem, tile: Tile, kept: Tensor | None, coefficients) -> Tensor:
        out = self._tile_buffer(tile)
        s = self._similarities(problem, tile, out) if kept is None else kept
        self._weights_pass(s, out, self._pairs(problem, tile), *coefficients_of(tile, *coefficients))
        return out

    def accumulate_gradients(
        self, problem: Problem, tile: Tile, kept: Tensor | None, coefficients, d_query, d_source
    ) -> None:
        if not self.objective.by_distance:
            return super().accumulate_gradients(problem, tile, kept, coefficients, d_query, d_source)
        points = problem.points(tile, self.objective.by_distance == "square")
        if kept is None:  # the distances are needed beside the weights
            kept = tile.source.product(tile, self._tile_buffer(tile, "distances"))
            self._distances_pass(kept, points)
        w = self.weights(problem, tile, kept, coefficients)
        sums = self._chain_pass(w, kept, points)
        tile.source.accumulate(tile, w, self.addmm_, d_query, d_source)
        distances.finish_tile_(problem.given_rows, problem.query, tile, sums, d_query)

    def workspace(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())

    def _similarities(self, problem: Problem, tile: Tile, out: Tensor) -> Tensor:
        """The tile's products, or distances, in ``out``."""
        s = tile.source.product(tile, out)
        if self.objective.by_distance:
            self._distances_pass(s, problem.points(tile, self.objective.by_distance == "square"))
        return s

    def _statistics_pass(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        self.objective.update_statistics(s, pairs, row_table, column_table)

    def _weights_pass(
        self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None
    ) -> None:
        self.objective.weights(s, out, pairs, row_table, column_table)

    def _distances_pass(self, s: Tensor, points: distances.Points) -> None:
        distances.negative_distances_(s, points)

    def _chain_pass(self, w: Tensor, v: Tensor, points: distances.Points) -> distances.TileSums:
        return distances.chain_(w, v, points)

    def _pairs(self, problem: Problem, tile: Tile) -> Pairs:
        return problem.pairs(tile, self.objective.uses_target)

    def _tile_buffer(self, tile: Tile, purpose: str = "weights") -> Tensor:
        """Room for the tile, the same memory for all: a fresh buffer per tile would leave the caches."""
        rows, columns = tile.shape
        stride = columns + _ROW_PADDING
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < rows * stride:
            buffer = self._buffers[purpose] = tile.query.new_empty(rows * stride)
            self._views.clear()
        view = self._views.get((purpose, rows, columns))
        if view is None:
            view = self._views[purpose, rows, columns] = buffer[: rows * stride].view(rows, stride)[:, :columns]
        return view


class CppBackend(TorchBackend):
    """The same passes as one vectorised, multi-threaded C++ loop each (``csrc/cpu``)."""

    name = "cpp"

    def __init__(self, objective):
        super().__init__(objective)
        self._groups: tuple[Problem, Tensor, Tensor] | None = None

    @staticmethod
    def tile_shape(sweep: str, d: int, dtype: torch.dtype, device: str, objective, is_batch: bool) -> tuple[int, int]:
        # The three products of N = 8,192 on two cores: d = 128: 0.30 s at 2048 x 512, 0.33 s at 2048 x 1024;
        # d = 512: 1.20 s and 1.13 s, where one tile of 8 MB is still small beside the gradients.
        # Half of a symmetric matrix, N = 8,192, without keeping: d = 128: 0.28 s at 1024 x 1024, 0.31 s at 512 x 512;
        # d = 512: 0.86 s and 0.90 s, although the tiles on the diagonal, which are formed whole, are larger.
        if is_batch:
            return 1024, 1024
        return 2048, 512 if d < 256 else 1024

    def _statistics_pass(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        native = getattr(torch.ops.replearn_kernels, f"{self.objective.family}_statistics_").default
        native(s, *pairs, *self.objective.roles, row_table, column_table)

    def _weights_pass(
        self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None
    ) -> None:
        native = getattr(torch.ops.replearn_kernels, f"{self.objective.family}_weights_").default
        native(s, out, *pairs, *self.objective.roles, row_table, column_table)

    def _distances_pass(self, s: Tensor, points: distances.Points) -> None:
        torch.ops.replearn_kernels.negative_distances_.default(s, *points)

    def _chain_pass(self, w: Tensor, v: Tensor, points: distances.Points) -> distances.TileSums:
        return distances.TileSums(*torch.ops.replearn_kernels.distance_chain_.default(w, v, *points))

    def _pairs(self, problem: Problem, tile: Tile) -> Pairs:
        pairs = super()._pairs(problem, tile)
        if pairs.row_group is None:
            return pairs
        if self._groups is None or self._groups[0] is not problem:  # a chunk of rows is a problem of its own
            self._groups = problem, *_narrow_groups(problem)
        _, rows, columns = self._groups
        return pairs._replace(row_group=rows[tile.rows], column_group=columns[tile.columns])

    def new_kept(self, problem: Problem, elements: int) -> Tensor:
        buffer = super().new_kept(problem, elements)
        torch.ops.replearn_kernels.advise_huge_pages_.default(buffer)
        return buffer

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
