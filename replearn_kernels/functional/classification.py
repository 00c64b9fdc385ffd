"""Losses of features against the weights of many classes: ArcFace, CosFace."""

from __future__ import annotations

import math

from torch import Tensor

from .. import reference
from ..engine import validation
from ..engine.problem import Inputs
from ..engine.world import World
from ..objectives import MarginSoftmax
from .call import Options, check_pair, in_group, run
from .gathered import loss_of_every_rank, loss_over_class_shards

CLASSIFIER_BUDGET = 32 * 2**20
"""Bytes of cosines kept: with a million classes the weight is what fills the memory, and the loss should add little."""

LARGEST_ARCFACE_MARGIN = math.pi
LARGEST_COSFACE_MARGIN = 2.0


@in_group
def arcface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    scale: float = 64.0,
    reduction: str = "mean",
    backend: str = "auto",
    memory_budget: int = CLASSIFIER_BUDGET,
    group=None,
    shard_classes: bool = True,
    classes: int | None = None,
) -> Tensor:
    r"""Cross entropy over cosines to C class centres, with a margin added to the angle to the true one.

    With ``c_ij = cos(embedding_i, weight_j)`` and ``y_i`` the label:

        L_i = logsumexp_j l_ij - l_i,y_i,   l_ij = scale * c_ij,   l_i,y_i = scale * cos(arccos(c_i,y_i) + margin)

    Where the angle and the margin exceed pi, ``c - max(margin * sin(margin), 1 - cos(margin))`` takes the cosine's
    place, so that the loss goes on rising with the angle (the first, as published, does so up to a margin of 2.33).
    The true class's cosine and its gradients are formed from the difference of unit rows, in fp32 or fp64, so that they
    are right however near a row is to its class. At c = 1, where the angle has no gradient, it is taken as 0.
    B x C is never formed.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019 (arXiv:1801.07698).

    Args:
        embeddings: ``[B, d]``, fp16, bf16, fp32 or fp64, any strides and lengths.
        weight: ``[C, d]``, the class centres, of any lengths, the same dtype and device; gets a gradient. With a group,
            this rank's classes, unless ``shard_classes=False``.
        labels: integers ``[B]``, in ``[0, C)``: any other, such as -1, is an error, and none is ignored. With a group,
            numbered through the classes of all ranks, in their order.
        margin: in radians, in [0, pi].
        scale: multiplies the cosines; positive.
        reduction: "mean" over the rows, "sum", or "none": ``[B]``.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of cosines that may be kept for the backward pass. Default 32 MiB; 0 keeps none.
        group: a torch.distributed process group, each of whose ranks passes its shard of the batch, of any size, and
            calls backward. Default None: this process alone. The value of rank r is R times its own rows' part of the
            mean over all ranks' rows (docs/design.md, "Many ranks").
        shard_classes: with a group, every rank has classes of its own ("partial FC"): the rows are gathered, and the
            weight stays where it is. Its gradient is that of the mean of the ranks' values: nothing has to be averaged,
            so keep the weight out of DistributedDataParallel. False: every rank has the whole weight, as a parameter
            whose gradients DistributedDataParallel averages. Default True.
        classes: how many classes there must be in all, over the ranks of a group. Default None: as many as there are.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without rows 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, a label out of range, a margin out of range, a
            scale that is not positive and finite, an unknown reduction or backend, a negative budget; with a group,
            options that differ between its ranks.
        RuntimeError: the backend asked for is not available here.
    """
    objective = MarginSoftmax(validation.check_margin(margin, LARGEST_ARCFACE_MARGIN), angular=True)
    options = reduction, backend, memory_budget, group, shard_classes, classes
    return _margin_loss(objective, embeddings, weight, labels, scale, *options)


@in_group
def cosface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 64.0,
    reduction: str = "mean",
    backend: str = "auto",
    memory_budget: int = CLASSIFIER_BUDGET,
    group=None,
    shard_classes: bool = True,
    classes: int | None = None,
) -> Tensor:
    r"""Cross entropy over cosines to C class centres, with a margin taken from the cosine to the true one.

        L_i = logsumexp_j l_ij - l_i,y_i,   l_ij = scale * c_ij,   l_i,y_i = scale * (c_i,y_i - margin)

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018 (arXiv:1801.09414).

    Args, result and exceptions are those of :func:`arcface_loss`, but that ``margin`` is a cosine, in [0, 2].
    """
    objective = MarginSoftmax(validation.check_margin(margin, LARGEST_COSFACE_MARGIN), angular=False)
    options = reduction, backend, memory_budget, group, shard_classes, classes
    return _margin_loss(objective, embeddings, weight, labels, scale, *options)


def _margin_loss(
    objective: MarginSoftmax,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    reduction: str,
    backend: str,
    memory_budget: int,
    world: World | None,
    shard_classes: bool,
    classes: int | None,
) -> Tensor:
    if classes is not None:
        validation.check_count("classes", classes, 0)
    shard_classes = validation.check_flag("shard_classes", shard_classes) and world is not None
    embeddings, weight = check_pair({"embeddings": embeddings, "weight": weight})
    labels = validation.check_labels("labels", labels, embeddings.shape[0], embeddings)
    logit_scale = validation.check_scale("scale", validation.check_positive("scale", scale), embeddings)
    options = Options.of(reduction, backend, memory_budget, embeddings, world)
    inputs = Inputs(embeddings, [weight], None, labels, None, None, logit_scale, None)
    if shard_classes:
        return loss_over_class_shards(inputs, objective, options, classes)
    if classes not in (None, weight.shape[0]):
        raise ValueError(f"weight must have {classes} classes, got {weight.shape[0]}")
    if world is not None:
        return loss_of_every_rank(inputs, objective, options)
    return run(inputs, objective, options, lambda inputs: reference.margin_loss(inputs, objective, reduction))
