"""The specification: every loss as a plain formula on the full matrix, differentiable any number of times.

This is what ``backend="eager"`` runs and what the tests hold the fused losses against. It takes the memory that the
library exists to save.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .engine.problem import Inputs, is_whole, statistics_dtype
from .objectives import BatchAll, BatchHard, HardLifted, Lifted, MarginContrastive, MarginSoftmax, Softmax
from .objectives.margin_softmax import above_rounding, angular_drop, chord_squares
from .objectives.triplet_distance import TripletDistance, loss_of_gap


def unit_rows(features: Tensor) -> Tensor:
    """F.normalize in fp32 (fp64), in which a norm does not overflow; a row of zeros has the gradient 0.

    F.normalize divides such a row by 1e-12: in fp16 0 / 0, and elsewhere a gradient 1e12 times the others. Rows are
    normalised as far as their squares are in range: in fp32 from 1e-19 to 1e19.
    """
    rows = features.to(statistics_dtype(features.dtype))
    return (rows / row_lengths(rows)).to(features.dtype)


def row_lengths(rows: Tensor) -> Tensor:
    """``[..., 1]``. Infinite for zeros: divided by it, such a row and its derivatives become 0 without another pass."""
    squares = rows.square().sum(-1, keepdim=True)  # no vecdot: autocast would round it
    return torch.where(squares == 0, torch.inf, squares.clamp(min=torch.finfo(rows.dtype).tiny)).sqrt()


def softmax_loss(inputs: Inputs, objective: Softmax, reduction: str) -> Tensor:
    """Cross entropy of every row over keys, queue and own negatives; symmetric: averaged with the columns'."""
    if objective.own_positives:
        own, *queue = reversed(_logits(inputs))
        logits = torch.cat([own, *queue], dim=1)
        target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return reduce(_cross_entropy(logits, target, objective.label_smoothing), reduction)
    query = inputs.query
    rows = torch.arange(len(query), device=query.device)
    target = rows if inputs.target is None else inputs.target
    logits, *negatives = _logits(inputs)
    if objective.groups_ignored:
        ignored = (inputs.row_group.unsqueeze(1) == inputs.column_group).scatter(1, target.unsqueeze(1), False)
        logits = logits.masked_fill(ignored, -torch.inf)
    loss = _cross_entropy(torch.cat([logits, *negatives], dim=1), target, objective.label_smoothing)
    if objective.symmetric:
        by_column = _cross_entropy(logits.t()[target], rows, objective.label_smoothing)
        loss = (loss + by_column) / 2
    return reduce(loss, reduction)


def siglip_loss(inputs: Inputs, reduction: str) -> Tensor:
    """Binary cross entropy of every pair, summed over each row."""
    query, key = _features(inputs)
    logits = inputs.logit_scale * query @ key.t()
    if inputs.logit_bias is not None:
        logits = logits + inputs.logit_bias
    if inputs.row_group is None:
        positive = torch.eye(len(query), device=query.device, dtype=torch.bool)
    else:
        positive = inputs.row_group.unsqueeze(1) == inputs.column_group
    return reduce(-F.logsigmoid(torch.where(positive, logits, -logits)).sum(1), reduction)


def sup_con_loss(inputs: Inputs, reduction: str) -> Tensor:
    """Log of the softmax over the other rows, averaged over each row's positives; the mean is over rows with one."""
    (z,) = _features(inputs)
    itself = torch.eye(len(z), device=z.device, dtype=torch.bool)
    positive = (inputs.row_group.unsqueeze(1) == inputs.row_group) & ~itself
    counts = positive.sum(1)
    logits = (inputs.logit_scale * z @ z.t()).masked_fill(itself, torch.finfo(z.dtype).min)
    log_softmax = F.log_softmax(logits, dim=1)
    loss = -(log_softmax * positive).sum(1) / counts.clamp(min=1)
    return reduce(loss, reduction, (counts > 0).sum())


def margin_loss(inputs: Inputs, objective: MarginSoftmax, reduction: str) -> Tensor:
    """Cross entropy over cosines, the true class's with the margin."""
    features = _features(inputs)
    query, weight = (unit_rows(rows) for rows in features)
    query_whole, weight_whole = (is_whole(1 / row_lengths(rows.detach()).squeeze(1)) for rows in features)
    normalised = query_whole & weight_whole[inputs.target]
    square = above_rounding(chord_squares(query, weight[inputs.target], normalised))
    true, m = 1 - square / 2, objective.margin
    if objective.angular:
        sine = safe_sqrt(square * (1 - square / 4).clamp(min=0))
        phi = torch.where(true > -math.cos(m), true * math.cos(m) - sine * math.sin(m), true - angular_drop(m))
    else:
        phi = true - m
    logits = inputs.logit_scale * (query @ weight.t()).scatter(1, inputs.target.unsqueeze(1), phi.unsqueeze(1))
    return reduce(_cross_entropy(logits, inputs.target, 0.0), reduction)


