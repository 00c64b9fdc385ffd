"""Every loss over pairs as a function of one or two feature matrices, for the tests that try them all.

``CASES[name]``: a function of (x, y, labels, scale), each of ``[N, d]``, ``[N, d]``, int64 ``[N]`` and a float, and the
options of the loss. A loss of one matrix leaves y alone, one without a scale divides the rows' distances by nothing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import replearn_kernels as rk

CASES = {
    "clip": lambda x, y, labels, scale, **k: rk.clip_loss(x, y, scale, **k),
    "info_nce": lambda x, y, labels, scale, **k: rk.info_nce_loss(x, y, logit_scale=scale, **k),
    "symmetric": lambda x, y, labels, scale, **k: rk.info_nce_loss(
        x, y, logit_scale=scale, symmetric=True, label_smoothing=0.1, **k
    ),
    "target": lambda x, y, labels, scale, **k: rk.info_nce_loss(
        x, y, target=labels.remainder(max(len(y), 1)), logit_scale=scale, symmetric=True, **k
    ),
    "queue": lambda x, y, labels, scale, **k: rk.info_nce_loss(x, x.detach(), negatives=y, logit_scale=scale, **k),
    "n_pair": lambda x, y, labels, scale, **k: rk.n_pair_loss(x, y, labels=labels, **k),
    "siglip": lambda x, y, labels, scale, **k: rk.siglip_loss(x, y, scale, -scale / 2, **k),
    "siglip_groups": lambda x, y, labels, scale, **k: rk.siglip_loss(
        x, y, scale, -scale / 2, query_group=labels, key_group=labels, **k
    ),
    "nt_xent": lambda x, y, labels, scale, **k: rk.nt_xent_loss(
        x, y, temperature=1 / max(scale, 1e-3), normalize=False, **k
    ),
    "sup_con": lambda x, y, labels, scale, **k: rk.sup_con_loss(
        x, labels, temperature=1 / max(scale, 1e-3), normalize=False, **k
    ),
    "arcface": lambda x, y, labels, scale, **k: rk.arcface_loss(
        x, y, labels.remainder(max(len(y), 1)), scale=max(scale, 1e-3), **k
    ),
    "cosface": lambda x, y, labels, scale, **k: rk.cosface_loss(
        x, y, labels.remainder(max(len(y), 1)), scale=max(scale, 1e-3), **k
    ),
    "lifted": lambda x, y, labels, scale, **k: rk.lifted_structure_loss(x, labels, **k),
    "lifted_hard": lambda x, y, labels, scale, **k: rk.lifted_structure_loss(x, labels, smooth=False, **k),
    "contrastive": lambda x, y, labels, scale, **k: rk.contrastive_loss(x, labels, **k),
    "contrastive_plain": lambda x, y, labels, scale, **k: rk.contrastive_loss(x, labels, squared=False, **k),
    **{
        f"{mining}_{distance}": partial(
            lambda x, y, labels, scale, mining, distance, **k: rk.triplet_margin_loss(
                x, labels, mining=mining, distance=distance, **k
            ),
            mining=mining, distance=distance,
        )
        for mining in ("batch_hard", "semi_hard", "batch_all")
        for distance in ("euclidean", "squared_euclidean", "cosine")
    },
}  # fmt: skip

DECLARED = {
    "circle": lambda x, y, labels, scale, **k: rk.circle_loss(x, labels, **k),
    "multi_similarity": lambda x, y, labels, scale, **k: rk.multi_similarity_loss(x, labels, **k),
    "decoupled": lambda x, y, labels, scale, **k: rk.decoupled_contrastive_loss(
        x, y, temperature=1 / max(scale, 1e-3), **k
    ),
    "hard_negative": lambda x, y, labels, scale, **k: rk.hard_negative_loss(x, y, logit_scale=scale, **k),
    "debiased": lambda x, y, labels, scale, **k: rk.hard_negative_loss(
        x, y, beta=0.5, tau_plus=0.05, logit_scale=scale, **k
    ),
    "multi_positive": lambda x, y, labels, scale, **k: rk.multi_positive_clip_loss(
        x, y, scale, image_group=labels, **k
    ),
    "vse": lambda x, y, labels, scale, **k: rk.vse_loss(x, y[: len(x)], **k),
    "log_sum_exp": lambda x, y, labels, scale, **k: rk.pair_logsumexp(
        x, y, logit_scale=scale, hardness=0.3, **{"reduction": "mean", **k}
    ),
    "soft_target": lambda x, y, labels, scale, **k: rk.soft_target_loss(
        x, y, y[: len(x)].detach().flip(0), y.detach(), logit_scale=scale, guide_scale=5.0, **k
    ),
    "sampled_softmax": lambda x, y, labels, scale, **k: rk.sampled_softmax_loss(
        x, y, key_log_probability=-(torch.arange(len(y), device=y.device) % 5).double(), query_weight=1.0 + labels % 3,
        logit_scale=scale, **k,
    ),
}
"""Without passes in C++."""
CASES |= DECLARED


def value_and_gradients(name: str, x: Tensor, y: Tensor, labels: Tensor, scale: float, **options) -> list[Tensor]:
    """The loss summed, and its gradients for x and y (zeros where a loss leaves one alone), in fp64."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    value = CASES[name](*leaves, labels, scale, **options)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return [t.detach().double() for t in (value, *gradients)]
