"""The losses' mathematics: one file per family, found by name by the dispatcher's operators."""

from .base import Objective
from .batch_all import BatchAll
from .hardest import BatchHard
from .lifted import HardLifted, Lifted
from .margin_contrastive import MarginContrastive
from .margin_softmax import MarginSoftmax
from .semi_hard import SemiHard
from .sigmoid import Sigmoid
from .softmax import Softmax
from .sup_con import SupCon

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        Softmax, SupCon, Sigmoid, MarginSoftmax, MarginContrastive, Lifted, HardLifted, BatchHard, SemiHard, BatchAll,
    )
}
"""Declared losses are added when they are first made."""


def objective_class(name: str) -> type[Objective]:
    """By the name that an operator was called with.

    Raises:
        RuntimeError: it is that of a declared loss, of a program that another process has traced or exported.
    """
    if name not in OBJECTIVES:
        raise RuntimeError(
            f"this program calls the declared loss {name!r}, which is not known here: fuse it first, by the same "
            "declaration and under the same version of Python"
        )
    return OBJECTIVES[name]
