"""Triton kernels of the losses: two skeletons, and what each loss plugs into them.

    tiles.py        what a kernel sees of a tile, and the tile of similarities itself
    distances.py    similarities that are distances
    statistics.py   sweep 1: statistics of rows and columns (skeleton and launcher)
    sums.py         sweep 1 of a plain softmax: sums of one exponential an entry
    reference.py    sweep 2 of a plain softmax: the exponent that rows and columns share
    tma.py          features and W moved by TMA
    combine.py      between the sweeps: the loss, and what sweep 2 needs to know of rows and columns
    gradients.py    sweep 2: dL/dl of a tile, or its products with the features (skeletons and launchers)
    outputs.py      the end: gradients in the features' dtype, and the scale's
    softmax.py      the softmax family's epilogues
    sigmoid.py      the sigmoid family's
    margin_contrastive.py, hardest.py, semi_hard.py, batch_all.py    those of losses over distances, but for the
                    lifted softmax
    declared.py     what the epilogues of declared losses call, which are printed (replearn_kernels/declare)
    groups.py       where pairs of one group can be
    hopper/         kernels in Gluon, for a softmax on sm_90: sweep 1, and W or its products
    launching.py    how a kernel is launched, and launched again
    configs.py      block sizes per architecture, and the search for better ones

A skeleton walks tiles and knows no loss. A loss is an :class:`~.tiles.Epilogue`: a few ``@triton.jit`` functions
of a tile of similarities that has not left the registers.
"""

from .batch_all import BATCH_ALL
from .combine import COEFFICIENTS, STATE, combine_losses, combine_statistics
from .gradients import accumulate_gradient, form_weights
from .groups import group_ranges, ranges_of
from .hardest import HARDEST
from .hopper.launch import columns_of_half, launch_gradient, launch_weights
from .margin_contrastive import MARGIN_CONTRASTIVE
from .outputs import Side, finish_gradients
from .reference import form_shares, shared_reference
from .semi_hard import SEMI_HARD
from .sigmoid import SIGMOID
from .softmax import LIFTED, MARGIN_SOFTMAX, SOFTMAX, SUP_CON
from .statistics import update_statistics
from .sums import begin_sums, update_by_sums
from .tiles import Epilogue, Points, TileInputs

EPILOGUES: dict[str, Epilogue] = {
    epilogue.name: epilogue
    for epilogue in (
        SOFTMAX, SUP_CON, MARGIN_SOFTMAX, SIGMOID, MARGIN_CONTRASTIVE, LIFTED, HARDEST, SEMI_HARD, BATCH_ALL,
    )
}
"""By the objective's name, or where a family shares one by the family's."""

__all__ = [
    "COEFFICIENTS", "EPILOGUES", "STATE", "Epilogue", "Points", "Side", "TileInputs", "accumulate_gradient",
    "begin_sums", "columns_of_half", "combine_losses", "combine_statistics", "finish_gradients", "form_shares",
    "form_weights", "group_ranges", "launch_gradient", "launch_weights", "ranges_of", "shared_reference",
    "update_by_sums", "update_statistics",
]  # fmt: skip
