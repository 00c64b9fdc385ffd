"""A declared loss printed as a Triton epilogue (``triton_kernels/tiles.py``), and loaded.

Parameters are arguments of the kernels and not part of the text: other values compile nothing. The text is held in
memory, where Python's tracebacks find it too; what Triton compiles from it is in Triton's cache on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from .definition import Definition
from .expressions import Expr
from .printing import INFIX, Writer, function, indented, load, parameters_text, tuple_of, values_text
from .terms import Term, places

_HEAD = '''"""{name}: printed from the declaration of {cls}. {parameters}."""

import triton
import triton.language as tl

from replearn_kernels.triton_kernels.declared import (
    every_pairs, fold, fold_largest, fold_weights, guide_tile, is_larger, maximum, merged, minimum, other_pairs,
    rate_of, relu, rescaled, same_pairs, share, sigmoid, signed, signed_or_0, softplus, target_pairs,
)
from replearn_kernels.triton_kernels.tiles import (
    LOWEST, Epilogue, table_quantity, value_of_columns, value_of_rows,
)
'''
_SCALE = re.compile(r"\bscale\b")
_LEARNED = re.compile(r"(?<!\.)\brole_\d+\b")  # a parameter that is a tensor; others are "inputs.role_0"
NOTATION = INFIX | {
    "not": "({} == 0)", "where": "tl.where({}, {}, {})", "detach": "{}", "exp": "tl.exp({})", "log": "tl.log({})",
    "sqrt": "tl.sqrt_rn({})", "absolute": "tl.abs({})", "relu": "relu({})", "softplus": "softplus({})",
    "sigmoid": "sigmoid({})", "minimum": "minimum({}, {})", "maximum": "maximum({}, {})",
}  # fmt: skip


@cache
def epilogue_of(definition: Definition):
    """The :class:`~replearn_kernels.triton_kernels.Epilogue` of a declared loss."""
    return load(definition, "triton", source_of(definition)).EPILOGUE


@cache
def source_of(definition: Definition) -> str:
    """The text of the epilogue, a module of Python."""
    functions = _empty(definition), _reduce(definition), _merge(definition), _weights(definition)
    options = {
        "takes_roles": bool(definition.parameters),
        "takes_given": definition.takes_given,
        "folds_columns": definition.one_sweep and definition.settings.batch,
        "additive": all(term.kind == "total" for term in definition.terms),
    }
    arguments = f'"{_block_sizes(definition)}"', "empty", "reduce", "merge", "weights"
    epilogue = ", ".join([*arguments, *(f"{name}={value}" for name, value in options.items())])
    head = _HEAD.format(
        name=definition.name, cls=definition.cls.__name__, parameters=parameters_text(definition)
    )
    return "\n\n".join([head, *functions, f"EPILOGUE = Epilogue({epilogue})\n"])


def _block_sizes(definition: Definition) -> str:
    """The name by which ``triton_kernels/configs.py`` knows them: of what a block's rows and columns hold."""
    quantities = sum(term.statistics for term in definition.terms) * (2 if definition.has_columns else 1)
    if definition.settings.guide:
        return "declared_guided"
    if quantities > 12:
        return "declared_many"
    several = sum(term.kind == "logsumexp" for term in definition.terms) > 1
    return "declared_large" if several or definition.takes_given or quantities > 6 else "declared"


def _writer(definition: Definition, roots: list[Expr]) -> Writer:
    return Writer(definition, roots, NOTATION, "inputs.role_{}", "role_{}")


def _rate(writer: Writer, term: Term) -> str:
    return f"rate_of({writer.text(term.factor)})"


def _signed(writer: Writer, term: Term, signed: str = "signed") -> str:
    """The text of a log-sum-exp's or a largest's v, which is -inf for pairs that are not in it."""
    rest, factor = writer.text(term.rest), term.factor.constant
    if factor is None:
        rest = f"{signed}({writer.text(term.factor)}, {rest})"
    elif factor < 0:
        rest = f"(-{rest})"
    return f'tl.where({writer.text(term.over)}, {rest}, float("-inf"))'


def _names(term: Term) -> list[str]:
    """The variables that hold the statistics of a log-sum-exp, or of a largest."""
    kinds = ("max", "sum", "mean") if term.kind == "logsumexp" else ("max", "number", "read")
    return [f"{term.name}_{kind}" for kind in (*kinds[:2], *(f"{kinds[2]}_{m}" for m in range(len(term.means))))]


def _empty(definition: Definition) -> str:
    first = {"total": [], "logsumexp": ["low"], "largest": ["low", "none"]}
    parts = [part for t in definition.terms for part in [*first[t.kind], *["zero"] * t.statistics][: t.statistics]]
    none = ["none = tl.full([BLOCK], -1.0, tl.float32)"] if definition.has_numbers else []
    return _function(
        "empty(BLOCK: tl.constexpr, AXIS: tl.constexpr)",
        "zero, low = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], LOWEST, tl.float32)",
        *none,
        f"return {tuple_of(parts + _weight(definition))}",
    )


