"""The loss functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .engine import validation
from .engine.backends import resolve_backend
from .engine.operators import pair_loss
from .engine.plan import DEFAULT_MEMORY_BUDGET
from .objectives.softmax import Softmax


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Cross entropy that picks every query's key out of all keys, without the N x M matrix of logits.

    With ``l_ij = logit_scale * <query_i, key_j>``, W columns in all and label smoothing e:

        L_i = logsumexp_j l_ij - (1 - e) * l_i,target_i - e / W * sum_j l_ij

    van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018
    (arXiv:1807.03748); with a queue of negatives: He et al., "Momentum Contrast", 2020 (arXiv:1911.05722).

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        key: ``[M, d]``, of the same dtype and device.
        target: int64 ``[N]``, the row of ``key`` that is each query's positive, in ``[0, M)``.
            Default: query i belongs to key i, which needs M >= N.
        negatives: more columns that are nobody's positive: ``[K, d]`` seen by every query (a queue), or
            ``[N, K, d]``, K of each query's own. They get a gradient only if they require one.
        logit_scale: the inverse temperature, *not* its logarithm; a float, or a 0-d tensor, which gets a gradient.
        symmetric: average with the other direction: the column of query i's key over all queries
            (negatives have no part in it). With target=None and M = N this is :func:`clip_loss`.
        label_smoothing: e in [0, 1].
        reduction: "mean" over the queries, "sum", or "none": ``[N]``.
        normalize: L2-normalise query, key and negatives first.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula on the
            full matrix, which can be differentiated twice.
        memory_budget: bytes of similarities that may be kept for the backward pass instead of computed again.
            Default 256 MiB; 0 keeps none.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs). Without queries 0, with zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or two features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, target out of range, a scale that is not
            finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.
    """
    return _softmax_loss(
        {"query": query, "key": key}, target, negatives, logit_scale, symmetric, label_smoothing, reduction, normalize,
        backend, memory_budget,
    )  # fmt: skip


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""The CLIP loss: image i picks text i out of all texts, and the reverse, without the N x N matrix.

    With ``l_ij = logit_scale * <image_i, text_j>``:

        L_i = 1/2 (logsumexp_j l_ij - l_ii) + 1/2 (logsumexp_j l_ji - l_ii)

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
    (arXiv:2103.00020). Values and gradients are those of open_clip's ``ClipLoss``.

    Args:
        image_features: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        text_features: ``[N, d]``, of the same dtype and device.
        logit_scale: the inverse temperature, already exponentiated as in open_clip; float or 0-d tensor.

    The other arguments, the result and the exceptions are those of :func:`info_nce_loss`. Also raises ValueError
    where the two batches differ in size.
    """
    if isinstance(image_features, Tensor) and isinstance(text_features, Tensor):
        validation.check_same_rows("image_features", image_features, "text_features", text_features)
    return _softmax_loss(
        {"image_features": image_features, "text_features": text_features}, None, None, logit_scale, True,
        label_smoothing, reduction, normalize, backend, memory_budget,
    )  # fmt: skip


def _softmax_loss(
    features: dict[str, Tensor],
    target: Tensor | None,
    negatives: Tensor | None,
    logit_scale: float | Tensor,
    symmetric: bool,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    backend: str,
    memory_budget: int,
) -> Tensor:
    """The family behind one check of arguments; ``features`` holds queries and keys under the caller's names."""
    (query_name, query), (key_name, key) = features.items()
    validation.check_features(query_name, query)
    validation.check_features(key_name, key)
    query, key, negatives = _autocast(query, key, negatives)
    validation.check_alike(key_name, key, query_name, query)
    queue, own = _split_negatives(negatives, query_name, query)
    validation.check_reduction(reduction)
    objective = Softmax(
        validation.check_flag("symmetric", symmetric), validation.check_fraction("label_smoothing", label_smoothing)
    )
    validation.check_target(target, query.shape[0], key.shape[0], query)
    logit_scale = validation.check_scale("logit_scale", logit_scale, query)
    validation.check_memory_budget(memory_budget)
    backend = resolve_backend(backend, query.device, query.dtype)
    if normalize:
        query, key, queue, own = (None if t is None else F.normalize(t, dim=-1) for t in (query, key, queue, own))
    if backend == "eager":
        validation.check_values(target, key.shape[0], logit_scale, query.dtype)
        return reference.info_nce_loss(
            query, key, own, queue, target, logit_scale, objective.symmetric, objective.label_smoothing, reduction
        )
    keys = [key] if queue is None else [key, queue]
    differentiable = (query, *keys, logit_scale) if own is None else (query, *keys, own, logit_scale)
    enabled = torch.is_grad_enabled()
    needs_grad = [enabled and tensor.requires_grad for tensor in differentiable]
    return pair_loss(
        query, keys, own, target, logit_scale,
        objective.name, objective.parameters, reduction, backend, memory_budget, needs_grad,
    )  # fmt: skip


def _split_negatives(negatives: Tensor | None, query_name: str, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(queue ``[K, d]``, own ``[N, K, d]``): which of the two the negatives are."""
    if negatives is None:
        return None, None
    ndim = 3 if isinstance(negatives, Tensor) and negatives.ndim == 3 else 2
    validation.check_features("negatives", negatives, ndim)
    validation.check_alike("negatives", negatives, query_name, query)
    if ndim == 2:
        return negatives, None
    if negatives.shape[0] != query.shape[0]:
        raise ValueError(
            f"negatives [N, K, d] must have one set per query, got {negatives.shape[0]} for {query.shape[0]} queries"
        )
    return None, negatives


def _autocast(*features: Tensor | None):
    """Under autocast, features enter the products in its dtype, as in any matrix product; logits stay fp32."""
    device = features[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return features
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in features
    )
