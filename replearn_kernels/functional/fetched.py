"""Losses over a process group whose gradient is one of few pairs: all ranks find them, and each fetches their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import distributed
from ..engine.problem import Inputs
from ..engine.remote_rows import fetch_rows
from ..engine.shards import meet
from ..engine.triplets import triplet_loss_at
from ..objectives import BatchHard
from ..objectives.hardest import hardest_negatives, hardest_positives
from .call import Options, config_of
from .gathered import reduced


def batch_hard_over_ranks(inputs: Inputs, objective: BatchHard, options: Options, reduction: str) -> Tensor:
    """The loss of the own anchors, with the farthest positive and the nearest negative of all ranks' rows."""
    world, rows = options.world, inputs.query
    needs_grad = torch.is_grad_enabled() and rows.requires_grad
    layout = meet(world, inputs, objective, {"reduction": reduction, "requires_grad": needs_grad}, options.strategy)
    found = inputs._replace(query=rows.detach())
    with torch.no_grad():
        table, squares = distributed.row_statistics(found, config_of(found, objective, options), layout)
    (has_positive, positive), (has_negative, negative) = hardest_positives(table), hardest_negatives(table)
    (anchor,) = (has_positive & has_negative).nonzero(as_tuple=True)
    chosen = fetch_rows(rows, world, layout.rows, torch.cat([positive[anchor], negative[anchor]]))
    place = len(rows) + torch.arange(len(chosen), device=rows.device)
    losses = triplet_loss_at(
        torch.cat([rows, chosen]), anchor, place[: len(anchor)], place[len(anchor) :],
        objective.margin, objective.distance.name, "cpp" if options.backend == "cpp" else "torch",
    )  # fmt: skip
    losses = losses.new_zeros(len(rows)).index_put((anchor,), losses) + squares * 0  # a NaN shows, on every rank
    counted = (losses > 0).sum() if reduction == "mean_nonzero" else torch.tensor(len(anchor), device=rows.device)
    return reduced(losses, world.sum(counted), reduction, world)
