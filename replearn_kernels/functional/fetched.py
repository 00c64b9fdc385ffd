"""Triplets over a process group: all ranks find those of their own anchors, and each fetches the rows that it chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import distributed
from ..engine.listed_pairs import add_differences_, pair_squares
from ..engine.mining import Triplets
from ..engine.operators import differentiable_once
from ..engine.problem import Inputs, Problem, statistics_dtype
from ..engine.remote_rows import RemotePairs
from ..engine.schedules import on_device_of
from ..engine.shards import meet
from ..engine.triplets import losses_of, new_sums, pair_weights, pairs_from_zero, to_distances_
from ..objectives import BatchHard, SemiHard
from ..objectives.hardest import hardest_negatives, hardest_positives
from ..objectives.semi_hard import triplets_of
from .call import Options, config_of
from .gathered import reduced

# Fetched rows that a rank holds at a time, for each row of the largest shard: with up to 8 ranks of like size, all.
_HELD_ROWS = 8


def triplets_over_ranks(
    inputs: Inputs, objective: BatchHard | SemiHard, margin: float | None, options: Options, reduction: str
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
    pairs = anchor.repeat(2), torch.cat([positive, negative])
    others = RemotePairs(world, layout.rows, *pairs, held=_HELD_ROWS * max(layout.rows))
    how = margin, objective.distance.name, "cpp" if options.backend == "cpp" else "torch"
    nan_of_rows = shard.squares * 0  # NaN for all rows of all ranks if one is not finite, chosen or not
    losses = _TripletLosses.apply(rows, nan_of_rows, others, *how)
    counted = (losses > 0).sum() if reduction == "mean_nonzero" else torch.tensor(len(anchor), device=rows.device)
    losses = losses.new_zeros(len(rows)).index_add(0, anchor, losses) + nan_of_rows
    return reduced(losses, world.sum(counted), reduction, world)


def _hardest_triplets(problem: Problem, row_table: Tensor) -> Triplets:
    (has_positive, positive), (has_negative, negative) = hardest_positives(row_table), hardest_negatives(row_table)
    (anchor,) = (has_positive & has_negative).nonzero(as_tuple=True)
    return anchor, positive[anchor], negative[anchor]


class _TripletLosses(torch.autograd.Function):
    """:func:`~replearn_kernels.engine.triplets.triplet_loss_at` of rows that are fetched: in parts, in both passes.

    ``nan_of_rows``, ``[N]``, is added to each row's gradient.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, nan_of_rows: Tensor, others: RemotePairs, margin: float | None, distance: str, backend: str
    ) -> Tensor:
        wide = statistics_dtype(rows.dtype)
        squares = rows.new_empty(others.pairs, dtype=wide)
        from_zero = torch.zeros_like(squares, dtype=torch.bool) if distance == "cosine" else None
        with on_device_of(rows):
            for route, pairs, i, j in others:
                both = torch.cat([rows, route.fetch(rows)]).to(wide)
                squares[pairs] = pair_squares(both, i, len(rows) + j, plain=backend == "torch")
                if from_zero is not None:
                    from_zero[pairs] = pairs_from_zero(both, i, len(rows) + j)
            from_zero = None if from_zero is None else from_zero.view(2, -1)
            distances = to_distances_(squares.view(2, -1), distance, from_zero)
            losses = losses_of(distances, margin)
        ctx.others, ctx.how = others, (margin, distance, backend)
        kept = both if len(others) == 1 else None  # fetched again otherwise
        ctx.save_for_backward(rows, nan_of_rows, distances, from_zero, kept)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        ctx.others.world.meet_again("backward")
        with torch.no_grad():
            total = _TripletLosses._gradient(ctx, saved, grad)
        return *differentiable_once([grad, saved[0]], [total]), None, None, None, None, None

    @staticmethod
    def _gradient(ctx, saved: tuple[Tensor | None, ...], grad: Tensor) -> Tensor:
        rows, nan_of_rows, distances, from_zero, both = saved
        margin, distance, backend = ctx.how
        with on_device_of(rows):
            weight = pair_weights(grad, distances, margin, distance, from_zero).flatten()
            total = rows.new_zeros(rows.shape, dtype=distances.dtype)
            for route, pairs, i, j in ctx.others:
                if len(ctx.others) > 1:
                    both = torch.cat([rows, route.fetch(rows)]).to(distances.dtype)
                gradient = new_sums(both, backend)
                add_differences_(gradient, both, i, len(rows) + j, weight[pairs], plain=backend == "torch")
                own, shares = gradient.to(total.dtype).tensor_split([len(rows)])
                total += own
                total += route.send_back(shares)
            return total.add_(nan_of_rows.unsqueeze(1)).to(rows.dtype)
