"""The structure of a loss: what is found out about a declaration, whatever the values of its parameters."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .algebra import is_symmetric, walk
from .expressions import Expr
from .learning import Derivative, with_derivatives
from .pair_loss import Facts, PairLoss, Reduction
from .terms import NUMBER, Term

_NO_FIELDS = ("row_values", "column_values", "terms", "loss", "counted")
_RESERVED = ("batch", "scaled", "symmetric", "similarity", "guide", *_NO_FIELDS)
SIMILARITIES = ("product", "cosine", "distance", "squared_distance")
_NUMBER_OR_TENSOR = re.compile(r"float \| (torch\.)?Tensor|(torch\.)?Tensor \| float")


@dataclass(frozen=True, eq=False)
class Definition:
    """A loss's structure: all but the values of its parameters.

    ``learned``: those parameters that are tensors, and get a gradient. ``terms``: the author's, then those that the
    ``derivatives`` in such parameters need.
    """

    name: str
    cls: type[PairLoss]
    options: tuple[tuple[str, bool | int | str], ...]
    parameters: tuple[str, ...]
    learned: tuple[str, ...]
    terms: tuple[Term, ...]
    derivatives: tuple[Derivative, ...]
    facts: frozenset[str]

    @property
    def has_columns(self) -> bool:
        """Whether the terms are taken over columns as over rows."""
        return self.settings.batch or self.settings.symmetric

    @property
    def has_numbers(self) -> bool:
        """Whether a term is of a single pair, which is known by the numbers of its row and column."""
        return any(term.kind == "largest" for term in self.terms)

    @property
    def row_values(self) -> tuple[str, ...]:
        """The names of the values of a row: those that calls give, and last its number if that is needed."""
        return self.settings.row_values + (NUMBER,) * (self.has_numbers and self.has_columns)

    @property
    def column_values(self) -> tuple[str, ...]:
        """The same of a column; of a batch, those of its rows."""
        return self.row_values if self.settings.batch else self.settings.column_values + (NUMBER,) * self.has_numbers

    @property
    def takes_given(self) -> bool:
        """Whether passes are given something for rows, columns or pairs beside what every loss takes."""
        return bool(self.row_values or self.column_values or self.settings.guide)

    @property
    def has_sides(self) -> bool:
        """Whether, in a batch, a pair's terms are others seen from its column than from its row."""
        parts = (e for t in self.terms for e in (t.rest, t.over, t.slope, *t.means) if e is not None)
        return self.settings.batch and not all(map(is_symmetric, parts))

    @cached_property
    def settings(self) -> PairLoss:
        """An object that says what is compared: by attributes of its class, or by options."""
        return instance_of(self.cls, dict(self.options))

    @cached_property
    def own_terms(self) -> tuple[Term, ...]:
        """The author's."""
        return tuple(term for term in self.terms if not term.is_derivative)

    @property
    def one_sweep(self) -> bool:
        """Whether W needs no statistics, as the loss is the sum of totals."""
        overridden = self.cls.loss is not PairLoss.loss or self.cls.counted is not PairLoss.counted
        return not overridden and all(term.kind == "total" for term in self.terms)

    def row_losses(
        self, loss: PairLoss, of_rows: list[Tensor], of_columns: list[Tensor], logit_scale: float | Tensor, given: Given
    ) -> Tensor:
        """The author's formula, or the sum of all terms; of the terms in their order."""
        if self.cls.loss is PairLoss.loss:
            return sum(of_rows)
        row = self.values_of_rows(of_rows, logit_scale, given)
        if not self.settings.symmetric:
            return loss.loss(row)
        return loss.loss(row, self._values(of_columns, self.column_values, given.at_targets))

    def count(
        self, loss: PairLoss, of_rows: list[Tensor], logit_scale: float | Tensor, given: Given
    ) -> Tensor | None:
        """What the mean divides by, 0-d in fp64; None: the number of rows."""
        if self.cls.counted is PairLoss.counted:
            return None
        counted = loss.counted(self.values_of_rows(of_rows, logit_scale, given))
        check_rows(f"{self.cls.__name__}.counted", counted, len(of_rows[0]))
        return counted.double().sum()

    def values_of_rows(self, of_rows: list[Tensor], logit_scale: float | Tensor, given: Given) -> Values:
        """The object that the author's formulas get for ``row``."""
        row = self._values(of_rows, self.settings.row_values, given.of_rows)
        if self.settings.scaled:
            row.logit_scale = scalar(logit_scale)
        return row

    def _values(self, of_terms: list[Tensor], names: tuple[str, ...], given: Tensor | None) -> Values:
        values = dict(zip((term.name for term in self.own_terms), of_terms))
        return Values(values if given is None else values | dict(zip(names, given.double())))


class Given(NamedTuple):
    """The values that the call gave, which formulas read."""

    of_rows: Tensor | None  # [values, N]
    at_targets: Tensor | None  # [values, N], of every row's target column: of a symmetric loss

    @classmethod
    def nothing(cls) -> Given:
        return cls(None, None)


