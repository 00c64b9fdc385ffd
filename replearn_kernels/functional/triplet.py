"""The triplet margin loss, with its triplets mined from the batch or given."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine import mining as miner
from ..engine import validation
from ..engine.native import check_has_data
from ..engine.operators import needs_dispatcher
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs
from ..engine.triplets import triplet_loss_at
from ..objectives import BatchAll, BatchHard, SemiHard
from ..objectives.triplet_distance import DISTANCES, TripletDistance
from .call import Options, in_group, run
from .fetched import triplets_over_ranks
from .metric import labelled_batch, other_members

MINING = ("batch_hard", "semi_hard", "batch_all")
REDUCTIONS = (*validation.REDUCTIONS, "mean_nonzero")

Triplets = tuple[Tensor, Tensor, Tensor]


@in_group
def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float | None = 0.2,
    mining: str = "semi_hard",
    distance: str = "euclidean",
    triplets: Triplets | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Triplet margin loss: an anchor nearer to rows of its label than to others, by a margin.

    Over triplets (a, p, n), p another row of a's label and n a row of another label:

        loss = mean [D_ap - D_an + margin]+        margin=None, the soft margin: mean log(1 + exp(D_ap - D_an))

        mining="batch_hard"    one triplet per anchor: the farthest p, the nearest n
        mining="semi_hard"     one per ordered pair (a, p): the nearest n with D_an > D_ap; without one, the farthest
        mining="batch_all"     every triplet, without a list of them: O(N^2 (d + log P)) time, O(N (d + P)) memory for
                               at most P positives a row

        distance="euclidean"            D_ij = |x_i - x_j|; at 0 its gradient is 0
        distance="squared_euclidean"    D_ij = |x_i - x_j|^2
        distance="cosine"               D_ij = 1 - cos(x_i, x_j), of rows normalised here; 1 from a row of zeros

    Half-precision rows that are normalised are rounded to their dtype again, as F.normalize's would be; semi_hard alone
    keeps them in fp32, as mine_triplets does. Of equal distances the lower index is taken. The distances of chosen
    triplets come from differences, without cancellation. Those compared to choose them (batch_hard; semi_hard on
    "triton" and with a group), and all of batch_all's, have the relative error of
    :func:`~replearn_kernels.lifted_structure_loss`'s. Within it margins go either way, and a negative is not beyond p.

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", 2015 (arXiv:1503.03832);
    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017 (arXiv:1703.07737).

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        labels: integers ``[N]``, any values (-1 is a label as any other); not needed with ``triplets``.
        margin: at least 0, in units of distance; or None: the soft margin of Hermans et al., which re-identification
            uses with "batch_hard" (not of "batch_all"). Default 0.2.
        mining: which triplets, as above. Default "semi_hard".
        distance: as above. Default "euclidean".
        triplets: ``(anchor, positive, negative)``, int64 ``[T]`` each, as :func:`~replearn_kernels.mine_triplets`
            returns them: the loss of these, whatever ``mining`` says, in O(T d).
        reduction: "mean" over the triplets; "mean_nonzero": over those with a loss above 0, as in FaceNet's batch_all;
            "sum"; or "none": the sum over the triplets of every anchor, ``[N]``, with ``triplets`` of every triplet,
            ``[T]``. Without a triplet the means are 0.
        normalize: L2-normalise the embeddings first. Default False; "cosine" always does.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula. "triton" sees
            4 positives of a row at a time: semi_hard and batch_all take one sweep for every 4 rows of a label.
        memory_budget: bytes of distances that may be kept. No mode keeps any at present.
        group: a torch.distributed process group, each of whose ranks passes its shard of the batch: triplets are mined
            across ranks. Default None. Blocks of rows go round the ranks, and positives and chosen rows are fetched,
            some at a time: O(local N (d + P)) memory. The value of rank r is R times its own rows' part of the mean
            over all ranks' triplets: DDP's average over the R ranks, of values and of gradients, is that of the whole
            batch (docs/design.md, "Many ranks").
        strategy: how shards meet: "ring", "gather", or "auto", as in :func:`~replearn_kernels.info_nce_loss`.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). NaN if an embedding is not finite.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, another device, triplets out of range, a margin that is negative or not finite,
            an unknown mining, distance, reduction or backend; neither labels nor triplets; triplets and a group; no
            margin with batch_all.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: semi_hard's embeddings are on the meta device, where no triplets can be counted.
    """
    validation.check_choice("mining", mining, MINING)
    margin = check_margin_of(mining, margin, triplets is not None)
    validation.check_choice("distance", distance, DISTANCES)
    validation.check_choice("reduction", reduction, REDUCTIONS)
    measure = TripletDistance(distance)
    if labels is None and triplets is None:
        raise ValueError("labels are needed to mine triplets: give labels, or triplets")
    normalize = validation.check_flag("normalize", normalize) or measure.unit_rows
    keep_wide = normalize and (triplets is not None or mining == "semi_hard")
    inputs, options = labelled_batch(
        embeddings, labels, "none", normalize, backend, memory_budget, group, strategy,
        keep_wide=keep_wide, needs_labels=triplets is None,
    )  # fmt: skip
    if triplets is not None:
        if group is not None:
            raise ValueError("given triplets take no group: they are of the rows at hand")
        losses = _losses_at(inputs.query, _checked(triplets, inputs.query), margin, measure, options.backend)
        counted = _counted(losses, torch.ones_like(losses).sum(), reduction)
        return _with_nan_of(inputs.query, _reduced(losses, counted, reduction))
    if group is not None and mining != "batch_all":
        objective = BatchHard(margin, measure) if mining == "batch_hard" else SemiHard(measure)
        return triplets_over_ranks(inputs, objective, margin, options, reduction)
    if mining == "batch_all":
        return _batch_all(inputs, BatchAll(margin, measure, reduction == "mean_nonzero"), options, reduction)
    if mining == "semi_hard":
        return _semi_hard(inputs, margin, measure, options.backend, reduction)
    objective = BatchHard(margin, measure)
    losses = run(inputs, objective, options, lambda inputs: reference.batch_hard_losses(inputs, objective))
    others = other_members(inputs.row_group)
    complete = (others > 0) & (others < others.shape[0] - 1)  # which anchors have a positive and a negative
    return _reduced(losses, _counted(losses, complete.sum(), reduction), reduction)


