"""The schedules: which sweeps run when, over which rows, and what the forward call saves for the backward call.

    two_sweeps    statistics in the forward call, gradients in the backward call. Any loss, any upstream gradient.
    row_chunks    both sweeps over one chunk of rows after another, in the forward call: every tile is formed once.
                  Under one upstream gradient, which scales them later, and without statistics of whole columns,
                  unless the one chunk holds all rows.
"""

from __future__ import annotations

from contextlib import ExitStack

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
        if plan.schedule == "row_chunks":
            losses, saved = _row_chunks(problem, plan, runner, needs_grad)
        else:
            losses, saved = _first_sweep(problem, plan, runner)
        loss = losses
        if reduction != "none":
            loss = losses.mean() if reduction == "mean" and problem.rows else losses.sum()
        return loss, saved if any(needs_grad) else []


def backward(
    grad_loss, saved, query, keys, own, target, logit_scale,
    objective, parameters, reduction, backend, memory_budget, needs_grad,
) -> list[Tensor]:  # fmt: skip
    """Gradients in the order of ``needs_grad``: query, keys, own, logit_scale; an empty tensor where none is due."""
    plan = _plan(query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad)
    scale = scale_of(logit_scale)
    with _on_device_of(query):
        if plan.schedule == "row_chunks":
            *sums, scale_gradient = saved
            factor, multiply = grad_loss, torch.mul  # not in place: saved tensors may be needed again
        else:
            problem = Problem.build(query, keys, own, target, scale, needs_grad)
            row_weights, factor = _row_weights(grad_loss, reduction, problem)
            runner = make_backend(backend, OBJECTIVES[objective].from_parameters(parameters))
            gradients = _second_sweep(problem, plan, runner, saved, row_weights, needs_grad)
            scale_gradient = gradients.scale_gradient(problem) if needs_grad[-1] else None
            sums, multiply = [gradients.query, *gradients.sources], Tensor.mul_
    share = 1 / query.shape[0] if reduction == "mean" and query.shape[0] else 1
    inputs = (query, *keys) if own is None else (query, *keys, own)
    by_scale = factor * (scale * share)
    results = [
        multiply(gradient, by_scale).to(tensor.dtype) if needs else query.new_empty(0)
        for tensor, gradient, needs in zip(inputs, sums, needs_grad)
    ]
    results.append((scale_gradient * (factor * share)).to(logit_scale.dtype) if needs_grad[-1] else query.new_empty(0))
    return results


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
        query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad, make_plan.__wrapped__
    )  # shapes may be symbols, which no cache can hold
    dtype = statistics_dtype(query.dtype)
    rows = query.shape[0]
    loss = query.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    if not any(needs_grad):
        return loss, []
    if plan.schedule == "row_chunks":
        problem = Problem.build(query, keys, own, target, 1.0, needs_grad)
        gradients = Gradients.zeros(problem, sums_over_columns(problem, needs_grad[0], needs_grad[-1]))
        return loss, _saved_gradients(problem, gradients, query.new_empty((), dtype=torch.float64), needs_grad)
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


def _row_chunks(problem: Problem, plan: Plan, runner, needs_grad) -> tuple[Tensor, list[Tensor]]:
    """Both sweeps over one chunk of rows after another: every tile is formed once.

    The gradients are those of the sum of the rows' losses; one upstream gradient scales them later.
    """
    with_query = sums_over_columns(problem, needs_grad[0], needs_grad[-1])
    if plan.gradient_tile.rows == problem.rows and (results := runner.one_tile(problem, with_query)) is not None:
        losses, (*sums, scale_gradient) = results
        return losses, [*sums, scale_gradient if needs_grad[-1] else problem.query.new_empty(0)]
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
    scale_gradient = gradients.scale_gradient(problem) if needs_grad[-1] else None
    return torch.cat(losses), _saved_gradients(problem, gradients, scale_gradient, needs_grad)


def _saved_gradients(problem: Problem, gradients: Gradients, scale_gradient: Tensor | None, needs_grad) -> list[Tensor]:
    """The sums and the scale's gradient, an empty tensor of its own for each that is not needed."""
    saved = (gradients.query, *gradients.sources, scale_gradient if needs_grad[-1] else None)
    return [problem.query.new_empty(0) if tensor is None else tensor for tensor in saved]


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


def _plan(
    query, keys, own, objective, parameters, reduction, backend, memory_budget, needs_grad, make=make_plan
) -> Plan:
    kind = backend_class(backend)
    widths = [key.shape[0] for key in keys] + ([] if own is None else [own.shape[1]])
    needs_columns = OBJECTIVES[objective].from_parameters(parameters).needs_columns
    return make(
        query.shape[0], tuple(widths), query.shape[1],
        itemsize=statistics_dtype(query.dtype).itemsize if kind.keeps_tiles else 0,
        tile_shapes=tuple(kind.tile_shape(sweep, query) for sweep in ("statistics", "gradients")),
        memory_budget=memory_budget,
        needs_grad=any(needs_grad),
        one_gradient=reduction != "none",
        needs_columns=needs_columns,
    )  # fmt: skip


def _on_device_of(query: Tensor) -> ExitStack:
    """The features' GPU as the current one, and products of the dtype chosen for them, whatever autocast says."""
    stack, device = ExitStack(), query.device.type
    if device == "cuda":
        stack.enter_context(torch.cuda.device_of(query))
    if torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