def _reduce(definition: Definition) -> str:
    terms, parts = definition.terms, []
    writer = _writer(definition, [e for t in terms for e in (t.rest, t.factor, t.over, *t.means)])
    if not definition.has_columns:
        writer.lines.append('tl.static_assert(AXIS == 1, "columns have no statistics")')
    for term in terms:
        parts += _REDUCED[term.kind](writer, term)
    if definition.one_sweep:
        writer.let("zero", f"tl.zeros_like({parts[0]})")
    lines = *writer.lines, f"return {tuple_of(parts + _weight(definition))}"
    given = _values(definition)
    if definition.has_sides:
        given = [*indented(given, "if AXIS == 1:"), *indented(_values(definition, seen_from_columns=True), "else:")]
    given += _numbers(definition)
    return _function("reduce(s, row, column, inputs, AXIS: tl.constexpr)", *_facts(definition), *given, *lines)


def _reduced_total(writer: Writer, term: Term) -> list[str]:
    """The variables of a total of a tile, once they are written."""
    name = f"{term.name}_sum"
    writer.let(name, f"tl.sum({_of_its_pairs(writer, term, term.rest)}, AXIS)")
    return [name]


def _reduced_log_sum_exp(writer: Writer, term: Term) -> list[str]:
    """The same of a log-sum-exp."""
    names, v, rate = _names(term), _signed(writer, term), _rate(writer, term)
    if not term.means:
        writer.let(", ".join(names), f"fold({v}, {rate}, AXIS)")
        return names
    weights = f"{term.name}_weights"
    writer.let(", ".join([*names[:2], weights]), f"fold_weights({v}, {rate}, AXIS)")
    for name, mean in zip(names[2:], term.means):
        writer.let(name, f"tl.sum({weights} * {_of_its_pairs(writer, term, mean)}, AXIS)")
    return names


def _reduced_largest(writer: Writer, term: Term) -> list[str]:
    """The same of a largest."""
    names, chosen = _names(term), f"{term.name}_chosen"
    writer.let(", ".join([*names[:2], chosen]), f"fold_largest({_signed(writer, term, 'signed_or_0')}, numbers, AXIS)")
    for name, read in zip(names[2:], term.means):
        writer.let(name, f"tl.sum(tl.where({chosen}, {writer.text(read)}, 0.0), AXIS)")
    return names


_REDUCED = {"total": _reduced_total, "logsumexp": _reduced_log_sum_exp, "largest": _reduced_largest}


def _of_its_pairs(writer: Writer, term: Term, e: Expr) -> str:
    return f"tl.where({writer.text(term.over)}, {writer.text(e)}, 0.0)"


def _merge(definition: Definition) -> str:
    writer, parts = _writer(definition, [term.factor for term in definition.terms]), []
    for term, place in places(definition.terms, "statistics"):
        if term.kind == "total":
            parts.append(f"a[{place}] + b[{place}]")
            continue
        names, both = _names(term), ", ".join(f"{side}[{place + k}]" for side in "ab" for k in range(2))
        if term.kind == "largest":
            writer.let("is_b", f"is_larger({both})")
            for k, name in enumerate(names, place):
                writer.let(name, f"tl.where(is_b, b[{k}], a[{k}])")
        elif term.means:
            writer.let(f"{names[0]}, of_a, of_b", f"rescaled(a[{place}], b[{place}], {_rate(writer, term)})")
            for k, name in enumerate(names[1:], place + 1):
                writer.let(name, f"a[{k}] * of_a + b[{k}] * of_b")
        else:
            writer.let(", ".join(names), f"merged({both}, {_rate(writer, term)})")
        parts += names
    if definition.one_sweep:
        parts.append(f"a[{len(parts)}] + b[{len(parts)}]")
    return _function("merge(a, b, inputs)", *writer.lines, f"return {tuple_of(parts)}")


def _weights(definition: Definition) -> str:
    if not definition.has_sides:
        return _weights_of(definition, "weights", "row", "column")
    sum_of_both = [
        "w = weights_of_rows(s, row, column, inputs)",
        *indented(["w += weights_of_columns(s, row, column, inputs)"], "if inputs.column_table is not None:"),
        "return w",
    ]
    functions = (
        _weights_of(definition, "weights_of_rows", "row"),
        _weights_of(definition, "weights_of_columns", "column", seen_from_columns=True),
        _function("weights(s, row, column, inputs)", *sum_of_both),
    )
    return "\n\n".join(functions)


