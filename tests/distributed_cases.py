"""The losses over shards of one batch, and what a single process says of the whole."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import hardest_toys as hardest
import learned_toys as toys
import torch
import torch.distributed as dist
from declared_cases import (
    Contrastive,
    Filtered,
    Graded,
    Guided,
    Imitation,
    Margin,
    OwnMargins,
    Regression,
    Sampled,
    SigLip,
    Squares,
)
from declared_toys import Spread
from torch import Tensor

from replearn_kernels import (
    circle_loss,
    clip_loss,
    contrastive_loss,
    decoupled_contrastive_loss,
    gist_loss,
    hard_negative_loss,
    info_nce_loss,
    lifted_structure_loss,
    multi_positive_clip_loss,
    multi_similarity_loss,
    n_pair_loss,
    nt_xent_loss,
    pair_logsumexp,
    sampled_softmax_loss,
    siglip_loss,
    soft_target_loss,
    sup_con_loss,
    triplet_margin_loss,
    vse_loss,
)
from replearn_kernels.declare import fuse

WIDTH, QUEUE, VIEWS = 5, 3, 2


@dataclass
class Batch:
    """Of all ranks, or of one. Rows are spread over the ranks; scale, bias and queue are everywhere the same."""

    x: Tensor
    y: Tensor
    own: Tensor
    views: Tensor
    labels: Tensor
    target: Tensor
    scale: Tensor
    bias: Tensor
    queue: Tensor

    @classmethod
    def random(cls, rows: int) -> Batch:
        g = torch.Generator().manual_seed(rows)

        def features(*shape):
            return torch.randn(*shape, WIDTH, generator=g, dtype=torch.float64)

        return cls(
            features(rows), features(rows), features(rows, 2), features(rows, VIEWS),
            torch.randint(0, max(rows // 2, 1), (rows,), generator=g), torch.randint(0, rows, (rows,), generator=g),
            torch.tensor(1.7, dtype=torch.float64), torch.tensor(-0.6, dtype=torch.float64), features(QUEUE),
        )  # fmt: skip

    def shard(self, rank: int, sizes: list[int]) -> Batch:
        start = sum(sizes[:rank])
        return replace(self, **{name: getattr(self, name)[start : start + sizes[rank]] for name in SPREAD})

    def to(self, dtype: torch.dtype) -> Batch:
        """Leaves of this dtype."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}).leaves()

    def leaves(self) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()})

    def gradients(self) -> dict[str, Tensor]:
        names = [name for name in DIFFERENTIABLE if getattr(self, name).grad is not None]
        return {name: getattr(self, name).grad for name in names}


SPREAD = ("x", "y", "own", "views", "labels", "target")
DIFFERENTIABLE = ("x", "y", "own", "views", "scale", "bias", "queue")


def numbers(b: Batch, *names: str) -> dict[str, Tensor]:
    """For every row, some that nothing else depends on."""
    return dict(zip(names, 1 + b.own.detach().flatten(1).t().tanh()))