def _batch_all(inputs: Inputs, objective: BatchAll, options: Options, reduction: str) -> Tensor:
    reduction = "mean" if reduction == "mean_nonzero" else reduction
    options = options._replace(reduction=reduction)
    return run(inputs, objective, options, lambda inputs: reference.batch_all_loss(inputs, objective, reduction))


def _semi_hard(inputs: Inputs, margin: float | None, measure: TripletDistance, backend: str, reduction: str) -> Tensor:
    rows = inputs.query
    if backend == "eager":
        if not torch.compiler.is_compiling():
            check_has_data(rows)
        mined = reference.semi_hard_triplets(inputs, measure)
    else:
        mined = miner.mine(rows.detach(), inputs.row_group, "semi_hard", 0.0, measure.name, backend)  # of any margin
    losses = _losses_at(rows, mined, margin, measure, backend)
    counted = _counted(losses, torch.ones_like(losses).sum(), reduction)
    return _reduced(
        _with_nan_of(rows, losses.new_zeros(rows.shape[0]).index_add(0, mined[0], losses)), counted, reduction
    )  # fmt: skip


def check_margin_of(mining: str, margin: float | None, given: bool = False) -> float | None:
    """At least 0, or None, the soft margin; ``given``: the triplets are, whatever the mining."""
    if margin is not None:
        return validation.check_margin(margin)
    if mining == "batch_all" and not given:
        raise ValueError(
            "margin must be a number with mining='batch_all', which counts the triplets that are within it, got None: "
            "the soft margin is for 'batch_hard', 'semi_hard' and given triplets"
        )
    return None


def _losses_at(
    rows: Tensor, triplets: Triplets, margin: float | None, measure: TripletDistance, backend: str
) -> Tensor:
    """``[T]``."""
    if backend == "eager":
        return reference.triplet_losses(rows, *triplets, margin, measure)
    return triplet_loss_at(rows, *triplets, margin, measure.name, "cpp" if backend == "cpp" else "torch")


def _with_nan_of(rows: Tensor, loss: Tensor) -> Tensor:
    """NaN where any row is not finite, though it is in no triplet."""
    return loss + (rows.detach() * 0).sum().to(loss.dtype)


def _counted(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    """``count``, or with "mean_nonzero" the losses above 0."""
    if reduction == "mean_nonzero":
        return (losses > 0).sum()
    return count


def _reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.clamp(min=1)


def _checked(triplets: Triplets, rows: Tensor) -> Triplets:
    if not isinstance(triplets, (tuple, list)) or len(triplets) != 3:
        length = f" of {len(triplets)}" if isinstance(triplets, (tuple, list)) else ""
        raise TypeError(f"triplets must be (anchor, positive, negative), got {type(triplets).__name__}{length}")
    for name, index in zip(("anchor", "positive", "negative"), triplets):
        first = triplets[0]
        count = first.shape[0] if isinstance(first, Tensor) and first.ndim and not first.is_nested else 0
        validation.check_target(index, count, rows.shape[0], rows, name=f"triplets: {name}", required=True)
        if not needs_dispatcher(index):  # in a traced graph the operator tells
            validation.check_inside(f"triplets: {name}", index, rows.shape[0])
    return tuple(triplets)
