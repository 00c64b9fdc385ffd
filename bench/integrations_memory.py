"""Peak memory of this library's classes for pytorch-metric-learning's NTXentLoss and miners, each in its own process.

`make bench-integrations`: fp32 rows, two of a label, beside what one matrix of all pairs would take.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.memory import host_peak
from bench.results import MACHINE, machine, write_csv

COLUMNS = ("date", "what", "n", "d", "peak_mb", "memory_method", "matrix_mb", "library", *MACHINE)
WHAT = ("NTXentLoss", "BatchHardMiner", "TripletMarginMiner")


def measure(what: str, n: int, d: int) -> tuple[float, str]:
    """(MB, how it was read) of one step."""
    from replearn_kernels.integrations import pytorch_metric_learning as integration

    rows, labels = torch.randn(n, d, requires_grad=True), torch.arange(n) // 2
    if what == "NTXentLoss":
        loss = integration.NTXentLoss()
        peak, method = host_peak(lambda: loss(rows, labels).backward())
    else:
        options = dict(margin=0.01, type_of_triplets="semihard") if what == "TripletMarginMiner" else {}
        miner = getattr(integration, what)(**options)
        peak, method = host_peak(lambda: miner(rows, labels))
    return peak / 1e6, method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--what", choices=WHAT, help="one of them, in this process; only printed")
    parser.add_argument("--output", type=Path, help="CSV file to write; only printed without it")
    options = parser.parse_args()
    if options.what:
        print("{:.1f} {}".format(*measure(options.what, options.n, options.d)))
        return
    size = ["--n", str(options.n), "--d", str(options.d)]
    rows = []
    for what in WHAT:
        command = [sys.executable, "-m", "bench.integrations_memory", "--what", what, *size]
        peak, method = subprocess.check_output(command, text=True).split()
        library = "pytorch-metric-learning"
        rows.append({
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "what": what, "n": options.n,
            "d": options.d, "peak_mb": peak, "memory_method": method, "matrix_mb": f"{4e-6 * options.n**2:.0f}",
            "library": f"{library} {importlib.metadata.version(library)}",
        } | machine("cpu"))  # fmt: skip
        print(f"{what}: {peak} MB; one matrix of pairs {rows[-1]['matrix_mb']} MB")
    if options.output:
        write_csv(options.output, COLUMNS, rows)


if __name__ == "__main__":
    main()