LOSSES = {
    "clip": lambda b, **k: clip_loss(b.x, b.y, b.scale, **k),
    "clip_smoothed": lambda b, **k: clip_loss(b.x, b.y, b.scale, label_smoothing=0.2, **k),
    "clip_frozen_text": lambda b, **k: clip_loss(b.x, b.y.detach(), b.scale, normalize=True, **k),
    "info_nce": lambda b, **k: info_nce_loss(b.x, b.y, logit_scale=b.scale, **k),
    "info_nce_frozen": lambda b, **k: info_nce_loss(b.x.detach(), b.y.detach(), logit_scale=b.scale, **k),
    "info_nce_negative_scale": lambda b, **k: info_nce_loss(b.x, b.y, logit_scale=-b.scale, symmetric=True, **k),
    "info_nce_target": lambda b, **k: info_nce_loss(b.x, b.y, target=b.target, logit_scale=b.scale, **k),
    "info_nce_target_symmetric": lambda b, **k: info_nce_loss(
        b.x, b.y, target=b.target, logit_scale=b.scale, symmetric=True, label_smoothing=0.1, **k
    ),
    "info_nce_queue": lambda b, **k: info_nce_loss(
        b.x, b.y, negatives=b.queue, logit_scale=b.scale, symmetric=True, label_smoothing=0.1, **k
    ),
    "info_nce_own": lambda b, **k: info_nce_loss(b.x, b.y, negatives=b.own, logit_scale=b.scale, **k),
    "moco": lambda b, **k: info_nce_loss(
        b.x, b.y, negatives=b.queue, batch_negatives=False, logit_scale=b.scale, label_smoothing=0.1, **k
    ),
    "moco_own": lambda b, **k: info_nce_loss(
        b.x, b.y, negatives=b.own, batch_negatives=False, logit_scale=b.scale, **k
    ),
    "n_pair": lambda b, **k: n_pair_loss(b.x, b.y, **k),
    "n_pair_labels": lambda b, **k: n_pair_loss(b.x, b.y, labels=b.labels, **k),
    "siglip": lambda b, **k: siglip_loss(b.x, b.y, b.scale, b.bias, **k),
    "siglip_frozen": lambda b, **k: siglip_loss(b.x.detach(), b.y.detach(), b.scale.detach(), b.bias, **k),
    "siglip_groups": lambda b, **k: siglip_loss(
        b.x, b.y, b.scale, b.bias, query_group=b.labels, key_group=b.labels, normalize=True, **k
    ),
    "nt_xent": lambda b, **k: nt_xent_loss(b.x, b.y, temperature=1 / b.scale, **k),
    "sup_con": lambda b, **k: sup_con_loss(b.x, b.labels, temperature=1 / b.scale, **k),
    "contrastive": lambda b, **k: contrastive_loss(b.x, b.labels, margin=3.0, **k),
    "contrastive_plain": lambda b, **k: contrastive_loss(b.x, b.labels, margin=3.0, squared=False, **k),
    "lifted": lambda b, **k: lifted_structure_loss(b.x, b.labels, **k),
    "lifted_hard": lambda b, **k: lifted_structure_loss(b.x, b.labels, smooth=False, **k),
    "triplet_batch_hard": lambda b, **k: triplet_margin_loss(b.x, b.labels, margin=3.0, mining="batch_hard", **k),
    "triplet_batch_hard_soft": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, margin=None, mining="batch_hard", **k
    ),
    "triplet_semi_hard_soft": lambda b, **k: triplet_margin_loss(b.x, b.labels, margin=None, **k),
    "triplet_batch_hard_squared": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, margin=9.0, mining="batch_hard", distance="squared_euclidean", **k
    ),
    "triplet_batch_hard_cosine": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, mining="batch_hard", distance="cosine", **k
    ),
    "triplet_semi_hard": lambda b, **k: triplet_margin_loss(b.x, b.labels, margin=3.0, **k),
    "triplet_semi_hard_squared": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, margin=9.0, distance="squared_euclidean", **k
    ),
    "triplet_semi_hard_cosine": lambda b, **k: triplet_margin_loss(b.x, b.labels, distance="cosine", **k),
    "triplet_batch_all": lambda b, **k: triplet_margin_loss(b.x, b.labels, margin=3.0, mining="batch_all", **k),
    "triplet_batch_all_cosine": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, margin=1.0, mining="batch_all", distance="cosine", **k
    ),
    "triplet_batch_all_violated": lambda b, **k: triplet_margin_loss(
        b.x, b.labels, margin=1.0, mining="batch_all", **{"reduction": "mean_nonzero", **k}
    ),
    "circle": lambda b, **k: circle_loss(b.x, b.labels, gamma=5.0, **k),
    "vse": lambda b, **k: vse_loss(b.x, b.y, margin=2.0, image_group=b.labels, **k),
    "multi_similarity": lambda b, **k: multi_similarity_loss(b.x, b.labels, beta=5.0, **k),
    "decoupled": lambda b, **k: decoupled_contrastive_loss(b.x, b.y, temperature=1 / b.scale, **k),
    "hard_negative": lambda b, **k: hard_negative_loss(b.x, b.y, logit_scale=b.scale, **k),
    "debiased_target": lambda b, **k: hard_negative_loss(
        b.x, b.y, beta=0.3, tau_plus=0.05, target=b.target, logit_scale=b.scale.detach(), **k
    ),
    "multi_positive": lambda b, **k: multi_positive_clip_loss(b.x, b.y, b.scale, image_group=b.labels, **k),
    "sampled_softmax": lambda b, **k: sampled_softmax_loss(
        b.x, b.y, key_group=b.labels, key_log_probability=-b.own.detach()[:, 0, 0].exp(),
        query_weight=b.own.detach()[:, 1, 0].square(), logit_scale=b.scale, **k,
    ),
    "sampled_softmax_target": lambda b, **k: sampled_softmax_loss(
        b.x, b.y, target=b.target, query_group=b.labels, key_group=b.labels, logit_scale=b.scale, **k
    ),
    "soft_target": lambda b, **k: soft_target_loss(
        b.x, b.y, b.own.detach()[:, 0], b.own.detach()[:, 1], logit_scale=b.scale, guide_scale=1.3, **k
    ),
    "soft_target_symmetric": lambda b, **k: soft_target_loss(
        b.x, b.y, b.own.detach()[:, 0], b.own.detach()[:, 1], logit_scale=b.scale, symmetric=True, **k
    ),
    "log_sum_exp_of_others": lambda b, **k: pair_logsumexp(
        b.x, b.y, over="other", query_group=b.labels, key_group=b.labels, logit_scale=b.scale, hardness=0.3,
        **{"reduction": "mean", **k},
    ),
    "log_sum_exp": lambda b, **k: pair_logsumexp(
        b.x, b.x, logit_scale=b.scale, **{"reduction": "mean", **k}
    ),
    "gist": lambda b, **k: gist_loss(
        b.x, b.y, b.own.detach()[:, 0], b.own.detach()[:, 1], logit_scale=b.scale, **k
    ),
    "gist_negatives": lambda b, **k: gist_loss(
        b.x, b.y, b.own.detach()[:, 0], b.own.detach()[:, 1], negative=b.views[:, 0], negative_guide=b.y.detach(),
        logit_scale=b.scale, contrast_positives=False, **k
    ),
    "declared_with_a_margin": lambda b, **k: fuse(Margin(), **k)(b.x, b.y, b.scale),
    "declared_in_one_sweep": lambda b, **k: fuse(SigLip(), **k)(
        b.x, b.y, b.scale, query_group=b.labels, key_group=b.labels
    ),
    "declared_over_distances": lambda b, **k: fuse(Contrastive(1.3), **k)(b.x, b.labels),
    "declared_over_distances_without_labels": lambda b, **k: fuse(Spread(), **k)(b.x),
    "declared_mean_over_weights": lambda b, **k: fuse(Squares(), **k)(b.x, b.labels),
    "declared_by_values": lambda b, **k: fuse(Graded(), **k)(b.x, row_values=numbers(b, "grade", "weight")),
    "declared_in_one_sweep_by_values": lambda b, **k: fuse(Regression(), **k)(
        b.x, None, b.scale, row_values=numbers(b, "grade")
    ),
    "declared_over_distances_by_values": lambda b, **k: fuse(OwnMargins(), **k)(
        b.x, b.labels, row_values=numbers(b, "margin")
    ),
    "declared_by_values_of_both": lambda b, **k: fuse(Sampled(), **k)(
        b.x, b.y, b.scale, target=b.target, row_values=numbers(b, "weight", "skipped"),
        column_values=numbers(b, "log_q", "weight"),
    ),
    "declared_by_a_guide": lambda b, **k: fuse(Filtered(), **k)(
        b.x, b.y, b.scale, target=b.target, row_values=numbers(b, "threshold"), row_guide=b.own.detach()[:, 0],
        column_guide=b.own.detach()[:, 1],
    ),
    "declared_over_distances_by_a_guide": lambda b, **k: fuse(Guided(), **k)(
        b.x, b.labels, row_values=numbers(b, "weight"), row_guide=b.own.detach()[:, 0]
    ),
    "declared_in_one_sweep_by_a_guide": lambda b, **k: fuse(Imitation(), **k)(b.x, row_guide=b.own.detach().flatten(1)),
    "declared_hardest_over_distances": lambda b, **k: fuse(hardest.Triplets(), **k)(b.x, b.labels),
    "declared_hardest_of_both_sides": lambda b, **k: fuse(hardest.Violation(b.bias, b.scale), **k)(
        b.x, b.y, b.scale, target=b.target
    ),
    "declared_hardest_by_group": lambda b, **k: fuse(hardest.Among(), **k)(
        b.x, b.y, b.scale, query_group=b.labels, key_group=b.labels
    ),
    "declared_hardest_by_values": lambda b, **k: fuse(hardest.Grades(b.scale), **k)(
        b.x, row_values=numbers(b, "grade")
    ),
    "declared_that_learns_in_one_sweep": lambda b, **k: fuse(toys.Bias(b.bias), **k)(
        b.x, b.y, b.scale, query_group=b.labels, key_group=b.labels
    ),
    "declared_that_learns_over_a_batch": lambda b, **k: fuse(toys.Steep(b.bias, b.scale), **k)(b.x, b.labels),
    "declared_that_learns_by_columns": lambda b, **k: fuse(toys.Columns(b.scale, b.bias), **k)(
        b.x, b.y, target=b.target, row_values=numbers(b, "weight"), column_values=numbers(b, "weight")
    ),
    "declared_that_learns_by_sides": lambda b, **k: fuse(toys.Sides(b.scale), **k)(
        b.x, row_values=numbers(b, "grade")
    ),
    "declared_that_learns_over_distances": lambda b, **k: fuse(Contrastive(b.scale), **k)(b.x, b.labels),
    "declared_that_learns_over_a_batch_in_one_sweep": lambda b, **k: fuse(toys.Totals(b.scale, b.bias), **k)(
        b.x, b.labels
    ),
    "declared_that_learns_over_a_frozen_batch": lambda b, **k: fuse(toys.Steep(b.bias, b.scale), **k)(
        b.x.detach(), b.labels
    ),
    "declared_that_learns_over_a_frozen_batch_in_one_sweep": lambda b, **k: fuse(toys.Totals(b.scale, b.bias), **k)(
        b.x.detach(), b.labels
    ),
    "declared_that_learns_over_frozen_distances": lambda b, **k: fuse(Contrastive(b.scale), **k)(
        b.x.detach(), b.labels
    ),
    "sup_con_views": lambda b, **k: sup_con_loss(b.views, temperature=0.3, **k),
}


