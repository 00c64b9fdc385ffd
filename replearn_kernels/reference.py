"""The specification: every loss as a plain formula on the full matrix, differentiable any number of times.

This is what ``backend="eager"`` runs and what the tests hold the fused losses against. It takes the memory that the
library exists to save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    own: Tensor | None,
    queue: Tensor | None,
    target: Tensor | None,
    logit_scale: Tensor,
    symmetric: bool,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Cross entropy of every row over keys, queue and own negatives; symmetric: averaged with the columns'."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    rows = torch.arange(len(query), device=query.device)
    target = rows if target is None else target
    logits = query @ key.t()
    columns = [logits]
    if queue is not None:
        columns.append(query @ queue.to(dtype).t())
    if own is not None:
        columns.append(torch.einsum("nd,nkd->nk", query, own.to(dtype)))
    loss = _cross_entropy(logit_scale * torch.cat(columns, dim=1), target, label_smoothing)
    if symmetric:
        by_column = logit_scale * logits.t()[target]
        loss = (loss + _cross_entropy(by_column, rows, label_smoothing)) / 2
    return reduce(loss, reduction)


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """"mean" | "sum" | "none"; the mean over no rows is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(losses.numel(), 1) if reduction == "mean" else total
