"""The schedules: which sweeps run when, over which rows, and what the forward call saves for the backward call.

    two_sweeps    statistics in the forward call, gradients in the backward call. Any loss, any upstream gradient.
    row_chunks    both sweeps over one chunk of rows after another, in the forward call: every tile is formed once.
                  Under one upstream gradient, which scales them later, and without statistics of whole columns,
                  unless the one chunk holds all rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..objectives import OBJECTIVES
from .backends import backend_class, make_backend
from .backends.base import KeptTiles
from .plan import Plan, make_plan
from .problem import Problem, blocks, scale_of, statistics_dtype
from .sweeps import Gradients, sums_over_columns, sweep_gradients, sweep_statistics
from .validation import check_values


def forward(
    query, keys, own, target, logit_scale, objective, parameters, reduction, backend, memory_budget, needs_grad
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the tensors that :func:`backward` needs (none if no input needs a gradient)."""
    check_values(target, keys[0].shape[0], logit_scale, query.dtype)
    with _on_device_of(query):
        plan = _plan(query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad)
        problem = Problem.build(query, keys, own, target, scale_of(logit_scale), needs_grad)
        runner = make_backend(backend, OBJECTIVES[objective].from_parameters(parameters))
        share = _share(problem.rows, reduction)
        if plan.schedule == "row_chunks":
            return _row_chunks(problem, plan, runner, share, needs_grad)
        losses, saved = _first_sweep(problem, plan, runner)
        loss = losses if reduction == "none" else losses.sum() * share
        return loss, saved if any(needs_grad) else []


def backward(
    grad_loss, saved, query, keys, own, target, logit_scale,
    objective, parameters, reduction, backend, memory_budget, needs_grad,
) -> list[Tensor]:  # fmt: skip
    """Gradients in the order of ``needs_grad``: query, keys, own, logit_scale; an empty tensor where none is due."""
    plan = _plan(query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad)
    inputs = (query, *keys, logit_scale) if own is None else (query, *keys, own, logit_scale)
    with _on_device_of(query):
        if plan.schedule == "row_chunks":  # not in place: what was saved may be needed again
            results = [gradient * grad_loss if needs else gradient for gradient, needs in zip(saved, needs_grad)]
        else:
            problem = Problem.build(query, keys, own, target, scale_of(logit_scale), needs_grad)
            row_weights, factor = _row_weights(grad_loss, reduction, problem)
            runner = make_backend(backend, OBJECTIVES[objective].from_parameters(parameters))
            gradients = _second_sweep(problem, plan, runner, saved, row_weights, needs_grad)
            results = _results(problem, gradients, factor * _share(problem.rows, reduction), needs_grad)
        return [result.to(tensor.dtype) if needs else query.new_empty(0)
                for tensor, result, needs in zip(inputs, results, needs_grad)]


def fake_backward(
    grad_loss, saved, query, keys, own, target, logit_scale,
    objective, parameters, reduction, backend, memory_budget, needs_grad,
) -> list[Tensor]:  # fmt: skip
    """What :func:`backward` returns, without the data."""
    inputs = (query, *keys, logit_scale) if own is None else (query, *keys, own, logit_scale)
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needs else query.new_empty(0)
        for t, needs in zip(inputs, needs_grad)
    ]


def fake_forward(
    query, keys, own, target, logit_scale, objective, parameters, reduction, backend, memory_budget, needs_grad
) -> tuple[Tensor, list[Tensor]]:
    """What :func:`forward` returns, without the data."""
    plan = _plan(
        query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad, _make_plan.__wrapped__
    )  # shapes may be symbols, which no cache can hold
    dtype = statistics_dtype(query.dtype)
    rows = query.shape[0]
    loss = query.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    if not any(needs_grad):
        return loss, []
    if plan.schedule == "row_chunks":
        problem = Problem.build(query, keys, own, target, 1.0, needs_grad)
        gradients = Gradients.zeros(problem, sums_over_columns(problem, needs_grad[0], needs_grad[-1]))
        return loss, _results(problem, gradients, 1.0, needs_grad)
    like = query.new_empty((), dtype=dtype)
    maker = OBJECTIVES[objective].from_parameters(parameters)
    row_table, column_table = maker.new_statistics(rows, keys[0].shape[0], like)
    kept = query.new_empty(plan.kept_elements, dtype=dtype)
    return loss, [row_table, kept] if column_table is None else [row_table, kept, column_table]


def _first_sweep(problem: Problem, plan: Plan, runner) -> tuple[Tensor, list[Tensor]]:
    """Statistics now, gradients in the backward call."""
    kept = KeptTiles(runner.new_kept(problem, plan.kept_elements))
    row_table, column_table = sweep_statistics(problem, plan, runner, kept)
    losses = runner.objective.row_losses(problem, row_table, column_table)
    return losses, [row_table, kept.buffer] if column_table is None else [row_table, kept.buffer, column_table]