def contrastive_loss(inputs: Inputs, objective: MarginContrastive, reduction: str) -> Tensor:
    """Half of the pairs' losses for each of their rows; the mean is over pairs."""
    distance, positive, itself = _distances(inputs)
    losses = torch.where(positive, distance, (objective.margin - distance).relu())
    losses = losses.square() if objective.squared else losses
    count = len(losses) * (len(losses) - 1) // 2
    losses = losses.masked_fill(itself, 0).sum(1) / 2 + nan_of_rows(inputs)
    return reduce(losses, reduction, torch.tensor(count, device=losses.device))


def lifted_structure_loss(inputs: Inputs, objective: Lifted | HardLifted, reduction: str) -> Tensor:
    """Over positive pairs, half of each pair's for each of its rows; the mean is over pairs."""
    distance, positive, itself = _distances(inputs)
    v = (objective.margin - distance).masked_fill(positive | itself, -torch.inf)
    r = _finite(v.logsumexp(1) if isinstance(objective, Lifted) else v.max(1).values if len(v) else v.sum(1))
    combine = torch.logaddexp if isinstance(objective, Lifted) else torch.maximum
    losses = torch.where(positive, combine(r.unsqueeze(1), r) + distance, 0).relu().square() / 4
    return reduce(losses.sum(1) + nan_of_rows(inputs), reduction, positive.sum() // 2)


def batch_hard_losses(inputs: Inputs, objective: BatchHard) -> Tensor:
    """``[N]``: of every anchor's farthest positive and nearest negative, 0 where it lacks one."""
    distance, positive, negative = _triplet_distances(inputs, objective.distance)
    if not len(distance):
        return distance.sum(1)
    p = distance.detach().masked_fill(~positive, -1).argmax(1, keepdim=True)
    n = distance.detach().masked_fill(~negative, torch.inf).argmin(1, keepdim=True)
    losses = loss_of_gap((distance.gather(1, p) - distance.gather(1, n)).squeeze(1), objective.margin)
    return torch.where(positive.any(1) & negative.any(1), losses, 0) + nan_of_rows(inputs)


def semi_hard_triplets(inputs: Inputs, measure: TripletDistance) -> tuple[Tensor, Tensor, Tensor]:
    """Of every ordered positive pair: its nearest negative beyond the positive, or the farthest of all."""
    distance, positive, negative = _triplet_distances(inputs, measure)
    a, p = (positive & negative.any(1, keepdim=True)).nonzero(as_tuple=True)
    beyond = negative[a] & (distance[a] > distance[a, p].unsqueeze(1))
    if not len(a):
        return a, p, a
    nearest = distance[a].masked_fill(~beyond, torch.inf).argmin(1)
    farthest = distance[a].masked_fill(~negative[a], -1).argmax(1)
    return a, p, torch.where(beyond.any(1), nearest, farthest)


def triplet_losses(rows, anchor, positive, negative, margin: float | None, measure: TripletDistance) -> Tensor:
    """``[T]``."""
    x = rows.to(statistics_dtype(rows.dtype))
    isolated = (x == 0).all(1).to(x.dtype) if measure.unit_rows else x.new_zeros(len(x))

    def distance(others: Tensor) -> Tensor:
        square = (x[anchor] - x[others]).square().sum(1) + isolated[anchor] + isolated[others]
        return safe_sqrt(square) if measure.name == "euclidean" else square * measure.factor

    return loss_of_gap(distance(positive) - distance(negative), margin)


def batch_all_loss(inputs: Inputs, objective: BatchAll, reduction: str) -> Tensor:
    """Over all triplets: N x N x N of them at once."""
    distance, positive, negative = _triplet_distances(inputs, objective.distance)
    triplet = positive.unsqueeze(2) & negative.unsqueeze(1)
    losses = distance.unsqueeze(2) - distance.unsqueeze(1) + objective.margin
    losses = torch.where(triplet, losses, 0).relu()
    count = ((losses > 0) if objective.nonzero else triplet).sum()
    return reduce(losses.sum((1, 2)) + nan_of_rows(inputs), reduction, count)


def _triplet_distances(inputs: Inputs, distance: TripletDistance) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, and which pairs are positive and negative."""
    squares, positive, itself = squared_distances(inputs), *_roles(inputs)
    if distance.unit_rows:
        isolated = (inputs.query == 0).all(1).to(squares)
        squares = squares + isolated.unsqueeze(1) + isolated
    of_square = safe_sqrt(squares) if distance.name == "euclidean" else squares * distance.factor
    return of_square, positive, ~(positive | itself)


def squared_distances(inputs: Inputs) -> Tensor:
    """``|x_i - x_j|^2`` from differences, which cancel nothing, some rows at a time: N x N x d are not kept.

    But within a torch.func transform, for which PyTorch's checkpoint has no rule.
    """
    (x,) = _features(inputs)
    if torch._C._are_functorch_transforms_active():
        return _squares_between(x, x)
    rows = max(2**22 // max(x.numel(), 1), 1)
    blocks = [checkpoint(_squares_between, x[i : i + rows], x, use_reentrant=False) for i in range(0, len(x), rows)]
    return torch.cat(blocks) if blocks else x @ x.t()


def safe_sqrt(squares: Tensor) -> Tensor:
    """The root with the sub-gradient 0 at 0."""
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _squares_between(rows: Tensor, x: Tensor) -> Tensor:
    return (rows.unsqueeze(1) - x).square().sum(2)


def _distances(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, which pairs are of one group, and which entries are a row with itself."""
    return safe_sqrt(squared_distances(inputs)), *_roles(inputs)


def _roles(inputs: Inputs) -> tuple[Tensor, Tensor]:
    itself = torch.eye(len(inputs.query), device=inputs.query.device, dtype=torch.bool)
    return (inputs.row_group.unsqueeze(1) == inputs.row_group) & ~itself, itself


def nan_of_rows(inputs: Inputs) -> Tensor:
    """``[N]``: NaN for a row that is not finite, though it is in no pair that counts; else 0."""
    (x,) = _features(inputs)
    return (x.detach() * 0).sum(1)


def _finite(r: Tensor) -> Tensor:
    """-inf, of no negatives, as a number whose exp is 0: differences of two are then no NaN."""
    return r.clamp(min=torch.finfo(r.dtype).min / 4)


def dino_loss(student, teacher, center, student_temp, teacher_temp, reduction) -> Tensor:
    """Cross entropies of all pairs of different views, on whole logits."""
    dtype = statistics_dtype(student.dtype)
    log_p_s = (student.to(dtype) / student_temp).log_softmax(-1)
    p_t = ((teacher.to(dtype) - center.to(dtype)) / teacher_temp).softmax(-1)
    pairs = [(u, v) for u in range(len(p_t)) for v in range(len(log_p_s)) if u != v]
    no_pair = log_p_s[:0].sum((0, 2))  # zeros that depend on the student, so that their gradient is zeros too
    losses = sum((-(p_t[u] * log_p_s[v]).sum(-1) for u, v in pairs), start=no_pair) / max(len(pairs), 1)
    return reduce(losses, reduction)


def dino_head_loss(student, student_weight, teacher, teacher_weight, center, *config) -> Tensor:
    """:func:`dino_loss` of features times prototypes."""
    dtype = statistics_dtype(student.dtype)
    logits = student.to(dtype) @ student_weight.to(dtype).t()
    return dino_loss(logits, teacher.to(dtype) @ teacher_weight.to(dtype).t(), center, *config)


def cosine_similarities(rows: Tensor, labels: Tensor) -> Tensor:
    """``[N]``, from unit rows: the mean cosine to the other labels' rows, less that to the own label's others."""
    cosines = rows @ rows.t()
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return _row_means(cosines, ~same) - _row_means(cosines, positive)


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Of every row's masked values; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _features(inputs: Inputs) -> list[Tensor]:
    """Rows and keys in the dtype of the statistics."""
    dtype = statistics_dtype(inputs.query.dtype)
    return [features.to(dtype) for features in (inputs.query, *inputs.keys)]


def _logits(inputs: Inputs) -> list[Tensor]:
    """Of keys and of a queue, ``[N, M]`` each, then of every row's own columns, ``[N, K]``."""
    query, *keys = _features(inputs)
    logits = [inputs.logit_scale * query @ features.t() for features in keys]
    if inputs.own is not None:
        logits.append(inputs.logit_scale * torch.einsum("nd,nkd->nk", query, inputs.own.to(query.dtype)))
    return logits


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def reduce(losses: Tensor, reduction: str, count: int | Tensor | None = None) -> Tensor:
    """"mean" (over ``count`` rows; default all) | "sum" | "none"; the mean over no rows is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if isinstance(count, Tensor):
        return losses.sum() / (count + (count == 0))
    return losses.sum() / max(losses.numel(), 1)
