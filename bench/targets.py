"""The acceptance bars on the CPU, and whether the measured values clear them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.harness import Point
from bench.report import MISSING, markdown
from bench.results import DENSE_KINDS, Entries, Entry, fastest, time_ratio

CASE = "clip"
SMALL_N = (16, 64, 256, 1024)
WIDTHS = (128, 512)


@dataclass(frozen=True)
class Target:
    """A bar on one number computed from what was measured at one point."""

    text: str
    n: int
    d: int
    value: Callable[[Entries], float | None]
    at_least: float = float("-inf")
    at_most: float = float("inf")
    memory_of: str = ""  # the implementation whose peak memory is needed; empty: all are timed
    large: bool = False

    @property
    def point(self) -> Point:
        return Point(self.n, self.d, "fp32", "cpu")

    @property
    def bar(self) -> str:
        return f"<= {self.at_most:g}" if self.at_least == float("-inf") else f">= {self.at_least:g}"


def select(entries: Entries, name: str) -> Entry | None:
    """An implementation by its name, or the fastest of a group."""
    groups = {"best_dense": DENSE_KINDS, "best_eager": ("eager",)}
    return fastest(entries, groups[name]) if name in groups else entries.get(name)


def ratio(n: int, d: int, slow: str, fast: str, **bar: float) -> Target:
    text = f"time of {slow} / {fast}"
    return Target(text, n, d, lambda entries: time_ratio(select(entries, slow), select(entries, fast)), **bar)


def peak(n: int, d: int, name: str, at_most: float, *, large: bool = False) -> Target:
    def value(entries: Entries) -> float | None:
        return entries[name]["peak_mb"] if name in entries else None

    return Target(f"peak extra MB of {name}", n, d, value, at_most=at_most, memory_of=name, large=large)


TARGETS = (
    ratio(8192, 128, "best_dense", "ours", at_least=1.8),
    ratio(8192, 512, "best_dense", "ours", at_least=1.15),
    ratio(8192, 128, "eager_open_clip", "ours", at_least=4.0),
    ratio(8192, 512, "eager_open_clip", "ours", at_least=2.5),
    ratio(8192, 512, "ours_budget_0", "products_4", at_most=1.15),
    *(ratio(n, d, "ours", "best_eager", at_most=1.10) for d in WIDTHS for n in SMALL_N),
    peak(8192, 512, "ours_budget_0", at_most=64),
    peak(131072, 128, "ours", at_most=1000, large=True),
)


def target_table(targets: Iterable[Target], entries_at: Callable[[Point], Entries]) -> tuple[str, bool]:
    """A Markdown table, and whether every target was measured and met."""
    lines, all_met = [], True
    for target in targets:
        value = target.value(entries_at(target.point))
        met = value is not None and target.at_least <= value <= target.at_most
        verdict = "not measured" if value is None else "pass" if met else "FAIL"
        shown = MISSING if value is None else f"{value:.3g}"
        lines.append([target.text, str(target.n), str(target.d), target.bar, shown, verdict])
        all_met = all_met and met
    return markdown(["target (CLIP, fp32, CPU)", "N", "d", "bar", "measured", "verdict"], lines), all_met