def _second_sweep(problem: Problem, plan: Plan, runner, saved, row_weights, needs_grad) -> Gradients:
    row_table, kept, *column_table = saved
    column_table = column_table[0] if column_table else None
    coefficients = runner.objective.coefficients(problem, row_table, column_table, row_weights)
    gradients = Gradients.zeros(problem, sums_over_columns(problem, needs_grad[0], needs_grad[-1]))
    sweep_gradients(problem, plan, runner, KeptTiles(kept), coefficients, gradients)
    return gradients


def _row_chunks(problem: Problem, plan: Plan, runner, share: float, needs_grad) -> tuple[Tensor, list[Tensor]]:
    """Both sweeps over one chunk of rows after another: every tile is formed once.

    The gradients saved are those under an upstream gradient of 1; the one that comes scales them later.
    """
    with_query = sums_over_columns(problem, needs_grad[0], needs_grad[-1])
    if plan.gradient_tile.rows == problem.rows:
        if (results := runner.one_tile(problem, share, with_query)) is not None:
            loss, gradients = results
            return loss, [g if needs else problem.query.new_empty(0) for g, needs in zip(gradients, needs_grad)]
    kept = KeptTiles(runner.new_kept(problem, plan.kept_elements))
    gradients = Gradients.zeros(problem, with_query)
    losses = []
    for rows in blocks(problem.rows, plan.gradient_tile.rows):
        chunk = problem.of_rows(rows)
        kept.rewind()
        statistics = sweep_statistics(chunk, plan, runner, kept)
        losses.append(runner.objective.row_losses(chunk, *statistics))
        coefficients = runner.objective.coefficients(chunk, *statistics, torch.ones_like(losses[-1]))
        kept.rewind()
        sweep_gradients(chunk, plan, runner, kept, coefficients, gradients.of_rows(problem, rows))
    return torch.cat(losses).sum() * share, _results(problem, gradients, share, needs_grad)


def _share(rows: int, reduction: str) -> float:
    """Of a row in the loss."""
    return 1 / rows if reduction == "mean" and rows else 1.0


def _results(problem: Problem, gradients: Gradients, factor: float | Tensor, needs_grad) -> list[Tensor]:
    """Gradients for queries, sources and scale: the sums, in place, times ``factor`` (and the scale).

    An empty tensor of its own for each that is not needed.
    """
    scale_gradient = gradients.scale_gradient(problem) * factor if needs_grad[-1] else None
    by_scale = factor * problem.scale
    results = [
        sums.mul_(by_scale) if needs else None for sums, needs in zip((gradients.query, *gradients.sources), needs_grad)
    ]
    return [problem.query.new_empty(0) if tensor is None else tensor for tensor in (*results, scale_gradient)]


def _row_weights(grad_loss: Tensor, reduction: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Upstream gradients of the rows as (weights of order 1, common factor).

    W is formed from the weights and the factor multiplies the fp32 sums at the end: W may be rounded to half
    precision for the products, and 1 / N or a gradient scaler's 65,536 would take it out of range.
    """
    if reduction != "none":
        return torch.ones((), dtype=grad_loss.dtype, device=grad_loss.device).expand(problem.rows), grad_loss
    largest = grad_loss.abs().amax() if problem.rows else grad_loss.new_ones(())
    usable = (largest > 0) & largest.isfinite()  # an infinite one must not make NaN of the other rows
    factor = torch.where(usable, largest, 1)
    return grad_loss / factor, factor


def _plan(query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad, make=None) -> Plan:
    widths = [key.shape[0] for key in keys] + ([] if own is None else [own.shape[1]])
    make = _make_plan if make is None else make
    return make(
        query.shape[0], tuple(widths), query.shape[1], query.dtype, query.device.type, objective, tuple(parameters),
        reduction != "none", backend, memory_budget, True in needs_grad,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _make_plan(
    rows, widths, d, dtype, device, objective, parameters, one_gradient, backend, memory_budget, needs_grad
) -> Plan:
    kind = backend_class(backend)
    return make_plan(
        rows, widths, d,
        itemsize=statistics_dtype(dtype).itemsize if kind.keeps_tiles else 0,
        tile_shapes=tuple(kind.tile_shape(sweep, d, dtype, device) for sweep in ("statistics", "gradients")),
        memory_budget=memory_budget,
        needs_grad=needs_grad,
        one_gradient=one_gradient,
        needs_columns=OBJECTIVES[objective].from_parameters(parameters).needs_columns,
    )  # fmt: skip


def _on_device_of(query: Tensor) -> AbstractContextManager:
    """The features' GPU as the current one, and products of the dtype chosen for them, whatever autocast says."""
    device = query.device.type
    if device == "cpu" and not torch.is_autocast_enabled(device):
        return nullcontext()
    stack = ExitStack()
    if device == "cuda":
        stack.enter_context(torch.cuda.device_of(query))
    if torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
