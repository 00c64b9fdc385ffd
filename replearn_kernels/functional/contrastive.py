"""Losses of queries against keys: InfoNCE, CLIP, N-pair, SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine import validation
from ..engine.operators import needs_dispatcher
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import Inputs
from ..objectives import Sigmoid, Softmax
from .call import Options, autocast, check_groups, check_pair, in_group, run, takes_logit_scale
from .gathered import loss_of_every_rank
from .rows import unit_rows


@in_group
@takes_logit_scale
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    symmetric: bool = False,
    batch_negatives: bool = True,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Cross entropy that picks every query's key out of all keys, without the N x M matrix of logits.

    With ``l_ij = logit_scale * <query_i, key_j>``, W columns in all and label smoothing e:

        L_i = logsumexp_j l_ij - (1 - e) * l_i,target_i - e / W * sum_j l_ij

    van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018
    (arXiv:1807.03748).

    With ``batch_negatives=False`` query i is compared with key i and the negatives alone: over a queue that is MoCo's
    loss, He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020 (arXiv:1911.05722)::

        info_nce_loss(query, key, negatives=queue, batch_negatives=False, logit_scale=1 / 0.07)

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        key: ``[M, d]``, of the same dtype and device.
        target: int64 ``[N]``, the row of ``key`` that is each query's positive, in ``[0, M)``.
            Default: query i belongs to key i, which needs M >= N.
        negatives: more columns that are nobody's positive: ``[K, d]`` seen by every query (a queue), or
            ``[N, K, d]``, K of each query's own. They get a gradient only if they require one.
        logit_scale: the inverse temperature, *not* its logarithm; a float, or a tensor of one element, 0-d or ``[1]``,
            which gets a gradient.
        symmetric: average with the other direction: the column of query i's key over all queries
            (negatives have no part in it). With target=None and M = N this is :func:`clip_loss`.
        batch_negatives: query i is compared with all keys. False: with key i and ``negatives`` alone, without
            ``target`` and ``symmetric``; as many keys as queries. Default True.
        label_smoothing: e in [0, 1].
        reduction: "mean" over the queries, "sum", or "none": ``[N]``.
        normalize: L2-normalise query, key and negatives first.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula on the
            full matrix, which can be differentiated twice.
        memory_budget: bytes of similarities that may be kept for the backward pass instead of computed again.
            Default 256 MiB; 0 keeps none.
        group: a torch.distributed process group: the batch is that of all its ranks, each of which passes its shard
            and calls backward. Targets count through the keys of all ranks, in their order; negatives are the rank's
            own. Default: this process alone. See docs/design.md, "Many ranks".
        strategy: "ring": blocks of keys travel from rank to rank, in O(local N x d) memory; "gather": all at once;
            "auto": "gather" where the features and gradients of all ranks take up to 32 MiB.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without queries 0, with zero gradients. With a group, "mean" is R / N
        times the sum over the own queries, with R ranks and N queries on all of them: the mean over the own queries
        where all have as many, and always such that the plain mean over the ranks is the mean over all queries. The
        gradients are those of the sum over the ranks, which DistributedDataParallel averages to those of that mean.

    Raises:
        TypeError: an argument is not of the type or dtype above, or two features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, target out of range, a scale that is not
            finite, ``batch_negatives=False`` without negatives, with a target or symmetric, an unknown reduction or
            backend, a negative budget; with a group, on every rank: shards that do not fit together, or a call that
            failed on another rank.
        RuntimeError: the backend asked for is not available here; a rank of the group died, or did not come within
            the group's timeout.
    """
    objective = Softmax(
        validation.check_flag("symmetric", symmetric),
        validation.check_fraction("label_smoothing", label_smoothing),
        own_positives=not validation.check_flag("batch_negatives", batch_negatives),
    )
    if objective.own_positives:
        refuse_symmetric(symmetric)
        _check_own_positives(target, negatives)
    features = {"query": query, "key": key}
    options = reduction, backend, memory_budget, group, strategy
    return _softmax_loss(objective, features, target, negatives, None, logit_scale, normalize, options)


