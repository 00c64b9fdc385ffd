"""Losses that are declared (:mod:`replearn_kernels.declare`): a file has all that there is of one.

    circle.py            circle loss
    decoupled.py         decoupled contrastive learning: NT-Xent without the positive in its denominator
    hard_negatives.py    InfoNCE with negatives by their hardness, and debiased
    multi_positive.py    CLIP with several positives
    multi_similarity.py  multi-similarity loss
    sampled_softmax.py   InfoNCE over a sample of all keys, for retrieval: probabilities, duplicates, weights
"""

from ..declare.objective import register
from .circle import Circle, CircleLoss, circle_loss
from .decoupled import Decoupled, DecoupledContrastiveLoss, decoupled_contrastive_loss
from .hard_negatives import HardNegativeLoss, HardNegatives, hard_negative_loss
from .multi_positive import MultiPositiveClip, MultiPositiveClipLoss, multi_positive_clip_loss
from .multi_similarity import MultiSimilarity, MultiSimilarityLoss, multi_similarity_loss
from .sampled_softmax import SampledSoftmax, SampledSoftmaxLoss, sampled_softmax_loss

for _loss in (Circle, Decoupled, HardNegatives, MultiPositiveClip, MultiSimilarity, SampledSoftmax):
    register(_loss, ())

__all__ = [
    "CircleLoss", "DecoupledContrastiveLoss", "HardNegativeLoss", "MultiPositiveClipLoss", "MultiSimilarityLoss",
    "SampledSoftmaxLoss", "circle_loss", "decoupled_contrastive_loss", "hard_negative_loss", "multi_positive_clip_loss",
    "multi_similarity_loss", "sampled_softmax_loss",
]  # fmt: skip
