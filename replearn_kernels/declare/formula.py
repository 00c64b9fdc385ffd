"""The specification of a declared loss: its terms on the full matrix, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine.problem import Inputs, statistics_dtype
from .definition import Given, check_rows
from .objective import Declared
from .on_tensors import Facts, TermOfTile, given_of_tile, terms_of_tile


def dense_loss(inputs: Inputs, objective: Declared, reduction: str) -> Tensor:
    """What ``backend="eager"`` runs, in the dtype of the statistics."""
    definition, scale = objective.definition, inputs.logit_scale
    learned = () if inputs.learned is None else inputs.learned.unbind()
    numbers = objective.numbers(scale)
    parameters, loss = numbers.with_learned(learned), numbers.loss(learned)
    similarities, target = _similarities(inputs, objective), _targets(inputs)
    facts = _facts(inputs, similarities, target if objective.uses_target else None)
    column_values = inputs.row_values if inputs.is_batch else inputs.column_values
    of_pairs = given_of_tile(_guide(inputs, similarities.dtype), inputs.row_values, column_values)
    call = definition.own_terms, objective.functions, similarities, scale, parameters, facts, of_pairs
    terms = {name: _of_its_pairs_alone(term, *call) for name, term in terms_of_tile(*call).items()}
    offsets = dict(zip(terms, objective.functions.offsets(None, scale, *parameters)))

    def of(name: str, dim: int) -> Tensor:
        term = terms[name]
        if term.term.kind == "total":
            return (term.total(dim) * term.factor).double()
        of_row = term.logsumexp if term.term.kind == "logsumexp" else term.largest
        value = of_row(dim, offsets[name]).double()
        return -value if term.term.is_negated else value

    of_rows = [of(term.name, 1) for term in definition.own_terms]
    of_columns = [of(term.name, 0)[target] for term in definition.own_terms] if definition.settings.symmetric else []
    at_targets = column_values[:, target] if definition.settings.symmetric and column_values is not None else None
    given = Given(inputs.row_values, at_targets)
    losses = definition.row_losses(loss, of_rows, of_columns, scale, given).to(similarities.dtype)
    check_rows(f"{definition.cls.__name__}.loss", losses, len(similarities))
    counting = numbers.loss([value.detach() for value in learned])
    count = definition.count(counting, [value.detach() for value in of_rows], scale.detach(), given)
    if objective.by_distance:
        losses = losses + reference.nan_of_rows(inputs)
    return reference.reduce(losses, reduction, None if count is None else count.to(losses.dtype))


def _of_its_pairs_alone(
    term: TermOfTile, terms, functions, similarities, scale, parameters, facts, of_pairs
) -> TermOfTile:
    """The term formed anew, such that pairs that are not in it have no part in its gradient, not even 0 times
    infinity: torch.where passes that on."""
    if not isinstance(term.over, Tensor):
        return term
    def of_its_pairs(number: float | Tensor) -> float | Tensor:
        if not isinstance(number, Tensor):
            return number
        number = number.to(similarities.dtype)
        return torch.where(term.over, number, number.detach())

    s, scale, *parameters = map(of_its_pairs, (similarities, scale, *parameters))
    rest = terms_of_tile(terms, functions, s, scale, parameters, facts, of_pairs)[term.term.name].rest
    return TermOfTile(s, term.term, term.factor, rest, term.over)


def _similarities(inputs: Inputs, objective: Declared) -> Tensor:
    dtype = statistics_dtype(inputs.query.dtype)
    if not objective.by_distance:
        keys = inputs.query if inputs.is_batch else inputs.keys[0]
        return inputs.query.to(dtype) @ keys.to(dtype).t()
    squares = reference.squared_distances(inputs)
    return -(reference.safe_sqrt(squares) if objective.by_distance == "distance" else squares)


def _guide(inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
    """The similarities of the guide's features."""
    if inputs.row_guide is None:
        return None
    of_columns = inputs.row_guide if inputs.is_batch else inputs.column_guide
    return inputs.row_guide.to(dtype) @ of_columns.to(dtype).t()


def _targets(inputs: Inputs) -> Tensor:
    if inputs.target is not None:
        return inputs.target
    return torch.arange(len(inputs.query), device=inputs.query.device)


def _facts(inputs: Inputs, similarities: Tensor, target: Tensor | None) -> Facts:
    every, nothing = torch.ones_like(similarities, dtype=torch.bool), torch.zeros_like(similarities, dtype=torch.bool)
    if inputs.is_batch:
        every = every.fill_diagonal_(False)
        same = nothing if inputs.row_group is None else every & (inputs.row_group.unsqueeze(1) == inputs.row_group)
        return every, nothing, same, every & ~same
    is_target = nothing if target is None else nothing.scatter(1, target.unsqueeze(1), True)
    same = is_target if inputs.row_group is None else inputs.row_group.unsqueeze(1) == inputs.column_group
    return every, is_target, same, ~same
