"""The schedules: which sweeps run when, over which rows, and what the forward call saves for the backward call.

    two_sweeps    statistics in the forward call, gradients in the backward call. Any loss, any upstream gradient.
    row_chunks    both sweeps over one chunk of rows after another, in the forward call: every tile is formed once.
                  Under one upstream gradient, which scales them later, and without statistics of whole columns,
                  unless the one chunk holds all rows.
    one_sweep     gradients and losses from one sweep in the forward call, where W needs no statistics.
                  Under one upstream gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import objective_class
from .backends import backend_class, make_backend
from .backends.base import KeptTiles
from .columns import blocks
from .plan import Plan, make_plan
from .problem import Inputs, Problem, statistics_dtype
from .sweeps import Gradients, sums_over_columns, sweep_gradients, sweep_statistics
from .validation import check_values


class Config(NamedTuple):
    """How the operator is called, beyond its tensors."""

    objective: str
    parameters: list[float]
    reduction: str
    backend: str
    memory_budget: int
    needs_grad: list[bool]  # in the order of Inputs.differentiable
    any_size: bool = False  # a call of a graph whose shapes are symbols: the plan may not depend on where they lie

    def make_objective(self, learned: Tensor | None = None):
        """``learned``: the inputs', where values of parameters are needed."""
        objective = objective_class(self.objective).from_parameters(self.parameters)
        if learned is not None:
            objective.learn(learned)
        return objective

    def needs_grad_of_scalars(self, features: int) -> tuple[bool, list[bool], list[bool]]:
        """Of the scale; of the bias, if there is one; of what is learned, if that is anything. ``features``: how many
        inputs come before them."""
        scale, *others = self.needs_grad[features:]
        return (scale, [], others) if objective_class(self.objective).learned else (scale, others, [])


def forward(inputs: Inputs, config: Config) -> tuple[Tensor, list[Tensor], bool]:
    """The loss, the tensors that :func:`backward` needs (none if no input needs a gradient), and whether those are
    gradients already, which it only scales."""
    check_values(inputs, objective_class(config.objective))
    with on_device_of(inputs.query):
        return _taken(_forward, inputs, config)


def backward(
    grad_loss: Tensor, saved: list[Tensor], inputs: Inputs, config: Config, in_place: bool = False
) -> list[Tensor]:
    """Gradients in the order of ``inputs.differentiable``; an empty tensor where none is due.

    ``in_place``: gradients that came with the forward call are scaled in place, as nobody else will need them.
    """
    with on_device_of(inputs.query):
        return _taken(_backward, inputs, config, grad_loss, saved, in_place)


def _taken(call: Callable, inputs: Inputs, config: Config, *upstream) -> object:
    """``call(inputs, config, *upstream)``, which the backend may know by heart.

    ``upstream``: of a backward call, the upstream gradient, what was saved, and ``in_place``.
    """
    kind = backend_class(config.backend)
    if not (kind.repeats(inputs.query) and objective_class(config.objective).repeats):
        return call(inputs, config, *upstream)
    objective, parameters, reduction, name, memory_budget, needs_grad, any_size = config
    key = call, objective, (*parameters,), reduction, memory_budget, (*needs_grad,), any_size, upstream[2:]
    query, keys, *others = inputs
    tensors = [query, *keys, *others]
    if upstream:
        tensors += [upstream[0], *upstream[1]]
    return kind.repeat(key, tensors, partial(call, inputs, config, *upstream))


def _forward(inputs: Inputs, config: Config) -> tuple[Tensor, list[Tensor], bool]:
    run = _Run.of(inputs, config)
    if run.plan.schedule == "row_chunks":
        return *_row_chunks(run), True
    if run.plan.schedule == "one_sweep":
        return *_one_sweep(run), not run.plan.combined
    loss, saved = _first_sweep(run)
    return loss, saved if any(config.needs_grad) else [], False


