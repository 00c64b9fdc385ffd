"""The commands of `python -m bench`. Each option's help is the text in its annotation."""

import sys
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

from bench.cases import CASES
from bench.harness import (
    Case,
    Implementation,
    Point,
    implementations,
    measure_memory,
    measure_speed,
    short_error,
    why_fallback,
)
from bench.report import memory_cell, show, time_cell, write_report
from bench.results import Row, append, by_point, file_name, load, machine, make_row, parse, point_key
from bench.targets import TARGETS, Target, target_table

LOCAL = Path(__file__).parent / "local_results"  # not in git: bench/results has what README quotes
ALL_CASES = list(CASES)
DEFAULT_D = [128, 512]
DEFAULT_DTYPE = ["fp32"]
AUTO = ["auto"]
EVERY: list[str] = []
THE_CASES_OWN: list[int] = []

Output = Annotated[Path, "directory of the CSV files, tables and plots; bench/results has the committed ones"]
Rounds = Annotated[int, "timed rounds at least; in each, all implementations take turns"]
Seconds = Annotated[float, "time at least spent on the rounds of a point: short steps get more rounds"]


def run(
    case: Annotated[list[str], "case to measure; may be repeated, like all lists here"] = ALL_CASES,
    n: Annotated[list[int], "number of rows N; else those of the case"] = THE_CASES_OWN,
    d: Annotated[list[int], "width d"] = DEFAULT_D,
    dtype: Annotated[list[str], "fp32, bf16, fp16 or fp64"] = DEFAULT_DTYPE,
    device: Annotated[str, "cpu or cuda"] = "cpu",
    implementation: Annotated[list[str], "measure only this implementation"] = EVERY,
    backend: Annotated[list[str], "backend of ours: auto, triton, cpp, torch or eager"] = AUTO,
    rounds: Rounds = 9,
    seconds: Seconds = 10.0,
    compiled: Annotated[bool, "measure the dense formulas under torch.compile too"] = True,
    speed: Annotated[bool, "measure time"] = True,
    memory: Annotated[bool, "measure peak extra memory, a fresh process per figure"] = True,
    keep_going: Annotated[bool, "where ours fails, record the error, go on, and exit with 1 in the end"] = False,
    output: Output = LOCAL,
) -> None:
    """Measure cases and add the figures to OUTPUT/loss_CASE_DEVICE.csv, after each point."""
    all_measured = True
    for name in case:
        sizes = n or CASES[name].sizes
        for point in (Point(rows, width, kind, device) for kind in dtype for width in d for rows in sizes):
            chosen = implementations(CASES[name], backend, implementation)
            chosen = [one for one in chosen if compiled or one.kind != "compiled"]
            try:
                measure(CASES[name], point, chosen, output, rounds * speed, seconds, memory=memory)
            except Exception as error:
                if not keep_going:
                    raise
                record_failure(CASES[name], point, chosen, output, error)
                all_measured = False
    if not all_measured:
        sys.exit(1)


def measure(
    case: Case,
    point: Point,
    chosen: Sequence[Implementation],
    output: Path,
    rounds: int,
    seconds: float,
    *,
    memory: bool,
) -> None:
    """Measure a case at one point (its time unless rounds = 0), print the figures and add them to the CSV file."""
    refuse_fallback(case, point, chosen)
    print(f"{case.name}: N = {point.n}, d = {point.d}, {point.dtype}, {point.device}", flush=True)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured_on = machine(point.device)
    timed = measure_speed(case, point, chosen, rounds, seconds) if rounds else {}
    rows = []
    for implementation in chosen:
        measured = timed.get(implementation.name, {})
        # Outputs of products are preallocated: nothing extra. Other processes' memory is not this one's.
        if memory and implementation.kind not in ("products", "processes"):
            measured |= measure_memory(case, point, implementation)
        row = make_row(date, case, implementation, point, measured) | measured_on
        rows.append(row)
        print(line(parse(row)), flush=True)
    append(rows, output / file_name(case.name, point.device))


def record_failure(
    case: Case, point: Point, chosen: Sequence[Implementation], output: Path, error: Exception
) -> None:
    """A row for each of ours, with the error in place of figures."""
    traceback.print_exception(error)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured = {"error": short_error(f"{type(error).__name__}: {error}")}
    ours = [implementation for implementation in chosen if implementation.kind == "ours"]
    rows = [make_row(date, case, one, point, measured) | machine(point.device) for one in ours]
    append(rows, output / file_name(case.name, point.device))


def refuse_fallback(case: Case, point: Point, chosen: Sequence[Implementation]) -> None:
    """What "auto" replaces by plain PyTorch must not pass for ours."""
    automatic = any(one.kind in ("ours", "processes") and one.backend == "auto" for one in chosen)
    if automatic and (missing := why_fallback(case, point)):
        sys.exit(
            f"{case.name} is not measured: 'auto' would take plain PyTorch for ours, since {missing}. "
            "To measure that, ask for it by name: python -m bench run --backend torch"
        )


def line(row: Row) -> str:
    spread = f"({row['ms_p10']} to {row['ms_p90']})" if row["round_ms"] else ""
    return f"  {row['implementation']:<32}{time_cell(row):>10} ms {spread:<24}{memory_cell(row):>10} MB"


def report(output: Output = LOCAL) -> None:
    """Write OUTPUT/report.md and its plots from the CSV files there."""
    path = write_report(output)
    show(path.read_text())
    print(f"written to {path}")


def targets(
    case: Annotated[list[str], "judge only this case"] = ALL_CASES,
    large: Annotated[bool, "include the largest N (minutes)"] = False,
    fresh: Annotated[bool, "measure now; otherwise judge the results that are there"] = True,
    rounds: Rounds = 9,
    seconds: Seconds = 10.0,
    output: Output = LOCAL,
) -> None:
    """Print every acceptance bar with its measured value; exit with 1 if one is missed."""
    wanted = [target for target in TARGETS if target.case in case and (large or not target.large)]
    if fresh:
        measure_targets(wanted, output, rounds, seconds)
    here = machine("cpu")
    points = by_point(load(output))

    def entries_at(name: str, point: Point):
        return points.get(point_key(here | vars(point) | {"case": name}), {})

    text, all_met = target_table(wanted, entries_at)
    show(text)
    sys.exit(not all_met)


def measure_targets(wanted: Sequence[Target], output: Path, rounds: int, seconds: float) -> None:
    """Time every implementation at each point that needs it; take only the memory that is asked for."""
    for name, point in dict.fromkeys((target.case, target.point) for target in wanted if not target.memory_of):
        measure(CASES[name], point, implementations(CASES[name]), output, rounds, seconds, memory=False)
    for target in wanted:
        if target.memory_of:
            only = implementations(CASES[target.case], names=[target.memory_of])
            measure(CASES[target.case], target.point, only, output, 0, 0, memory=True)
