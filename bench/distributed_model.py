"""A model of what a loss over R ranks sends and holds, for even shards; tests/test_distributed_work.py holds it to
what is counted. ``python -m bench.distributed_model`` prints what it says of sizes that were not run.

Elements that one rank sends, forward and backward, with n = N / R rows and hops h = R - 1, or floor(R / 2) where rows
are compared with each other:

    statistics sweep    h n d        blocks of features
                        h n t        the statistics of their columns: t = 2, 3 in a batch, none in one direction
    gradient sweep      h n (d + c)  blocks with their columns' coefficients: c = 5, none in one direction
                        h n d        their gradients
    one sweep           2 h n d      blocks and their gradients

and a few scalars. So of N d, with R large: 3 for CLIP and InfoNCE, 2 for SigLIP, 3/2 for a batch against itself (where
N counts all views). Gathering changes the memory, not the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """What of a loss decides what it sends."""

    name: str
    column_statistics: int = 0  # per column
    coefficients: int = 0  # per column
    one_sweep: bool = False
    is_batch: bool = False  # rows against each other, with groups
    centred: bool = False  # about the mean of all rows, and the own and visiting rows made one batch
    units: float = 4.0  # products of N x N x d in all, nothing kept


CLIP = Loss("CLIP", column_statistics=2, coefficients=5)
INFO_NCE = Loss("InfoNCE")
SIGLIP = Loss("SigLIP", one_sweep=True, units=3.0)
NT_XENT = Loss("NT-Xent, SupCon", column_statistics=3, coefficients=5, is_batch=True, units=2.0)
CONTRASTIVE = Loss("contrastive", column_statistics=2, one_sweep=True, is_batch=True, centred=True, units=1.5)
LOSSES = (CLIP, INFO_NCE, SIGLIP, NT_XENT, CONTRASTIVE)


def hops(loss: Loss, ranks: int) -> int:
    return ranks // 2 if loss.is_batch else ranks - 1


def sent_elements(loss: Loss, ranks: int, rows: int, d: int, scalar_gradients: int = 0) -> int:
    """By each rank, of ``rows`` of its own, forward and backward; either strategy."""
    sweep = hops(loss, ranks) * rows
    features = 2 * sweep * d if loss.one_sweep else 3 * sweep * d
    tables = sweep * (loss.column_statistics + loss.coefficients)
    runs = 1 if loss.one_sweep else 2  # each counts the rows, and in a batch knows the groups of all
    to_all = runs * (1 + (rows if loss.is_batch else 0) + (d if loss.centred else 0)) + 1 + scalar_gradients
    return features + tables + (ranks - 1) * to_all


def held_elements(loss: Loss, ranks: int, rows: int, d: int, strategy: str = "ring") -> int:
    """At most, beside the features given, tiles and O(rows): the own gradients, blocks of others and their gradients.

    In a ring of 3 hops or more that is the block that is visited and the next one, and three gradients: one leaving,
    one arriving, one at work. Gathered, it is all blocks and their gradients, and those that others send.
    """
    own, travelling = 1 if loss.is_batch else 2, hops(loss, ranks)
    if loss.centred:  # two ranks' rows as one batch, given and centred, and their gradient
        own += 3 * 2
    others = 3 * travelling if strategy == "gather" else {1: 2, 2: 4}.get(travelling, 5)
    return (own + others) * rows * d


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Modelled, not measured: one step, forward and backward, of each GPU; d = 512, all in fp32")
    for column in ("loss", "GPUs", "global batch", "sent (GB)", "held, ring (GB)", "held, gather (GB)", "TFLOP"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    d = 512
    for loss in LOSSES:
        for ranks in (8, 64, 1024):
            for batch in (32 * 1024, 2**20, 2**24):
                rows = batch // ranks
                gigabytes = [
                    elements * 4 / 1e9
                    for elements in (
                        sent_elements(loss, ranks, rows, d, 1),
                        held_elements(loss, ranks, rows, d),
                        held_elements(loss, ranks, rows, d, "gather"),
                    )
                ]
                work = loss.units * 2 * batch * batch * d / ranks / 1e12
                table.add_row(loss.name, str(ranks), f"{batch:,}", *(f"{g:,.2f}" for g in gigabytes), f"{work:,.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