def on_one_rank(rank, name, sizes, options, ranks=None, factors=None):
    """The loss of a rank's shard and its gradients, as arrays: what the tests compare with :func:`in_one_process`.

    ``ranks``: of a sub-group; ``factors``: of the loss, for each rank.
    """
    group = dist.group.WORLD if ranks is None else dist.new_group(ranks)
    if ranks is not None:
        if rank not in ranks:
            return None
        rank = ranks.index(rank)
    batch = Batch.random(sum(sizes)).shard(rank, sizes).leaves()
    loss = LOSSES[name](batch, group=group, **options)
    weighted = loss if factors is None else loss * factors[rank]
    weighted.sum().backward()
    return loss.detach().numpy(), {name: gradient.numpy() for name, gradient in batch.gradients().items()}


@cache
def in_one_process(name, sizes, factors=None):
    """(losses of the rows of each rank; what each returns; a batch with the gradients of the mean over the ranks)."""
    world = len(sizes)
    batch = Batch.random(sum(sizes)).leaves()
    rows = LOSSES[name](batch, reduction="none", backend="eager")
    mean = LOSSES[name](batch, backend="eager")
    by_rank = [by_rank_of(name, rows, rank, sizes) for rank in range(world)]
    total = rows.sum()
    share = mean.detach() / total.detach() if total else torch.zeros(())  # 1 / the rows that count
    factors = factors or [1.0] * world
    (share * sum(part.sum() * factor for part, factor in zip(by_rank, factors))).backward()
    return [part.detach() for part in by_rank], [part.sum().item() * share.item() * world for part in by_rank], batch


def by_rank_of(name, rows, rank, sizes):
    """The losses of a rank's rows, in the order in which it has them."""
    start, size = sum(sizes[:rank]), sizes[rank]
    if name in ("nt_xent", "decoupled"):
        first, second = rows.chunk(2)
        return torch.cat([first[start : start + size], second[start : start + size]])
    per = VIEWS if name == "sup_con_views" else 1
    return rows[start * per : (start + size) * per]
