"""What `import replearn_kernels` costs beyond torch: `python -m bench.import_time`, each time in a fresh process.

In the processor's time, which is the clock's where modules come from the system's cache of files, on an idle machine.
"""

import argparse
import csv
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from bench.results import MACHINE, machine, quantiles

COLUMNS = ("date", "module", "ms_p10", "ms_median", "ms_p90", "round_ms", *MACHINE)
MODULES = ("torch", "replearn_kernels")
CODE = f"""
import importlib, json, time
times = []
for name in {MODULES}:
    start = time.process_time()
    importlib.import_module(name)
    times.append((time.process_time() - start) * 1e3)
print(json.dumps(times))
"""


def measure(rounds: int) -> dict[str, list[float]]:
    """{module: ms in each round}, imported in this order; not of the first process, which fills the cache of files."""
    found = [json.loads(subprocess.check_output([sys.executable, "-c", CODE], text=True)) for _ in range(rounds + 1)]
    return dict(zip(MODULES, map(list, zip(*found[1:]))))


def append(times: dict[str, list[float]], path: Path) -> None:
    """One line per module."""
    is_new = not path.exists()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for module, round_ms in times.items():
            taken = quantiles(round_ms) | {"round_ms": " ".join(f"{ms:.5g}" for ms in round_ms)}
            writer.writerow({"date": date, "module": module} | taken | machine("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="CSV file to add the figures to; only printed without it")
    options = parser.parse_args()
    times = measure(options.rounds)
    for module, round_ms in times.items():
        print(f"{module}: {quantiles(round_ms)['ms_median']} ms")
    if options.output:
        append(times, options.output)


if __name__ == "__main__":
    main()
