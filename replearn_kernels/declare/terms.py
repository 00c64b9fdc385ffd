"""Terms of a loss as the passes take them, and where tables keep what is known of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .algebra import affine, factored, slope
from .expressions import Expr, number
from .pair_loss import Reduction


@dataclass(frozen=True)
class Term:
    """A reduction as the passes take it: ``factor * rest + offset`` summed, in a log-sum-exp, or the largest of them.

    ``kind``: "total", "logsumexp" or "largest"; ``is_negated``: the term is minus that: a smallest.
    ``slope``: its derivative in the logit (the similarity, of a loss without scale); None where that is 0.
    ``means``: of a log-sum-exp, what is averaged over its pairs, each weighted by its exponential; of a largest, what
    is read of its pair.
    ``is_derivative``: it is the derivative of another term in a parameter, and no part of the loss (:mod:`.learning`).
    """

    name: str
    kind: str
    factor: Expr
    rest: Expr
    offset: Expr
    over: Expr
    slope: Expr | None
    means: tuple[Expr, ...] = ()
    is_derivative: bool = False
    is_negated: bool = False

    @classmethod
    def of(cls, name: str, reduction: Reduction, variable: Expr) -> Term:
        kind, is_negated = reduction.kind, reduction.kind == "smallest"
        if kind == "total":  # an offset would count the pairs
            parts = (*factored(reduction.of), number(0, ""))
        else:
            parts = affine(-reduction.of if is_negated else reduction.of)
        derivative = slope(reduction.of, variable)
        if derivative.constant == 0:
            derivative = None
        kind = "largest" if is_negated else kind
        return cls(name, kind, *parts, reduction.over, derivative, is_negated=is_negated)

    @property
    def statistics(self) -> int:
        """How many quantities the statistics keep of the term: its sum; of a log-sum-exp (max, sum, sums of what is
        averaged); of a largest (max, number of the other row, what is read)."""
        return 1 if self.kind == "total" else 2 + len(self.means)

    @property
    def coefficients(self) -> int:
        """How many quantities W reads of the term: a weight; of a log-sum-exp (max, log_sum, weight), of a largest
        (number, weight)."""
        return 0 if self.slope is None else {"total": 1, "logsumexp": 3, "largest": 2}[self.kind]


NUMBER = "_number"
"""The last value of columns, and where these have terms of rows: by which a largest knows them, in whole batches."""


def places(terms: tuple[Term, ...], of: str) -> Iterator[tuple[Term, int]]:
    """Every term, and the place of its first quantity in a table of "statistics" or "coefficients"."""
    place = 0
    for term in terms:
        yield term, place
        place += getattr(term, of)
