"""The loss functions, by what they learn from: pairs (contrastive), labels (supervised), classes (classification)."""

from .classification import arcface_loss, cosface_loss
from .contrastive import clip_loss, info_nce_loss, n_pair_loss, siglip_loss
from .cosine import cosine_similarity_loss
from .supervised import nt_xent_loss, sup_con_loss

__all__ = [
    "arcface_loss",
    "clip_loss",
    "cosface_loss",
    "cosine_similarity_loss",
    "info_nce_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
]
