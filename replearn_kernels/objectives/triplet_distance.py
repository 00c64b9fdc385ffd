"""What triplet losses are made of: distances, as functions of the squared Euclidean distance, and the loss of a gap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("euclidean", "squared_euclidean", "cosine")


@dataclass(frozen=True)
class TripletDistance:
    """``|x - y|``, ``|x - y|^2``, or between unit rows ``1 - cos = |x - y|^2 / 2``."""

    name: str

    @classmethod
    def numbered(cls, number: float) -> TripletDistance:
        return cls(DISTANCES[int(number)])

    @property
    def number(self) -> float:
        return float(DISTANCES.index(self.name))

    @property
    def similarity(self) -> str:
        """``Objective.by_distance``: what the tiles hold, negative."""
        return "distance" if self.name == "euclidean" else "square"

    @property
    def factor(self) -> float:
        """The distance is so many times what the tiles hold."""
        return 0.5 if self.name == "cosine" else 1.0

    @property
    def unit_rows(self) -> bool:
        return self.name == "cosine"

    def of_square(self, square: Tensor) -> Tensor:
        return square.sqrt() if self.name == "euclidean" else square * self.factor

    def slope(self, square: Tensor) -> Tensor:
        """a of the gradient ``a (x - y)`` of a pair: twice dD / d(D^2); 0 at a Euclidean distance of 0."""
        if self.name == "euclidean":
            return torch.where(square > 0, square.rsqrt(), 0)
        return torch.full_like(square, 2 * self.factor)


def loss_of_gap(gap: Tensor, margin: float | None) -> Tensor:
    """Of a triplet with ``gap = D_ap - D_an``: ``[gap + margin]+``, or without a margin the soft one,
    ``log(1 + exp(gap))``."""
    return -F.logsigmoid(-gap) if margin is None else (gap + margin).relu()


def gradient_of_gap(grad: Tensor, gap: Tensor, margin: float | None) -> Tensor:
    """The gradient in the gap, under an upstream gradient; of a hinge that is not violated 0, whatever is upstream."""
    return grad * gap.sigmoid() if margin is None else grad.masked_fill(gap + margin <= 0, 0)
