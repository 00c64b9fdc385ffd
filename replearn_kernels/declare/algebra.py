"""What is done with expressions: a walk over them, their derivative, what all pairs share taken out of them, and the
same of a pair seen from its column."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from .expressions import ATOMS, MIRRORED, Expr, number, sigmoid, where


def walk(roots: list[Expr]) -> Iterator[Expr]:
    """Every expression that there is in ``roots``, once, and after its arguments."""
    seen: set[Expr] = set()
    left = [(root, False) for root in reversed(roots)]
    while left:
        e, is_ready = left.pop()
        if is_ready:
            yield e
        elif e not in seen:
            seen.add(e)
            left.append((e, True))
            left += [(a, False) for a in reversed(e.args) if isinstance(a, Expr) and a not in seen]


def slope(e: Expr, x: Expr, found: dict[Expr, Expr] | None = None) -> Expr:
    """``de / dx`` of an atom x, a pair's or a number that all pairs share, by the rules that torch's autograd has."""
    found = {} if found is None else found
    if e not in found:
        found[e] = _slope(e, x, found)
    return found[e]


def _slope(e: Expr, x: Expr, found: dict[Expr, Expr]) -> Expr:
    if e is x:
        return number(1, "")
    if e.op in ATOMS or e.op == "detach" or (x.of_pair and not e.of_pair):
        return number(0, "")
    if e.op == "where":
        condition, *branches = e.args
        return where(condition, *(slope(branch, x, found) for branch in branches))
    inner = [slope(a, x, found) for a in e.args]
    if all(each.constant == 0 for each in inner):
        return number(0, "")
    a, d = e.args[0], inner[0]
    match e.op:
        case "add":
            return d + inner[1]
        case "subtract":
            return d - inner[1]
        case "negative":
            return -d
        case "multiply":
            return 2 * (a * d) if a is e.args[1] else d * e.args[1] + a * inner[1]
        case "divide":
            return (d - e * inner[1]) / e.args[1]
        case "minimum" | "maximum":
            first, second = (a < e.args[1], a > e.args[1]) if e.op == "minimum" else (a > e.args[1], a < e.args[1])
            return where(first, d, where(second, inner[1], (d + inner[1]) / 2))
        case "exp":
            return e * d
        case "log":
            return d / a
        case "sqrt":
            return d / (2 * e)
        case "absolute":
            return where(a > 0, d, where(a < 0, -d, 0))
        case "relu":
            return where(a <= 0, 0, d)
        case "softplus":
            return sigmoid(a) * d
        case "sigmoid":
            return e * (1 - e) * d
    raise AssertionError(f"no rule for {e.op}")


@lru_cache(maxsize=4096)
def factored(e: Expr) -> tuple[Expr, Expr]:
    """(factor, rest) with ``e = factor * rest``, where the factor is a number that all pairs share."""
    if not e.of_pair:
        return e, number(1, "")
    if e.op == "logit":
        return Expr("scale"), Expr("s")
    if e.op == "negative":
        factor, rest = factored(e.args[0])
        return -factor, rest
    if e.op == "multiply":
        (factor, rest), (other_factor, other_rest) = map(factored, e.args)
        return factor * other_factor, rest * other_rest
    if e.op == "divide" and not e.args[1].of_pair:
        factor, rest = factored(e.args[0])
        return factor / e.args[1], rest
    return number(1, ""), e


def affine(e: Expr) -> tuple[Expr, Expr, Expr]:
    """(factor, rest, offset) with ``e = factor * rest + offset``, where only the rest is of the pair."""
    factor, rest = factored(e)
    if rest.op not in ("add", "subtract") or all(a.of_pair for a in rest.args):
        return factor, rest, number(0, "")
    a, b = rest.args
    if rest.op == "subtract":
        b = -b
    shared, of_pair = (a, b) if b.of_pair else (b, a)
    inner, rest, offset = affine(of_pair)
    return factor * inner, rest, factor * (offset + shared)


_COMMUTATIVE = frozenset(("add", "multiply", "minimum", "maximum", "and", "or"))


@lru_cache(maxsize=4096)
def seen_from_column(e: Expr) -> Expr:
    """The expression with the values of a pair's row and of its column exchanged."""
    if e.op in ("row", "column"):
        return Expr("column" if e.op == "row" else "row", *e.args)
    if e.op in ATOMS:
        return e
    return Expr(e.op, *map(seen_from_column, e.args))


def is_symmetric(e: Expr) -> bool:
    """Whether it is the same, to the bit but for the sign of a 0, for a pair and for that pair seen from its column:
    may say no where it is."""
    return _alike(e, seen_from_column(e))


@lru_cache(maxsize=4096)
def _alike(a: Expr, b: Expr) -> bool:
    """Whether two expressions have the same value, as far as the order of operands goes."""
    if a is b:
        return True
    if MIRRORED.get(a.op) == b.op or (a.op == b.op and a.op in _COMMUTATIVE):
        if all(map(_alike, a.args, reversed(b.args))):
            return True
    if a.op != b.op or a.op in ATOMS:
        return False
    if all(map(_alike, a.args, b.args)):
        return True
    x, y = a.args[0], b.args[0]
    of_size = a.op == "absolute" or (a.op == "multiply" and x is a.args[1] and y is b.args[1])
    return of_size and x.op == y.op == "subtract" and all(map(_alike, x.args, reversed(y.args)))
