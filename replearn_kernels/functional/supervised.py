"""Losses of a batch against itself, every row with the others: NT-Xent, SupCon."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs
from ..engine.world import World
from ..objectives import SupCon
from .call import Options, autocast, check_pair, in_group, run
from .rows import stacked, unit_rows


@in_group
def nt_xent_loss(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""SimCLR's loss: each of 2N views picks its sample's other view out of the 2N - 1 others.

    Over the rows ``z = [z_i; z_j]``, with p(i) the other view of row i's sample:

        L_i = logsumexp_{k != i} (<z_i, z_k> / temperature) - <z_i, z_p(i)> / temperature

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020 (arXiv:2002.05709).

    Args:
        z_i: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        z_j: ``[N, d]``: row i is another view of z_i's row i; of the same dtype and device.
        temperature: divides the similarities; a positive float, or a tensor of one element, 0-d or ``[1]``, which gets
            a gradient.
        reduction: "mean" over the 2N views, "sum", or "none": ``[2N]``, those of z_i first.
        normalize: L2-normalise both first. Default True.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; the rows are those of all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without rows 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different sizes, widths or devices, a temperature that is not positive and
            finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.
    """
    views, sample = check_views(z_i, z_j, group)
    options = reduction, backend, memory_budget, group, strategy
    return _batch_loss(views, sample, 2, temperature, normalize, options)


@in_group
def sup_con_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Supervised contrastive loss (the paper's L_out): rows of one label attract each other, all others repel.

    With ``l_ik = <z_i, z_k> / temperature`` and P_i the other rows of row i's label:

        L_i = logsumexp_{k != i} l_ik - 1 / |P_i| sum_{p in P_i} l_ip

    Khosla et al., "Supervised Contrastive Learning", 2020 (arXiv:2004.11362). The reference code multiplies by
    temperature / base_temperature; the paper, and this function, do not.

    Args:
        features: ``[N, d]``, or ``[B, V, d]`` for V views of each of B samples; fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``, or ``[B]`` for views; any values: -1 is a label as any other, and none is ignored.
            None, for views only: each sample is a class of its own, as in :func:`nt_xent_loss`.
        temperature: divides the similarities; a positive float, or a tensor of one element, 0-d or ``[1]``, which gets
            a gradient.
        reduction: "mean" over the rows that have a positive, "sum", or "none": ``[N]`` (``[B * V]``, sample by
            sample), 0 for rows without a positive.
        normalize: L2-normalise first. Default True.

    The other arguments, the result and the exceptions are those of :func:`nt_xent_loss`. Without any positive pair the
    loss is 0, with zero gradients. Without any negative pair, where all rows have one label, the formula stays as it
    is: log(N - 1) where all similarities are equal, and more elsewhere (pytorch-metric-learning returns 0). Labels that
    are no integers: TypeError; of the wrong shape or device: ValueError.
    """
    views = features.ndim if isinstance(features, Tensor) else 2
    validation.check_features("features", features, 3 if views == 3 else 2, "2 dimensions [N, d], or 3 [B, V, d]")
    (features,) = autocast(features)
    group_size = 0
    if labels is not None:
        labels = validation.check_labels("labels", labels, features.shape[0], features)
    elif views != 3:
        raise ValueError("labels are needed for features [N, d]; only views [B, V, d] can do without")
    else:
        labels = own_samples(features.shape[0], features, group)
        # A graph may have a symbol for the number of views, and each rank a number of its own.
        if group is None and not torch.compiler.is_compiling():
            group_size = features.shape[1]
    if views == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    options = reduction, backend, memory_budget, group, strategy
    return _batch_loss([features], labels, group_size, temperature, normalize, options)


def check_views(z_i: Tensor, z_j: Tensor, world: World | None) -> tuple[list[Tensor], Tensor]:
    """Two views of every sample, checked, and the samples' numbers: those of the rows of z_i, then of z_j."""
    z_i, z_j = check_pair({"z_i": z_i, "z_j": z_j})
    validation.check_same_rows("z_i", z_i, "z_j", z_j)
    return [z_i, z_j], own_samples(z_i.shape[0], z_i, world).repeat(2)


def own_samples(count: int, features: Tensor, world: World | None) -> Tensor:
    """A number for each sample, that no sample of another rank has."""
    samples = torch.arange(count, device=features.device)
    return samples if world is None else samples * world.size + world.rank


def _batch_loss(
    views: list[Tensor],
    labels: Tensor,
    group_size: int,
    temperature: float | Tensor,
    normalize: bool,
    options: tuple,
) -> Tensor:
    """Of the views' rows, one view after the other. ``group_size``: how many rows have the same label, 0 if not known;
    ``options``: reduction, backend, memory_budget, group, strategy."""
    reduction, backend, memory_budget, group, strategy = options
    logit_scale = validation.check_temperature("temperature", temperature, views[0])
    options = Options.of(reduction, backend, memory_budget, views[0], group, strategy)
    features = unit_rows(*views) if validation.check_flag("normalize", normalize) else stacked(*views)
    inputs = Inputs(features, [], None, None, labels, None, logit_scale, None)
    return run(inputs, SupCon(group_size), options, lambda inputs: reference.sup_con_loss(inputs, reduction))
