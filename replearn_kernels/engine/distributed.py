"""The schedules of a batch that is spread over the ranks of a process group.

    two sweeps    statistics in the forward call: blocks of keys travel, and carry their columns' statistics home.
                  Gradients in the backward call: blocks travel with their columns' coefficients, and carry gradients.
    one sweep     where W needs no statistics: the second tour, in the forward call.

Rank r returns the mean over its own rows, weighted so that the plain mean over the R ranks is the mean L of the global
batch, and gets the gradients of the sum of what all ranks return, each times its upstream gradient: R dL/dx for its
features, which DistributedDataParallel averages to that of L. Scale and bias, which all ranks share, get the mean over
the ranks, dL/ds, on every rank: as right with DistributedDataParallel as without.

All ranks must call forward and backward, and several losses in the same order. The order of every sum is fixed by the
ranks (:mod:`.ring`): the same call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import make_backend
from .backends.base import Backend, KeptTiles
from .counters import count_workspace
from .plan import Plan, TileShape, balanced_block, visited_pairs
from .problem import Inputs, Problem
from .ring import Tour, travel
from .schedules import Config, gradients_of_scalars, needs_query_sums, on_device_of, sweeps_for_scalars
from .shards import Layout, Shard
from .sweeps import Gradients, Tables, fold_statistics, sweep_gradients
from .world import World


class Schedules(NamedTuple):
    """What :mod:`.schedules` is to a batch in one process."""

    layout: Layout

    def forward(self, inputs: Inputs, config: Config) -> tuple[Tensor, list[Tensor], bool]:
        """This rank's loss, the tensors that :meth:`backward` needs, and whether those are gradients already.

        None if no input needs a gradient.
        """
        with on_device_of(inputs.query):
            run = _Run.of(inputs, config, self.layout)
            if _gradients_in_forward(config):
                tables, gradients = run.new_tables(), run.new_gradients()
                loss, results = _sweep_gradients(run, tables, gradients, run.new_kept(0), with_losses=True)
                return loss, results, True
            kept = run.new_kept(run.kept_elements)
            tables = _sweep_statistics(run, kept)
            losses = run.objective.row_losses(run.shard, *tables)
            loss = losses if config.reduction == "none" else losses.sum() * run.share_after(tables[0])
            saved = [kept.buffer, *(table for table in tables if table is not None)]
            return loss, saved if any(config.needs_grad) else [], False

    def backward(
        self, grad_loss: Tensor, saved: list[Tensor], inputs: Inputs, config: Config, in_place: bool
    ) -> list[Tensor]:
        """Gradients in the order of ``inputs.differentiable``; an empty tensor where none is due."""
        with on_device_of(inputs.query):
            upstream = _upstream(grad_loss, self.layout.world)
            in_forward = _gradients_in_forward(config)
            if in_forward and (upstream == upstream[0]).all():
                results = [gradient.mul_(grad_loss) if in_place else gradient * grad_loss for gradient in saved]
            else:
                run = _Run.of(inputs, config, self.layout)
                if in_forward:  # their sums are of no use: the rows of each rank have a factor of their own
                    saved = [run.new_kept(0).buffer, *run.new_tables()[:1]]
                kept, row_table, *column_table = saved
                weights, factor = _row_weights(grad_loss, upstream, len(inputs.query))
                tables, gradients = (row_table, *(column_table or [None])), run.new_gradients()
                coefficients = run.objective.coefficients(run.shard, *tables, weights, gradients.query)
                if run.objective.sweeps_gradients:
                    counted = None if in_forward else row_table
                    _, results = _sweep_gradients(run, coefficients, gradients, KeptTiles(kept), factor, counted)
                else:
                    results = run.results(gradients, coefficients[0], factor * run.share_after(coefficients[0]))
            return [
                result.to(tensor.dtype) if needs else inputs.query.new_empty(0)
                for tensor, result, needs in zip(inputs.differentiable, results, config.needs_grad)
            ]


def row_statistics(inputs: Inputs, config: Config, layout: Layout) -> tuple[Shard, Tensor]:
    """For losses that go on from there: the shard, and the table of its rows, which meet those of all ranks.

    The shard's ``squares`` are NaN where a row of any rank is not finite.
    """
    with on_device_of(inputs.query):
        run = _Run.of(inputs, config, layout)
        table, _ = _sweep_statistics(run, run.new_kept(0))
        return run.shard, table


@dataclass
class _Run:
    """One call at work, on one rank."""

    shard: Shard
    config: Config
    layout: Layout
    runner: Backend

    @classmethod
    def of(cls, inputs: Inputs, config: Config, layout: Layout) -> _Run:
        objective = config.make_objective(inputs.learned)
        shard = Shard.of(inputs, config.needs_grad, objective, layout)
        return cls(shard, config, layout, make_backend(config.backend, objective))

    @property
    def objective(self):
        return self.runner.objective

    @property
    def is_batch(self) -> bool:
        return self.layout.is_batch

    @property
    def needs_grad_of_scalars(self) -> tuple[bool, list[bool], list[bool]]:
        return self.config.needs_grad_of_scalars(1 + (0 if self.is_batch else len(self.shard.sources)))

    def share_after(self, row_table: Tensor) -> float | Tensor:
        """Of a row in the loss, as the finished sweep tells. All ranks ask."""
        if self.config.reduction != "mean":
            return 1.0
        counted = torch.as_tensor(self.objective.rows_counted(self.shard, row_table), device=row_table.device)
        total = self.layout.world.sum(counted.to(self.shard.statistics_dtype))
        return self.layout.world.size / (total + (total == 0))

    def new_tables(self) -> Tables:
        """Statistics of nothing, for the own rows and columns."""
        tables = self.objective.new_statistics(self.shard.rows, self.shard.sources[0].width, self.like)
        self.objective.number_rows(tables[0], sum(self.layout.rows[: self.layout.world.rank]))
        return self.objective.prepared(self.shard, *tables)

    def new_gradients(self) -> Gradients:
        needed = needs_query_sums(self.shard, self.config, self.objective, *self.needs_grad_of_scalars)
        return Gradients.zeros(self.shard, needed)

    def new_column_table(self, rank: int) -> Tensor | None:
        """Statistics of nothing, for the columns of ``rank``; in a batch they are rows there."""
        columns = self.layout.columns[rank]
        row_table, column_table = self.objective.new_statistics(columns if self.is_batch else 0, columns, self.like)
        if self.is_batch:
            self.objective.number_rows(row_table, self.layout.first_column(rank))
        return row_table if self.is_batch else column_table

    @property
    def like(self) -> Tensor:
        return self.shard.query.new_empty((), dtype=self.shard.statistics_dtype)

    def new_kept(self, elements: int) -> KeptTiles:
        return KeptTiles(self.runner.new_kept(self.shard, elements))

    @property
    def kept_elements(self) -> int:
        """Entries that may be kept, out of all that this rank visits."""
        if not (any(self.config.needs_grad) and self.runner.keeps_tiles and self.objective.sweeps_gradients):
            return 0
        rows, home = self.shard.rows, sum(source.width for source in self.shard.sources)
        entries = visited_pairs(rows, home, self._tile("statistics", rows, home).rows, self.is_batch)
        for step in range(1, self.layout.hops + 1):
            region = self.layout.region((self.layout.world.rank - step) % self.layout.world.size)
            high, wide = (part.stop - part.start for part in region)
            entries += high * wide
        return min(entries, self.config.memory_budget // self.shard.statistics_dtype.itemsize)

    def plan(self, problem: Problem) -> Plan:
        widest = max(source.width for source in problem.sources)
        tiles = [self._tile(sweep, problem.rows, widest) for sweep in ("statistics", "gradients")]
        return Plan("two_sweeps", *tiles, 0)

    def _tile(self, sweep: str, rows: int, columns: int) -> TileShape:
        query = self.shard.query
        most_rows, most_columns = self.runner.tile_shape(
            sweep, rows, query.shape[1], query.dtype, query.device.type, self.objective, self.is_batch,
            self.config.memory_budget,
        )
        return TileShape(balanced_block(rows, most_rows), balanced_block(columns, most_columns))

    def travel(self, tour: Tour) -> list[Tensor]:
        return travel(tour, self.layout.world, self.layout.hops, self.layout.strategy)

    def results(self, gradients: Gradients, row_coefficients: Tensor, factor) -> list[Tensor]:
        """Gradients for features, scale, bias and what is learned, times ``factor``: an empty tensor of its own where
        none is needed."""
        needs_scale, of_bias, _ = self.needs_grad_of_scalars
        weight_sum = self.objective.bias_gradient(row_coefficients) if any(of_bias) else None
        features, scale, bias = self.runner.finish(
            self.shard, gradients, (factor,), self.config.needs_grad, needs_scale, weight_sum
        )
        scalars = gradients_of_scalars(self, self.shard, row_coefficients, scale, bias, (factor,))
        world = self.layout.world
        scalars = [None if scalar is None else world.sum(scalar) / world.size for scalar in scalars]
        return [self.shard.query.new_empty(0) if tensor is None else tensor for tensor in (*features, *scalars)]


class _RowsAndColumns(Tour):
    """Blocks of features, beginning with those of the own rank, and tables that come with them."""

    def __init__(self, run: _Run, kept: KeptTiles):
        self.run, self.shard, self.kept = run, run.shard, kept
        self.block = run.shard.travelling
        self.matrices = len(self.block)  # the features, and maybe the guide's; what comes after them are tables

    def new_block(self, rank: int) -> list[Tensor]:
        features, tables = self.split(self.block)
        columns = self.run.layout.columns[rank]
        features = (t.new_empty(columns, t.shape[1]) for t in features)
        return [*features, *(t.new_empty(t.shape[0], columns) for t in tables)]

    def split(self, block: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A block's features, ``[M, d]`` each, and its tables, ``[quantities, M]``."""
        return block[: self.matrices], block[self.matrices :]

    def new_carried(self, rank: int) -> list[Tensor]:
        return self.new_shares(rank)