@in_group
@takes_logit_scale
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""The CLIP loss: image i picks text i out of all texts, and the reverse, without the N x N matrix.

    With ``l_ij = logit_scale * <image_i, text_j>``:

        L_i = 1/2 (logsumexp_j l_ij - l_ii) + 1/2 (logsumexp_j l_ji - l_ii)

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
    (arXiv:2103.00020). Values and gradients are those of open_clip's ``ClipLoss``.

    Args:
        image_features: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        text_features: ``[N, d]``, of the same dtype and device.
        logit_scale: the inverse temperature, already exponentiated as in open_clip; float or tensor of one element.
        logit_bias: for models that have one: a constant added to every logit leaves a softmax as it is, so it changes
            nothing; its gradient is 0. Default: none.

    The other arguments, the result and the exceptions are those of :func:`info_nce_loss`. Also raises ValueError
    where the two batches differ in size.
    """
    if isinstance(image_features, Tensor) and isinstance(text_features, Tensor):
        validation.check_same_rows("image_features", image_features, "text_features", text_features)
    if logit_bias is not None:
        validation.check_features("image_features", image_features)
        logit_bias = validation.check_scale("logit_bias", logit_bias, image_features)
        if logit_bias.is_cpu and not needs_dispatcher(logit_bias):  # in a graph nobody reads it
            validation.check_finite("logit_bias", logit_bias.item(), logit_bias.dtype)
    objective = Softmax(symmetric=True, label_smoothing=validation.check_fraction("label_smoothing", label_smoothing))
    features = {"image_features": image_features, "text_features": text_features}
    options = reduction, backend, memory_budget, group, strategy
    loss = _softmax_loss(objective, features, None, None, None, logit_scale, normalize, options)
    return with_unseen(loss, logit_bias)


def with_unseen(loss: Tensor, logit_bias: float | Tensor | None) -> Tensor:
    """The loss, and a gradient of 0 for a bias of all logits, which a softmax does not see."""
    if not isinstance(logit_bias, Tensor) or not logit_bias.requires_grad:
        return loss
    return loss + logit_bias.expand(0).sum(dtype=loss.dtype)


@in_group
def n_pair_loss(
    anchor: Tensor,
    positive: Tensor,
    *,
    labels: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Multi-class N-pair loss: anchor i's positive against the positives of all other classes.

        L_i = log(1 + sum_j exp(<anchor_i, positive_j> - <anchor_i, positive_i>)),  over j of other labels than i's

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016. The paper adds a penalty
    on the features' norms, which is the caller's: ``(anchor.square().sum(1) + positive.square().sum(1)).mean()``.

    Args:
        anchor: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        positive: ``[N, d]``, of the same dtype and device.
        labels: integers ``[N]``, any values (-1 is a label as any other); other columns of the row's own label are no
            negatives. Default: all labels differ.

    The other arguments, the result and the exceptions are those of :func:`info_nce_loss`. Also raises ValueError
    where the two batches differ in size, and for labels of the wrong shape or device, TypeError if not integers.
    """
    if isinstance(anchor, Tensor) and isinstance(positive, Tensor):
        validation.check_same_rows("anchor", anchor, "positive", positive)
    objective = Softmax(groups_ignored=labels is not None)
    features = {"anchor": anchor, "positive": positive}
    options = reduction, backend, memory_budget, group, strategy
    return _softmax_loss(objective, features, None, None, labels, 1.0, normalize, options)


