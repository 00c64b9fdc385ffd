"""What users write, for type checkers alone (test_typing.py): right calls pass, and wrong ones are found.

Each ``type: ignore`` below is of an error that must be there: checkers complain of those that are not needed.
"""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import replearn_kernels
from replearn_kernels import (
    ArcFaceLoss,
    ClipLoss,
    DINOLoss,
    InfoNCELoss,
    MomentumEncoder,
    NegativeQueue,
    SigLipLoss,
    arcface_loss,
    clip_loss,
    count_work,
    info_nce_loss,
    lifted_structure_loss,
    mine_triplets,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
    update_momentum,
)


def functions(x: Tensor, y: Tensor, labels: Tensor, scale: nn.Parameter) -> Tensor:
    loss = clip_loss(x, y, scale.exp(), label_smoothing=0.1, reduction="none")
    assert_type(loss, Tensor)
    loss = loss + info_nce_loss(x, y, negatives=y, batch_negatives=False, logit_scale=14.3)
    loss = loss + siglip_loss(x, y, scale, -10.0) + n_pair_loss(x, y, labels=labels)
    loss = loss + nt_xent_loss(x, y, temperature=0.5) + sup_con_loss(x, labels)
    loss = loss + lifted_structure_loss(x, labels, margin=1) + arcface_loss(x, y, labels, margin=0.3)
    anchor, positive, negative = mine_triplets(x, labels, mining="semi_hard")
    assert_type(anchor, Tensor)
    return loss + triplet_margin_loss(x, triplets=(anchor, positive, negative))


def modules(x: Tensor, y: Tensor, labels: Tensor) -> None:
    clip, siglip = ClipLoss(True, True, rank=0, world_size=1), SigLipLoss(chunk_size=512)
    assert_type(clip, ClipLoss)
    loss = clip(x, y, 14.3, output_dict=True)["contrastive_loss"] + siglip(x, y, 10.0, -10.0)
    loss.backward()
    head = ArcFaceLoss(128, 1000, margin=0.5)
    assert_type(head.weight, nn.Parameter)
    assert_type(head.logits(x), Tensor)
    losses: list[nn.Module] = [InfoNCELoss(symmetric=True), DINOLoss(4096), head]
    torch.optim.AdamW([parameter for module in losses for parameter in module.parameters()])


def momentum(encoder: nn.Module, x: Tensor) -> Tensor:
    queue, follower = NegativeQueue(4096, 128), MomentumEncoder(encoder, 0.99)
    queue.push(follower(x))
    update_momentum(follower.encoder, encoder)
    assert_type(queue.negatives(), Tensor)
    with count_work() as work:
        info_nce_loss(x, x)
    assert_type(work.units(8, 8, 4), float)
    assert_type(replearn_kernels.__version__, str)
    return queue.negatives()


def mistakes(x: Tensor, labels: Tensor) -> None:
    clip_loss(x, x)  # type: ignore
    clip_loss(x, x, "14.3")  # type: ignore
    info_nce_loss(x, x, temperature=0.07)  # type: ignore
    sup_con_loss(x, labels, temprature=0.07)  # type: ignore
    arcface_loss(x, x, labels, scale=None)  # type: ignore
    triplet_margin_loss(x, labels, mining=1)  # type: ignore
    SigLipLoss(chunk_size="512")  # type: ignore
    ClipLoss(temperature=0.07)  # type: ignore
