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
