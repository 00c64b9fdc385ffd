"""What a backend provides: the steps that a tile takes in either sweep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ..columns import Step, Tile, part
from ..plan import TileShape
from ..problem import Inputs, Problem


class KeptTiles:
    """A flat buffer that holds the similarities of as many tiles as fit, in the order of the walk.

    Both sweeps walk the same tiles, so asking in order gives each tile its own place in both.
    """

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.used = 0

    def place(self, tile: Tile) -> Tensor | None:
        """The tile's place in the buffer, or None if there is no room for it."""
        rows, columns = tile.shape
        if self.used + rows * columns > self.buffer.numel():
            return None
        place = self.buffer[self.used : self.used + rows * columns].view(rows, columns)
        self.used += rows * columns
        return place

    def rewind(self) -> None:
        self.used = 0


class Backend(ABC):
    """Runs an objective's passes over tiles. Stateless but for its tile buffer: made anew for each run."""

    name: str
    keeps_tiles: bool  # whether similarities can be kept between the sweeps
    overwrites = False  # the products of the sweep at hand do not add to the accumulators

    def __init__(self, objective):
        self.objective = objective

    @staticmethod
    def repeats(query: Tensor) -> bool:
        """Whether :meth:`repeat` can do something for a call with these rows."""
        return False

    @staticmethod
    def repeat(key: Hashable, tensors: Sequence[Tensor | None], call: Callable[[], object]) -> object:
        """``call()``, of forward or backward, or the same steps as those of an earlier call with an equal key."""
        return call()

    @staticmethod
    @abstractmethod
    def tile_shape(
        sweep: str, rows: int | None, d: int, dtype: torch.dtype, device: str, objective, is_batch: bool,
        memory_budget: int,
    ) -> tuple[int, int]:  # fmt: skip
        """Most rows and columns of a tile in the sweep "statistics" or "gradients".

        The same for both where tiles are kept. ``rows``: of the problem, None where they are not known. ``d``,
        ``dtype`` and ``device``: of the features. ``is_batch``: rows are compared with each other, and tiles on the
        diagonal, as wide as high, do half of their work twice.
        """

    @abstractmethod
    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which features enter the products."""

    @abstractmethod
    def statistics_steps(self, problem: Problem, tile: Tile, kept: Tensor | None, statistics) -> Iterable[Step]:
        """Sweep 1 on one tile: fold it into the statistics, and leave its similarities in ``kept``."""

    @abstractmethod
    def gradient_steps(
        self, problem: Problem, tile: Tile, kept: Tensor | None, coefficients, d_query, d_source
    ) -> Iterable[Step]:
        """Sweep 2 on one tile: ``W = dL/dl`` from ``kept`` similarities or new ones, and its products
        ``d_query[rows] += W Y``, ``d_source[columns] += W.T X``, each unless it is None."""

    addmm_ = staticmethod(Tensor.addmm_)
    """``addmm_(accumulator, a, b)``: ``accumulator += a @ b``, accumulated in the accumulator's dtype."""

    def new_statistics(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Tables of empty sets, for sweep 1."""
        like = problem.query.new_empty((), dtype=problem.statistics_dtype)
        tables = self.objective.new_statistics(problem.rows, problem.sources[0].width, like)
        return self.objective.prepared(problem, *tables)

    @staticmethod
    def combines(objective, dtype: torch.dtype, has_target: bool) -> bool:
        """Whether, under one upstream gradient, :meth:`combine` takes the place of the objective's formulas between
        two sweeps, or after the only one."""
        return False

    @staticmethod
    def new_combined(inputs: Inputs, objective) -> list[Tensor]:
        """What :meth:`combine` saves, uninitialised."""
        raise NotImplementedError

    def combine(self, problem: Problem, row_table, column_table, mean: bool) -> tuple[Tensor, list[Tensor]]:
        """The loss, a mean over the rows that count or their sum, and what the backward call needs: for
        :meth:`combined`, or after the only sweep what :meth:`share_of` needs, and the sum of W."""
        raise NotImplementedError

    def combined(self, problem: Problem, saved: list[Tensor]) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """The coefficients of rows and columns, and a row's share in the loss."""
        raise NotImplementedError

    def share_of(self, state: Tensor) -> Tensor:
        """The weight of a row's loss in the loss."""
        raise NotImplementedError

    def can_overwrite(self, problem: Problem, shape: TileShape) -> bool:
        """Whether a sweep over tiles of this shape gives every accumulator one product, which need not be added."""
        return False

    def finish(
        self, problem: Problem, gradients, factors: Sequence[float | Tensor], needs_grad: list[bool],
        needs_scale: bool, weight_sum: Tensor | None = None, dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of queries and sources, in ``dtype`` if given, of the scale, and of the bias: None where none
        is due. All are what the sweeps added up, times ``factors``: in place where the dtype stays.

        ``weight_sum``: ``sum_ij W_ij``, fp64, if the bias gets a gradient.
        """
        factor = math.prod(factors)
        scale = gradients.scale_gradient(problem) * factor if needs_scale else None
        bias = None if weight_sum is None else weight_sum * factor
        return gradients.finish(problem, factor, needs_grad, dtype), scale, bias

    def new_kept(self, problem: Problem, elements: int) -> Tensor:
        """An uninitialised buffer for kept similarities."""
        return problem.query.new_empty(elements, dtype=problem.statistics_dtype)

    def one_tile(self, problem: Problem, share: float, needs_query: bool) -> tuple[Tensor, list[Tensor]] | None:
        """A small problem at once, if the backend has a single call for it.

        ``share`` times the sum of the losses, and its gradients for query, sources and scale: empty tensors where
        none is needed.
        """
        return None

    def workspace(self) -> tuple[Tensor, ...]:
        """The buffers that the backend holds, for the count of work."""
        return ()


def statistics_of(tile: Tile, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tile's part of the statistics: of its rows and, where it tells of whole columns, of its columns."""
    of_rows = part(row_table, tile.rows, 1)
    if tile.mirrored:
        return of_rows, part(row_table, tile.columns, 1)
    has_columns = column_table is not None and tile.source.has_positives
    return of_rows, part(column_table, tile.columns, 1) if has_columns else None


def coefficients_of(tile: Tile, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tile's part of the coefficients; a tile on the diagonal is its own mirror image."""
    if tile.diagonal:
        return part(row_table, tile.rows, 1), part(row_table, tile.columns, 1)
    return statistics_of(tile, row_table, column_table)