def _backward(
    inputs: Inputs, config: Config, grad_loss: Tensor, saved: list[Tensor], in_place: bool
) -> list[Tensor]:
    plan = plan_of(inputs, config)
    if plan.schedule == "two_sweeps":
        results = _second_sweep(_Run.of(inputs, config), saved, grad_loss)
    elif plan.combined:
        results = _after_one_sweep(_Run.of(inputs, config), saved, grad_loss)
    else:
        results = scaled(saved, grad_loss, config, in_place)
    return [
        result.to(tensor.dtype) if needs else inputs.query.new_empty(0)
        for tensor, result, needs in zip(inputs.differentiable, results, config.needs_grad)
    ]


def row_statistics(inputs: Inputs, config: Config) -> tuple[Problem, Tensor]:
    """For losses that go on from there: the problem, and the table of its rows."""
    with on_device_of(inputs.query):
        run = _Run.of(inputs, config)
        kept = KeptTiles(run.runner.new_kept(run.problem, 0))
        table, _ = sweep_statistics(run.problem, run.plan, run.runner, kept)
        return run.problem, table


def scaled(gradients: list[Tensor], grad_loss: Tensor, config: Config, in_place: bool) -> list[Tensor]:
    """Gradients that came with the forward call, times the upstream gradient; in the dtypes of the statistics."""
    if in_place and grad_loss.is_cpu and grad_loss.item() == 1:  # loss.backward(): a microsecond for each gradient
        return gradients
    multiply = Tensor.mul_ if in_place else torch.mul
    return [multiply(g, grad_loss) if needs else g for g, needs in zip(gradients, config.needs_grad)]


def fake_forward(inputs: Inputs, config: Config) -> tuple[Tensor, list[Tensor]]:
    """What :func:`forward` returns, without the data."""
    # Shapes may be symbols, which no cache can hold.
    plan = plan_of(inputs, config, _make_plan.__wrapped__)
    query, dtype = inputs.query, statistics_dtype(inputs.query.dtype)
    loss = query.new_empty((query.shape[0],) if config.reduction == "none" else (), dtype=dtype)
    if not any(config.needs_grad):
        return loss, []
    if plan.combined and plan.schedule == "one_sweep":
        of_query, *of_sources = config.needs_grad[: len(inputs.features)]
        of_query = sums_over_columns(of_query, of_sources, config.needs_grad[len(inputs.features)])
        accumulators = (
            query.new_empty(tensor.shape, dtype=dtype) if there else query.new_empty(0)
            for tensor, there in zip(inputs.features, (of_query, *of_sources))
        )
        saved = backend_class(config.backend).new_combined(inputs, config.make_objective())
        return loss, [*saved, *accumulators]
    if plan.schedule != "two_sweeps":
        dtypes = [dtype] * len(inputs.features) + [torch.float64] * 3
        return loss, [
            query.new_empty(tensor.shape, dtype=kind) if needs else query.new_empty(0)
            for tensor, kind, needs in zip(inputs.differentiable, dtypes, config.needs_grad)
        ]
    if plan.combined:
        return loss, backend_class(config.backend).new_combined(inputs, config.make_objective())
    kept = query.new_empty(plan.kept_elements, dtype=dtype)
    # Of one row and column: how many rows an objective can number is a question that would tie symbols.
    tables = config.make_objective().new_statistics(1, 1, query.new_empty((), dtype=dtype))
    counts = query.shape[0], inputs.widths[0]
    return loss, [kept, *(t.new_empty(t.shape[0], n) for t, n in zip(tables, counts) if t is not None)]


def fake_backward(grad_loss: Tensor, saved: list[Tensor], inputs: Inputs, config: Config) -> list[Tensor]:
    """What :func:`backward` returns, without the data."""
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needs else inputs.query.new_empty(0)
        for t, needs in zip(inputs.differentiable, config.needs_grad)
    ]


