"""Triplet mining: a call without a gradient, held against pytorch-metric-learning's miner."""

import torch

from bench.cases.batch import labelled_rows
from bench.harness import Case, Inputs
from replearn_kernels import mine_triplets

MINER = "pytorch_metric_learning"
MARGIN = torch.tensor(0.2)  # in fp32, as distances are


class Triplets:
    """Mined triplets, as the harness compares them."""

    def __init__(self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor):
        self.rows = anchor, positive, negative

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    def item(self) -> float:
        """The same for the same set of triplets, in any order, and hardly for another: a sum of pseudo-random terms."""
        total = 0
        for anchor, positive, negative in zip(*(row.split(2**20) for row in self.rows)):
            mixed = (anchor * 1_000_003 + positive) * 1_000_003 + negative
            total += int((mixed * 6364136223846793005 >> 33).bitwise_and_(2**20 - 1).sum())
        return float(total)


def grid_rows(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Rows of length 1, rounded to multiples of 1/256: their sums of products are exact in any order."""
    rows, labels = labelled_rows(n, d, dtype, device).values()
    return {"embeddings": (rows.detach() * 256).round() / 256, "labels": labels}


def ours(embeddings, labels, backend):
    found = mine_triplets(embeddings, labels, mining="batch_all_semi_hard", margin=MARGIN.item(), backend=backend)
    return Triplets(*found)


def metric_learning(embeddings, labels):
    """Its condition is D_an - D_ap <= margin, ours < margin: so its margin is the next smaller number."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.miners import TripletMarginMiner

    margin = torch.nextafter(MARGIN, torch.tensor(0.0)).item()
    miner = TripletMarginMiner(margin, type_of_triplets="semihard", distance=LpDistance(normalize_embeddings=False))
    return Triplets(*miner(embeddings, labels))


MINING = Case(
    name="mining",
    title="Semi-hard triplets, all of them (a call without a gradient)",
    make_inputs=grid_rows,
    ours={"ours": ours},
    dense={MINER: metric_learning},
    backends=("auto", "cpp", "cuda", "torch"),
    sizes=(1024, 4096),
    training=False,
)
