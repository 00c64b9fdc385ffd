"""The loss functions, by what a row learns from.

    contrastive.py     its key among others: InfoNCE, CLIP, N-pair, SigLIP
    supervised.py      the other rows of its batch: NT-Xent, SupCon
    cosine.py          the same, by mean cosines in closed form
    metric.py          the same, by distances: lifted structure, margin contrastive
    triplet.py         the same: triplets
    classification.py  the centre of its class: ArcFace, CosFace
    distillation.py    a teacher: DINO
"""

from .classification import arcface_loss, cosface_loss
from .contrastive import clip_loss, info_nce_loss, n_pair_loss, siglip_loss
from .cosine import cosine_similarity_loss
from .distillation import dino_head_loss, dino_loss
from .metric import contrastive_loss, lifted_structure_loss
from .supervised import nt_xent_loss, sup_con_loss
from .triplet import triplet_margin_loss

__all__ = [
    "arcface_loss",
    "clip_loss",
    "contrastive_loss",
    "cosface_loss",
    "cosine_similarity_loss",
    "dino_head_loss",
    "dino_loss",
    "info_nce_loss",
    "lifted_structure_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_margin_loss",
]
