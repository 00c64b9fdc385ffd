"""The time of replearn_kernels.integrations' classes beside that of our functions and of the libraries' own classes.

`make bench-integrations`: forward and backward of fp32 features on this machine's CPU, in rounds in which all three
take turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import replearn_kernels as rk
from bench.harness import Step, choose_loops, time_cpu, time_rounds
from bench.results import MACHINE, machine, write_csv

ROUNDS, SECONDS = 25, 20.0
COLUMNS = (
    "date", "loss", "n", "d", "ours_ms", "function_ms", "theirs_ms", "ours_over_function", "theirs_over_ours",
    "library", *MACHINE,
)  # fmt: skip


class Entry(NamedTuple):
    """A class in two versions, as ``make(classes)`` makes it, and ``function`` of the same features."""

    library: str
    classes: dict[str, dict[str, type]]  # "ours" and "theirs", by the names of classes
    make: Callable[[dict[str, type]], Callable[[Tensor, Tensor], Tensor]]
    function: Callable[[Tensor, Tensor], Tensor] | None = None


def entries() -> dict[str, Entry]:
    """By name; imported here, as the libraries are in no other environment."""
    from replearn_kernels.integrations import open_clip, sentence_transformers

    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def in_open_clip(name, *given):
        def make(classes):
            loss = classes[name]()
            return lambda x, y: loss(x, y, *given)

        return make

    def in_sentence_transformers(name, **options):
        def make(classes):
            loss = classes[name](None, **options)
            return lambda x, y: loss.compute_loss_from_embeddings([x, y], None)

        return make

    def triplets(classes):
        loss = classes["BatchHardTripletLoss"](None)
        return lambda x, y: loss.compute_loss_from_embeddings([x], torch.arange(len(x)) // 8)

    clip = "open_clip_torch", vars(open_clip._classes)
    ranking = "sentence-transformers", vars(sentence_transformers._classes)
    every_direction = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    return {
        "ClipLoss": Entry(*clip, in_open_clip("ClipLoss", scale), partial(rk.clip_loss, logit_scale=scale)),
        "SigLipLoss": Entry(
            *clip, in_open_clip("SigLipLoss", scale, bias),
            lambda x, y: rk.siglip_loss(x, y, scale, bias),
        ),
        "MultipleNegativesRankingLoss": Entry(
            *ranking, in_sentence_transformers("MultipleNegativesRankingLoss"),
            lambda x, y: rk.info_nce_loss(x, y, logit_scale=20.0, normalize=True),
        ),
        "MultipleNegativesRankingLoss, four directions": Entry(
            *ranking, in_sentence_transformers("MultipleNegativesRankingLoss", directions=every_direction)
        ),
        "BatchHardTripletLoss": Entry(
            *ranking, triplets,
            lambda x, y: rk.triplet_margin_loss(x, torch.arange(len(x)) // 8, margin=5.0, mining="batch_hard"),
        ),
    }  # fmt: skip


def measure(entry: Entry, n: int, d: int) -> dict[str, list[float]]:
    """{"ours" | "function" | "theirs": ms of each round}."""
    rng = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d, generator=rng), dim=1).requires_grad_() for _ in range(2))

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return lambda: loss(x, y).backward()

    calls = {name: entry.make(entry.classes[name]) for name in ("ours", "theirs")}
    if entry.function is not None:
        calls["function"] = entry.function
    values = [call(x, y).item() for call in calls.values()]
    assert max(values) - min(values) <= 1e-4 * abs(values[0]), values
    steps = {name: (step(call), choose_loops(time_cpu, step(call))) for name, call in calls.items()}
    return time_rounds(time_cpu, steps, ROUNDS, SECONDS)


def ratio(above: list[float], below: list[float]) -> str:
    """The median of the ratios within rounds."""
    return f"{statistics.median(a / b for a, b in zip(above, below)):.3f}"


def row(name: str, entry: Entry, n: int, d: int, times: dict[str, list[float]]) -> dict[str, object]:
    found = {f"{each}_ms": f"{statistics.median(ms):.4g}" for each, ms in times.items()}
    if "function" in times:
        found["ours_over_function"] = ratio(times["ours"], times["function"])
    library = f"{entry.library} {importlib.metadata.version(entry.library)}"
    return found | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "loss": name, "n": n, "d": d,
        "theirs_over_ours": ratio(times["theirs"], times["ours"]), "library": library,
    } | machine("cpu")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--output", type=Path, help="CSV file to write; only printed without it")
    options = parser.parse_args()
    rows = []
    for name, entry in entries().items():
        for n in options.sizes:
            rows.append(row(name, entry, n, options.width, measure(entry, n, options.width)))
            print({column: rows[-1].get(column, "") for column in COLUMNS[1:9]}, flush=True)
    if options.output:
        write_csv(options.output, COLUMNS, rows)


if __name__ == "__main__":
    main()
