"""Tables of everything measured, as Markdown."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases import CASES
from bench.results import Entries, Entry, PointKey, Row, by_point, fastest, load, median_ms, point_key, time_ratio

MISSING = "–"


def write_report(directory: Path) -> Path:
    """`report.md` beside the CSV files, and its plots where matplotlib is installed."""
    rows = load(directory)
    if not rows:
        raise FileNotFoundError(f"no results in {directory}: measure first (`python -m bench run`), or name --output")
    groups = grouped(by_point(rows))
    plots = draw_plots(groups, directory)
    parts = ["# Benchmark results", "Times are medians in ms, forward + backward; memory is the peak extra MB (10^6)."]
    for key, points in groups.items():
        parts += [f"## {heading(key)}", origin(rows, key)]
        if key in plots:
            parts.append(f"![time and memory over N]({plots[key].name})")
        parts += ["### Ratios", ratio_table(key, points)]
        parts += ["### Time (ms)", table(points, time_cell), "### Peak extra memory (MB)", table(points, memory_cell)]
    path = directory / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


GroupKey = tuple[str, str, str, str, int]  # machine, case, device, dtype, d
Groups = dict[GroupKey, dict[int, Entries]]  # ... -> {n: entries}


def grouped(points: dict[PointKey, Entries]) -> Groups:
    groups: Groups = defaultdict(dict)
    for (*group, n), entries in points.items():
        groups[tuple(group)][n] = entries
    return groups


def heading(key: GroupKey) -> str:
    _, case, device, dtype, d = key
    return f"{CASES[case].title}, {device}, {dtype}, d = {d}"


def origin(rows: Iterable[Row], key: GroupKey) -> str:
    """The machine and the versions of the group's latest rows."""
    row = [row for row in rows if point_key(row)[:-1] == key][-1]
    used = {"torch": row["torch"], "triton": row["triton"], "replearn-kernels": row["package"]}
    versions = ", ".join(f"{name} {version}" for name, version in used.items() if version)
    return f"{key[0]}; {versions}; last measured {row['date']}"


def ratio_table(key: GroupKey, points: dict[int, Entries]) -> str:
    """How many times slower than ours: the best dense version, the common formula; and ours over its bare products."""
    case = CASES[key[1]]
    common = f"eager_{next(iter(case.dense), 'formula')}"
    floor = next(iter(case.products), None)
    header = ["N", "best dense", "best dense / ours", f"{common} / ours", f"ours_budget_0 / {floor or 'products'}"]
    lines = []
    for n, entries in points.items():
        best, ours = fastest(entries), entries.get("ours")
        ratios = [
            time_ratio(best, ours),
            time_ratio(entries.get(common), ours),
            time_ratio(entries.get("ours_budget_0"), entries.get(floor)),
        ]
        lines.append([str(n), best["name"] if best else MISSING, *map(ratio_cell, ratios)])
    return markdown(header, lines)


def table(points: dict[int, Entries], cell) -> str:
    """One line per implementation, one column per N."""
    names = dict.fromkeys(name for entries in points.values() for name in entries)
    lines = [[name, *(cell(entries.get(name)) for entries in points.values())] for name in names]
    return markdown(["implementation", *(f"N = {n}" for n in points)], lines)


def time_cell(entry: Entry | None) -> str:
    if entry and entry["round_ms"]:
        return f"{median_ms(entry):.4g}"
    return entry["error"] or MISSING if entry else MISSING


def memory_cell(entry: Entry | None) -> str:
    if entry and entry["peak_mb"] is not None:
        return f"{entry['peak_mb']:.1f}"
    return MISSING


def ratio_cell(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def draw_plots(groups: Groups, directory: Path) -> dict[GroupKey, Path]:
    try:
        from bench.plots import draw
    except ImportError as missing:
        print(f"no plots: {missing}")
        return {}
    drawn, seen = {}, Counter()
    for key, points in groups.items():
        _, case, device, dtype, d = key
        path = directory / f"{case}_{device.replace(':', '')}_{dtype}_d{d}.png"
        seen[path] += 1
        if seen[path] > 1:  # the same point on another machine
            path = path.with_stem(f"{path.stem}_{seen[path]}")
        draw(points, title=f"{heading(key)}: forward + backward", subtitle=key[0], path=path)
        drawn[key] = path
    return drawn


def show(text: str) -> None:
    """Print Markdown, prettily if rich is installed."""
    try:
        from rich.console import Console
        from rich.markdown import Markdown
    except ImportError:
        print(text)
        return
    Console().print(Markdown(text))
