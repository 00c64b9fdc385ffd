"""A declared loss printed as C++: the terms of a vector of pairs, for the passes in csrc/cpu/declared_kernels.inl.

Parameters are arguments of the passes and not part of the text: other values compile nothing. What all pairs share is
formed in fp64 by the constructor, once for a slab of a tile.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate

from .definition import Definition
from .expressions import Expr
from .printing import INFIX, Writer, parameters_text

_HEAD = """\
// {name}: printed from the declaration of {cls}. {parameters}.
#include "declared_head.inl"

namespace {{

template <typename T>
struct Loss {{
"""
_TAIL = """\
};

}  // namespace

#include "declared_kernels.inl"
"""
_OF_ONE, _OF_TWO = ("absolute", "relu", "softplus", "sigmoid"), ("minimum", "maximum")
_OF_NUMBERS = INFIX | {
    "not": "(!{})", "where": "({} ? {} : {})", "detach": "{}", "divide": "divide({}, {})",
    "exp": "any_exp({})", "log": "any_log({})", "sqrt": "any_sqrt({})",
    **{name: f"{name}({{}})" for name in _OF_ONE}, **{name: f"{name}({{}}, {{}})" for name in _OF_TWO},
}  # fmt: skip
_OF_PAIRS = INFIX | {
    "not": "(~{})", "where": "select<T>({}, {}, {})", "detach": "{}",
    "exp": "any_exp<T>({})", "log": "any_log<T>({})", "sqrt": "any_sqrt<T>({})",
    **{name: f"{name}<T>({{}})" for name in _OF_ONE}, **{name: f"{name}<T>({{}}, {{}})" for name in _OF_TWO},
}  # fmt: skip
_KINDS = {"total": "kTotal", "logsumexp": "kLogSumExp", "largest": "kLargest"}
_TAKES_VECTORS = {"where", "minimum", "maximum"}  # where an operator would take a number beside a vector


@cache
def source_of(definition: Definition) -> str:
    """The text of a library's only file."""
    terms = definition.terms
    kinds = ", ".join(_KINDS[term.kind] for term in terms)
    slopes = ", ".join(_word(term.slope is not None) for term in terms)
    row_values, column_values = len(definition.row_values), len(definition.column_values)
    means, first_mean = [e for term in terms for e in term.means], [0, *accumulate(len(t.means) for t in terms)]
    of_terms = [e for t in terms for e in (t.rest, t.over, t.slope) if e is not None]
    pairs = _OfPairs(definition, [*of_terms, *means])
    body = []
    for k, term in enumerate(terms):
        body += [f"rest[{k}] = {pairs.vector(term.rest)};", f"over[{k}] = {pairs.text(term.over)};"]
        if term.slope is not None:
            body.append(f"if (Slopes) slope[{k}] = {pairs.vector(term.slope)};")
    body += [f"if (!Slopes) mean[{m}] = {pairs.vector(e)};" for m, e in enumerate(means)]
    numbers = _OfNumbers(definition, [*pairs.shared, *(term.factor for term in terms)])
    shared = [f"{name} = {numbers.value(e)};" for e, name in pairs.shared.items()]
    factors = [f"set_factor({k}, {numbers.text(term.factor)});" for k, term in enumerate(terms)]
    members = [
        f"static constexpr int kTerms = {len(terms)}, kParameters = {len(definition.parameters)};",
        f"static constexpr int kRowValues = {row_values}, kColumnValues = {column_values};",
        f"static constexpr bool kReadsGuide = {_word(bool(definition.settings.guide))};",
        f"static constexpr Kind kKind[] = {{{kinds}}};",
        f"static constexpr bool kHasSlope[] = {{{slopes}}};",
        f"static constexpr int kFirstMean[] = {{{', '.join(map(str, first_mean))}}};  // of what terms average or read",
        f"static constexpr bool kOneSweep = {_word(definition.one_sweep)}, kHasSides = {_word(definition.has_sides)};",
        "T sign[kTerms], steepness[kTerms];  // of the terms' factors",
        *(f"{'bool' if e.is_mask else 'T'} {name};" for e, name in pairs.shared.items()),
        "",
        "explicit Loss(DeclaredNumbers numbers) {",
        *_indented(["const double scale = numbers.scale, *role = numbers.parameters;", "(void)scale, (void)role;"]),
        *_indented([*numbers.lines, *shared, *factors]),
        "}",
        "",
        "void set_factor(int k, double factor) {",
        "  steepness[k] = steepness_of<T>(factor);",
        "  sign[k] = T(steepness[k] == 0 ? 0 : (factor > 0) - (factor < 0));",
        "  if (steepness[k] == 0) steepness[k] = 1;",
        "}",
        "",
        "template <bool Slopes>",
        "void of(const Pairs<T, kRowValues, kColumnValues>& pair, Vec<T>* rest, Bits<T>* over, Vec<T>* slope,",
        "        Vec<T>* mean) const {",
        *_indented(["const Vec<T> s = pair.s;", "(void)s;", *pairs.lines, *body]),
        "}",
    ]
    head = _HEAD.format(name=definition.name, cls=definition.cls.__name__, parameters=parameters_text(definition))
    return head + "\n".join(line and f"  {line}" for line in members) + "\n" + _TAIL


class _OfNumbers(Writer):
    """Of what all pairs share, in fp64."""

    def __init__(self, definition: Definition, roots: list[Expr]):
        super().__init__(definition, roots, _OF_NUMBERS, "role[{}]")

    def text(self, e: Expr) -> str:
        if e.op == "constant":
            return _number(e.args[0])
        return super().text(e)

    def value(self, e: Expr) -> str:
        return self.text(e) if e.is_mask else f"T({self.text(e)})"

    def let(self, name: str, text: str) -> None:
        self.lines.append(f"const auto {name} = {text};")


class _OfPairs(Writer):
    """Of a vector of pairs. ``shared``: the names of numbers that it takes from all of them."""

    of_row, of_column, guide = "pair.row[{}]", "pair.column[{}]", "pair.guide"

    def __init__(self, definition: Definition, roots: list[Expr]):
        super().__init__(definition, roots, _OF_PAIRS, "role_{}")
        self.shared: dict[Expr, str] = {}

    def text(self, e: Expr) -> str:
        if e.op == "constant":
            return f"T({_number(e.args[0])})"
        if e.op == "always":
            return "~Bits<T>{}" if e.args[0] else "Bits<T>{}"
        if e.op == "fact":
            return f"pair.{e.args[0]}"
        if not e.of_pair:
            return self.shared.setdefault(e, f"number_{len(self.shared)}")
        if e.op == "logit":
            return f"(s * {self.text(Expr('scale'))})"
        if e.op in _TAKES_VECTORS and e not in self._names:
            *conditions, a, b = e.args
            arguments = *map(self.text, conditions), self.vector(a), self.vector(b)
            return self.named(e, self.notation[e.op].format(*arguments))
        return super().text(e)

    def vector(self, e: Expr) -> str:
        return self.text(e) if e.of_pair else f"splat<T>({self.text(e)})"

    def let(self, name: str, text: str) -> None:
        self.lines.append(f"const auto {name} = {text};")


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _word(flag: bool) -> str:
    return str(flag).lower()


def _number(x: float) -> str:
    if math.isnan(x):
        return "__builtin_nan(\"\")"
    return repr(x) if math.isfinite(x) else "__builtin_inf()" if x > 0 else "-__builtin_inf()"
