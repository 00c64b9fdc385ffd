r"""A declared loss as the engine asks for it: statistics, losses, coefficients and W, all derived.

With the terms ``t_k`` of a row, each a total, a log-sum-exp or the largest over the row's pairs of ``f_k``, a loss
``L(t_1, ...)`` and upstream gradients g::

    c_ki = g_i dL_i / dt_ki                                             by autograd of the author's formula
    W_ij = sum_k c_ki f_k'(l_ij)                                        of totals
         + sum_k c_ki exp(f_k(l_ij) - t_ki) f_k'(l_ij)                  of log-sum-exps

over the pairs that are in the term; in a batch, and of a symmetric loss, the same of the column too (in a batch with
the values of row and column exchanged, where there are some). ``f_k`` is kept
as ``factor * rest + offset``: tables are of ``v = sign(factor) rest``, so that no logit is rounded before the largest
is taken from it (objectives/softmax.py). The author's formula runs in fp64, where ``|factor| max + log sum`` loses
nothing.

    statistics     one after the other: a total's sum; a log-sum-exp's max of v and sum of exp(|factor| (v - max)); a
                   largest's max of v and the number of the other row of that pair, -1 over none
    coefficients   a total's weight c; a log-sum-exp's max, log_sum and weight; a largest's number and weight; nothing
                   of a term without a slope

The largest (or smallest) of a row's pairs has its gradient from that pair alone: ``c_ki f_k'(l_ij)`` of the j it names.

Where the loss is the sum of totals, W needs no statistics, and one sweep does all:

    row table      the totals, which the passes add to; weight (dL / dL_i)

A parameter that is a tensor has its gradient from the statistics, too: ``sum_ki c_ki dt_ki / dp`` (:mod:`.learning`),
and what the author's formula makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from types import ModuleType

import torch
from torch import Tensor

from ..engine.operators import needs_dispatcher
from ..engine.problem import Pairs, Problem
from ..objectives import OBJECTIVES
from ..objectives.base import Objective, steepness
from ..objectives.softmax import fold_sum_exp, logarithms, merge_sum_exp
from .cpp_passes import number_of, why_none
from .definition import Definition, Given, definition_of, fields_of, scalar
from .evaluation import Evaluation, Numbers, is_of_none, through_terms
from .on_tensors import TermOfTile, facts_of_tile, given_of_tile, terms_of_tile
from .pair_loss import PairLoss
from .terms import Term, places
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

    def __init__(self, by_group: bool, values: list[float | Tensor]):
        self.by_group, self.values = by_group, values
        self._evaluation: Evaluation | None = None

    @classmethod
    def from_parameters(cls, parameters: list[float]) -> Declared:
        return cls(bool(parameters[0]), parameters[1:])

    @property
    def parameters(self) -> list[float]:
        return [float(self.by_group), *self.values]

    def learn(self, learned: Tensor) -> None:
        self.values = self.numbers(1.0).with_learned(learned.tolist() if learned.is_cpu else learned.unbind())

    def numbers(self, scale: float | Tensor) -> Numbers:
        """What the formulas are evaluated with, under this scale."""
        return Numbers(self.definition, self.functions, self.values, scale)

    @property
    def epilogue(self):
        return epilogue_of(self.definition)

    @property
    def roles(self) -> tuple[float | Tensor, ...]:
        """Those that are learned as tensors, which kernels read."""
        named = zip(self.definition.parameters, self.values)
        return tuple(scalar(value).float() if name in self.definition.learned else value for name, value in named)

    def native_roles(self, dtype: torch.dtype, pairs: Pairs) -> tuple:
        parameters = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        return number_of(self.name, dtype), parameters, pairs.row_values, pairs.column_values, pairs.guide

    def why_no_passes(self, features: Tensor) -> Callable[[], str | None]:
        """What asks why there are no passes in C++ for these features; None says that there are."""
        return partial(why_none, self.name, getattr(features, "dtype", None))

    @property
    def uses_target(self) -> bool:
        """Where there are no groups, a target is a row's only column of the same one."""
        settings, facts = self.definition.settings, self.definition.facts
        if settings.batch:
            return False
        return settings.symmetric or "target" in facts or (self.reads_groups and not self.by_group)

    # -- sweep 1 ---------------------------------------------------------------------------------------------

    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        table = _empty(self.definition.terms, rows, like)
        if not self.needs_statistics:
            return torch.cat([table, like.new_ones((1, rows))]), None
        return table, _empty(self.definition.terms, columns, like) if self.definition.settings.symmetric else None

    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        tile = self._tile(s, pairs)
        self._fold(tile, pairs, 1, row_table)
        if column_table is not None:
            tile = self._tile(s, pairs, seen_from_columns=True) if self.has_sides else tile
            self._fold(tile, pairs, 0, column_table)

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        factors = self.numbers(scale).factors()
        for term, place in places(self.definition.terms, "statistics"):
            its = slice(place, place + term.statistics)
            if term.kind == "total":
                table[its] += other[its]
            elif term.kind == "largest":
                _keep_larger(table[its], other[its])
            else:
                merge_sum_exp(table[its], other[its], steepness(factors[term.name]), len(term.means))

    # -- combine ---------------------------------------------------------------------------------------------

    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        losses = self._evaluated(problem, row_table, column_table).losses.to(row_table.dtype)
        return losses + problem.squares * 0 if self.by_distance else losses  # a NaN shows, whatever its row counts for

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> int | Tensor:
        if self.definition.cls.counted is PairLoss.counted:  # nor is there a table before the first sweep
            return problem.rows
        numbers, known = self.numbers(problem.scale), self._evaluation
        if known is not None and known.row_table is row_table:
            of_rows = [value.detach() for value in known.of_rows]
        else:
            of_rows = numbers.terms(row_table)
        count = self.definition.count(numbers.loss(), of_rows, problem.scale, Given(problem.row_values, None))
        return count.to(problem.statistics_dtype)

    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, Tensor | None]:
        if not self.needs_statistics:
            return torch.cat([torch.zeros_like(row_table[:-1]), grad_rows.unsqueeze(0)]), None
        weights, of_scale, of_learned = self._evaluated(problem, row_table, column_table).gradients(grad_rows)
        self._evaluation = None  # its graph is used up
        if self.definition.settings.scaled:  # of chunk after chunk of rows
            self.own_scale_gradient = _sum(self.own_scale_gradient, of_scale)
        if of_learned is not None:
            self.own_learned_gradient = _sum(self.own_learned_gradient, of_learned)
        rows = self._coefficients(row_table, weights)
        if column_table is None:
            return rows, None
        # A column that is no row's target has weight 0, one that is several rows' has their sum.
        weights = [problem.sum_at_targets(weight) for weight in weights[len(self.definition.own_terms) :]]
        return rows, self._coefficients(column_table, weights)

    def learned_gradient(self, problem: Problem, row_table: Tensor | None) -> Tensor | None:
        if self.needs_statistics:
            return super().learned_gradient(problem, row_table)
        weights = [row_table[-1].double()] * len(self.definition.own_terms)
        return through_terms(self.numbers(problem.scale), [row_table], weights)

    def _evaluated(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Evaluation:
        """The formula on these tables: where losses and coefficients are asked for in one call, the same object."""
        if self._evaluation is None or self._evaluation.row_table is not row_table:
            self._evaluation = Evaluation(self.numbers(problem.scale), problem, row_table, column_table)
        return self._evaluation

    def _coefficients(self, table: Tensor, weights: Sequence[Tensor]) -> Tensor:
        rows = []
        for (term, place), weight in zip(places(self.definition.own_terms, "statistics"), weights):
            if term.slope is None:
                continue
            weight = weight.to(table.dtype)
            if term.kind == "logsumexp":
                rows += logarithms(table[place], table[place + 1])
                weight = weight.masked_fill(is_of_none(term, table[place:]), 0)
            elif term.kind == "largest":
                weight = weight.masked_fill(is_of_none(term, table[place:]), 0)
                rows.append(table[place + 1])
            rows.append(weight)
        return torch.stack(rows) if rows else table.new_empty(0, table.shape[1])

    # -- sweep 2 ---------------------------------------------------------------------------------------------

    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Where one sweep does all, adds to the tables' totals, too; a tile on the diagonal to the rows' alone."""
        tile = of_columns = self._tile(s, pairs, with_slopes=True)
        if column_table is not None and self.has_sides:
            of_columns = self._tile(s, pairs, with_slopes=True, seen_from_columns=True)
        if not self.needs_statistics:
            self._fold(tile, pairs, 1, row_table)
            if column_table is not None and not pairs.diagonal:
                self._fold(of_columns, pairs, 0, column_table)
        of_rows = [(row_table.unsqueeze(2), self._numbers(pairs, 1))]
        if column_table is None:
            out.copy_(self._weights(s, tile, of_rows))
            return
        of_pairs = [(column_table.unsqueeze(1), self._numbers(pairs, 0))]
        if of_columns is tile:
            out.copy_(self._weights(s, tile, of_rows + of_pairs))
        else:
            torch.add(self._weights(s, tile, of_rows), self._weights(s, of_columns, of_pairs), out=out)

    def _weights(
        self, s: Tensor, tile: dict[str, TermOfTile], sides: list[tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """W of a tile under coefficients ``[quantities, R, 1]`` of its rows and ``[quantities, 1, C]`` of its columns,
        each with the numbers of the other side."""
        terms = self.definition.terms
        if not self.needs_statistics:
            slopes = reduce(torch.add, (tile[term.name].slope for term in terms if term.slope is not None))
            return slopes * reduce(torch.add, (table[-1] for table, _ in sides))
        w = torch.zeros_like(s)
        for term, place in places(terms, "coefficients"):
            if term.slope is not None:
                share = reduce(
                    torch.add, (_share(tile[term.name], table[place:], numbers) for table, numbers in sides)
                )
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

    def _fold(self, tile: dict[str, TermOfTile], pairs: Pairs, dim: int, table: Tensor) -> None:
        """Add the terms of a tile to statistics, along the columns (``dim`` 1) or the rows."""
        for term, place in places(self.definition.terms, "statistics"):
            its, of_tile = table[place : place + term.statistics], tile[term.name]
            if term.kind == "total":
                its += of_tile.total(dim)
            elif term.kind == "largest":
                _fold_largest(of_tile, dim, self._numbers(pairs, dim), its)
            else:
                fold_sum_exp(*of_tile.signed(), dim, its, of_tile.means)

    def _numbers(self, pairs: Pairs, dim: int) -> Tensor | None:
        """Those of what is along ``dim``, ``[1, C]`` of the columns (1) or ``[R, 1]`` of the rows."""
        if not self.definition.has_numbers:
            return None
        return pairs.column_values[-1].unsqueeze(0) if dim == 1 else pairs.row_values[-1].unsqueeze(1)


def _fold_largest(term: TermOfTile, dim: int, numbers: Tensor, table: Tensor) -> None:
    """Merge the largest along ``dim`` into ``table = (max, number, ...)``; ``numbers``: of what is along it."""
    v, _ = term.signed()
    value, place = v.max(dim)  # of equal ones the first; NaN, if there is one
    of_pair = [each.gather(dim, place.unsqueeze(dim)).squeeze(dim) for each in term.means]
    found = torch.stack([value, numbers.flatten()[place], *of_pair])
    _keep_larger(table, found)


def _keep_larger(table: Tensor, other: Tensor) -> None:
    """Merge two tables ``(max, number, ...)`` of one column each, in place: of equal ones the lower number stays."""
    (top, number, *_), (other_top, other_number, *_) = table, other
    alike = (other_top == top) | (other_top.isnan() & top.isnan())
    lower = alike & (other_number >= 0) & ((other_number < number) | (number < 0))
    larger = (other_top > top) | (other_top.isnan() & ~top.isnan()) | lower
    table.copy_(torch.where(larger, other, table))


def _share(term: TermOfTile, coefficients: Tensor, numbers: Tensor | None) -> Tensor:
    """What a term's slope is multiplied by, of a row's or a column's coefficients ``[quantities, R or 1, 1 or C]``,
    of which the first are the term's; ``numbers``: of the other side."""
    if term.term.kind == "total":
        return coefficients[0]
    if term.term.kind == "largest":
        return torch.where(numbers == coefficients[0], coefficients[1], 0)
    top, log_sum, weight = coefficients[:3]
    v, steep = term.signed()
    return ((v - top) * steep - log_sum).exp_() * weight


def _empty(terms: tuple[Term, ...], count: int, like: Tensor) -> Tensor:
    """A new table of statistics, of no pairs."""
    table = like.new_zeros((sum(term.statistics for term in terms), count))
    for term, place in places(terms, "statistics"):
        if term.kind != "total":
            table[place] = torch.finfo(like.dtype).min
        if term.kind == "largest":
            table[place + 1] = -1
    return table


def _sum(known: Tensor | None, found: Tensor) -> Tensor:
    return found if known is None else known + found


def objective_of(loss: PairLoss) -> type[Declared]:
    """The class by which the operator finds the loss: one for all values of its parameters.

    Raises:
        TypeError, ValueError, AttributeError: the loss cannot be declared so.
    """
    cls = type(loss)
    parameters, options = _names_of_fields(cls)
    learned = tuple(name for name in parameters if is_learned(getattr(loss, name)))
    return OBJECTIVES[register(cls, tuple(getattr(loss, name) for name in options), learned)]


def is_learned(parameter: float | Tensor) -> bool:
    """Whether a parameter goes into the call as a tensor: to get a gradient, or as its value cannot be read here."""
    if not isinstance(parameter, Tensor):
        return False
    wants_gradient = parameter.requires_grad and torch.is_grad_enabled()
    return wants_gradient or not parameter.is_cpu or needs_dispatcher(parameter)


def _names_of_fields(cls: type[PairLoss]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return fields_of(cls)


def register(cls: type[PairLoss], options: tuple[bool | int | str, ...], learned: tuple[str, ...] = ()) -> str:
    """The name by which operators and exported programs call the loss, once they can find it."""
    definition = definition_of(cls, options, learned)
    if definition.name not in OBJECTIVES:
        OBJECTIVES[definition.name] = _class_of(definition)
    return definition.name


# The mark that torch.compiler.assume_constant_result leaves, which itself imports all of dynamo: 1.3 s.
_names_of_fields._dynamo_marked_constant = register._dynamo_marked_constant = True


def _class_of(definition: Definition) -> type[Declared]:
    cls, settings = definition.cls, definition.settings
    members = {
        "definition": definition,
        "learned": tuple(f"{cls.__name__}.{name}" for name in definition.learned),
        "name": definition.name,
        "functions": functions_of(definition),
        "reads_groups": not definition.facts.isdisjoint(("same", "other")),
        "needs_statistics": not definition.one_sweep,
        "needs_columns": settings.symmetric or (settings.batch and not definition.one_sweep),
        "has_sides": definition.has_sides,
        "by_distance": {"distance": "distance", "squared_distance": "square"}.get(settings.similarity, ""),
    }
    return type(cls.__name__, (Declared,), members)
