"""Derivatives in a loss's parameters: what else its statistics keep, so that a margin or a bias can learn.

A term t of a row is a total or a log-sum-exp over the row's pairs of f, which reads a parameter p; with g = df / dp::

    dt / dp = sum_j g(l_ij)                     of a total: one total more
            = sum_j exp(f(l_ij) - t) g(l_ij)    of a log-sum-exp: the mean of g, weighted by what it sums already

A factor of g that all pairs share is taken out; of a log-sum-exp, g that is nothing but that is its own mean. So the
sweep that finds the terms finds their derivatives, and no pass over pairs is added: the passes sum what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .algebra import factored, slope
from .expressions import Expr, number
from .pair_loss import Reduction
from .terms import Term


@dataclass(frozen=True)
class Derivative:
    """Of a term in a learned parameter: ``factor`` times a total, a mean, or 1 where both are None."""

    parameter: int  # its place among the learned ones
    term: int  # the author's, by its place
    factor: Expr  # a number that all pairs share
    total: int | None  # the place of a term that the author did not write
    mean: int | None  # the place among the means of the author's term


def with_derivatives(
    terms: tuple[Term, ...], reductions: list[Reduction], learned: tuple[str, ...]
) -> tuple[tuple[Term, ...], tuple[Derivative, ...]]:
    """The terms with what their derivatives need, first the author's; and the derivatives, of those that are not 0."""
    terms, more, derivatives = list(terms), [], []
    for parameter, name in enumerate(learned):
        for k, reduction in enumerate(reductions):
            g = slope(reduction.of, Expr("parameter", name))
            if g.constant == 0:
                continue
            factor, rest = factored(g)
            total = mean = None
            if reduction.kind == "total":
                total = len(terms) + len(more)
                parts = factor, rest, number(0, ""), terms[k].over
                own_name = f"_{terms[k].name}_by_{name}_{total}"  # its place: other names could come to the same
                more.append(Term(own_name, "total", *parts, slope=None, is_derivative=True))
            elif rest.constant != 1:
                mean = len(terms[k].means)
                terms[k] = replace(terms[k], means=(*terms[k].means, rest))
            derivatives.append(Derivative(parameter, k, factor, total, mean))
    return (*terms, *more), tuple(derivatives)