def check_rows(name: str, values: Tensor, rows: int) -> None:
    """Raise TypeError or ValueError if a formula of the author's did not return one value for each of the rows."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must return a tensor, one value for every row, got {type(values).__name__}")
    if values.shape != (rows,):
        raise ValueError(
            f"{name} must return one value for every row, [N], got {tuple(values.shape)} for N = {rows}: "
            "the mean or sum over the rows is the caller's, by reduction="
        )


def scalar(number: float | Tensor) -> Tensor:
    """The number as a 0-d tensor in fp64, through which gradients go."""
    return number.double() if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64, device="cpu")


class Values:
    """The terms of every row, or of its target's column, by name."""

    def __init__(self, values: dict[str, Tensor | float]):
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"there is no term or value {name!r}: there are {', '.join(vars(self)) or 'none'}")


@cache
def fields_of(cls: type[PairLoss]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a loss's parameters, and of its options.

    Raises:
        TypeError, ValueError: the class is not as :class:`PairLoss` says.
    """
    _check_class(cls)
    parameters, options = [], []
    for field in fields(cls):
        kind = kind_of(field)
        if kind not in ("float", "bool", "int", "str"):
            raise TypeError(
                f"{cls.__name__}.{field.name} must be annotated float, float | Tensor, bool, int or str, got {kind}"
            )
        (parameters if kind == "float" else options).append(field.name)
    return tuple(parameters), tuple(options)


def kind_of(field: Field) -> str:
    """The name of the type that a field is annotated with; of a float or a tensor, "float"."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return "float" if _NUMBER_OR_TENSOR.fullmatch(kind) else kind


@cache
def definition_of(
    cls: type[PairLoss], options: tuple[bool | int | str, ...], learned: tuple[str, ...] = ()
) -> Definition:
    """The structure of a loss with these options, whatever the values of its parameters.

    ``learned``: the parameters that get a gradient.

    Raises:
        TypeError, ValueError, AttributeError: the loss cannot be declared so; the message says what to write instead.
    """
    parameters, names = fields_of(cls)
    try:
        return _defined(cls, tuple(zip(names, options)), parameters, learned)
    except RecursionError:
        raise ValueError(f"{cls.__name__}.terms nests some hundred operations: that is too deep") from None


def _defined(cls: type[PairLoss], options: tuple, parameters: tuple[str, ...], learned: tuple[str, ...]) -> Definition:
    symbolic = instance_of(cls, dict(options) | {name: Expr("parameter", name) for name in parameters})
    _check_settings(cls.__name__, symbolic)
    variable = Expr("logit" if symbolic.scaled else "s")
    pair = Facts(cls.row_values, cls.row_values if symbolic.batch else cls.column_values, bool(symbolic.guide))
    # The engine's similarities are larger the nearer two rows are: distances come negative.
    reductions = symbolic.terms(-variable if "distance" in symbolic.similarity else variable, pair)
    _check_reductions(cls, reductions)
    terms = tuple(Term.of(name, reduction, variable) for name, reduction in reductions.items())
    if all(term.slope is None for term in terms):
        raise ValueError(f"{cls.__name__}.terms: no term depends on the similarity, so that nothing has a gradient")
    roots = [e for r in reductions.values() for e in (r.of, r.over)]
    facts = frozenset(e.args[0] for e in walk(roots) if e.op == "fact")
    if symbolic.batch and "target" in facts:
        raise TypeError(f"{cls.__name__}: rows of a batch have no target; use pair.same and pair.other")
    names = "batch", "scaled", "symmetric", "similarity", "row_values", "column_values", "guide"
    settings = tuple(getattr(symbolic, name) for name in names)
    terms, derivatives = with_derivatives(terms, list(reductions.values()), learned)
    structure = repr((cls.__qualname__, settings, options, parameters, *[learned] * bool(learned))) + _listing(terms)
    if not cls.__module__.startswith("replearn_kernels."):  # of ours the name says enough
        structure += _text_of(cls.loss) + _text_of(cls.counted)
    return _known(structure, cls, options, parameters, learned, terms, derivatives, facts)


def with_fields(loss: PairLoss, values: Mapping[str, Tensor]) -> PairLoss:
    """The loss with these values of its fields."""
    return instance_of(type(loss), {**vars(loss), **values})


def instance_of(cls: type[PairLoss], values: dict) -> PairLoss:
    """The author's object with these fields, which have been checked when it was made first."""
    instance = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    return instance


def _listing(terms: tuple[Term, ...]) -> str:
    """A text that tells the terms from any others. It lists every expression once, however often it is used."""
    roots = [e for t in terms for e in (t.factor, t.rest, t.offset, t.over, *t.means)]
    numbers: dict[Expr, int] = {}
    lines = [repr([(term.name, "smallest" if term.is_negated else term.kind) for term in terms])]
    for e in walk(roots):
        arguments = [numbers[a] if isinstance(a, Expr) else a for a in e.args]
        numbers[e] = len(numbers)
        lines.append(f"{e.op} {arguments}")
    return "\n".join([*lines, repr([numbers[e] for e in roots])])


_definitions: dict[tuple[str, type], Definition] = {}


def _known(structure: str, cls: type[PairLoss], *others) -> Definition:
    """The definition of this structure and class: one object, with a name that is the same in every process."""
    if (structure, cls) not in _definitions:
        name = f"{cls.__name__}-{hashlib.sha256(structure.encode()).hexdigest()[:12]}"
        alike = sum(known == structure for known, _ in _definitions)
        if alike:  # a class that was defined again, as in a notebook
            name += f"-{alike + 1}"
        _definitions[structure, cls] = Definition(name, cls, *others)
    return _definitions[structure, cls]


def _text_of(function) -> str:
    """A text that tells a function from any that does something else, and is the same in every process."""
    codes, found = [function.__code__], []
    while codes:
        code = codes.pop()
        inner = [constant for constant in code.co_consts if hasattr(constant, "co_code")]
        constants = (sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts if c not in inner)
        found += [code.co_code, code.co_names, list(constants)]
        codes += inner
    return repr(found)


def _check_class(cls: type[PairLoss]) -> None:
    if not issubclass(cls, PairLoss):
        raise TypeError(f"a declared loss is a PairLoss, got {cls.__name__}")
    if not (is_dataclass(cls) and cls.__dataclass_params__.frozen):
        raise TypeError(f"{cls.__name__} must be a frozen dataclass: write @dataclass(frozen=True) above it")
    if not (cls.__name__.isidentifier() and cls.__name__.isascii()):
        raise TypeError(f"the name of a declared loss must be an ASCII identifier, got {cls.__name__!r}")
    for field in fields(cls):
        if field.name in _NO_FIELDS:
            raise TypeError(f"{cls.__name__}.{field.name} cannot be a field: write {field.name} = ... without a type")
    for name in vars(cls).keys() - {*_RESERVED, *(field.name for field in fields(cls))}:
        if near := difflib.get_close_matches(name, _RESERVED, n=1, cutoff=0.8):
            raise TypeError(f"{cls.__name__}.{name} is nothing that PairLoss knows: did you mean {near[0]}?")
    for name in ("row_values", "column_values"):
        _check_names(f"{cls.__name__}.{name}", getattr(cls, name))


def _check_settings(name: str, loss: PairLoss) -> None:
    """What is compared, by attributes of the class or fields of its object; ``name``: the class's."""
    for setting in ("batch", "scaled", "symmetric"):
        if not isinstance(getattr(loss, setting), bool):
            raise TypeError(f"{name}.{setting} must be a bool, got {getattr(loss, setting)!r}")
    if loss.column_values and loss.batch:
        raise ValueError(f"{name}: the columns of a batch are its rows: give names to row_values alone")
    if loss.similarity not in SIMILARITIES:
        raise ValueError(f"{name}.similarity must be one of {', '.join(SIMILARITIES)}, got {loss.similarity!r}")
    if loss.guide not in ("", "product", "cosine"):
        raise ValueError(f'{name}.guide must be "product" or "cosine", or "" for none, got {loss.guide!r}')
    if "distance" in loss.similarity and not loss.batch:
        raise ValueError(f"{name}: distances are those of a batch: set batch = True, or take products")
    if "distance" in loss.similarity and loss.scaled:
        raise ValueError(f"{name}: distances take no logit_scale: leave scaled out, and use a float field")
    if loss.symmetric and loss.batch:
        raise ValueError(f"{name}: the columns of a batch are its rows: leave symmetric out")
    if loss.symmetric and type(loss).loss is PairLoss.loss:
        raise ValueError(f"{name} is symmetric: define loss(self, row, column)")


def _check_names(what: str, names) -> None:
    if not isinstance(names, tuple):
        raise TypeError(f'{what} must be a tuple of names, ("weight",), got {names!r}')
    for name in names:
        if not _is_name(name):
            raise TypeError(f"{what}: a value needs a name of its own, an ASCII identifier, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} names a value twice: {', '.join(names)}")


def _is_name(name) -> bool:
    """Whether an author may call a term or a value so."""
    return isinstance(name, str) and name.isidentifier() and name.isascii() and name[0] != "_" and name != "logit_scale"


def _check_reductions(cls: type[PairLoss], reductions) -> None:
    if not isinstance(reductions, dict) or not reductions:
        raise TypeError(f"{cls.__name__}.terms must return a dict of terms by name, got {reductions!r}")
    for name, reduction in reductions.items():
        if not _is_name(name):
            raise TypeError(f"{cls.__name__}.terms: a term needs a name of its own, an ASCII identifier, got {name!r}")
        if name in (*cls.row_values, *cls.column_values):
            raise ValueError(f"{cls.__name__}: {name} is a value that calls give: a term needs another name")
        if not isinstance(reduction, Reduction):
            raise TypeError(
                f"{cls.__name__}.terms: {name} must be total(...), logsumexp(...), largest(...) or smallest(...) of an "
                f"expression, got {reduction!r}"
            )