class _StatisticsTour(_RowsAndColumns):
    """Sweep 1. What is carried: the table of the columns, if whole columns are needed.

    A table that only its own rank can prepare travels with the block.
    """

    def __init__(self, run: _Run, kept: KeptTiles):
        super().__init__(run, kept)
        self.tables = run.new_tables()
        if run.objective.prepares:
            self.block.append(self.tables[0].clone())

    def new_shares(self, rank: int) -> list[Tensor]:
        if self.run.objective.prepares:
            return self.split(self.new_block(rank))[1]
        table = self.run.new_column_table(rank)
        return [] if table is None else [table]

    def at_home(self) -> None:
        fold_statistics(self.shard, self.run.plan(self.shard), self.run.runner, self.kept, self.tables)

    def visit(self, rank: int, block: list[Tensor]) -> list[Tensor]:
        shares, (rows, columns) = self.new_shares(rank), self.run.layout.region(rank)
        features, tables = self.split(block)
        for share, prepared in zip(shares, tables):
            share.copy_(prepared)
        if self.run.objective.by_distance:
            problem = self.shard.meet_rows(rank, *features)
            table = torch.cat([self.run.new_tables()[0][:, rows], shares[0][:, columns]], dim=1)
            fold_statistics(problem, self.run.plan(problem), self.run.runner, self.kept, (table, None))
            self.merge([self.tables[0][:, rows]], [table[:, : problem.rows]])
            shares[0][:, columns] = table[:, problem.rows :]
            return shares
        problem = self.shard.visit(rank, False, *features)
        tables = self.tables[0][:, rows], shares[0][:, columns] if shares else None
        fold_statistics(problem, self.run.plan(problem), self.run.runner, self.kept, tables)
        return shares

    def merge(self, carried: list[Tensor], other: list[Tensor]) -> None:
        for table, more in zip(carried, other):
            self.run.objective.merge_statistics(table, more, self.shard.scale)

    def held(self) -> tuple[Tensor | None, ...]:
        return self.kept.buffer, *self.run.runner.workspace(), *self.tables


