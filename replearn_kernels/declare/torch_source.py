"""A declared loss printed as functions of tensors; what they are written in.

Facts are ``[R, C]`` bool, or True or False where all pairs of a tile are alike; values of rows ``[R, 1]``, of columns
``[1, C]``; the guide's similarities ``[R, C]``; numbers that all pairs share are Python's or 0-d tensors.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .definition import Definition
from .expressions import Expr
from .printing import INFIX, Writer, function, load, parameters_text, tuple_of, values_text

Number = Tensor | float | bool

_HEAD = '''"""{name}: printed from the declaration of {cls}. {parameters}."""

from replearn_kernels.declare.torch_source import (
    absolute, detach, divide, exp, invert, log, maximum, minimum, relu, sigmoid, softplus, sqrt, where,
)
'''
_FUNCTIONS = ("exp", "log", "sqrt", "absolute", "relu", "softplus", "sigmoid", "detach")
NOTATION = INFIX | {name: f"{name}({{}})" for name in _FUNCTIONS} | {
    "divide": "divide({}, {})", "minimum": "minimum({}, {})", "maximum": "maximum({}, {})", "not": "invert({})",
    "where": "where({}, {}, {}, s)",
}  # fmt: skip
FACTS = ("every", "target", "same", "other")


@cache
def source_of(definition: Definition) -> str:
    """The text of the module."""
    terms = definition.terms
    roles = "".join(f", role_{k}" for k in range(len(definition.parameters)))
    given = ", ".join([*FACTS, *["guide"] * bool(definition.settings.guide), *values_text(definition)])
    pair = f"(s, scale{roles}, {given})"
    slopes = [Expr("constant", 0.0) if term.slope is None else term.slope for term in terms]
    rests, overs, means = [term.rest for term in terms], [term.over for term in terms], [term.means for term in terms]
    groups = {
        f"factors(s, scale{roles})": [[term.factor for term in terms]],
        f"offsets(s, scale{roles})": [[term.offset for term in terms]],
        f"factors_of_derivatives(s, scale{roles})": [[each.factor for each in definition.derivatives]],
        f"values{pair}": [rests, overs, means],
        f"values_and_slopes{pair}": [rests, overs, slopes],
    }
    head = _HEAD.format(name=definition.name, cls=definition.cls.__name__, parameters=parameters_text(definition))
    return "\n\n".join([head, *(_function(definition, *group) for group in groups.items())])


@cache
def functions_of(definition: Definition) -> ModuleType:
    """``factors`` and ``offsets`` of the terms, and the derivatives' factors, for which ``s`` is None; ``values``:
    (rests, conditions, what each term averages); ``values_and_slopes``: (rests, conditions, slopes)."""
    return load(definition, "torch", source_of(definition))


def _function(definition: Definition, signature: str, groups: list[list[Expr | tuple[Expr, ...]]]) -> str:
    parts = [part if isinstance(part, tuple) else (part,) for group in groups for part in group]
    writer = Writer(definition, [e for part in parts for e in part], NOTATION, "role_{}")

    def text(part: Expr | tuple[Expr, ...]) -> str:
        return tuple_of(list(map(text, part))) if isinstance(part, tuple) else writer.text(part)

    texts = [tuple_of(list(map(text, group))) for group in groups]
    return function(signature, [*writer.lines, f"return {', '.join(texts)}"])


# -- what the text calls --------------------------------------------------------------------------------------------


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else _of_number(torch.exp, x)


def log(x: Number) -> Number:
    return x.log() if isinstance(x, Tensor) else _of_number(torch.log, x)


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else _of_number(torch.sqrt, x)


def absolute(x: Number) -> Number:
    return abs(x)


def relu(x: Number) -> Number:
    return x.relu() if isinstance(x, Tensor) else _of_number(torch.relu, x)


def softplus(x: Number) -> Number:
    """``log(1 + exp(x))`` for any x; F.softplus returns x from 20 on."""
    return -F.logsigmoid(-x) if isinstance(x, Tensor) else -_of_number(F.logsigmoid, -x)


def sigmoid(x: Number) -> Number:
    return x.sigmoid() if isinstance(x, Tensor) else _of_number(torch.sigmoid, x)


def detach(x: Number) -> Number:
    return x.detach() if isinstance(x, Tensor) else x


def minimum(a: Number, b: Number) -> Number:
    """The smaller one, NaN if either is."""
    return torch.minimum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)


def maximum(a: Number, b: Number) -> Number:
    """The larger one, NaN if either is."""
    return torch.maximum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else max(a, b)


def divide(a: Number, b: Number) -> Number:
    """``a / b``; of two numbers too a division by 0 is infinite, or NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)


def invert(condition: Tensor | bool) -> Tensor | bool:
    return ~condition if isinstance(condition, Tensor) else not condition


def where(condition: Tensor | bool, a: Number, b: Number, s: Tensor | None) -> Number:
    """``a`` where the condition holds, else ``b``. Numbers take the dtype of ``s``: torch.where would make two fp32."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.where(condition, a, b)
    like = condition.new_empty((), dtype=torch.float64) if s is None else s
    return torch.where(condition, like.new_full((), a), b)


def _of_number(of_tensor, x: float) -> float:
    return of_tensor(torch.tensor(x, dtype=torch.float64, device="cpu")).item()


def _tensors(a: Number, b: Number) -> tuple[Tensor, Tensor]:
    """Both as tensors; a number's, unlike one made of it, waits for no copy to a GPU."""
    if not isinstance(a, Tensor):
        return b.new_full((), a), b
    return a, b if isinstance(b, Tensor) else a.new_full((), b)
