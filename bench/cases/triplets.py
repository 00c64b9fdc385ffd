"""Triplets of a batch, mined and learned from in one step: batch_hard, semi_hard, batch_all."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.cases.metric import (
    class_members,
    distances_by_cdist,
    distances_by_products,
    distances_to,
    labelled_embeddings,
)
from bench.harness import Case
from replearn_kernels import triplet_margin_loss

MARGIN = 0.2
INFINITY = float("inf")


def mined_loss(embeddings, positive, negative):
    """The loss of one triplet per row, in O(N d)."""
    to_positive = F.pairwise_distance(embeddings, embeddings[positive], eps=0)
    to_negative = F.pairwise_distance(embeddings, embeddings[negative], eps=0)
    return (to_positive - to_negative + MARGIN).relu().mean()


# --- The farthest positive and the nearest negative ------------------------------------------------------------------


def batch_hard_mined(distances, embeddings, labels):
    """The usual way: distances without a gradient, two masks, two searches."""
    with torch.no_grad():
        distance, same = distances(embeddings), labels[:, None] == labels
        positive = torch.where(same, distance, -1).argmax(dim=1)
        negative = torch.where(same, INFINITY, distance).argmin(dim=1)
    return mined_loss(embeddings, positive, negative)


def batch_hard_max_min(embeddings, labels):
    """The gradient goes through the whole matrix of distances."""
    distance, same = distances_by_products(embeddings), labels[:, None] == labels
    farthest = torch.where(same, distance, -1).amax(dim=1)
    nearest = torch.where(same, INFINITY, distance).amin(dim=1)
    return (farthest - nearest + MARGIN).relu().mean()


def batch_hard_gathered(embeddings, labels):
    """One product, whose order is that of the distances to a row; classes are gathered from it, and struck out."""
    with torch.no_grad():
        members, others = class_members(labels)
        nearness = torch.addmm(-(embeddings * embeddings).sum(dim=1), embeddings, embeddings.T, alpha=2)
        slot = torch.where(others, nearness.gather(1, members), INFINITY).argmin(dim=1, keepdim=True)
        own_class = torch.where(others, members, torch.arange(len(labels), device=labels.device)[:, None])
        negative = nearness.scatter_(1, own_class, -INFINITY).argmax(dim=1)
    return mined_loss(embeddings, members.gather(1, slot)[:, 0], negative)


def triplet_case(mining, title, dense, reduction="mean", **options) -> Case:
    """Both of ours against ``dense``; ``options`` are the case's."""
    ours = partial(triplet_margin_loss, margin=MARGIN, mining=mining, reduction=reduction)
    return Case(
        name=mining,
        title=f"Triplet margin loss, {title}",
        make_inputs=labelled_embeddings,
        ours={"ours": ours, "ours_budget_0": partial(ours, memory_budget=0)},
        dense=dense,
        **options,
    )


BATCH_HARD = triplet_case(
    "batch_hard",
    "the hardest of every row",
    {
        "cdist": partial(batch_hard_mined, distances_by_cdist),
        "products": partial(batch_hard_mined, distances_by_products),
        "max_min": batch_hard_max_min,
        "gathered": batch_hard_gathered,
    },
)


# --- The nearest negative beyond a positive --------------------------------------------------------------------------


def semi_hard(distances, embeddings, labels):
    """A search per positive, over all rows at once; where no negative is farther, the farthest one."""
    members, others = class_members(labels)
    with torch.no_grad():
        distance = distances(embeddings)
        same = labels[:, None] == labels
        farthest = torch.where(same, -1, distance).argmax(dim=1)
        negatives = torch.where(same, INFINITY, distance)
        columns = []
        for to_positive in distance.gather(1, members).unbind(dim=1):
            nearest, column = torch.where(distance > to_positive[:, None], negatives, INFINITY).min(dim=1)
            columns.append(torch.where(nearest < INFINITY, column, farthest))
    gap = distances_to(embeddings, members) - distances_to(embeddings, torch.stack(columns, dim=1))
    return torch.where(others, (gap + MARGIN).relu(), 0).sum() / others.sum()


SEMI_HARD = triplet_case(
    "semi_hard",
    "semi-hard",
    {"cdist": partial(semi_hard, distances_by_cdist), "products": partial(semi_hard, distances_by_products)},
)


# --- All triplets, the mean over those with a loss: the formula over [N, N, N] would take 275 GB at N = 4096 ---------


def mean_of_nonzero(total, count):
    return total / count.clamp(min=1)


def batch_all_gathered(embeddings, labels):
    """All triplets of a class's K slots: [N, K, N]."""
    members, others = class_members(labels)
    distance = distances_by_products(embeddings)
    negatives = torch.where(labels[:, None] == labels, INFINITY, distance)
    violation = distances_to(embeddings, members)[:, :, None] - negatives[:, None] + MARGIN
    losses = torch.where(others[:, :, None], violation, 0).relu()
    return mean_of_nonzero(losses.sum(), (losses > 0).sum())


def batch_all_by_slots(distances, embeddings, labels):
    """Slot by slot: K times [N, N]."""
    members, others = class_members(labels)
    negatives = torch.where(labels[:, None] == labels, INFINITY, distances(embeddings))
    to_positives = torch.where(others, distances_to(embeddings, members), -INFINITY)
    total = count = 0
    for to_positive in to_positives.unbind(dim=1):
        losses = (to_positive[:, None] - negatives + MARGIN).relu()
        total, count = total + losses.sum(), count + (losses > 0).sum()
    return mean_of_nonzero(total, count)


BATCH_ALL = triplet_case(
    "batch_all",
    "all triplets",
    {
        "gathered": batch_all_gathered,
        "cdist_by_slots": partial(batch_all_by_slots, distances_by_cdist),
        "products_by_slots": partial(batch_all_by_slots, distances_by_products),
    },
    reduction="mean_nonzero",
    backends=("auto", "triton", "cpp", "torch"),  # the eager formula forms [N, N, N]
    sizes=(1024, 2048, 4096),
)