def _weights_of(definition: Definition, name: str, *sides: str, seen_from_columns: bool = False) -> str:
    """W by the coefficients of these sides."""
    terms = [term for term in definition.terms if term.slope is not None]
    writer = _writer(definition, [e for t in terms for e in (t.rest, t.factor, t.over, t.slope)])
    if definition.one_sweep:
        _let_shared(writer, definition, sides, lambda side: _quantity(side, len(definition.terms)))
    writer.let("w", "tl.zeros_like(s)")
    for term, place in places(definition.terms, "coefficients"):
        if term.slope is None:
            continue
        if term.kind == "logsumexp":
            v, rate = f"{term.name}_v", f"{term.name}_rate"
            writer.let(v, _signed(writer, term))
            writer.let(rate, _rate(writer, term))
            _let_shared(
                writer, definition, sides, lambda side, v=v, rate=rate, place=place: _share(v, rate, side, place)
            )
        elif term.kind == "largest":
            own = sides[0]  # seen from columns, a pair's row is the tile's column
            _let_shared(
                writer, definition, sides,
                lambda side, own=own, place=place: _chosen(_other_numbers(definition, side == own), side, place),
            )  # fmt: skip
        elif not definition.one_sweep:
            _let_shared(writer, definition, sides, lambda side, place=place: _quantity(side, place))
        part = "shared" if term.slope.constant == 1 else f"shared * {writer.text(term.slope)}"
        writer.let("w", f"w + tl.where({writer.text(term.over)}, {part}, 0.0)")
    lines = *_facts(definition), *_values(definition, seen_from_columns), *writer.lines, "return w"
    return _function(f"{name}(s, row, column, inputs)", *lines)


def _let_shared(
    writer: Writer, definition: Definition, sides: tuple[str, ...], of_side: Callable[[str], str]
) -> None:
    """What a term's slope is multiplied by: the row's, and where columns have terms the column's."""
    writer.let("shared", of_side(sides[0]))
    if definition.has_columns and len(sides) == 2:
        writer.lines += indented([f"shared += {of_side('column')}"], "if inputs.column_table is not None:")


def _quantity(side: str, place: int) -> str:
    return f"table_quantity(row, column, inputs, {place}, {int(side == 'row')})"


def _share(v: str, rate: str, side: str, place: int) -> str:
    """The text of what a log-sum-exp's slope is multiplied by, of rows or of columns (``side``)."""
    table = f"inputs.{side}_table + {place} * inputs.{side}_stride, inputs.{side}_stride"
    return f"share({v}, {rate}, {table}, {side}, inputs.{side}s)"


def _chosen(numbers: str, side: str, place: int) -> str:
    """The text of what the slope of a largest is multiplied by, of rows or of columns (``side``)."""
    return f"tl.where({numbers} == {_quantity(side, place)}, {_quantity(side, place + 1)}, 0.0)"


def _other_numbers(definition: Definition, of_row: bool) -> str:
    """The variable with the numbers of the columns, which a pair's row chooses among; else of the rows."""
    if of_row:
        return f"column_{len(definition.column_values) - 1}"
    return f"row_{len(definition.row_values) - 1}"


def _numbers(definition: Definition) -> list[str]:
    """The lines that set ``numbers`` to those that statistics along AXIS choose among."""
    if not definition.has_numbers:
        return []
    of_rows = f"numbers = {_other_numbers(definition, True)}"
    if definition.has_sides or not definition.has_columns:
        return [of_rows]
    of_columns = f"numbers = {_other_numbers(definition, False)}"
    return [*indented([of_rows], "if AXIS == 1:"), *indented([of_columns], "else:")]


def _facts(definition: Definition) -> list[str]:
    """The lines that form the facts of a tile's pairs, as far as the loss reads them, and the guide's similarities."""
    facts = [name for name in ("every", "target", "same", "other") if name in definition.facts]
    lines = [f"{name} = {name}_pairs(row, column, inputs)" for name in facts]
    return [*lines, "guide = guide_tile(row, column, inputs)"] if definition.settings.guide else lines


def _values(definition: Definition, seen_from_columns: bool = False) -> list[str]:
    """The lines that load what the call gives for rows and columns; of the latter a pair's row is the tile's column."""
    sides = [("row", definition.row_values), ("column", definition.column_values)]
    loads = [f"value_of_{side}s({side}, inputs, {k})" for side, names in sides for k in range(len(names))]
    if seen_from_columns:
        loads = loads[len(definition.row_values) :] + loads[: len(definition.row_values)]
    return [f"{name} = {load}" for name, load in zip(values_text(definition), loads)]


def _weight(definition: Definition) -> list[str]:
    """The part of a statistic that stands for the weight, which tables of one sweep keep after the totals."""
    return ["zero"] if definition.one_sweep else []


def _function(signature: str, *lines: str) -> str:
    if any(_SCALE.search(line) for line in lines):
        lines = ("scale = tl.load(inputs.scale).to(tl.float32)", *lines)
    learned = sorted({found for line in lines for found in _LEARNED.findall(line)})
    lines = (*(f"{name} = tl.load(inputs.{name})" for name in learned), *lines)
    return function(signature, list(lines), "@triton.jit")
