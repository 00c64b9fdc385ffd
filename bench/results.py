"""The one CSV format, and what is computed from its rows."""

import csv
import importlib.metadata
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

import replearn_kernels
from bench.harness import DENSE_KINDS, Case, Implementation, Point

MEASURED = ("loops", "ms_p10", "ms_median", "ms_p90", "round_ms", "peak_mb", "memory_method", "error")
MACHINE = ("cpu", "cores", "threads", "gpu", "os", "load", "python", "torch", "triton", "package", "matmul_precision")
COLUMNS = ("date", "case", "implementation", "kind", "n", "d", "dtype", "device", *MEASURED, *MACHINE)

Row = dict
Entry = dict  # name, kind, error, round_ms and peak_mb of one implementation at one point
Entries = dict[str, Entry]
PointKey = tuple[str, str, str, str, int, int]  # machine, case, device, dtype, d, n


def make_row(date: str, case: Case, implementation: Implementation, point: Point, measured: dict) -> Row:
    """One line of CSV, without the machine."""
    row = dict.fromkeys(COLUMNS, "") | vars(point) | measured
    if times := measured.get("round_ms"):
        row |= quantiles(times) | {"round_ms": " ".join(f"{ms:.5g}" for ms in times)}
    if "peak_mb" in measured:
        row["peak_mb"] = f"{measured['peak_mb']:.3f}"
    return row | {"date": date, "case": case.name, "implementation": implementation.name, "kind": implementation.kind}


def write_csv(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """A file of these rows alone, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def quantiles(times: list[float]) -> dict[str, str]:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    picked = {"ms_p10": deciles[0], "ms_median": statistics.median(times), "ms_p90": deciles[-1]}
    return {name: f"{ms:.5g}" for name, ms in picked.items()}


def machine(device: str) -> dict[str, object]:
    """What the numbers depend on besides the code; no host name."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "",
        "os": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "package": replearn_kernels.__version__,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def cpu_model() -> str:
    """The name, and on x86 family and model: a virtual machine's name may be that of a dozen generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    name = known.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {known[key]}" for key in ("cpu family", "model") if key in known]
    return ", ".join([name, *numbers])


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def file_name(case: str, device: str) -> str:
    return f"loss_{case}_{device.replace(':', '')}.csv"


def append(rows: Iterable[Row], path: Path) -> None:
    """Add rows to a CSV file, which is begun with its header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        read(path)  # complains of other columns
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def load(directory: Path) -> list[Row]:
    """All rows of all our CSV files in a directory, oldest first."""
    paths = directory.glob(file_name("*", "*"))
    return sorted((row for path in paths for row in read(path)), key=lambda row: row["date"])


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this harness writes; move it away and measure again")
        return [parse(row) for row in reader]


def parse(row: Row) -> Row:
    """A line of CSV with its numbers as numbers."""
    return row | {
        "n": int(row["n"]),
        "d": int(row["d"]),
        "round_ms": [float(ms) for ms in row["round_ms"].split()],
        "peak_mb": float(row["peak_mb"]) if row["peak_mb"] else None,
    }


def point_key(row: Row) -> PointKey:
    model = row["gpu"] or f"{row['cpu']}, {row['threads']} threads"
    return model, row["case"], row["device"], row["dtype"], row["d"], row["n"]


def by_point(rows: Iterable[Row]) -> dict[PointKey, Entries]:
    """What to report at each point: all times from its latest timed run, since a ratio across runs means little;
    the memory of each implementation from its own latest run."""
    points: dict[PointKey, Entries] = defaultdict(dict)
    timed_on: dict[PointKey, str] = {}
    for row in rows:
        key = point_key(row)
        entries = points[key]
        if row["round_ms"] and timed_on.get(key) != row["date"]:
            timed_on[key] = row["date"]
            points[key] = entries = {name: entry | {"round_ms": []} for name, entry in entries.items()}
        entry = entries.setdefault(row["implementation"], {"round_ms": [], "peak_mb": None})
        entry |= {"name": row["implementation"], "kind": row["kind"], "error": row["error"]}
        entry["round_ms"] = row["round_ms"] or entry["round_ms"]
        entry["peak_mb"] = entry["peak_mb"] if row["peak_mb"] is None else row["peak_mb"]
    return dict(sorted(points.items()))


def median_ms(entry: Entry) -> float:
    return statistics.median(entry["round_ms"])


def fastest(entries: Entries, kinds: tuple[str, ...] = DENSE_KINDS) -> Entry | None:
    """The fastest timed implementation of these kinds; of the dense ones: the best dense version."""
    timed = [entry for entry in entries.values() if entry["kind"] in kinds and entry["round_ms"]]
    return min(timed, key=median_ms, default=None)


def time_ratio(slow: Entry | None, fast: Entry | None) -> float | None:
    """Median over the rounds of slow / fast, both taken in the same round."""
    if not (slow and fast and slow["round_ms"] and fast["round_ms"]):
        return None
    return statistics.median(a / b for a, b in zip(slow["round_ms"], fast["round_ms"], strict=True))
