"""Losses by functions of one pair: the author writes those, gradient and kernels are derived.

    expressions.py    what an author's functions are made of
    algebra.py        their derivatives, and what all pairs share taken out of them
    pair_loss.py      PairLoss, total, logsumexp, largest, smallest, and the facts of a pair: what else an author writes
    terms.py          terms as the passes take them
    learning.py       their derivatives in parameters that learn
    definition.py     the structure of a declared loss
    checks.py         its formulas, tried out
    fuse.py           the module that a declared loss becomes
    compute.py        a call of it
    given.py          what calls give beside features: values of rows and columns, a guide's features
    objective.py      the engine's view: statistics, losses, coefficients, W
    evaluation.py     the author's formula on the terms of the rows, and its derivatives
    printing.py       expressions as text
    torch_source.py   the same for PyTorch, and what that text calls
    triton_source.py  the same as a Triton epilogue
    on_tensors.py     the terms of a tile, computed by PyTorch
    formula.py        the specification, on the full matrix
"""

from .expressions import (
    Expr,
    absolute,
    clamp,
    equal,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    where,
)
from .fuse import FusedBatchLoss, FusedPairLoss, fuse
from .pair_loss import Facts, PairLoss, Reduction, largest, logsumexp, smallest, total

__all__ = [
    "Expr", "Facts", "FusedBatchLoss", "FusedPairLoss", "PairLoss", "Reduction", "absolute", "clamp", "equal", "exp",
    "fuse", "largest", "log", "logsumexp", "maximum", "minimum", "relu", "sigmoid", "smallest", "softplus", "sqrt",
    "total", "where",
]  # fmt: skip