class _Run(NamedTuple):
    """One call at work."""

    problem: Problem
    plan: Plan
    config: Config
    runner: object  # a fresh backend

    @classmethod
    def of(cls, inputs: Inputs, config: Config) -> _Run:
        objective = config.make_objective(inputs.learned)
        problem = Problem.build(inputs, config.needs_grad, objective)
        return cls(problem, plan_of(inputs, config), config, make_backend(config.backend, objective))

    @property
    def objective(self):
        return self.runner.objective

    @property
    def needs_grad_of_scalars(self) -> tuple[bool, list[bool], list[bool]]:
        return self.config.needs_grad_of_scalars(1 + (0 if self.problem.is_batch else len(self.problem.sources)))

    @property
    def share(self) -> float | Tensor:
        """The weight of a row's loss in the loss: 1 over the number of rows for a mean, else 1."""
        return self.share_after(None)

    def share_after(self, row_table: Tensor | None) -> float | Tensor:
        """The same, where only the finished sweep can tell."""
        if self.config.reduction != "mean":
            return 1.0
        return _share_of(self.objective.rows_counted(self.problem, row_table))

    def new_gradients(self, sums_alone: bool = False) -> Gradients:
        """``sums_alone``: nobody adds to them but the sweep, whose only tile may then overwrite what it finds."""
        shape, runner = self.plan.gradient_tile, self.runner
        runner.overwrites = sums_alone and runner.can_overwrite(self.problem, shape)
        return Gradients.zeros(self.problem, self.with_query, torch.empty if runner.overwrites else torch.zeros)

    @property
    def with_query(self) -> bool:
        return needs_query_sums(self.problem, self.config, self.objective, *self.needs_grad_of_scalars)

    def weight_sum(self, table: Tensor) -> Tensor | None:
        """``sum_ij W_ij``, where the bias gets a gradient."""
        return self.objective.bias_gradient(table) if any(self.needs_grad_of_scalars[1]) else None

    def results(
        self, gradients: Gradients, table: Tensor | None, weight_sum: Tensor | None, *factors, dtype=None
    ) -> list[Tensor]:
        """Gradients for features, in ``dtype`` if given, scale, bias and what is learned, times ``factors``: an empty
        tensor of its own for each not needed. ``table``: of the rows, after the sweep of W."""
        features, scale, bias = self.runner.finish(
            self.problem, gradients, factors, self.config.needs_grad, self.needs_grad_of_scalars[0], weight_sum, dtype
        )
        results = [*features, *gradients_of_scalars(self, self.problem, table, scale, bias, factors)]
        return [self.problem.query.new_empty(0) if tensor is None else tensor for tensor in results]


def _first_sweep(run: _Run) -> tuple[Tensor, list[Tensor]]:
    """Statistics now, gradients in the backward call."""
    kept = KeptTiles(run.runner.new_kept(run.problem, run.plan.kept_elements))
    tables = sweep_statistics(run.problem, run.plan, run.runner, kept)
    if run.plan.combined:
        return run.runner.combine(run.problem, *tables, run.config.reduction == "mean")
    losses = run.objective.row_losses(run.problem, *tables)
    loss = losses if run.config.reduction == "none" else losses.sum() * run.share_after(tables[0])
    return loss, [kept.buffer, *(table for table in run.objective.saved(*tables) if table is not None)]


def _second_sweep(run: _Run, saved: list[Tensor], grad_loss: Tensor) -> list[Tensor]:
    if run.plan.combined:
        kept = saved[0].new_empty(0)
        coefficients, share = run.runner.combined(run.problem, saved)
        gradients, factors = run.new_gradients(sums_alone=True), (grad_loss, share)
    else:
        kept, *tables = saved
        row_table, column_table = tables if len(tables) == 2 else (*tables, None)
        row_weights, factor = _row_weights(grad_loss, run)
        gradients = run.new_gradients()
        coefficients = run.objective.coefficients(run.problem, row_table, column_table, row_weights, gradients.query)
        factors = factor, run.share_after(row_table)
    if run.objective.sweeps_gradients:
        every_tile = sweeps_for_scalars(run.objective, *run.needs_grad_of_scalars)
        sweep_gradients(run.problem, run.plan, run.runner, KeptTiles(kept), coefficients, gradients, every_tile)
    run.objective.add_pair_gradients(run.problem, coefficients[0], gradients.query)
    table = coefficients[0]
    return run.results(gradients, table, run.weight_sum(table), *factors, dtype=run.problem.query.dtype)


