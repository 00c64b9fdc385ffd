"""The author's formula on the terms of a problem's rows, which tables of statistics tell, and its derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.problem import Problem
from .definition import Definition, Given, check_rows, instance_of, scalar
from .pair_loss import PairLoss
from .terms import Term, places


class Numbers(NamedTuple):
    """What all pairs of a call share: a loss's structure and the values of its parameters."""

    definition: Definition
    functions: ModuleType  # printed for PyTorch
    values: list[float | Tensor]  # of the parameters
    scale: float | Tensor

    def with_learned(self, learned: Sequence[float | Tensor]) -> list[float | Tensor]:
        """The values of all parameters, of which these are learned."""
        values = dict(zip(self.definition.parameters, self.values)) | dict(zip(self.definition.learned, learned))
        return list(values.values())

    def loss(self, learned: Sequence[float | Tensor] = ()) -> PairLoss:
        """The author's object with these values."""
        parameters = zip(self.definition.parameters, self.with_learned(learned))
        return instance_of(self.definition.cls, dict(self.definition.options) | dict(parameters))

    def learned(self) -> list[float | Tensor]:
        return [self.values[self.definition.parameters.index(name)] for name in self.definition.learned]

    def factors(self) -> dict[str, float | Tensor]:
        """The terms' factors, by name."""
        names = (term.name for term in self.definition.terms)
        return dict(zip(names, self.functions.factors(None, self.scale, *self.values)))

    def terms(self, table: Tensor) -> list[Tensor]:
        """The values of the author's terms, ``[N]`` each in fp64, from a table of statistics."""
        values, factors = [], self.factors()
        offsets = self.functions.offsets(None, self.scale, *self.values)
        wide = table.double().unbind()
        for (term, place), offset in zip(places(self.definition.own_terms, "statistics"), offsets):
            factor = factors[term.name]
            if term.kind == "total":
                values.append(wide[place] * factor)
                continue
            value = wide[place] * abs(factor) + offset
            if term.kind == "logsumexp":
                value = value + wide[place + 1].log()
            value = torch.where(is_of_none(term, wide[place:]), -torch.inf, value)
            values.append(-value if term.is_negated else value)
        return values


class Evaluation:
    """Losses of the rows, with what their derivatives are formed of: once for both, where one call asks for them."""

    def __init__(self, numbers: Numbers, problem: Problem, row_table: Tensor, column_table: Tensor | None):
        definition = numbers.definition
        self.numbers, self.row_table = numbers, row_table
        self.tables = [row_table] if column_table is None else [row_table, problem.at_targets(column_table)]
        self.of_rows, *of_columns = ([v.requires_grad_() for v in numbers.terms(table)] for table in self.tables)
        self.of_columns = of_columns[0] if of_columns else []
        self.scale = scalar(numbers.scale).clone().requires_grad_()
        self.learned = [scalar(value).clone().requires_grad_() for value in numbers.learned()]
        at_targets = None
        if definition.settings.symmetric and problem.column_values is not None:
            at_targets = problem.at_targets(problem.column_values)
        loss, given = numbers.loss(self.learned), Given(problem.row_values, at_targets)
        with _Differentiable():
            self._losses = definition.row_losses(loss, self.of_rows, self.of_columns, self.scale, given)
        check_rows(f"{definition.cls.__name__}.loss", self._losses, problem.rows)

    @property
    def losses(self) -> Tensor:
        """``[N]``, in the dtype of the author's formula."""
        return self._losses.detach()

    def gradients(self, grad_rows: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """``sum_i grad_i dL_i``, once: in every term, ``[N]`` each, of the rows and then of their targets' columns; in
        the scale, as far as the formula reads it; and in what is learned, ``[parameters]`` in fp64."""
        leaves = [*self.of_rows, *self.of_columns, self.scale, *self.learned]
        with _Differentiable():
            gradients = torch.autograd.grad(
                self._losses, leaves, grad_rows.to(self._losses.dtype), materialize_grads=True
            )
        count = len(self.of_rows) + len(self.of_columns)
        weights, of_scale, of_learned = gradients[:count], gradients[count], gradients[count + 1 :]
        if not of_learned:
            return weights, of_scale, None
        return weights, of_scale, torch.stack(of_learned) + through_terms(self.numbers, self.tables, weights)


class _Differentiable:
    """Within a registered operator autograd is off, whatever its mode says: PyTorch takes it out of the dispatcher
    around the call of a kernel. This puts it in again."""

    def __enter__(self) -> None:
        excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
        self._guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
        self._mode = torch.enable_grad()
        self._guard.__enter__()
        self._mode.__enter__()

    def __exit__(self, *error) -> None:
        self._mode.__exit__(*error)
        self._guard.__exit__(*error)


def through_terms(numbers: Numbers, tables: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The gradient in what is learned, ``[parameters]`` in fp64, by way of terms whose derivatives the tables hold
    (:mod:`.learning`).

    ``weights``: of every term of the first table's rows, ``[N]`` each, then of the second's.
    """
    definition = numbers.definition
    of_parameters = tables[0].new_zeros(len(definition.learned), dtype=torch.float64)
    factors = numbers.functions.factors_of_derivatives(None, numbers.scale, *numbers.values)
    first = [place for _, place in places(definition.terms, "statistics")]
    for side, table in enumerate(tables):
        for derivative, factor in zip(definition.derivatives, factors):
            k = derivative.term
            weight = weights[side * len(definition.own_terms) + k]
            if derivative.total is not None:
                products = weight * table[first[derivative.total]].double()
            else:
                products = _times_mean(weight, definition.terms[k], derivative.mean, table[first[k] :])
            of_parameters[derivative.parameter] += products.sum() * factor
    return of_parameters


def _times_mean(weight: Tensor, term: Term, mean: int | None, table: Tensor) -> Tensor:
    """The weight times one of the term's means, or 1 (None), ``[N]``; 0 of a row without pairs, whatever its weight.
    The table's first quantities are the term's."""
    if mean is not None:
        weight = weight * table[2 + mean].double()
        if term.kind == "logsumexp":
            weight = weight / table[1].double()
    return torch.where(is_of_none(term, table), 0, weight)


def is_of_none(term: Term, table: Sequence[Tensor] | Tensor) -> Tensor:
    """Of which rows a log-sum-exp or a largest is over no pair, ``[N]``; the first quantities are the term's."""
    return table[1] == 0 if term.kind == "logsumexp" else table[1] < 0
