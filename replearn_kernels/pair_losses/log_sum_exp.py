"""The logarithm of a row's sum of exponentials over the pairs of a batch: what softmax losses are put together from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..declare import PairLoss, logsumexp
from ..declare.compute import pair_loss
from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group, takes_logit_scale

OVER = ("every", "same", "other")


@dataclass(frozen=True)
class PairLogSumExp(PairLoss):
    """Over all pairs of a row, those of its group, or the others. ``by_hardness``: with ``hardness``, or without."""

    over: str = "every"
    by_hardness: bool = False
    hardness: float = 0.0

    scaled = True

    def terms(self, logit, pair):
        exponent = logit + self.hardness * logit.detach() if self.by_hardness else logit
        return {"all": logsumexp(exponent, where=getattr(pair, self.over))}

    def loss(self, row):
        return row.all


@in_group
@takes_logit_scale
def pair_logsumexp(
    query: Tensor,
    key: Tensor,
    *,
    over: str = "every",
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    hardness: float = 0.0,
    reduction: str = "none",
    normalize: bool = False,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> Tensor:
    r"""The log-sum-exp of every query's logits over keys, without the N x M matrix: of all, of its group, of others.

    With ``l_ij = logit_scale * <query_i, key_j>``:

        z_i = log sum_j exp(l_ij + hardness * stop_gradient(l_ij))        over the keys j that count

    A softmax loss of one's own is an O(N) formula of such sums and of the logits that it names one by one. InfoNCE with
    the other queries among a query's negatives, for instance::

        positive = 20 * (query * key).sum(1)
        parts = [pair_logsumexp(query, each, over="other", logit_scale=20.0) for each in (key, query)]
        loss = F.cross_entropy(torch.stack([positive, *parts], 1), torch.zeros(len(query), dtype=torch.int64))

    ``hardness`` weights the pairs as Lan et al., "LLaVE: Large Language and Vision Embedding Models with
    Hardness-Weighted Contrastive Learning", 2025 (arXiv:2503.04812), do; there it is alpha / logit_scale.

    Args:
        query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides; L2-normalised, unless ``normalize``.
        key: ``[M, d]``, of the same dtype and device. It may be ``query``.
        over: "every" key; those of the "same" group as the query; or the "other" ones. Without groups the same is key
            i, for query i: with ``key=query`` "other" leaves out the row itself. Default "every".
        query_group: integers ``[N]``, any values; with ``key_group``. Default: every query has a key of its own.
        key_group: integers ``[M]``.
        logit_scale: the inverse temperature; a float, or a tensor of one element, which gets a gradient. Default 1.
        hardness: at least 0: what a pair's logit adds to its own exponent, as a constant. Default 0.
        reduction: "none", "mean" over the queries, or "sum". Default "none".
        normalize: L2-normalise query and key first. Default False.
        backend: "auto", "triton" (GPU), "cpp" (CPU), "torch" (any device), or "eager": the plain formula.
        memory_budget: bytes of similarities that may be kept for the backward pass. Default 256 MiB; 0 keeps none.
        group, strategy: as in :func:`~replearn_kernels.info_nce_loss`; keys are those of all ranks.

    Returns:
        ``[N]``, or its mean or sum, in fp32 (fp64 for fp64 inputs). -inf of a query without a key that counts, with
        zero gradients.

    Raises:
        TypeError: an argument is not of the type or dtype above, or the features differ in dtype.
        ValueError: wrong rank or shape, different widths or devices, "same" or "other" of fewer keys than queries
            without groups, one group without the other, an unknown ``over``, reduction or backend, a scale or hardness
            that is not finite, a negative hardness or budget.
        RuntimeError: the backend asked for is not available here.
    """
    validation.check_choice("over", over, OVER)
    hardness = validation.check_real("hardness", hardness)
    if hardness < 0:
        raise ValueError(f"hardness must be at least 0, got {hardness}")
    if over != "every" and query_group is None and isinstance(query, Tensor) and isinstance(key, Tensor):
        if 0 < query.ndim == key.ndim and query.shape[0] > key.shape[0]:
            raise ValueError(
                f"over={over!r} of more queries than keys needs query_group and key_group, "
                f"got {query.shape[0]} queries and {key.shape[0]} keys"
            )
    return pair_loss(
        PairLogSumExp(over, hardness > 0, hardness), query, key, query_group=query_group, key_group=key_group,
        logit_scale=logit_scale, reduction=reduction, normalize=normalize, backend=backend, memory_budget=memory_budget,
        group=group, strategy=strategy,
    )  # fmt: skip
