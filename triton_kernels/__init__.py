"""Triton kernels of the losses: two skeletons, and what each loss plugs into them.

    tiles.py        what a kernel sees of a tile, and the tile of similarities itself
    statistics.py   sweep 1: statistics of rows and columns (skeleton and launcher)
    gradients.py    sweep 2: dL/dl of a tile, or its products with the features (skeletons and launchers)
    softmax.py      the softmax family's epilogues
    sigmoid.py      the sigmoid family's
    configs.py      block sizes per architecture, and the search for better ones

A skeleton walks tiles and knows no loss. A loss is an :class:`~.tiles.Epilogue`: a few ``@triton.jit`` functions
of a tile of similarities that has not left the registers.
"""

from .gradients import accumulate_gradient, form_weights
from .sigmoid import SIGMOID
from .softmax import MARGIN_SOFTMAX, SOFTMAX, SUP_CON
from .statistics import update_statistics
from .tiles import Epilogue, TileInputs

EPILOGUES: dict[str, Epilogue] = {e.name: e for e in (SOFTMAX, SUP_CON, MARGIN_SOFTMAX, SIGMOID)}
"""By the objective's name."""

__all__ = ["EPILOGUES", "Epilogue", "TileInputs", "accumulate_gradient", "form_weights", "update_statistics"]
