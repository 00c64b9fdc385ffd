"""The losses over distances straight from their papers, a row or a pair at a time: for tests, in fp64."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def distances(x: Tensor, kind: str = "euclidean") -> Tensor:
    """``[N, N]``, from differences; the gradient of a Euclidean distance of 0 is 0, a zero row's cosine is 0."""
    if kind == "cosine":
        lengths = [row.square().sum().sqrt() if row.any() else None for row in x]
        u = torch.stack([row * 0 if length is None else row / length for row, length in zip(x, lengths)])
        return torch.stack([1 - (row * u).sum(1) for row in u])
    squares = torch.stack([(row - x).square().sum(1) for row in x])
    if kind == "squared_euclidean":
        return squares
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def others(labels: list[int], i: int) -> tuple[list[int], list[int]]:
    """The positives and the negatives of row i."""
    rows = range(len(labels))
    return [j for j in rows if labels[j] == labels[i] and j != i], [j for j in rows if labels[j] != labels[i]]


def of_pairs(losses: Tensor, i: Tensor, j: Tensor, count: int, rows: int, reduction: str) -> Tensor:
    """The reductions of the losses of pairs, of which each row of a pair takes half."""
    if reduction == "none":
        return torch.stack([losses[(i == row) | (j == row)].sum() / 2 for row in range(rows)])
    return losses.sum() / max(count, 1) if reduction == "mean" else losses.sum()


def lifted(x, labels, margin=1.0, smooth=True, reduction="mean") -> Tensor:
    """Oh Song et al. 2016: equation 4, and 3 where not smooth."""
    d, labels = distances(x), labels.tolist()
    pairs = [(i, j) for i, j in combinations(range(len(x)), 2) if labels[i] == labels[j]]
    losses = [d.sum() * 0]  # of no pair: what follows may be empty
    for i, j in pairs:
        negatives = others(labels, i)[1]
        terms = margin - d[[i, j]][:, negatives]
        if negatives:
            bound = terms.exp().sum().log() if smooth else terms.max()
            losses.append((bound + d[i, j]).clamp(min=0).square() / 2)
        else:
            losses.append(d[i, j] * 0)
    i, j = torch.tensor([(-1, -1), *pairs]).t()
    return of_pairs(torch.stack(losses), i, j, len(pairs), len(x), reduction)


def contrastive(x, labels, margin=1.0, squared=True, reduction="mean") -> Tensor:
    """Hadsell et al. 2006, equation 4, without its factor of 1/2."""
    i, j = torch.tensor(list(combinations(range(len(x)), 2)), dtype=torch.int64).reshape(-1, 2).t()
    d = distances(x)[i, j]
    losses = torch.where(labels[i] == labels[j], d, (margin - d).clamp(min=0)) ** (2 if squared else 1)
    return of_pairs(losses, i, j, len(i), len(x), reduction)


def mined(d: Tensor, labels: Tensor, mining: str) -> list[tuple[int, int, int]]:
    """The triplets that the loss is over; of equal distances the lower index."""
    triplets, labels = [], labels.tolist()
    for a in range(len(d)):
        row = d[a].tolist()
        positives, negatives = others(labels, a)
        if not negatives or not positives:
            continue
        nearest = min(negatives, key=row.__getitem__)
        if mining == "batch_hard":
            triplets.append((a, max(positives, key=row.__getitem__), nearest))
            continue
        for p in positives:
            if mining == "batch_all":
                triplets += [(a, p, n) for n in negatives]
            else:
                beyond = [n for n in negatives if row[n] > row[p]]
                triplets.append(
                    (a, p, min(beyond, key=row.__getitem__) if beyond else max(negatives, key=row.__getitem__))
                )
    return triplets


def triplet(x, labels, margin=0.2, mining="semi_hard", distance="euclidean", reduction="mean", triplets=None) -> Tensor:
    """[D_ap - D_an + margin]+ of every mined triplet, or of the given ones; without a margin the soft one."""
    d = distances(x, distance) if len(x) else x @ x.t()
    given = triplets is not None
    a, p, n = torch.tensor(triplets if given else mined(d, labels, mining), dtype=torch.int64).reshape(-1, 3).t()
    gap = d[a, p] - d[a, n]
    losses = torch.logaddexp(gap, torch.zeros_like(gap)) if margin is None else (gap + margin).clamp(min=0)
    if reduction == "none":
        return losses if given else torch.stack([losses[a == i].sum() for i in range(len(x))])
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / max(len(losses) if reduction == "mean" else int((losses > 0).sum()), 1)