def _one_sweep(run: _Run) -> tuple[Tensor, list[Tensor]]:
    """The sweep of gradients, whose passes fold the losses into the row table on their way."""
    problem = run.problem
    tables = run.runner.new_statistics(problem)
    gradients, kept = run.new_gradients(run.plan.combined), KeptTiles(tables[0].new_empty(0))
    sweep_gradients(problem, run.plan, run.runner, kept, tables, gradients, every_tile=True)
    if run.plan.combined:
        loss, sums = run.runner.combine(problem, *tables, run.config.reduction == "mean")
        accumulators = (gradients.query, *gradients.sources)
        return loss, [*sums, *(problem.query.new_empty(0) if each is None else each for each in accumulators)]
    run.objective.add_pair_gradients(problem, tables[0], gradients.query)
    losses, share = run.objective.row_losses(problem, *tables), run.share_after(tables[0])
    return losses.sum() * share, run.results(gradients, tables[0], run.weight_sum(tables[0]), share)


def _after_one_sweep(run: _Run, saved: list[Tensor], grad_loss: Tensor) -> list[Tensor]:
    """What the sweep added up becomes gradients, in the backward call, as a second sweep's would."""
    state, weight_sum, *accumulators = saved
    there = run.with_query, *(source.needs_grad for source in run.problem.sources)
    query, *sources = (each if is_there else None for each, is_there in zip(accumulators, there))
    weight_sum = weight_sum if any(run.needs_grad_of_scalars[1]) else None
    factors = grad_loss, run.runner.share_of(state)
    return run.results(Gradients(query, sources), None, weight_sum, *factors, dtype=run.problem.query.dtype)


def _row_chunks(run: _Run) -> tuple[Tensor, list[Tensor]]:
    """Both sweeps over one chunk of rows after another: every tile is formed once.

    The gradients saved are those under an upstream gradient of 1; the one that comes scales them later.
    """
    problem, plan, runner = run.problem, run.plan, run.runner
    if plan.gradient_tile.rows == problem.rows and run.objective.one_tile_parameters is not None:
        if (results := runner.one_tile(problem, run.share, run.with_query)) is not None:
            loss, gradients = results
            needed = zip(gradients, run.config.needs_grad)
            return loss, [g if needs else problem.query.new_empty(0) for g, needs in needed]
    kept = KeptTiles(runner.new_kept(problem, plan.kept_elements))
    gradients = run.new_gradients()
    losses, counted = [], 0
    for rows in blocks(problem.rows, plan.gradient_tile.rows):
        chunk = problem.of_rows(rows)
        kept.rewind()
        statistics = sweep_statistics(chunk, plan, runner, kept)
        losses.append(runner.objective.row_losses(chunk, *statistics))
        if run.config.reduction == "mean":
            counted = counted + runner.objective.rows_counted(chunk, statistics[0])
        of_chunk = gradients.of_rows(problem, rows)
        ones = torch.ones_like(losses[-1])
        coefficients = runner.objective.coefficients(chunk, *statistics, ones, of_chunk.query)
        kept.rewind()
        sweep_gradients(chunk, plan, runner, kept, coefficients, of_chunk)
    share = _share_of(counted) if run.config.reduction == "mean" else 1.0
    return torch.cat(losses).sum() * share, run.results(gradients, None, None, share)


def _share_of(count: int | Tensor) -> float | Tensor:
    """A row's, in the mean over so many; 1 of none."""
    return 1 / (count + (count == 0) if isinstance(count, Tensor) else count or 1)


def gradients_of_scalars(
    run, problem: Problem, table: Tensor | None, scale: Tensor | None, bias: Tensor | None, factors
) -> list[Tensor | None]:
    """Of the scale, with that of losses which read the scale themselves; of the bias, if there is one; and of what is
    learned, if that is anything. None of what needs none.

    ``run``: of one process, or of one rank; ``table``: of the rows, after the sweep of W; ``scale``, ``bias``: the
    gradients that the sweep has found, times ``factors``.
    """
    objective, (_, of_bias, of_learned) = run.objective, run.needs_grad_of_scalars
    if scale is not None and objective.own_scale_gradient is not None:
        scale = scale + objective.own_scale_gradient * math.prod(factors)
    found = [scale, *[bias] * len(of_bias)]
    for is_needed in of_learned:
        found.append(objective.learned_gradient(problem, table) * math.prod(factors) if is_needed else None)
    return found


