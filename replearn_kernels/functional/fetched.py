"""Triplets over a process group: all ranks find those of their own anchors, and each fetches the rows that it chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import distributed
from ..engine.mining import Triplets
from ..engine.problem import Inputs, Problem
from ..engine.remote_rows import fetch_rows
from ..engine.shards import meet
from ..engine.triplets import triplet_loss_at
from ..objectives import BatchHard, SemiHard
from ..objectives.hardest import hardest_negatives, hardest_positives
from ..objectives.semi_hard import triplets_of
from .call import Options, config_of
from .gathered import reduced


def triplets_over_ranks(
    inputs: Inputs, objective: BatchHard | SemiHard, margin: float, options: Options, reduction: str
) -> Tensor:
    """The loss of the own anchors' triplets, whose positives and negatives are rows of any rank."""
    world, rows = options.world, inputs.query
    needs_grad = torch.is_grad_enabled() and rows.requires_grad
    layout = meet(world, inputs, objective, {"reduction": reduction, "requires_grad": needs_grad}, options.strategy)
    found = inputs._replace(query=rows.detach())
    with torch.no_grad():
        shard, table = distributed.row_statistics(found, config_of(found, objective, options), layout)
        find = triplets_of if isinstance(objective, SemiHard) else _hardest_triplets
        anchor, positive, negative = find(shard, table)
        wanted, place = torch.cat([positive, negative]).unique(return_inverse=True)
    chosen = fetch_rows(rows, world, layout.rows, wanted)
    places = len(rows) + place
    losses = triplet_loss_at(
        torch.cat([rows, chosen]), anchor, places[: len(anchor)], places[len(anchor) :],
        margin, objective.distance.name, "cpp" if options.backend == "cpp" else "torch",
    )  # fmt: skip
    counted = (losses > 0).sum() if reduction == "mean_nonzero" else torch.tensor(len(anchor), device=rows.device)
    losses = losses.new_zeros(len(rows)).index_add(0, anchor, losses) + shard.squares * 0  # a NaN shows, on every rank
    return reduced(losses, world.sum(counted), reduction, world)


def _hardest_triplets(problem: Problem, row_table: Tensor) -> Triplets:
    (has_positive, positive), (has_negative, negative) = hardest_positives(row_table), hardest_negatives(row_table)
    (anchor,) = (has_positive & has_negative).nonzero(as_tuple=True)
    return anchor, positive[anchor], negative[anchor]
