"""The two sweeps over tiles, and the gradients they accumulate. Nothing here knows a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from .backends.base import Backend, KeptTiles
from .columns import Step, Tile, blocks, run
from .counters import count_workspace
from .plan import Plan, TileShape
from .problem import Problem, is_whole

# Some 5 KB each. Where a block of features is converted for its products, one at a time: all would be a copy of them.
_PREPARED_TILES = 64

Tables = tuple[Tensor, Tensor | None]


def sweep_statistics(problem: Problem, plan: Plan, backend: Backend, kept: KeptTiles) -> Tables:
    """Sweep 1: the statistics of rows (and columns) from every tile, keeping the tiles that fit."""
    statistics = backend.new_statistics(problem)
    fold_statistics(problem, plan, backend, kept, statistics)
    return statistics


def fold_statistics(problem: Problem, plan: Plan, backend: Backend, kept: KeptTiles, statistics: Tables) -> None:
    """Sweep 1 into tables that may hold other columns' statistics already."""

    def steps_of(tile: Tile) -> Iterable[Step]:
        return backend.statistics_steps(problem, tile, kept.place(tile), statistics)

    _walk(problem, plan.statistics_tile, backend, steps_of)
    count_workspace(kept.buffer, *backend.workspace(), *statistics)


@dataclass
class Gradients:
    """Sums ``W Y`` and ``W.T X`` of ``W = dL/dl``: the gradients before the factor ``logit_scale``.

    Where the rows are compared with each other there is one accumulator: the queries'.
    """

    query: Tensor | None
    sources: list[Tensor | None]

    @classmethod
    def zeros(cls, problem: Problem, with_query: bool, new=torch.zeros) -> Gradients:
        """Accumulators for the queries, if asked, and the sources that need a gradient."""

        def accumulator(features: Tensor) -> Tensor:
            return new(features.shape, dtype=problem.statistics_dtype, device=features.device)

        return cls(
            accumulator(problem.query) if with_query else None,
            [accumulator(source.features) if source.needs_grad else None for source in problem.sources],
        )

    def of_rows(self, problem: Problem, rows: slice) -> Gradients:
        """Views of the accumulators that a chunk of rows adds to."""
        sources = [
            gradient if gradient is None or source.of_rows(rows) is source else gradient[rows]
            for source, gradient in zip(problem.sources, self.sources)
        ]
        return Gradients(None if self.query is None else self.query[rows], sources)

    def scale_gradient(self, problem: Problem) -> Tensor:
        """``sum_ij W_ij S_ij = sum_i <x_i, (W Y)_i> = sum_j <y_j, (W.T X)_j>``: no further work on tiles.

        Where the rows are compared with each other, ``(W + W.T) X`` counts every pair twice.
        """
        pairs = [(problem.query, self.query)]
        if self.query is None:
            pairs = [(source.features, gradient) for source, gradient in zip(problem.sources, self.sources)]
        total = _total(_inner_product(features, gradient) for features, gradient in pairs)
        if not isinstance(total, Tensor):  # no rows
            return problem.query.new_zeros((), dtype=torch.float64)
        return total / 2 if problem.is_batch else total

    def finish(
        self, problem: Problem, factor: float | Tensor, needs_grad: list[bool], dtype: torch.dtype | None = None
    ) -> list[Tensor | None]:
        """Gradients for queries and sources: the sums, in place, times ``factor`` and the scale. None: not needed.

        ``dtype``: round them to it, in the same pass.
        """
        by_scale = factor * problem.scale
        if self.query is not None and problem.inverse_norms is not None:
            _project_(self.query, problem.query, problem.inverse_norms)
        for source, gradient in zip(problem.sources, self.sources):
            if gradient is not None and source.inverse_norms is not None:
                _project_(gradient, source.features, source.inverse_norms)
        sums = [self.query] if problem.is_batch else [self.query, *self.sources]
        return [_scaled(gradient, by_scale, dtype) if needs else None for gradient, needs in zip(sums, needs_grad)]


def sums_over_columns(needs_query: bool, needs_sources: Iterable[bool], needs_scale: bool) -> bool:
    """Whether ``W Y`` is needed: for the queries, or for the scale, whose gradient is read off one side."""
    return needs_query or (needs_scale and not all(needs_sources))


def sweep_gradients(
    problem: Problem,
    plan: Plan,
    backend: Backend,
    kept: KeptTiles,
    coefficients: Tables,
    into: Gradients,
    every_tile: bool = False,
) -> None:
    """Sweep 2: W of every tile, from kept similarities or new ones, and its products with keys and queries.

    ``every_tile``: what the passes fold into ``coefficients``, losses or sums of W, is needed: no tile is left out.
    """

    def steps_of(tile: Tile) -> Iterable[Step]:
        place, d_source = kept.place(tile), into.sources[tile.position]
        if every_tile or into.query is not None or d_source is not None:
            return backend.gradient_steps(problem, tile, place, coefficients, into.query, d_source)
        return ()

    _walk(problem, plan.gradient_tile, backend, steps_of)
    backend.objective.add_target_gradients(problem, coefficients[0], into.query, into.sources[0])
    count_workspace(kept.buffer, *backend.workspace(), *coefficients)


def _walk(problem: Problem, shape: TileShape, backend: Backend, steps_of: Callable[[Tile], Iterable[Step]]) -> None:
    """Takes the steps of every tile, those of many tiles prepared before the first is taken.

    A tile's products leave nothing of the interpreter in a CPU's caches, and every line of Python between them takes
    several times as long: together 0.2 to 0.35 ms a tile, where its products at d = 128 take 1.5 to 3 ms.
    """
    dtype = backend.compute_dtype(problem.query.dtype)
    converts = dtype != problem.query.dtype or any(source.inverse_norms is not None for source in problem.sources)
    at_once = 1 if converts else _PREPARED_TILES
    for _, stripe in groupby(problem.tiles(shape, dtype), key=lambda tile: (tile.position, tile.rows.start)):
        while tiles := list(islice(stripe, at_once)):
            run([step for tile in tiles for step in steps_of(tile)])


def _project_(gradient: Tensor, features: Tensor, inverse_norms: Tensor) -> None:
    """From the gradient of ``y / |y|`` to that of ``y``, in place: ``(g - y <y, g> / |y|^2) / |y|``.

    Without the second term where |y| was raised to what can be squared.
    """
    for rows in blocks(gradient.shape[0], 4096):
        g, inverse = gradient[rows], inverse_norms[rows].unsqueeze(1)
        unit = features[rows].to(g.dtype) * inverse
        along = (unit * g).sum(1, keepdim=True).masked_fill_(~is_whole(inverse), 0)
        g.sub_(unit * along).mul_(inverse)


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>``: products in ``b``'s dtype, summed in fp64, some rows at a time.

    On a CPU that sum first makes a copy in fp64, so blocks are small: 2^17 elements are 0.5 MiB, and 1 MiB of copy.
    On a GPU a block takes four launches, and 64 MiB: 2^23 elements, a copy in ``b``'s dtype and the products.
    """
    size = max((2**17 if a.device.type == "cpu" else 2**23) // max(a.shape[1], 1), 1)
    return _total((a[rows].to(b.dtype) * b[rows]).sum(dtype=torch.float64) for rows in blocks(a.shape[0], size))


def _total(terms: Iterable[Tensor]) -> Tensor | int:
    """Their sum, without the launch that adds the first to 0."""
    terms = iter(terms)
    return sum(terms, start=next(terms, 0))


def _scaled(gradient: Tensor, factor: float | Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype in (None, gradient.dtype):
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))
