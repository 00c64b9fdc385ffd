"""Losses that are declared (:mod:`replearn_kernels.declare`): a file has all that there is of one.

    circle.py            circle loss
    decoupled.py         decoupled contrastive learning: NT-Xent without the positive in its denominator
    gist.py              GISTEmbed: InfoNCE without what a guide holds to be positives
    hard_negatives.py    InfoNCE with negatives by their hardness, and debiased
    log_sum_exp.py       the part that softmax losses share: a row's sum over all pairs, those of its group, the others
    multi_positive.py    CLIP with several positives
    multi_similarity.py  multi-similarity loss
    soft_targets.py      InfoNCE with a teacher's probabilities for targets
    sampled_softmax.py   InfoNCE over a sample of all keys, for retrieval: probabilities, duplicates, weights
    vse.py               VSE++: the hardest negative of every image and text
"""

import itertools

from ..declare.objective import register
from .circle import Circle, CircleLoss, circle_loss
from .decoupled import Decoupled, DecoupledContrastiveLoss, decoupled_contrastive_loss
from .gist import GistAmong, GistBetween, GistLoss, gist_loss
from .hard_negatives import HardNegativeLoss, HardNegatives, hard_negative_loss
from .log_sum_exp import OVER, PairLogSumExp, pair_logsumexp
from .multi_positive import MultiPositiveClip, MultiPositiveClipLoss, multi_positive_clip_loss
from .multi_similarity import MultiSimilarity, MultiSimilarityLoss, multi_similarity_loss
from .sampled_softmax import SampledSoftmax, SampledSoftmaxLoss, sampled_softmax_loss
from .soft_targets import SoftTargetLoss, SoftTargets, SymmetricSoftTargets, soft_target_loss
from .vse import Vse, VSELoss, vse_loss

for _loss in (
    *(Circle, Decoupled, HardNegatives, MultiPositiveClip, MultiSimilarity, SampledSoftmax),
    *(SoftTargets, SymmetricSoftTargets, GistBetween, Vse),
):
    register(_loss, ())
for _options in itertools.product(OVER, (False, True)):
    register(PairLogSumExp, _options)
for _options in itertools.product((True, False), repeat=3):
    if any(_options):
        register(GistAmong, _options)

__all__ = [
    "CircleLoss", "DecoupledContrastiveLoss", "GistLoss", "HardNegativeLoss", "MultiPositiveClipLoss",
    "MultiSimilarityLoss", "SampledSoftmaxLoss", "SoftTargetLoss", "VSELoss", "circle_loss",
    "decoupled_contrastive_loss", "gist_loss", "hard_negative_loss", "multi_positive_clip_loss",
    "multi_similarity_loss", "pair_logsumexp", "sampled_softmax_loss", "soft_target_loss", "vse_loss",
]  # fmt: skip
