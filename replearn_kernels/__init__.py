"""Fused losses for representation learning: all pairs of a batch, tile by tile, never the N x N matrix."""

from .classifiers import ArcFaceLoss, CosFaceLoss
from .dino import DINOHeadLoss, DINOLoss
from .engine.counters import count_work
from .engine.workspace import empty_cache
from .functional import (
    arcface_loss,
    clip_loss,
    contrastive_loss,
    cosface_loss,
    cosine_similarity_loss,
    dino_head_loss,
    dino_loss,
    info_nce_loss,
    lifted_structure_loss,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
)
from .losses import (
    ClipLoss,
    CosineSimilarityLoss,
    InfoNCELoss,
    NPairLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from .metric_losses import ContrastiveLoss, LiftedStructureLoss, TripletMarginLoss
from .mining import mine_triplets
from .momentum import MomentumEncoder, NegativeQueue, update_momentum

__version__ = "0.1.0"  # the package's: pyproject.toml reads it here

__all__ = [
    "ArcFaceLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CosineSimilarityLoss",
    "DINOHeadLoss",
    "DINOLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MomentumEncoder",
    "NPairLoss",
    "NTXentLoss",
    "NegativeQueue",
    "SigLipLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "arcface_loss",
    "clip_loss",
    "contrastive_loss",
    "cosface_loss",
    "cosine_similarity_loss",
    "dino_head_loss",
    "dino_loss",
    "count_work",
    "empty_cache",
    "info_nce_loss",
    "lifted_structure_loss",
    "mine_triplets",
    "n_pair_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_margin_loss",
    "update_momentum",
]