class _GradientsTour(_RowsAndColumns):
    """Sweep 2. What is carried: the gradient of the columns, and in a batch the table, if the sweep adds to it.

    It does with losses, and where the table was prepared by its own rank.
    """

    def __init__(self, run: _Run, kept: KeptTiles, coefficients: Tables, gradients: Gradients, with_losses: bool):
        super().__init__(run, kept)
        self.coefficients, self.gradients, self.with_losses = coefficients, gradients, with_losses
        prepares = run.objective.prepares
        self.carries_table = run.is_batch and (with_losses or prepares)
        of_columns = coefficients[0] if run.is_batch else coefficients[1]
        if of_columns is not None and (prepares or not with_losses):
            self.block.append(of_columns.clone() if prepares else of_columns.contiguous())
        self.met: tuple[Tensor, ...] = ()  # of the visiting and the own rows as one batch
        self.carries_gradient = gradients.query is not None if run.is_batch else run.shard.sources[0].needs_grad

    def new_shares(self, rank: int) -> list[Tensor]:
        features = self.block[0]
        shape, dtype = (self.run.layout.columns[rank], features.shape[1]), self.shard.statistics_dtype
        shares = [features.new_zeros(shape, dtype=dtype)] if self.carries_gradient else []
        if not self.carries_table:
            return shares
        return [*shares, *(self.split(self.new_block(rank))[1] or [self.run.new_column_table(rank)])]

    def at_home(self) -> None:
        self._sweep(self.shard, self.coefficients, self.gradients)

    def visit(self, rank: int, block: list[Tensor]) -> list[Tensor]:
        shares, (rows, columns) = self.new_shares(rank), self.run.layout.region(rank)
        features, tables = self.split(block)
        of_columns = shares[-1] if self.carries_table else tables[0] if tables else None
        if self.carries_table and tables:
            of_columns.copy_(tables[0])
        if self.run.objective.by_distance:
            self._visit_rows(self.shard.meet_rows(rank, *features), rows, columns, of_columns, shares[0])
            return shares
        problem = self.shard.visit(rank, self.carries_gradient, *features)
        coefficients = self.coefficients[0][:, rows], None if of_columns is None else of_columns[:, columns]
        d_query = None if self.gradients.query is None else self.gradients.query[rows]
        into = Gradients(d_query, [shares[0][columns] if self.carries_gradient else None])
        self._sweep(problem, coefficients, into)
        return shares

    def _visit_rows(self, problem: Problem, rows: slice, columns: slice, of_columns: Tensor, share: Tensor) -> None:
        """Where similarities are distances: one table and one accumulator for both ranks' rows."""
        self.met = ()
        of_rows, own = self.coefficients[0], problem.rows
        table = torch.cat([of_rows[:, rows], of_columns[:, columns]], dim=1)
        gradient, before = share.new_zeros(problem.query.shape), table.clone()
        self._sweep(problem, (table, None), Gradients(gradient, [None]))
        self.gradients.query[rows] += gradient[:own]
        share[columns] = gradient[own:]
        self.met = gradient, problem.query, problem.given_rows
        if self.carries_table:
            self.run.objective.share_losses(table, before, own)
            of_rows[:, rows], of_columns[:, columns] = table[:, :own], table[:, own:]

    def merge(self, carried: list[Tensor], other: list[Tensor]) -> None:
        if self.carries_gradient:
            carried[0].add_(other[0])
        if self.carries_table:
            self.run.objective.merge_statistics(carried[-1], other[-1], self.shard.scale)

    def finish(self, carried: list[Tensor]) -> None:
        """Add what came home to what was found there."""
        gradient = self.gradients.query if self.run.is_batch else self.gradients.sources[0]
        home = [*[gradient] * self.carries_gradient, self.coefficients[0]]
        self.merge(home, carried)

    def held(self) -> tuple[Tensor | None, ...]:
        gradients, workspace = self.gradients, self.run.runner.workspace()
        return self.kept.buffer, *workspace, *self.coefficients, gradients.query, *gradients.sources, *self.met

    def _sweep(self, problem: Problem, coefficients: Tables, into: Gradients) -> None:
        plan, runner = self.run.plan(problem), self.run.runner
        every_tile = self.with_losses or sweeps_for_scalars(runner.objective, *self.run.needs_grad_of_scalars)
        sweep_gradients(problem, plan, runner, self.kept, coefficients, into, every_tile)


