"""The cases: for each loss its inputs, our calls, and the formulas it has to beat.

To add a loss, write its formulas and one `Case`; speed, memory, reports and the GPU run come with it.
"""

from bench.cases.batch import NT_XENT, SUP_CON
from bench.cases.classes import ARCFACE, DINO_HEAD
from bench.cases.contrastive import CLIP, INFO_NCE, SIGLIP
from bench.cases.declared import (
    CIRCLE,
    CIRCLE_THAT_LEARNS,
    HARD_NEGATIVES,
    MULTI_SIMILARITY,
    SAMPLED_SOFTMAX,
    SOFT_TARGETS,
    VSE,
)
from bench.cases.metric import CONTRASTIVE, LIFTED
from bench.cases.mining import MINING
from bench.cases.ranks import RANKS_CASES
from bench.cases.retrieval import MAP_AT_R, TOPK
from bench.cases.triplets import BATCH_ALL, BATCH_HARD, SEMI_HARD
from bench.cases.verification import VERIFICATION

CASES = {
    case.name: case
    for case in (
        *(CLIP, INFO_NCE, SIGLIP),
        *(NT_XENT, SUP_CON),
        *(LIFTED, CONTRASTIVE, BATCH_HARD, SEMI_HARD, BATCH_ALL),
        *(CIRCLE, CIRCLE_THAT_LEARNS, MULTI_SIMILARITY, HARD_NEGATIVES, SAMPLED_SOFTMAX, SOFT_TARGETS, VSE),
        *(ARCFACE, DINO_HEAD),
        MINING,
        *(TOPK, MAP_AT_R),
        VERIFICATION,
        *RANKS_CASES,
    )
}
