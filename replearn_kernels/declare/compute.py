"""A call of a declared loss: arguments checked, and given to the engine."""

from __future__ import annotations

from torch import Tensor

from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs
from ..engine.world import World
from ..functional.call import Options, check_groups, check_pair, run
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
    reduction: str = "mean",
    normalize: bool,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group: World | None = None,
    strategy: str = "auto",
) -> Tensor:
    """The rows of one batch with each other; see :class:`~replearn_kernels.declare.FusedBatchLoss`."""
    objective = _objective(loss, labels is not None)
    inputs, options = labelled_batch(
        embeddings, labels, reduction, normalize, backend, memory_budget, group, strategy,
        needs_labels=objective.reads_groups, why_no_passes=objective.why_no_passes(embeddings),
    )  # fmt: skip
    inputs = inputs._replace(logit_scale=validation.check_scale("logit_scale", logit_scale, inputs.query))
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
    options = Options.of(reduction, backend, memory_budget, query, group, strategy, objective.why_no_passes(query))
    if validation.check_flag("normalize", normalize):
        query, key = unit_rows(query), unit_rows(key)
    inputs = Inputs(query, [key], None, target, query_group, key_group, logit_scale, None)
    return _run(loss, objective, inputs, options)


def _objective(loss: PairLoss, by_group: bool) -> Declared:
    """The engine's view of a loss. ``by_group``: the call gives groups of rows and columns."""
    of_loss = objective_of(loss)
    return of_loss(by_group, [float(getattr(loss, name)) for name in of_loss.definition.parameters])


def _run(loss: PairLoss, objective: Declared, inputs: Inputs, options: Options) -> Tensor:
    return run(inputs, objective, options, lambda inputs: dense_loss(inputs, objective, loss, options.reduction))