def _sweep_statistics(run: _Run, kept: KeptTiles) -> Tables:
    tour = _StatisticsTour(run, kept)
    carried = run.travel(tour)
    tour.merge([tour.tables[0] if run.is_batch else tour.tables[1]], carried)
    return tour.tables


def _sweep_gradients(
    run: _Run, coefficients: Tables, gradients: Gradients, kept: KeptTiles, factor=1.0,
    statistics: Tensor | None = None, with_losses: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """The loss, if asked for, and the gradients: what the sweep adds to those that are there.

    ``statistics``: the rows', which tell what the mean is over; None: the coefficients do, once the sweep has ended.
    """
    tour = _GradientsTour(run, kept, coefficients, gradients, with_losses)
    tour.finish(run.travel(tour))
    count_workspace(*tour.held())
    run.objective.add_pair_gradients(run.shard, coefficients[0], gradients.query)
    share = run.share_after(coefficients[0] if statistics is None else statistics)
    loss = run.objective.row_losses(run.shard, *coefficients).sum() * share if with_losses else None
    return loss, run.results(tour.gradients, coefficients[0], factor * share)


def _gradients_in_forward(config: Config) -> bool:
    needs_statistics = config.make_objective().needs_statistics
    return not needs_statistics and any(config.needs_grad) and config.reduction != "none"


def _upstream(grad_loss: Tensor, world: World) -> Tensor:
    """The largest upstream gradient of every rank, by magnitude; of a scalar loss, the one that it has."""
    largest = grad_loss
    if grad_loss.ndim:
        largest = grad_loss.abs().amax() if len(grad_loss) else grad_loss.new_zeros(())
    return torch.cat(world.gather(largest.reshape(1), [1] * world.size))


def _row_weights(grad_loss: Tensor, upstream: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Upstream gradients of the rows as (weights of order 1, factor), the factor the same on all ranks."""
    largest = torch.where(upstream.isfinite(), upstream.abs(), 0).amax()
    factor = torch.where(largest > 0, largest, 1)
    return (grad_loss / factor).expand(rows), factor
