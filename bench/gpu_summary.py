"""What is taken away of a GPU report: a Markdown file to read, and an archive with everything in it.

Standard library alone: what starts the stages must not need what they test.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_BYTES = 2 * 2**20  # of a longer log the archive has the end
FILE_BYTES = 4 * 2**20  # a larger file of results is left out of it
TAIL_LINES = 12
MOST_FAILURES = 40


@dataclass(frozen=True)
class Result:
    """``outcome``: passed, failed, out of time, "failed, out of time", skipped, or interrupted: with the report."""

    stage: str
    outcome: str
    seconds: float = 0.0
    note: str = ""


# -- the summary --------------------------------------------------------------------------------------------------


def write_summary(folder: Path, facts: dict[str, str], results: Sequence[Result], stages: Sequence[str]) -> None:
    """``summary.md``: the machine, the stages, and what each of them found."""
    parts = ["# GPU report", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(stage_table(results, stages))
    for result in results:
        found = list(sections(folder, result))
        parts += [f"## {result.stage}", *found] if found else []
    replace(folder / "summary.md", ("\n\n".join(parts) + "\n").encode())


def stage_table(results: Sequence[Result], stages: Sequence[str]) -> str:
    lines = [[r.stage, r.outcome, f"{r.seconds:.1f}", r.note.replace("|", "/")] for r in results]
    lines += [[stage, "not started", "", ""] for stage in stages[len(results) :]]
    return markdown(["stage", "outcome", "seconds", "note"], lines)


def sections(folder: Path, result: Result) -> Iterator[str]:
    """What a stage has left, whichever kinds of files."""
    files = folder / "results" / result.stage
    if (files / "outcomes.csv").exists():
        yield tests_section(files)
    yield from (table for table in (speed_table(files), configs_table(files)) if table)
    for path in sorted(files.glob("*.md")):
        yield path.read_text().strip()
    log = folder / "logs" / f"{result.stage}.log"
    if result.outcome not in ("passed", "skipped") and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        yield "\n".join(["The end of its log:", "", "```", *(line[:300] for line in lines), "```"])


def tests_section(files: Path) -> str:
    rows = read(files / "outcomes.csv")
    counts = {outcome: len({row["test"] for row in rows if row["outcome"] == outcome}) for outcome in OUTCOMES}
    failed = failed_tests(files)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "no test has ended"]
    lines += [f"- `{test}`: {error}" for test, error in list(failed.items())[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        lines.append(f"- and {len(failed) - MOST_FAILURES} more, in outcomes.csv")
    return "\n".join(lines)


OUTCOMES = ("passed", "failed", "skipped")


def failed_tests(files: Path) -> dict[str, str]:
    """{test: error} of a stage's failures so far. A test has more than one where its process died of the first."""
    failed: dict[str, str] = {}
    for row in read(files / "outcomes.csv"):
        if row["outcome"] == "failed":
            failed.setdefault(row["test"], row["error"])
    return failed


def speed_table(files: Path) -> str:
    """What `bench run` has measured."""
    rows = [row for path in sorted(files.glob("loss_*.csv")) for row in read(path)]
    lines = [
        [*(row[name] for name in ("case", "d", "n", "dtype", "implementation", "ms_median")),
         f"{row['ms_p10']} to {row['ms_p90']}" if row["ms_median"] else "", row["peak_mb"], row["error"]]
        for row in rows
    ]  # fmt: skip
    header = ["case", "d", "N", "dtype", "implementation", "ms (median)", "p10 to p90", "MB", "error"]
    return markdown(header, lines) if lines else ""


def configs_table(files: Path) -> str:
    """Of each kernel that `bench.gpu_configs` has timed: the shipped configuration, and the fastest."""
    rows = read(files / "configs.csv")
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        timed = [row for row in rows if row["kernel"] == kernel and row["ms_median"]]
        failed = sum(row["kernel"] == kernel and bool(row["error"]) for row in rows)
        shipped = [cell(row) for row in timed if row["shipped"] == "yes"]
        best = min(timed, key=lambda row: float(row["ms_median"]), default=None)
        lines.append([kernel, *(shipped or [""]), cell(best) if best else "", str(len(timed)), str(failed)])
    return markdown(["kernel", "shipped", "fastest", "timed", "errors"], lines) if lines else ""


def cell(row: dict[str, str]) -> str:
    return f"{row['ms_median']} ms, {row['tflops']} TFLOP/s: {row['config']}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file. A row whose writer was killed in it is left out."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


# -- the archive --------------------------------------------------------------------------------------------------


def write_archive(folder: Path) -> None:
    """``report.tar.gz``: the summary, all results and logs, but for what is huge, which ``left_out.txt`` names."""
    buffer, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        add(archive, "summary.md", (folder / "summary.md").read_bytes())
        for path in sorted(path for path in (folder / "results").rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if path.stat().st_size > FILE_BYTES:
                left_out.append(f"{name}: {path.stat().st_size} B")
            else:
                add(archive, name, path.read_bytes())
        for path in sorted((folder / "logs").glob("*.log")):
            name, size = f"logs/{path.name}", path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(size - LOG_BYTES, 0))
                add(archive, name, file.read())
            if size > LOG_BYTES:
                left_out.append(f"{name}: the first {size - LOG_BYTES} B")
        add(archive, "left_out.txt", "".join(f"{line}\n" for line in left_out).encode())
    replace(folder / "report.tar.gz", buffer.getvalue())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def replace(path: Path, data: bytes) -> None:
    """At once, so that whoever is killed meanwhile leaves the last whole one."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)
