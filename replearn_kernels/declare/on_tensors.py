"""The terms of a tile of pairs, computed by PyTorch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..engine.problem import Pairs
from ..objectives.base import sign, steepness
from .terms import Term
from .torch_source import FACTS, invert

Facts = tuple[Tensor | bool, ...]
"""``[R, C]`` bool, or True or False of all pairs, in the order of ``torch_source.FACTS``."""


class TermOfTile:
    """One term of the pairs of a tile ``[R, C]``.

    ``rest``: its values without factor and offset; ``over``: which pairs are in it; ``slope``: in the pairs' logits;
    ``means``: of what it averages.
    """

    def __init__(
        self, s: Tensor, term: Term, factor: float | Tensor, rest, over: Tensor | bool, slope=0.0, means=()
    ):
        self.s, self.term, self.factor, self.rest, self.over, self._slope = s, term, factor, rest, over, slope
        self._means = means

    def total(self, dim: int) -> Tensor:
        """The sum along ``dim``, without the factor."""
        return self._within(self.rest, 0.0).sum(dim)

    def signed(self) -> tuple[Tensor, float | Tensor]:
        """(v, steepness) of a log-sum-exp of ``steepness v + offset``; v is -inf of pairs that are not in it."""
        return self._within(self.rest * sign(self.factor), -torch.inf), steepness(self.factor)

    def logsumexp(self, dim: int, offset: float | Tensor) -> Tensor:
        """The log-sum-exp along ``dim`` by the plain formula, with factor and offset."""
        return self._within(self.rest * self.factor + offset, -torch.inf).logsumexp(dim)

    def largest(self, dim: int, offset: float | Tensor) -> Tensor:
        """The largest along ``dim`` by the plain formula, with factor and offset; -inf over none."""
        values = self._within(self.rest * self.factor + offset, -torch.inf)
        return values.max(dim)[0] if values.shape[dim] else values.sum(dim) - torch.inf

    @property
    def slope(self) -> Tensor:
        """The term's derivative in every pair's logit, ``[R, C]``; 0 for pairs that are not in the term."""
        return self._within(self._slope, 0.0)

    @property
    def means(self) -> list[Tensor]:
        """What is averaged, of every pair, ``[R, C]`` each; 0 for pairs that are not in the term."""
        return [self._within(values, 0.0) for values in self._means]

    def _within(self, values: Tensor | float, other: float) -> Tensor:
        if not isinstance(values, Tensor):
            values = self.s.new_full((), values)
        values = values.to(self.s.dtype).expand(self.s.shape)  # a number that all pairs share is 0-d
        if isinstance(self.over, Tensor):
            return torch.where(self.over, values, other)
        return values if self.over else torch.full_like(values, other)


def terms_of_tile(
    terms: tuple[Term, ...], functions: ModuleType, s: Tensor, scale: float | Tensor, parameters: list[float],
    facts: Facts, given: list[Tensor], with_slopes: bool = False,
) -> dict[str, TermOfTile]:  # fmt: skip
    """By the terms' names, of similarities ``s[R, C]``; ``functions``: those printed for the terms; ``given``: by
    the call, of :func:`given_of_tile`. ``with_slopes``: in place of what the terms average."""
    factors = functions.factors(None, scale, *parameters)
    pair = s, scale, *parameters, *facts, *given
    if with_slopes:
        rests, overs, slopes = functions.values_and_slopes(*pair)
        return {term.name: TermOfTile(s, term, *of) for term, *of in zip(terms, factors, rests, overs, slopes)}
    rests, overs, means = functions.values(*pair)
    return {
        term.name: TermOfTile(s, term, *of, means=of_term)
        for term, *of, of_term in zip(terms, factors, rests, overs, means)
    }


def given_of_tile(
    guide: Tensor | None, row_values: Tensor | None, column_values: Tensor | None, seen_from_columns: bool = False
) -> list[Tensor]:
    """What calls give for a tile ``[R, C]`` as its terms take it: the guide's similarities, then values ``[values, R]``
    and ``[values, C]``, the row's first, then the column's; ``seen_from_columns``: the other way round."""
    rows = [] if row_values is None else list(row_values.unsqueeze(2))
    columns = [] if column_values is None else list(column_values.unsqueeze(1))
    of_pairs = [] if guide is None else [guide]
    return [*of_pairs, *columns, *rows] if seen_from_columns else [*of_pairs, *rows, *columns]


def facts_of_tile(pairs: Pairs, s: Tensor, needed: frozenset[str]) -> Facts:
    """Those facts that are ``needed``, of the pairs of a tile ``s[R, C]``; False in place of others."""
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device) if pairs.diagonal else None
    facts: dict[str, Tensor | bool] = {"every": True if itself is None else ~itself}
    target: Tensor | bool = False
    if pairs.target is not None and (pairs.row_group is None or "target" in needed):
        inside, column = pairs.inside(s.shape[1])
        target = facts["target"] = torch.zeros_like(s, dtype=torch.bool).scatter_(1, column, inside.unsqueeze(1))
    if not needed.isdisjoint(("same", "other")):
        same = facts["same"] = target if pairs.row_group is None else pairs.same_group()
        facts["other"] = invert(same) if itself is None else ~(same | itself)
    return tuple(facts.get(name, False) for name in FACTS)
