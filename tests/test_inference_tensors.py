"""Inputs made under ``torch.inference_mode()``: a frozen encoder's rows, a queue, labels, a teacher, class weights.

``backend="eager"`` is PyTorch's own arithmetic, which refuses some of them.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

from replearn_kernels import (
    DINOHeadLoss,
    DINOLoss,
    MomentumEncoder,
    NegativeQueue,
    arcface_loss,
    clip_loss,
    contrastive_loss,
    cosface_loss,
    cosine_similarity_loss,
    dino_head_loss,
    dino_loss,
    info_nce_loss,
    lifted_structure_loss,
    mine_triplets,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
)

N, D, K = 12, 8, 10
LABELS = torch.arange(N) // 3
SCALE, BIAS = torch.tensor(5.0), torch.tensor(-1.0)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


X, Y, QUEUE, WEIGHT, CENTER = rows(N, D), rows(N, D).flip(0), rows(7, D), rows(K, D), rows(K)
TRIPLETS = tuple(torch.tensor(rows) for rows in ([0, 4, 6], [1, 5, 7], [3, 8, 11]))
VIEWS, TEACHER, TEACHER_WEIGHT = rows(3, N, D), rows(2, N, D), rows(K, D).flip(0)
LOGITS, TEACHER_LOGITS = VIEWS @ WEIGHT.t(), TEACHER @ TEACHER_WEIGHT.t()

# The loss of a leaf and of other tensors, which are constants.
LOSSES = {
    "clip": (clip_loss, X, (Y, SCALE)),
    "clip, of its scale": (lambda scale, x, y, **how: clip_loss(x, y, scale, **how), SCALE, (X, Y)),
    "clip, normalised": (lambda *all, **how: clip_loss(*all, normalize=True, **how), X, (Y, SCALE)),
    "siglip": (siglip_loss, X, (Y, SCALE, BIAS)),
    "siglip, groups": (
        lambda x, y, s, b, q, k, **how: siglip_loss(x, y, s, b, query_group=q, key_group=k, **how),
        X, (Y, SCALE, BIAS, LABELS, LABELS),
    ),
    "moco": (lambda x, y, queue, **how: info_nce_loss(x, y, negatives=queue, **how), X, (Y, QUEUE)),
    "info_nce, targets": (lambda x, y, t, **how: info_nce_loss(x, y, target=t, **how), X, (Y, LABELS)),
    "hard negatives": (lambda x, y, own, **how: info_nce_loss(x, y, negatives=own, **how), X, (Y, rows(N, 2, D))),
    "symmetric": (lambda x, y, **how: info_nce_loss(x, y, symmetric=True, **how), X, (Y,)),
    "n_pair": (n_pair_loss, X, (Y,)),
    "n_pair, labels": (lambda x, y, labels, **how: n_pair_loss(x, y, labels=labels, **how), X, (Y, LABELS)),
    "nt_xent": (nt_xent_loss, X, (Y,)),
    "sup_con": (sup_con_loss, X, (LABELS,)),
    "lifted": (lifted_structure_loss, X, (LABELS,)),
    "lifted, hard": (lambda *all, **how: lifted_structure_loss(*all, smooth=False, **how), X, (LABELS,)),
    "contrastive": (contrastive_loss, X, (LABELS,)),
    **{
        mining: (lambda *all, mining=mining, **how: triplet_margin_loss(*all, mining=mining, **how), X, (LABELS,))
        for mining in ("batch_hard", "semi_hard", "batch_all")
    },
    "triplets": (lambda x, *t, **how: triplet_margin_loss(x, triplets=t, **how), X, TRIPLETS),
    "cosine": (cosine_similarity_loss, X, (LABELS,)),
    "arcface": (arcface_loss, X, (WEIGHT, LABELS % K)),
    "arcface, of its weight": (lambda w, x, y, **how: arcface_loss(x, w, y, **how), WEIGHT, (X, LABELS % K)),
    "cosface": (cosface_loss, X, (WEIGHT, LABELS % K)),
    "dino": (dino_loss, LOGITS, (TEACHER_LOGITS, CENTER)),
    "dino head": (dino_head_loss, VIEWS, (TEACHER, WEIGHT, TEACHER_WEIGHT, CENTER)),
}  # fmt: skip
MODULES = {
    "dino": (lambda *all: DINOLoss(K)(*all), LOGITS, (TEACHER_LOGITS,)),
    "dino head": (lambda *all: DINOHeadLoss(K)(*all), VIEWS, (TEACHER, WEIGHT, TEACHER_WEIGHT)),
}


def cases():
    for name, case in LOSSES.items():
        for backend in ("auto",) if name.startswith(("dino", "cosine")) else ("cpp", "torch"):
            yield pytest.param(case, dict(backend=backend), id=f"{name}, {backend}")
    for name, case in MODULES.items():
        yield pytest.param(case, {}, id=f"module of {name}")


def result(case, how, constants):
    loss, leaf, _ = case
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf, *constants, **how)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("case, how", list(cases()))
def test_constants_made_in_inference_mode(case, how):
    with torch.inference_mode():
        constants = tree_map(torch.clone, case[2])
    assert all(tensor.is_inference() for tensor in constants)
    for got, expected in zip(result(case, how, constants), result(case, how, case[2])):
        assert torch.equal(got, expected)


def test_large_views(monkeypatch):
    """Rows that are normalised in held memory are saved by a rule of their own."""
    monkeypatch.setattr("replearn_kernels.functional.rows._BLOCK_ELEMENTS", 6)
    case = nt_xent_loss, X, (Y,)
    with torch.inference_mode():
        y = Y.clone()
    for got, expected in zip(result(case, {}, (y,)), result(case, {}, (Y,))):
        assert torch.equal(got, expected)


def test_momentum_contrast_in_inference_mode():
    """The keys, the queue that takes them and what it hands out; and mined triplets."""
    encoder, queue = torch.nn.Linear(D, D), NegativeQueue(5, D)
    follower, query = MomentumEncoder(encoder), encoder(X)
    with torch.inference_mode():
        key = follower(Y)
        queue.push(key)
        negatives, triplets = queue.negatives(), mine_triplets(key, LABELS, mining="batch_hard")
    loss = info_nce_loss(query, key, negatives=negatives)
    loss = loss + triplet_margin_loss(query, triplets=triplets)
    loss.backward()
    assert encoder.weight.grad.isfinite().all()
    follower.update(encoder)


def test_no_copy_without_gradient(monkeypatch):
    """What needs no backward pass is not copied."""
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor) or clone(tensor))
    clip_loss(x, y, 2.0)
    assert not copied
