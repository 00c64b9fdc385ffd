"""Losses by functions of one pair: the author writes those, gradient and kernels are derived.

    expressions.py    what an author's functions are made of
    algebra.py        their derivatives, and what all pairs share taken out of them
    definition.py     PairLoss: what is declared, and its structure
    checks.py         its formulas, tried out
    fuse.py           the module that a declared loss becomes
    compute.py        a call of it
    objective.py      the engine's view: statistics, losses, coefficients, W
    on_tensors.py     expressions computed by PyTorch
    triton_source.py  expressions printed as a Triton epilogue
    formula.py        the specification, on the full matrix
"""

from .definition import Facts, PairLoss, Reduction, logsumexp, total
from .expressions import (
    Expr,
    absolute,
    clamp,
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

__all__ = [
    "Expr", "Facts", "FusedBatchLoss", "FusedPairLoss", "PairLoss", "Reduction", "absolute", "clamp", "exp", "fuse",
    "log", "logsumexp", "maximum", "minimum", "relu", "sigmoid", "softplus", "sqrt", "total", "where",
]  # fmt: skip
