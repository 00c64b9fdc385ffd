"""A call of a declared loss: arguments checked, and given to the engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import validation
from ..engine.operators import refuse_forward_mode, refuse_wrapped
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs
from ..engine.world import World
from ..functional.call import Options, check_groups, check_pair, run
from ..functional.metric import labelled_batch
from ..functional.rows import unit_rows
from .checks import check_finite_parameter, check_parameter
from .formula import dense_loss
from .given import guides_of, values_of
from .objective import Declared, objective_of
from .pair_loss import PairLoss


def batch_loss(
    loss: PairLoss,
    embeddings: Tensor,
    labels: Tensor | None,
    *,
    logit_scale: float | Tensor = 1.0,
    row_values: Mapping[str, Tensor] | None = None,
    row_guide: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group: World | None = None,
    strategy: str = "auto",
) -> Tensor:
    """The rows of one batch with each other; see :class:`~replearn_kernels.declare.FusedBatchLoss`."""
    objective = _objective(loss, labels is not None)
    definition = objective.definition
    if labels is None and objective.reads_groups:
        raise TypeError(f"labels are needed: {type(loss).__name__} tells pairs of one label from others")
    inputs, options = labelled_batch(
        embeddings, labels, reduction, normalize, backend, memory_budget, group, strategy,
        needs_labels=False, why_no_passes=objective.why_no_passes(embeddings),
    )  # fmt: skip
    inputs = inputs._replace(
        logit_scale=validation.check_scale("logit_scale", logit_scale, inputs.query),
        row_values=values_of(loss, "row_values", row_values, inputs.query, inputs.query, group, definition.has_numbers),
        row_guide=guides_of(loss, {"row_guide": row_guide}, inputs.query, inputs.query, group)[0],
        learned=_learned(loss, objective, inputs.query, group),
    )
    return _run(objective, inputs, options)


def pair_loss(
    loss: PairLoss,
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    row_values: Mapping[str, Tensor] | None = None,
    column_values: Mapping[str, Tensor] | None = None,
    row_guide: Tensor | None = None,
    column_guide: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group: World | None = None,
    strategy: str = "auto",
    names: tuple[str, str, str, str] = ("query", "key", "query_group", "key_group"),
) -> Tensor:
    """Queries with keys; see :class:`~replearn_kernels.declare.FusedPairLoss`. ``names``: the caller's, of tensors."""
    query_name, key_name, query_group_name, key_group_name = names
    query, key = check_pair({query_name: query, key_name: key})
    groups = {query_group_name: query_group, key_group_name: key_group}
    query_group, key_group = check_groups(groups, query, key)
    objective = _objective(loss, query_group is not None)
    definition = objective.definition
    if objective.uses_target or target is not None:
        validation.check_target(target, query.shape[0], key.shape[0], query)
    logit_scale = validation.check_scale("logit_scale", logit_scale, query)
    values = (
        values_of(loss, "row_values", row_values, query, query, group, definition.has_numbers and loss.symmetric),
        values_of(loss, "column_values", column_values, key, query, group, definition.has_numbers),
        *guides_of(loss, {"row_guide": row_guide, "column_guide": column_guide}, query, key, group),
    )
    options = Options.of(reduction, backend, memory_budget, query, group, strategy, objective.why_no_passes(query))
    if validation.check_flag("normalize", normalize):
        query, key = unit_rows(query), unit_rows(key)
    learned = _learned(loss, objective, query, group)
    inputs = Inputs(query, [key], None, target, query_group, key_group, logit_scale, None, *values, learned)
    return _run(objective, inputs, options)


def _objective(loss: PairLoss, by_group: bool) -> Declared:
    """The engine's view of a loss. ``by_group``: the call gives groups of rows and columns."""
    of_loss = objective_of(loss)
    learned, names = of_loss.definition.learned, of_loss.definition.parameters
    return of_loss(by_group, [0.0 if name in learned else _number(loss, name) for name in names])


def _number(loss: PairLoss, name: str) -> float:
    """The value of a parameter that learns nothing."""
    value, full_name = getattr(loss, name), f"{type(loss).__name__}.{name}"
    check_parameter(full_name, value)
    return check_finite_parameter(full_name, value)


def _learned(loss: PairLoss, objective: Declared, query: Tensor, group: World | None) -> Tensor | None:
    """Those of the loss's parameters that are tensors, as the operator takes them."""
    names = objective.definition.learned
    if not names:
        return None
    values = [validation.check_scale(f"{type(loss).__name__}.{name}", getattr(loss, name), query) for name in names]
    for value in values:
        refuse_forward_mode(value)
    if group is not None:
        refuse_wrapped(*values)
    return torch.stack([value.double() for value in values])


def _run(objective: Declared, inputs: Inputs, options: Options) -> Tensor:
    return run(inputs, objective, options, lambda inputs: dense_loss(inputs, objective, options.reduction))
