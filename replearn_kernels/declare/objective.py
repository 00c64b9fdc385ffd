r"""A declared loss as the engine asks for it: statistics, losses, coefficients and W, all derived.

With the terms ``t_k`` of a row, each a total or a log-sum-exp over the row's pairs of ``f_k``, a loss ``L(t_1, ...)``
and upstream gradients g::

    c_ki = g_i dL_i / dt_ki                                             by autograd of the author's formula
    W_ij = sum_k c_ki f_k'(l_ij)                                        of totals
         + sum_k c_ki exp(f_k(l_ij) - t_ki) f_k'(l_ij)                  of log-sum-exps

over the pairs that are in the term; in a batch, and of a symmetric loss, the same of the column too (in a batch with
the values of row and column exchanged, where there are some). ``f_k`` is kept
as ``factor * rest + offset``: tables are of ``v = sign(factor) rest``, so that no logit is rounded before the largest
is taken from it (objectives/softmax.py). The author's formula runs in fp64, where ``|factor| max + log sum`` loses
nothing.

    statistics     one after the other: a total's sum; a log-sum-exp's max of v and sum of exp(|factor| (v - max))
    coefficients   a total's weight c; a log-sum-exp's max, log_sum and weight; nothing of a term without a slope

Where the loss is the sum of totals, W needs no statistics, and one sweep does all:

    row table      the totals, which the passes add to; weight (dL / dL_i)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from types import ModuleType

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem
from ..objectives import OBJECTIVES
from ..objectives.base import Objective, steepness
from ..objectives.softmax import fold_sum_exp, logarithms, merge_sum_exp
from .cpp_passes import number_of, why_none
from .definition import Definition, Given, Term, check_rows, definition_of, fields_of, instance_of, places, scalar
from .on_tensors import TermOfTile, facts_of_tile, given_of_tile, terms_of_tile
from .pair_loss import PairLoss
from .torch_source import functions_of
from .triton_source import epilogue_of


class Declared(Objective):
    """Made by :func:`objective_of`: a class for every definition."""

    family = "declared"
    repeats = False
    definition: Definition
    functions: ModuleType
    """What is printed for PyTorch."""
    reads_groups: bool
    """Whether a term tells pairs of one group from others."""
    has_sides: bool
    """Whether a pair's terms are others seen from its column than from its row."""

    def __init__(self, by_group: bool, values: list[float]):
        self.by_group, self.values = by_group, values

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> Declared:
        return cls(bool(parameters[0]), parameters[1:])

    @property
    def parameters(self) -> list[float]:
        return [float(self.by_group), *self.values]

    @property
    def loss(self) -> PairLoss:
        """The author's object, with the values of this call."""
        parameters = zip(self.definition.parameters, self.values)
        return instance_of(self.definition.cls, dict(self.definition.options) | dict(parameters))

    @property
    def epilogue(self):
        return epilogue_of(self.definition)

    @property
    def roles(self) -> tuple[float, ...]:
        return tuple(self.values)

    def native_roles(self, dtype: torch.dtype, pairs: Pairs) -> tuple:
        parameters = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        return number_of(self.name, dtype), parameters, pairs.row_values, pairs.column_values, pairs.guide

    def why_no_passes(self, features: Tensor) -> Callable[[], str | None]:
        """What asks why there are no passes in C++ for these features; None says that there are."""
        return partial(why_none, self.name, getattr(features, "dtype", None))

    @property
    def uses_target(self) -> bool:
        """Where there are no groups, a target is a row's only column of the same one."""
        cls, facts = self.definition.cls, self.definition.facts
        if cls.batch:
            return False
        return cls.symmetric or "target" in facts or (self.reads_groups and not self.by_group)

    # -- sweep 1 ---------------------------------------------------------------------------------------------

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        table = _empty(self.definition.terms, rows, like)
        if not self.needs_statistics:
            return torch.cat([table, like.new_ones((1, rows))]), None
        return table, _empty(self.definition.terms, columns, like) if self.definition.cls.symmetric else None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        tile = self._tile(s, pairs)
        _fold(tile, self.definition.terms, 1, row_table)
        if column_table is not None:
            tile = self._tile(s, pairs, seen_from_columns=True) if self.has_sides else tile
            _fold(tile, self.definition.terms, 0, column_table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        factors = self._factors(scale)
        for term, place in places(self.definition.terms, "statistics"):
            if term.kind == "total":
                table[place] += other[place]
            else:
                both = slice(place, place + 2)
                merge_sum_exp(table[both], other[both], steepness(factors[term.name]))

    # -- combine ---------------------------------------------------------------------------------------------

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        values = self._values(problem, row_table, column_table)
        losses = self._formula(problem.scale, self._given(problem), values).to(row_table.dtype)
        check_rows(f"{self.definition.cls.__name__}.loss", losses, problem.rows)
        return losses + problem.squares * 0 if self.by_distance else losses  # a NaN shows, whatever its row counts for

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> int | Tensor:
        if self.definition.cls.counted is PairLoss.counted:  # nor is there a table before the first sweep
            return problem.rows
        of_rows, given = self._values_of(row_table, problem.scale), Given(problem.row_values, None)
        count = self.definition.count(self.loss, of_rows, problem.scale, given)
        return count.to(problem.statistics_dtype)

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, Tensor | None]:
        if not self.needs_statistics:
            return torch.cat([torch.zeros_like(row_table[:-1]), grad_rows.unsqueeze(0)]), None
        values = self._values(problem, row_table, column_table)
        weights = self._gradients(problem, values, grad_rows)
        rows = self._coefficients(row_table, weights)
        if column_table is None:
            return rows, None
        # A column that is no row's target has weight 0, one that is several rows' has their sum.
        weights = [problem.sum_at_targets(weight) for weight in weights[len(self.definition.terms) :]]
        return rows, self._coefficients(column_table, weights)

    def _formula(self, scale: float | Tensor, given: Given, values: list[Tensor]) -> Tensor:
        """The losses, ``[N]``, of the terms of the rows, and of their targets' columns."""
        of_rows = len(self.definition.terms)
        return self.definition.row_losses(self.loss, values[:of_rows], values[of_rows:], scale, given)

    def _gradients(self, problem: Problem, values: list[Tensor], grad_rows: Tensor) -> Sequence[Tensor]:
        """``sum_i grad_i dL_i`` in each of the values; that in the scale, which a formula can read, is kept."""
        scale = scalar(problem.scale).clone()
        formula = partial(self._formula, scale, self._given(problem))
        *gradients, of_scale = _gradients(formula, [*values, scale], values, grad_rows)
        if self.definition.cls.scaled:  # of chunk after chunk
            known = self.own_scale_gradient
            self.own_scale_gradient = of_scale if known is None else known + of_scale
        return gradients

    def _given(self, problem: Problem) -> Given:
        """The values that :meth:`_formula` takes."""
        if problem.column_values is None or not self.definition.cls.symmetric:
            return Given(problem.row_values, None)
        return Given(problem.row_values, problem.at_targets(problem.column_values))

    def _values(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> list[Tensor]:
        """The values of the terms that :meth:`_formula` takes: of the rows, then of their targets' columns."""
        values = self._values_of(row_table, problem.scale)
        if column_table is not None:
            values += self._values_of(problem.at_targets(column_table), problem.scale)
        return values

    def _values_of(self, table: Tensor, scale: float | Tensor) -> list[Tensor]:
        """The values of all terms, ``[N]`` each in fp64, from a table of statistics."""
        values, factors = [], self._factors(scale)
        offsets = dict(zip(factors, self.functions.offsets(None, scale, *self.values)))
        for term, place in places(self.definition.terms, "statistics"):
            factor = factors[term.name]
            if term.kind == "total":
                values.append(table[place].double() * factor)
            else:
                top, total = table[place].double(), table[place + 1].double()
                value = top * abs(factor) + total.log() + offsets[term.name]
                values.append(torch.where(total == 0, -torch.inf, value))
        return values

    def _coefficients(self, table: Tensor, weights: Sequence[Tensor]) -> Tensor:
        rows = []
        for (term, place), weight in zip(places(self.definition.terms, "statistics"), weights):
            if term.slope is None:
                continue
            weight = weight.to(table.dtype)
            if term.kind == "logsumexp":
                rows += logarithms(table[place], table[place + 1])
                weight = weight.masked_fill(table[place + 1] == 0, 0)
            rows.append(weight)
        return torch.stack(rows) if rows else table.new_empty(0, table.shape[1])

    # -- sweep 2 ---------------------------------------------------------------------------------------------

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Where one sweep does all, adds to the tables' totals, too; a tile on the diagonal to the rows' alone."""
        tile = of_columns = self._tile(s, pairs, with_slopes=True)
        if column_table is not None and self.has_sides:
            of_columns = self._tile(s, pairs, with_slopes=True, seen_from_columns=True)
        if not self.needs_statistics:
            _fold(tile, self.definition.terms, 1, row_table)
            if column_table is not None and not pairs.diagonal:
                _fold(of_columns, self.definition.terms, 0, column_table)
        of_rows, of_pairs = row_table.unsqueeze(2), [] if column_table is None else [column_table.unsqueeze(1)]
        if of_columns is tile:
            out.copy_(self._weights(s, tile, [of_rows, *of_pairs]))
        else:
            torch.add(self._weights(s, tile, [of_rows]), self._weights(s, of_columns, of_pairs), out=out)

    def _weights(self, s: Tensor, tile: dict[str, TermOfTile], tables: list[Tensor]) -> Tensor:
        """W of a tile under coefficients ``[quantities, R, 1]`` of its rows, ``[quantities, 1, C]`` of its columns."""
        terms = self.definition.terms
        if not self.needs_statistics:
            slopes = reduce(torch.add, (tile[term.name].slope for term in terms))
            return slopes * reduce(torch.add, (table[-1] for table in tables))
        w = torch.zeros_like(s)
        for term, place in places(terms, "coefficients"):
            if term.slope is not None:
                share = reduce(torch.add, (_share(tile[term.name], table[place:]) for table in tables))
                w += share * tile[term.name].slope
        return w

    def _tile(
        self, s: Tensor, pairs: Pairs, with_slopes: bool = False, seen_from_columns: bool = False
    ) -> dict[str, TermOfTile]:
        facts = facts_of_tile(pairs, s, self.definition.facts)
        given = given_of_tile(pairs.guide, pairs.row_values, pairs.column_values, seen_from_columns)
        return terms_of_tile(
            self.definition.terms, self.functions, s, pairs.scale, self.values, facts, given, with_slopes
        )

    def _factors(self, scale: float | Tensor) -> dict[str, float | Tensor]:
        """The terms' factors, by name."""
        names = (term.name for term in self.definition.terms)
        return dict(zip(names, self.functions.factors(None, scale, *self.values)))


def _fold(tile: dict[str, TermOfTile], terms: tuple[Term, ...], dim: int, table: Tensor) -> None:
    """Add the terms of a tile to statistics."""
    for term, place in places(terms, "statistics"):
        if term.kind == "total":
            table[place] += tile[term.name].total(dim)
        else:
            fold_sum_exp(*tile[term.name].signed(), dim, table[place : place + 2])


def _share(term: TermOfTile, coefficients: Tensor) -> Tensor:
    """What a term's slope is multiplied by, of a row's or a column's coefficients ``[quantities, R or 1, 1 or C]``,
    of which the first are the term's."""
    if term.term.kind == "total":
        return coefficients[0]
    top, log_sum, weight = coefficients[:3]
    v, steep = term.signed()
    return ((v - top) * steep - log_sum).exp_() * weight


def _empty(terms: tuple[Term, ...], count: int, like: Tensor) -> Tensor:
    """A new table of statistics, of no pairs."""
    table = like.new_zeros((sum(term.statistics for term in terms), count))
    for term, place in places(terms, "statistics"):
        if term.kind == "logsumexp":
            table[place] = torch.finfo(like.dtype).min
    return table


def _gradients(
    formula: Callable[[list[Tensor]], Tensor], leaves: list[Tensor], values: list[Tensor], grad_rows: Tensor
) -> Sequence[Tensor]:
    """``sum_i grad_i d formula(values)_i`` in each of the leaves, which are the values and what else it reads."""
    for leaf in leaves:
        leaf.requires_grad_()
    # Within a registered operator autograd is off, whatever its mode says: PyTorch takes it out of the dispatcher
    # around the call of a kernel. This puts it in again.
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        losses = formula(values)
        return torch.autograd.grad(losses, leaves, grad_rows.to(losses.dtype), materialize_grads=True)


def objective_of(loss: PairLoss) -> type[Declared]:
    """The class by which the operator finds the loss: one for all values of its parameters.

    Raises:
        TypeError, ValueError, AttributeError: the loss cannot be declared so.
    """
    cls = type(loss)
    return OBJECTIVES[register(cls, tuple(getattr(loss, name) for name in _options_of(cls)))]


def _options_of(cls: type[PairLoss]) -> tuple[str, ...]:
    return fields_of(cls)[1]


def register(cls: type[PairLoss], options: tuple[bool | int | str, ...]) -> str:
    """The name by which operators and exported programs call the loss, once they can find it."""
    definition = definition_of(cls, options)
    if definition.name not in OBJECTIVES:
        OBJECTIVES[definition.name] = _class_of(definition)
    return definition.name


# The mark that torch.compiler.assume_constant_result leaves, which itself imports all of dynamo: 1.3 s.
_options_of._dynamo_marked_constant = register._dynamo_marked_constant = True


def _class_of(definition: Definition) -> type[Declared]:
    cls = definition.cls
    members = {
        "definition": definition,
        "name": definition.name,
        "functions": functions_of(definition),
        "reads_groups": not definition.facts.isdisjoint(("same", "other")),
        "needs_statistics": not definition.one_sweep,
        "needs_columns": cls.symmetric or (cls.batch and not definition.one_sweep),
        "has_sides": definition.has_sides,
        "by_distance": {"distance": "distance", "squared_distance": "square"}.get(cls.similarity, ""),
    }
    return type(cls.__name__, (Declared,), members)
