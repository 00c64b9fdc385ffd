"""Softmax over the keys of a batch as over a sample of all: with the probability of each, and without duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..declare import PairLoss, logsumexp, total
from ..declare.compute import pair_loss
from ..declare.given import check_value
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.problem import statistics_dtype
from ..functional.call import check_pair, in_group, takes_logit_scale
from ..losses import _Loss


@dataclass(frozen=True)
class SampledSoftmax(PairLoss):
    """InfoNCE of logits less the logarithm of their key's probability, without other keys of the target's group."""

    scaled, row_values, column_values = True, ("weight",), ("log_probability",)

    def terms(self, logit, pair):
        corrected = logit - pair.column.log_probability
        return {
            "all": logsumexp(corrected, where=pair.target | pair.other),
            "own": total(corrected, where=pair.target),
        }

    def loss(self, row):
        return torch.where(row.weight == 0, 0.0, row.weight * (row.all - row.own))  # whose own key may be padding

    def counted(self, row):
        return row.weight


@in_group
@takes_logit_scale
def sampled_softmax_loss(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    key_log_probability: Tensor | None = None,
    query_weight: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""Softmax over the keys of a batch, as over a sample of all keys: two-tower retrieval and recommendation.

    Keys that are in the batch because somebody chose them are the popular ones, and as negatives these are pushed away
    too often. What is subtracted from a logit, the logarithm of the probability with which its key came to be in the
    batch, makes the loss one over all keys. And a key that is there twice is no negative of itself. With
    ``l_ij = logit_scale * <query_i, key_j> - log q_j``, target ``t_i``, and ``G_i`` the other keys of query i's group:

        L_i = w_i (logsumexp_{j not in G_i} l_ij - l_{i, t_i})

    Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
    IEEE Transactions on Neural Networks, 2008; Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus
    Item Recommendations", RecSys 2019.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
        key: ``[M, d]``, of the same dtype and device.
        target: int64 ``[N]``, the key of each query, in ``[0, M)``. Default: query i's is key i, which needs M >= N.
        query_group, key_group: integers ``[N]`` and ``[M]``, any values: the number of the product, say, that is every
            query's target, and that is every key. Other keys of a query's group than its target are left out. Without
            groups none is. ``key_group`` is enough where there is no ``target``: query i then has the group of key i.
        key_log_probability: ``[M]``, floating-point: ``log q_j``, up to a number that all share. Default: 0, of keys
            that are all equally likely. +inf leaves a key out, as padding; -inf makes the loss NaN: count at least 1.
        query_weight: ``[N]``, floating-point: ``w_i``, which nobody checks to be positive. 0 leaves a query out,
            whatever its own key is. Default 1.
        logit_scale: the inverse temperature, a float, or a tensor of one element, which gets a gradient. Default 1.
        reduction: "mean" (``sum(L) / sum(w)``; 0 where no query weighs anything), "sum", or "none": ``[N]``.
        normalize: L2-normalise both features first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; targets and groups count over all ranks.

    Returns:
        The loss, in fp32 (fp64 for fp64 features). Without queries 0, with zero gradients. Log-probabilities and
        weights are read in its dtype, and get no gradient.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, groups of queries alone, or of keys alone beside a
            ``target``, a scale that is not finite, an unknown reduction or backend, a negative budget.
        RuntimeError: the backend asked for is not available here.

    Example::

        log_q = (count_of_item[item] / count_of_item.sum()).log()          # of the items of this batch
        sampled_softmax_loss(
            user, item_features, key_group=item, key_log_probability=log_q, logit_scale=log_scale.exp(), normalize=True
        ).backward()
    """
    rows, columns = check_pair({"query": query, "key": key})
    validation.check_target(target, rows.shape[0], columns.shape[0], rows)
    if query_group is None and key_group is not None:
        if target is not None:
            raise ValueError("query_group is needed beside key_group and target: the group of every query's target")
        query_group = validation.check_labels("key_group", key_group, columns.shape[0], rows)[: rows.shape[0]]
    weight = _given("query_weight", query_weight, 1.0, rows.shape[0], rows)
    log_probability = _given("key_log_probability", key_log_probability, 0.0, columns.shape[0], rows)
    return pair_loss(
        SampledSoftmax(), query, key, target=target, query_group=query_group, key_group=key_group,
        logit_scale=logit_scale, row_values={"weight": weight}, column_values={"log_probability": log_probability},
        reduction=reduction, normalize=normalize, backend=backend, memory_budget=memory_budget, group=group,
        strategy=strategy,
    )  # fmt: skip


def _given(name: str, value: Tensor | None, default: float, count: int, features: Tensor) -> Tensor:
    if value is None:
        return features.new_full((count,), default, dtype=statistics_dtype(features.dtype))
    return check_value(name, value, count, features)


class SampledSoftmaxLoss(_Loss):
    """:func:`~replearn_kernels.sampled_softmax_loss` as a module."""

    @takes_logit_scale
    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        super().__init__(
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )

    @takes_logit_scale
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        target: Tensor | None = None,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
        key_log_probability: Tensor | None = None,
        query_weight: Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss of N queries and M keys."""
        given = {
            "target": target, "query_group": query_group, "key_group": key_group,
            "key_log_probability": key_log_probability, "query_weight": query_weight, "logit_scale": logit_scale,
        }  # fmt: skip
        return sampled_softmax_loss(query, key, **given, **self.options)
