"""Expressions of one pair: what an author writes, as a graph.

An author's function is called once, with symbols for the similarity, the facts of a pair and the parameters. What it
returns is a graph of :class:`Expr`, in which equal expressions are one object. Nothing is computed here.
"""

from __future__ import annotations

import inspect
import math
import operator
import struct
from collections.abc import Callable
from numbers import Real
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = frozenset(("fact", "always", "gt", "ge", "lt", "le", "and", "or", "not"))
"""Operations whose value is true or false."""
ATOMS = frozenset(("constant", "parameter", "scale", "s", "logit", "fact", "always", "row", "column", "guide"))
_OF_PAIRS = frozenset(("s", "logit", "fact", "row", "column", "guide"))
_known: WeakValueDictionary = WeakValueDictionary()


class Expr:
    """A value of one pair, or where ``of_pair`` is False a number that all pairs share.

    ``op`` names the operation, ``args`` are its arguments: expressions, or for an atom its name or value.
    """

    __slots__ = ("__weakref__", "args", "of_pair", "op")
    __array_ufunc__ = None  # NumPy's scalars and arrays leave the operation to us

    def __new__(cls, op: str, *args):
        key = op, *map(_identity, args)
        known = _known.get(key)
        if known is None:
            known = object.__new__(cls)
            known.op, known.args = op, args
            known.of_pair = op in _OF_PAIRS or any(isinstance(a, Expr) and a.of_pair for a in args)
            _known[key] = known
        return known

    @property
    def is_mask(self) -> bool:
        return self.op in MASKS

    @property
    def constant(self) -> float | None:
        """The value of a constant; None of all other expressions."""
        return self.args[0] if self.op == "constant" else None

    def detach(self) -> Expr:
        """The same value, without a derivative."""
        return Expr("detach", number(self, "detach"))

    def __add__(self, other):
        return add(self, other)

    def __radd__(self, other):
        return add(other, self)

    def __sub__(self, other):
        return subtract(self, other)

    def __rsub__(self, other):
        return subtract(other, self)

    def __mul__(self, other):
        return multiply(self, other)

    def __rmul__(self, other):
        return multiply(other, self)

    def __truediv__(self, other):
        return divide(self, other)

    def __rtruediv__(self, other):
        return divide(other, self)

    def __pow__(self, exponent):
        return power(self, exponent)

    def __rpow__(self, base):
        return exp(multiply(log(base), self))

    def __neg__(self):
        return negative(self)

    def __abs__(self):
        return absolute(self)

    def __gt__(self, other):
        return _compare("gt", self, other)

    def __ge__(self, other):
        return _compare("ge", self, other)

    def __lt__(self, other):
        return _compare("lt", self, other)

    def __le__(self, other):
        return _compare("le", self, other)

    def __and__(self, other):
        return _joined("and", mask(self, "&"), mask(other, "&"))

    def __or__(self, other):
        return _joined("or", mask(self, "|"), mask(other, "|"))

    def __invert__(self):
        condition = mask(self, "~")
        if condition.op == "always":
            return Expr("always", not condition.args[0])
        return condition.args[0] if condition.op == "not" else Expr("not", condition)

    def _refuse_operation(self, *others):
        raise TypeError(f"{self} takes part in no operation but {FUNCTIONS}")

    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __matmul__ = __rmatmul__ = _refuse_operation

    def __bool__(self):
        raise TypeError(
            f"{self} has no truth value when a loss is declared: terms() is called once, not for every pair. "
            "Write where(condition, a, b), minimum(a, b) or maximum(a, b), and join conditions by & | ~ in place of "
            "and, or, not; an option that steers Python must be a bool, int or str field"
        )

    def __float__(self):
        raise TypeError(f"{self} is no number when a loss is declared: use the functions of replearn_kernels.declare")

    __int__ = __index__ = __float__

    def __iter__(self, *key):
        raise TypeError(f"{self} is one value of one pair, not a sequence")

    __getitem__ = __iter__

    def __eq__(self, other):
        if self is other or isinstance(other, Expr):  # equal expressions are one object
            return self is other
        raise TypeError(f"{self} == {other!r}: conditions are made of >, >=, <, <= and equal(a, b)")

    __hash__ = object.__hash__

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            hint = f"in-place operations change no expression: use {FUNCTIONS}"
        elif name in ("max", "min", "amax", "amin", "topk", "argmax", "argmin"):
            hint = "the largest of a row's pairs is a term of its own, largest(x), and smallest(x) the smallest"
        elif name in ("item", "data", "detach_"):
            hint = "it stands for the value, which the loss finds when it runs"
        elif name in FUNCTIONS:
            hint = f"write {name}(x)"
        else:
            hint = f"use {FUNCTIONS}"
        raise AttributeError(f"an expression of a pair has no method {name!r}: {hint}")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch.exp(s) is exp(s), and so on for all functions that there are here."""
        ours = _OF_TORCH.get(function)
        name = getattr(function, "__name__", str(function))
        for tensor in args:
            if isinstance(tensor, Tensor):
                number(tensor, name)
        # What torch's own functions fill in: relu(x, inplace=False), softplus(x, beta=1, threshold=20).
        kwargs = {name: value for name, value in (kwargs or {}).items() if (name, value) != ("inplace", False)}
        try:
            inspect.signature(ours).bind(*args, **kwargs)
        except (TypeError, ValueError):
            how = " with these arguments" if ours else ""
            raise TypeError(f"terms() cannot take torch's {name}{how}: use {FUNCTIONS}") from None
        return ours(*args, **kwargs)

    def __repr__(self) -> str:
        if self.op in ("s", "logit", "scale", "guide"):
            return self.op
        if self.op in ("row", "column"):
            return f"{self.op}.{self.args[0]}"
        if self.op in ATOMS:
            return f"{self.args[0]:g}" if self.op == "constant" else str(self.args[0])
        return _shown(self, 8)


def _identity(argument):
    """What equal arguments have in common. Of a number its bits: 0.0 and -0.0 are equal, NaN is not equal to itself."""
    if isinstance(argument, Expr):
        return id(argument)
    return struct.pack("d", argument) if isinstance(argument, float) else argument


def _shown(e: Expr, depth: int) -> str:
    """The expression as one would write it; deeper than ``depth`` it is cut off."""
    if e.op in ATOMS:
        return repr(e)
    if depth == 0:
        return "..."
    arguments = [_shown(a, depth - 1) for a in e.args]
    if e.op in _SIGNS:
        return f"({arguments[0]} {_SIGNS[e.op]} {arguments[1]})"
    return f"{e.op}({', '.join(arguments)})"


_SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "gt": ">", "ge": ">=", "lt": "<", "le": "<=",
    "and": "&", "or": "|",
}  # fmt: skip
FUNCTIONS = (
    "+ - * / ** abs, exp, log, sqrt, relu, softplus, sigmoid, minimum, maximum, clamp, where, equal, comparisons and "
    ".detach()"
)
"""What an author can write."""


def number(value, where: str) -> Expr:
    """Return the value as an expression that is no condition. ``where``: what asked for it, for the error."""
    if isinstance(value, Expr):
        if value.is_mask:
            raise TypeError(f"{where} takes numbers, got the condition {value}: write where({value}, 1, 0)")
        return value
    if isinstance(value, Tensor):
        raise TypeError(
            f"{where} got a tensor of shape {tuple(value.shape)}: terms() cannot hold tensors. A number that all pairs "
            "share is a float field of the loss, which may be a tensor of one element; one for every row is "
            "pair.row.name, of row_values"
        )
    if hasattr(type(value), "_refuse"):  # a sum over pairs
        value._refuse()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where} takes expressions and numbers, got {type(value).__name__}")
    try:
        return Expr("constant", float(value))
    except OverflowError:
        raise ValueError(f"{where} got a number beyond any float") from None


def mask(value, where: str) -> Expr:
    """Return the value if it is a condition. ``where``: what asked for it, for the error."""
    if isinstance(value, Expr) and value.is_mask:
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    hint = ""
    if isinstance(value, bool):
        hint = ": of two expressions == compares what they are, equal(a, b) what they come to"
    elif isinstance(value, Expr):
        hint = f", which is a number: write {value} > 0"
    raise TypeError(f"{where} takes conditions (pair.same, s > 0.5, ...), got {got}{hint}")


MIRRORED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}
_COMPARISONS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}


def _compare(op: str, a, b) -> Expr:
    a, b = number(a, "a comparison"), number(b, "a comparison")
    if a.constant is not None and b.constant is not None:
        return Expr("always", _COMPARISONS[op](a.constant, b.constant))
    if a.constant is not None:  # a constant comes second: Triton's tensors know what is done to them from the left
        return Expr(MIRRORED[op], b, a)
    return Expr(op, a, b)


def _joined(op: str, a: Expr, b: Expr) -> Expr:
    """Return ``a & b`` (``op`` "and") or ``a | b`` ("or"), in its simplest form."""
    for one, other in ((a, b), (b, a)):
        if one.op == "always":
            return other if one.args[0] == (op == "and") else one
        if not one.of_pair:
            raise TypeError(
                f"{one} is the same for all pairs, and cannot be joined with a condition of pairs: write "
                f"where({one}, a, b), or make it a bool field, which can steer Python"
            )
    return a if a is b else Expr(op, a, b)


def equal(a, b) -> Expr:
    """The condition that both are the same number; NaN is none."""
    return (number(a, "equal") >= b) & (a <= number(b, "equal"))


def add(a, b) -> Expr:
    a, b = number(a, "+"), number(b, "+")
    if a.constant is not None and b.constant is not None:
        return Expr("constant", a.constant + b.constant)
    if a.constant == 0:
        return b
    return a if b.constant == 0 else Expr("add", a, b)


def subtract(a, b) -> Expr:
    a, b = number(a, "-"), number(b, "-")
    if a.constant is not None and b.constant is not None:
        return Expr("constant", a.constant - b.constant)
    if a.constant == 0:
        return negative(b)
    return a if b.constant == 0 else Expr("subtract", a, b)


def negative(a) -> Expr:
    a = number(a, "-")
    if a.constant is not None:
        return Expr("constant", -a.constant)
    return a.args[0] if a.op == "negative" else Expr("negative", a)


def multiply(a, b) -> Expr:
    a, b = number(a, "*"), number(b, "*")
    if a.constant is not None and b.constant is not None:
        return Expr("constant", a.constant * b.constant)
    for one, other in ((a, b), (b, a)):
        if one.constant == 0:
            return one
        if one.constant == 1:
            return other
        if one.constant == -1:
            return negative(other)
    return Expr("multiply", a, b)


def divide(a, b) -> Expr:
    a, b = number(a, "/"), number(b, "/")
    if b.constant == 0:
        raise ZeroDivisionError(f"{a} is divided by 0")
    if a.constant is not None and b.constant is not None:
        return Expr("constant", a.constant / b.constant)
    return a if b.constant == 1 or a.constant == 0 else Expr("divide", a, b)


def power(a, exponent) -> Expr:
    """A power with a whole exponent, or 0.5."""
    if isinstance(exponent, Real) and exponent == 0.5:
        return sqrt(a)
    whole = isinstance(exponent, Real) and not isinstance(exponent, bool) and exponent in range(1, 65)
    if not whole:
        raise TypeError(f"** takes the exponents 1, 2, ... 64 and 0.5, got {exponent!r}: write exp(exponent * log(x))")
    a = number(a, "**")
    if exponent == 1:
        return a
    half = power(a, exponent // 2)
    return half * half * a if exponent % 2 else half * half


def _function(name: str, of_constant: Callable[[float], float]) -> Callable:
    def function(x):
        x = number(x, name)
        if x.constant is None:
            return Expr(name, x)
        try:
            return Expr("constant", float(of_constant(x.constant)))
        except (OverflowError, ValueError):
            raise ValueError(f"{name}({x}) is not finite") from None

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"``{name}`` of every pair's value, as torch's."
    return function


exp, log, sqrt = _function("exp", math.exp), _function("log", math.log), _function("sqrt", math.sqrt)
absolute, relu = _function("absolute", abs), _function("relu", lambda x: max(x, 0.0))
softplus = _function("softplus", lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))))
sigmoid = _function("sigmoid", lambda x: 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x)))


def minimum(a, b) -> Expr:
    """The smaller one; where both are equal they share the derivative, as in torch."""
    return _extreme("minimum", min, a, b)


def maximum(a, b) -> Expr:
    """The larger one; where both are equal they share the derivative, as in torch."""
    return _extreme("maximum", max, a, b)


def _extreme(name: str, of_constants: Callable, a, b) -> Expr:
    a, b = number(a, name), number(b, name)
    if a.constant is not None and b.constant is not None:
        return Expr("constant", of_constants(a.constant, b.constant))
    return a if a is b else Expr(name, a, b)


def clamp(x, min=None, max=None) -> Expr:
    """``x`` within [min, max]; on a bound it keeps its derivative, as in torch."""
    if min is None and max is None:
        raise TypeError("clamp takes min, max or both")
    x = number(x, "clamp")
    if min is not None:
        x = where(x < min, min, x)
    return x if max is None else where(x > max, max, x)


def where(condition, a, b) -> Expr:
    """``a`` of the pairs for which the condition holds, ``b`` of the others; only what is chosen has a derivative."""
    condition, a, b = mask(condition, "where"), number(a, "where"), number(b, "where")
    if condition.op == "always":
        return a if condition.args[0] else b
    return a if a is b else Expr("where", condition, a, b)


_OF_TORCH = {
    torch.exp: exp, torch.log: log, torch.sqrt: sqrt, torch.abs: absolute, torch.relu: relu,
    F.relu: relu, F.softplus: softplus, torch.sigmoid: sigmoid, F.sigmoid: sigmoid,
    torch.eq: equal, torch.ne: lambda a, b: ~equal(a, b),
    torch.minimum: minimum, torch.maximum: maximum, torch.clamp: clamp, torch.where: where, torch.pow: power,
    F.logsigmoid: lambda x: negative(softplus(negative(x))), torch.square: lambda x: power(x, 2),
}  # fmt: skip
