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
from .pair_losses import (
    CircleLoss,
    DecoupledContrastiveLoss,
    HardNegativeLoss,
    MultiPositiveClipLoss,
    MultiSimilarityLoss,
    SampledSoftmaxLoss,
    circle_loss,
    decoupled_contrastive_loss,
    hard_negative_loss,
    multi_positive_clip_loss,
    multi_similarity_loss,
    sampled_softmax_loss,
)

__version__ = "0.1.0"  # the package's: pyproject.toml reads it here

__all__ = [
    "ArcFaceLoss",
    "CircleLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CosineSimilarityLoss",
    "DINOHeadLoss",
    "DINOLoss",
    "DecoupledContrastiveLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MomentumEncoder",
    "MultiPositiveClipLoss",
    "MultiSimilarityLoss",
    "NPairLoss",
    "NTXentLoss",
    "NegativeQueue",
    "SampledSoftmaxLoss",
    "SigLipLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "arcface_loss",
    "circle_loss",
    "clip_loss",
    "contrastive_loss",
    "cosface_loss",
    "cosine_similarity_loss",
    "count_work",
    "decoupled_contrastive_loss",
    "dino_head_loss",
    "dino_loss",
    "empty_cache",
    "hard_negative_loss",
    "info_nce_loss",
    "lifted_structure_loss",
    "mine_triplets",
    "multi_positive_clip_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "sampled_softmax_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_margin_loss",
    "update_momentum",
]
