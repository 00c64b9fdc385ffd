"""Fused losses for representation learning: all pairs of a batch, tile by tile, never the N x N matrix."""

from .engine.counters import count_work
from .functional import (
    arcface_loss,
    clip_loss,
    cosface_loss,
    info_nce_loss,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
)
from .losses import (
    ArcFaceLoss,
    ClipLoss,
    CosFaceLoss,
    InfoNCELoss,
    NPairLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)

__all__ = [
    "ArcFaceLoss",
    "ClipLoss",
    "CosFaceLoss",
    "InfoNCELoss",
    "NPairLoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "arcface_loss",
    "clip_loss",
    "cosface_loss",
    "count_work",
    "info_nce_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
]
