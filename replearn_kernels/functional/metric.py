"""Metric learning: losses over the distances of labelled rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs, statistics_dtype
from ..engine.world import World
from ..objectives import HardLifted, Lifted, MarginContrastive
from .call import Options, autocast, in_group, run
from .rows import unit_rows


@in_group
def lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    smooth: bool = True,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Lifted structured loss: every positive pair against all negatives of both of its rows.

    With Euclidean distances D, P the unordered pairs of equal labels, N_i the rows with another label than row i's:

        J_ij = log(sum_{k in N_i} exp(margin - D_ik) + sum_{k in N_j} exp(margin - D_jk)) + D_ij       smooth
        J_ij = max(max_{k in N_i} margin - D_ik, max_{k in N_j} margin - D_jk) + D_ij                  not smooth
        loss = 1 / (2 |P|) sum_{(i, j) in P} max(0, J_ij)^2

    Oh Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", 2016 (arXiv:1511.06452), equations
    4 and 3. Distances have a relative error of 1e-5 to 1e-4 (fp32, growing as sqrt(d)) however near two rows are; equal
    rows have the gradient 0.

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``; any values: -1 is a label as any other, and none is ignored.
        margin: at least 0, in units of distance. Default 1.0.
        smooth: the log-sum-exp over negatives, an upper bound of the maximum; False: the maximum. Default True.
        reduction: "mean" over the pairs of P, "sum", or "none": ``[N]``, where each pair counts half for either row.
        normalize: L2-normalise the embeddings first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of distances that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group: a torch.distributed process group, each of whose ranks passes its shard of the batch. Default None: this
            process alone. Positive pairs fetch their rows from other ranks, some at a time.
            The value of rank r is R times its own rows' part of the mean over all ranks' pairs: DDP's average over the
            R ranks, of values and of gradients, is that of the whole batch (docs/design.md, "Many ranks").
        strategy: how shards meet: "ring", "gather", or "auto", as in :func:`~replearn_kernels.info_nce_loss`.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without a positive pair 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device, a margin that is negative or not finite, an unknown reduction
            or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.
    """
    margin = validation.check_margin(margin)
    objective = (Lifted if validation.check_flag("smooth", smooth) else HardLifted)(margin)
    inputs, options = labelled_batch(embeddings, labels, reduction, normalize, backend, memory_budget, group, strategy)
    return run(inputs, objective, options, lambda inputs: reference.lifted_structure_loss(inputs, objective, reduction))


@in_group
def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    squared: bool = True,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Margin contrastive loss: rows of one label attract each other, all others repel up to a margin.

    Over the N (N - 1) / 2 unordered pairs, with Euclidean distances D:

        loss_ij = D_ij^2                     equal labels        D_ij                   squared=False
                = max(0, margin - D_ij)^2    other labels        max(0, margin - D_ij)

    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006 (there with a factor
    of 1/2).

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``; any values: -1 is a label as any other, and none is ignored.
        margin: at least 0, in units of distance. Default 1.0.
        squared: squares of distance and hinge, as in the paper; False: both plain. Default True.
        reduction: "mean" over all pairs, "sum", or "none": ``[N]``, where each pair counts half for either row.
        group: a torch.distributed process group, each of whose ranks passes its shard of the batch; the value of rank r
            is R times its own rows' part of the mean over all ranks' pairs, as in :func:`lifted_structure_loss`.
            Default None.
        strategy: how shards meet: "ring", "gather", or "auto", as in :func:`~replearn_kernels.info_nce_loss`.

    The other arguments, the result and the exceptions are those of :func:`lifted_structure_loss`.
    """
    margin = validation.check_margin(margin)
    objective = MarginContrastive(margin, validation.check_flag("squared", squared))
    inputs, options = labelled_batch(embeddings, labels, reduction, normalize, backend, memory_budget, group, strategy)
    return run(inputs, objective, options, lambda inputs: reference.contrastive_loss(inputs, objective, reduction))


def labelled_batch(
    embeddings: Tensor,
    labels: Tensor | None,
    reduction: str,
    normalize: bool,
    backend: str,
    memory_budget: int,
    group: World | None = None,
    strategy: str = "auto",
    keep_wide: bool = False,
    needs_labels: bool = True,
    why_no_passes: Callable[[], str | None] | None = None,
) -> tuple[Inputs, Options]:
    """Labelled rows to be compared with each other, checked. ``keep_wide``: normalised rows stay in fp32;
    ``why_no_passes``: of a declared loss, as :func:`~..engine.backends.resolve_backend` takes it."""
    validation.check_features("embeddings", embeddings)
    (embeddings,) = autocast(embeddings)
    if labels is not None or needs_labels:
        labels = validation.check_labels("labels", labels, embeddings.shape[0], embeddings)
    options = Options.of(reduction, backend, memory_budget, embeddings, group, strategy, why_no_passes)
    if validation.check_flag("normalize", normalize):
        embeddings = unit_rows(embeddings.to(statistics_dtype(embeddings.dtype)) if keep_wide else embeddings)
    scale = torch.ones((), dtype=statistics_dtype(embeddings.dtype), device=embeddings.device)
    return Inputs(embeddings, [], None, None, labels, None, scale, None), options


def other_members(labels: Tensor) -> Tensor:
    """How many other rows have each row's label, ``[N]``."""
    ordered = labels.sort().values
    first, last = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    return last - first - 1
