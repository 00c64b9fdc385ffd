"""A call of a declared loss: arguments checked, and given to the engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import validation
from ..engine.operators import refuse_forward_mode, refuse_wrapped
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs, statistics_dtype
from ..engine.world import World
from ..functional.call import Options, autocast, check_groups, check_pair, run
from ..functional.metric import labelled_batch
from ..functional.rows import unit_rows
from .formula import dense_loss
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
    if labels is None and objective.reads_groups:
        raise TypeError(f"labels are needed: {type(loss).__name__} tells pairs of one label from others")
    inputs, options = labelled_batch(
        embeddings, labels, reduction, normalize, backend, memory_budget, group, strategy,
        needs_labels=objective.reads_groups, why_no_passes=objective.why_no_passes(embeddings),
    )  # fmt: skip
    inputs = inputs._replace(
        logit_scale=validation.check_scale("logit_scale", logit_scale, inputs.query),
        row_values=_values(loss, "row_values", row_values, inputs.query, inputs.query, group),
        row_guide=_guides(loss, {"row_guide": row_guide}, inputs.query, inputs.query, group)[0],
    )
    return _run(loss, objective, inputs, options)


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
    if objective.uses_target or target is not None:
        validation.check_target(target, query.shape[0], key.shape[0], query)
    logit_scale = validation.check_scale("logit_scale", logit_scale, query)
    values = (
        _values(loss, "row_values", row_values, query, query, group),
        _values(loss, "column_values", column_values, key, query, group),
        *_guides(loss, {"row_guide": row_guide, "column_guide": column_guide}, query, key, group),
    )
    options = Options.of(reduction, backend, memory_budget, query, group, strategy, objective.why_no_passes(query))
    if validation.check_flag("normalize", normalize):
        query, key = unit_rows(query), unit_rows(key)
    inputs = Inputs(query, [key], None, target, query_group, key_group, logit_scale, None, *values)
    return _run(loss, objective, inputs, options)


def _values(
    loss: PairLoss, name: str, given: Mapping[str, Tensor] | None, rows: Tensor, query: Tensor, group: World | None
) -> Tensor | None:
    """The values that a call gives for the rows, or for the columns (``rows``), in the order of their names:
    ``[values, N]``; None where the loss has none. ``name``: the argument's."""
    wanted, of_loss = getattr(loss, name), type(loss).__name__
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of tensors by name, got {type(given).__name__}")
    if set(given) != set(wanted):
        names, told = (", ".join(map(str, each)) or "none" for each in (wanted, given))
        raise ValueError(f"{name} must give the values that {of_loss} names ({names}), got {told}")
    if not wanted:
        return None
    values = [check_value(f"{name}[{each!r}]", given[each], rows.shape[0], query) for each in wanted]
    if group is not None:
        refuse_wrapped(*values)
    return torch.stack([value.to(statistics_dtype(query.dtype)) for value in values])


def check_value(name: str, value: Tensor, count: int, query: Tensor) -> Tensor:
    """Numbers of ``count`` rows or columns, as a call gives them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    validation.check_dense(name, value)
    if value.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(value.shape)}")
    if not (value.dtype.is_floating_point or value.dtype == torch.bool):
        raise TypeError(
            f"{name} must be floating-point or bool, got {value.dtype}: .float() of it holds whole numbers up to "
            "2**24; rows that share a number are a matter of labels or groups"
        )
    if value.device != query.device:
        raise ValueError(f"{name} must be on the features' device {query.device}, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which values do not get: pass {name}.detach()")
    refuse_forward_mode(value)
    return value


def _guides(
    loss: PairLoss, guides: dict[str, Tensor | None], query: Tensor, key: Tensor, group: World | None
) -> tuple[Tensor | None, ...]:
    """The features of the guide, of rows and columns, by the caller's names."""
    if not loss.guide:
        if given := [name for name, guide in guides.items() if guide is not None]:
            raise ValueError(f"{given[0]}: {type(loss).__name__} has no guide, whose features these would be")
        return (None,) * len(guides)
    for name, guide in guides.items():
        if guide is None:
            raise ValueError(f"{name} is needed: {type(loss).__name__} has a guide")
    checked = [check_guide(name, guide, features) for (name, guide), features in zip(guides.items(), (query, key))]
    if group is not None:
        refuse_wrapped(*checked)
    rows, *columns = autocast(*checked)
    for of_columns in columns:
        validation.check_alike("column_guide", of_columns, "row_guide", rows)
    return tuple(map(unit_rows, (rows, *columns))) if loss.guide == "cosine" else (rows, *columns)


def check_guide(name: str, guide: Tensor, features: Tensor) -> Tensor:
    """The features that a guide has for the same rows, in any dtype; in that of the statistics if either is fp64."""
    validation.check_features(name, guide)
    if guide.shape[0] != features.shape[0]:
        raise ValueError(f"{name} must have {features.shape[0]} rows, as the features, got {guide.shape[0]}")
    if guide.device != features.device:
        raise ValueError(f"{name} must be on the features' device {features.device}, got {guide.device}")
    if guide.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which a guide does not get: pass {name}.detach()")
    refuse_forward_mode(guide)
    is_wide = torch.float64 in (guide.dtype, features.dtype)
    return guide.to(statistics_dtype(features.dtype)) if is_wide else guide


def _objective(loss: PairLoss, by_group: bool) -> Declared:
    """The engine's view of a loss. ``by_group``: the call gives groups of rows and columns."""
    of_loss = objective_of(loss)
    return of_loss(by_group, [float(getattr(loss, name)) for name in of_loss.definition.parameters])


def _run(loss: PairLoss, objective: Declared, inputs: Inputs, options: Options) -> Tensor:
    return run(inputs, objective, options, lambda inputs: dense_loss(inputs, objective, loss, options.reduction))
