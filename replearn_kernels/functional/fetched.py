"""Triplets over a process group: all ranks find those of their own anchors, and each fetches the rows that it chose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..engine import distributed
from ..engine.mining import Triplets
from ..engine.problem import Inputs, Problem
from ..engine.remote_rows import fetch_rows
from ..engine.shards import Layout, meet
from ..engine.triplets import triplet_loss_at
from ..engine.world import World
from ..objectives import BatchHard, SemiHard
from ..objectives.hardest import hardest_negatives, hardest_positives
from ..objectives.semi_hard import triplets_of
from .call import Options, config_of
from .gathered import reduced

# Fetched rows that a rank holds at a time, for each row of the largest shard: with up to 8 ranks of like size, all.
_HELD_ROWS = 8


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
    kernel = objective.distance.name, "cpp" if options.backend == "cpp" else "torch"

    def losses_of(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        wanted, place = torch.cat([positive, negative]).unique(return_inverse=True)
        places = (place + len(rows)).tensor_split(2)
        chosen = fetch_rows(rows, world, layout.rows, wanted)
        return triplet_loss_at(torch.cat([rows, chosen]), anchor, *places, margin, *kernel)

    parts = _parts(world, layout, positive, negative)
    if parts == 1:
        losses = losses_of(anchor, positive, negative)
    else:  # fetched again in the backward pass, so that rows are held for a part at a time
        of_parts = zip(*(index.tensor_split(parts) for index in (anchor, positive, negative)))
        losses = torch.cat([checkpoint(losses_of, *part, use_reentrant=False) for part in of_parts])
    counted = (losses > 0).sum() if reduction == "mean_nonzero" else torch.tensor(len(anchor), device=rows.device)
    losses = losses.new_zeros(len(rows)).index_add(0, anchor, losses) + shard.squares * 0  # a NaN shows, on every rank
    return reduced(losses, world.sum(counted), reduction, world)


def _parts(world: World, layout: Layout, positive: Tensor, negative: Tensor) -> int:
    """Of the triplets, on every rank, so that no part is of more rows than may be held."""
    held = _HELD_ROWS * max(layout.rows)
    chosen = torch.cat([positive, negative])
    fits = len(chosen) <= held or len(chosen.unique()) <= held
    return world.most(torch.tensor(1 if fits else -(-len(chosen) // held), device=chosen.device))


def _hardest_triplets(problem: Problem, row_table: Tensor) -> Triplets:
    (has_positive, positive), (has_negative, negative) = hardest_positives(row_table), hardest_negatives(row_table)
    (anchor,) = (has_positive & has_negative).nonzero(as_tuple=True)
    return anchor, positive[anchor], negative[anchor]