def needs_query_sums(
    problem: Problem, config: Config, objective, needs_scale: bool, of_bias: list[bool], of_learned: list[bool]
) -> bool:
    """Whether the gradient of the queries is summed: for itself, for the scale's, or as passes over distances add to
    it, whatever they are for."""
    of_sources = (source.needs_grad for source in problem.sources)
    needed = sums_over_columns(config.needs_grad[0], of_sources, needs_scale)
    return needed or bool(objective.by_distance and any(of_learned))


def sweeps_for_scalars(objective, needs_scale: bool, of_bias: list[bool], of_learned: list[bool]) -> bool:
    """Whether a sweep of W finds gradients of scalars that no features' gradient tells: a bias's is the sum of W, and
    where one sweep does all, totals are what a learned parameter's is formed of."""
    return any(of_bias) or (any(of_learned) and not objective.needs_statistics)


def _row_weights(grad_loss: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
    """Upstream gradients of the rows as (weights of order 1, common factor).

    W is formed from the weights and the factor multiplies the fp32 sums at the end: W may be rounded to half
    precision for the products, and 1 / N or a gradient scaler's 65,536 would take it out of range.
    """
    rows = run.problem.rows
    if run.config.reduction != "none":
        return torch.ones((), dtype=grad_loss.dtype, device=grad_loss.device).expand(rows), grad_loss
    return of_order_one(grad_loss)


def of_order_one(grad_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, factor): the same, of which the largest weight has the magnitude 1 where it can."""
    largest = grad_rows.abs().amax() if len(grad_rows) else grad_rows.new_ones(())
    usable = (largest > 0) & largest.isfinite()  # an infinite one must not make NaN of the other rows
    factor = torch.where(usable, largest, 1)
    return grad_rows / factor, factor


def plan_of(inputs: Inputs, config: Config, make=None) -> Plan:
    """The plan, a function of shapes and options: the same in every call that asks."""
    query = inputs.query
    return (make or _make_plan)(
        query.shape[0], inputs.widths, query.shape[1], query.dtype, query.device, inputs.is_batch,
        config.objective, tuple(config.parameters), config.reduction != "none", config.backend, config.memory_budget,
        True in config.needs_grad, inputs.target is not None, config.any_size,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _make_plan(
    rows, widths, d, dtype, device, is_batch, objective, parameters, one_gradient, backend, memory_budget, needs_grad,
    has_target, any_size,
) -> Plan:
    kind, objective = backend_class(backend), objective_class(objective).from_parameters(parameters)
    known_rows = rows if isinstance(rows, int) else None
    return make_plan(
        rows, widths, d,
        itemsize=statistics_dtype(dtype).itemsize if kind.keeps_tiles else 0,
        tile_shapes=tuple(
            kind.tile_shape(sweep, known_rows, d, dtype, device.type, objective, is_batch, memory_budget)
            for sweep in ("statistics", "gradients")
        ),
        memory_budget=memory_budget,
        needs_grad=needs_grad,
        one_gradient=one_gradient,
        needs_columns=objective.needs_columns,
        needs_statistics=objective.needs_statistics,
        sweeps_gradients=objective.sweeps_gradients,
        is_batch=is_batch,
        combined=one_gradient and kind.combines(objective, dtype, has_target),
        any_size=any_size,
    )  # fmt: skip


def on_device_of(query: Tensor) -> AbstractContextManager:
    """The features' GPU as the current one, and products of the dtype chosen for them, whatever autocast says."""
    device = query.device
    if not torch._C._is_any_autocast_enabled() and (
        query.is_cpu or (query.is_cuda and device.index == torch.cuda.current_device())
    ):
        return nullcontext()
    stack = ExitStack()
    if query.is_cuda:
        stack.enter_context(torch.cuda.device_of(query))
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # torch has no autocast there
        stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack
