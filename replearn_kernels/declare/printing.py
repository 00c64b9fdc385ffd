"""Expressions as the text of functions, in a notation of Python."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from types import ModuleType

from .algebra import walk
from .definition import Definition
from .expressions import Expr

INFIX = {
    "add": "({} + {})", "subtract": "({} - {})", "multiply": "({} * {})", "divide": "({} / {})", "negative": "(-{})",
    "gt": "({} > {})", "ge": "({} >= {})", "lt": "({} < {})", "le": "({} <= {})", "and": "({} & {})",
    "or": "({} | {})",
}  # fmt: skip
"""What all notations share."""


_LONG = 160  # characters: what is longer gets a variable, and nothing nests too deep for Python's parser


class Writer:
    """The body of a function: a variable for every value that is used more than once.

    Args:
        roots: the expressions that the function is about; what occurs twice in them gets a variable.
        notation: a format for every operation.
        parameter: a format for the number of a parameter; of two, the second is that of a parameter that is learned.
    """

    of_row, of_column = "row_{}", "column_{}"  # formats for the number of a value of the row, or the column
    guide = "guide"

    def __init__(self, definition: Definition, roots: list[Expr], notation: dict[str, str], *parameter: str):
        self.definition, self.notation, self.parameter = definition, notation, parameter
        self.lines: list[str] = []
        self._names: dict[Expr, str] = {}
        self._uses = Counter(roots)
        for e in walk(roots):
            self._uses.update(a for a in e.args if isinstance(a, Expr))

    def text(self, e: Expr) -> str:
        """An expression of the variables that have been written, and those that it needs beyond them."""
        match e.op:
            case "constant":
                return repr(e.args[0]) if abs(e.args[0]) < float("inf") else f'float("{e.args[0]}")'
            case "parameter":
                of_kind = self.parameter[-1 if e.args[0] in self.definition.learned else 0]
                return of_kind.format(self.definition.parameters.index(e.args[0]))
            case "logit":
                return "(s * scale)"
            case "s" | "scale":
                return e.op
            case "fact":
                return e.args[0]
            case "guide":
                return self.guide
            case "row":
                return self.of_row.format(self.definition.row_values.index(e.args[0]))
            case "column":
                return self.of_column.format(self.definition.column_values.index(e.args[0]))
        if e in self._names:
            return self._names[e]
        return self.named(e, self.notation[e.op].format(*map(self.text, e.args)))

    def named(self, e: Expr, text: str) -> str:
        """The text of an expression, or a variable's that is set to it."""
        if self._uses[e] > 1 or len(text) > _LONG:
            self._names[e] = f"x{len(self._names)}"
            self.let(self._names[e], text)
            return self._names[e]
        return text

    def let(self, name: str, text: str) -> None:
        self.lines.append(f"{name} = {text}")


def function(signature: str, lines: list[str], decorator: str = "") -> str:
    """The text of a function with this body."""
    return "\n".join([*filter(None, [decorator]), f"def {signature}:", *indented(lines)]) + "\n"


def indented(lines: list[str], head: str = "") -> list[str]:
    """The lines as a block under a head, or nothing if there are none."""
    return [*filter(None, [head]), *(f"    {line}" for line in lines)] if lines else []


def tuple_of(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def parameters_text(definition: Definition) -> str:
    """A line that says which parameter is ``role_0``, ``role_1``, ..., and which value ``row_0`` or ``column_0``."""
    named = {"role": definition.parameters, "row": definition.row_values, "column": definition.column_values}
    texts = (f"{kind}_{k}: {name}" for kind, names in named.items() for k, name in enumerate(names))
    return ", ".join(texts) or "no parameters"


def values_text(definition: Definition) -> list[str]:
    """The names of the values of a pair's row, then of its column."""
    rows, columns = len(definition.row_values), len(definition.column_values)
    return [*(f"row_{k}" for k in range(rows)), *(f"column_{k}" for k in range(columns))]


def load(definition: Definition, notation: str, text: str) -> ModuleType:
    """The text as a module, whose lines tracebacks and Triton find without a file.

    Without a time of change, linecache keeps what it holds: see linecache.checkcache.
    """
    file = f"<{definition.name} in {notation}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    name = f"{__package__}.{notation}_of_{definition.name}"
    module = sys.modules[name] = ModuleType(name)  # where torch.compile looks for the functions' globals
    exec(compile(text, file, "exec"), module.__dict__)
    return module