@in_group
@takes_logit_scale
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""The sigmoid loss: every image-text pair is classified on its own, as matching or not.

    With ``l_ij = logit_scale * <image_i, text_j> + logit_bias``, and ``z_ij`` = 1 for a positive pair, -1 for others:

        L_i = sum_j log(1 + exp(-z_ij l_ij))

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023 (arXiv:2303.15343); the mean over rows is the
    paper's: the sum over all pairs, divided by N. Values and gradients are those of open_clip's ``SigLipLoss``.

    Args:
        image_features: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        text_features: ``[M, d]``, of the same dtype and device; M = N without groups.
        logit_scale: the inverse temperature, already exponentiated; a float, or a tensor of one element, 0-d or
            ``[1]``, which gets a gradient.
        logit_bias: added to every logit; a float, or a tensor of one element, which gets a gradient. The paper starts
            at -10. Default: none.
        query_group: integers ``[N]``, any values (-1 is a group as any other); with ``key_group``, pairs of equal group
            are positives. Default: image i and text i are.
        key_group: integers ``[M]``.
        reduction: "mean" over the images, "sum", or "none": ``[N]``.
        normalize: L2-normalise both features first.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: taken as by every loss, but one sweep has nothing to keep.
        group, strategy: as in :func:`info_nce_loss`.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without images 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, one group without the other, a scale or bias
            that is not finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.
    """
    image, text = check_pair({"image_features": image_features, "text_features": text_features})
    query_group, key_group = check_groups({"query_group": query_group, "key_group": key_group}, image, text)
    if query_group is None:
        validation.check_same_rows("image_features", image, "text_features", text)
    logit_scale = validation.check_scale("logit_scale", logit_scale, image)
    if logit_bias is not None:
        logit_bias = validation.check_scale("logit_bias", logit_bias, image)
    options = Options.of(reduction, backend, memory_budget, image, group, strategy)
    if validation.check_flag("normalize", normalize):
        image, text = unit_rows(image), unit_rows(text)
    inputs = Inputs(image, [text], None, None, query_group, key_group, logit_scale, logit_bias)
    objective = Sigmoid(query_group is not None)
    return run(inputs, objective, options, lambda inputs: reference.siglip_loss(inputs, reduction))


def _softmax_loss(
    objective: Softmax,
    features: dict[str, Tensor],
    target: Tensor | None,
    negatives: Tensor | None,
    labels: Tensor | None,
    logit_scale: float | Tensor,
    normalize: bool,
    options: tuple,
) -> Tensor:
    """The softmax family behind one check of arguments; ``features``: queries and keys under the caller's names.

    ``options``: reduction, backend, memory_budget, group, strategy.
    """
    query, key = check_pair(features)
    query_name = next(iter(features))
    queue, own = _split_negatives(negatives, query_name, query)
    if objective.own_positives:
        validation.check_same_rows(*(part for named in features.items() for part in named))
    else:
        validation.check_target(target, query.shape[0], key.shape[0], query)
    if labels is not None:
        labels = validation.check_labels("labels", labels, query.shape[0], query)
    logit_scale = validation.check_scale("logit_scale", logit_scale, query)
    reduction, backend, memory_budget, group, strategy = options
    options = Options.of(reduction, backend, memory_budget, query, group, strategy)
    if validation.check_flag("normalize", normalize):
        query, key, queue, own = (None if t is None else unit_rows(t) for t in (query, key, queue, own))
    keys = [key] if queue is None else [key, queue]
    if objective.own_positives:
        positive, keys = key.unsqueeze(1), keys[1:]
        own = positive if own is None else torch.cat([positive, own], dim=1)
    inputs = Inputs(query, keys, own, target, labels, labels, logit_scale, None)
    if objective.own_positives and options.world is not None:
        return loss_of_every_rank(inputs, objective, options)
    return run(inputs, objective, options, lambda inputs: reference.softmax_loss(inputs, objective, reduction))


def refuse_symmetric(symmetric: bool) -> None:
    """Raise ValueError if a loss without negatives from the batch is asked for the other direction, too."""
    if symmetric:
        raise ValueError("batch_negatives=False takes no symmetric=True: a key meets its own query, and no other")


def _check_own_positives(target: Tensor | None, negatives: Tensor | None) -> None:
    """What ``batch_negatives=False`` goes with."""
    if negatives is None:
        raise ValueError("batch_negatives=False needs negatives: query i is compared with key i and them alone")
    if target is not None:
        raise ValueError("batch_negatives=False takes no target: query i belongs to key i; pass key[target]")


def _split_negatives(negatives: Tensor | None, query_name: str, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(queue ``[K, d]``, own ``[N, K, d]``): which of the two the negatives are."""
    if negatives is None:
        return None, None
    ndim = 3 if isinstance(negatives, Tensor) and negatives.ndim == 3 else 2
    validation.check_features("negatives", negatives, ndim)
    _, negatives = autocast(query, negatives)
    validation.check_alike("negatives", negatives, query_name, query)
    if ndim == 2:
        return negatives, None
    if negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives [N, K, d] must have one set per query, got {negatives.shape[0]} for {query.shape[0]} queries"
        )
    return None, negatives
