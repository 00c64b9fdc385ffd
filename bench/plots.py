"""Time and memory over N, one picture per case, device, dtype and d."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.results import Entries, Entry, fastest, median_ms

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS = {"color": "#1d4ed8", "linewidth": 2.6, "marker": "o", "zorder": 5}
FRUGAL = {"color": "#0ea5a4", "linewidth": 2.2, "marker": "o", "zorder": 4}
COMMON = {"color": "#dc2626", "linewidth": 1.8, "marker": "s"}
BEST = {"color": "#f59e0b", "linewidth": 1.8, "marker": "D"}
CHUNKED = {"color": "#9ca3af", "linewidth": 1.6, "marker": "^"}
FLOOR = {"color": "#6b7280", "linewidth": 1.4, "linestyle": (0, (4, 3))}

Pick = Callable[[Entries], Entry | None]
SERIES: dict[str, tuple[Pick, dict]] = {
    "eager, common formula": (lambda entries: first(entries, "eager"), COMMON),
    "best dense version": (fastest, BEST),
    "row chunks + checkpoint": (lambda entries: first(entries, "chunked"), CHUNKED),
    "ours, memory_budget=0": (lambda entries: entries.get("ours_budget_0"), FRUGAL),
    "ours": (lambda entries: entries.get("ours"), OURS),
    "bare products": (lambda entries: first(entries, "products"), FLOOR),
}


def first(entries: Entries, kind: str) -> Entry | None:
    return next((entry for entry in entries.values() if entry["kind"] == kind), None)


def draw(points: dict[int, Entries], *, title: str, subtitle: str, path: Path) -> None:
    """Write a PNG with two panels that share N."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.09, 1, 0.79), wspace=0.06)
    figure.text(0.012, 0.955, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(0.012, 0.915, subtitle, fontsize=9.5, color=MUTED)
    draw_panel(time_axes, points, "Time per step (ms)", lambda entry: median_ms(entry) if entry["round_ms"] else None)
    draw_panel(memory_axes, points, "Peak extra memory (MB)", lambda entry: entry["peak_mb"] or None)
    handles = {label: handle for axes in (memory_axes, time_axes) for handle, label in legend_entries(axes)}
    labels = [label for label in SERIES if label in handles]
    figure.legend([handles[label] for label in labels], labels, ncols=6, loc="lower center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def legend_entries(axes) -> list[tuple]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


def draw_panel(axes, points: dict[int, Entries], label: str, value: Callable[[Entry], float | None]) -> None:
    for name, (pick, style) in SERIES.items():
        picked = {n: pick(entries) for n, entries in points.items()}
        line = {n: value(entry) for n, entry in picked.items() if entry and value(entry)}
        if line:
            axes.plot(*zip(*sorted(line.items()), strict=True), label=name, markersize=5, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(points), [f"{n:,}" for n in points], rotation=30 if len(points) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.set_xlabel("N", color=MUTED)
    axes.set_title(label, loc="left", fontsize=10.5, color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, which="both", labelsize=9)
