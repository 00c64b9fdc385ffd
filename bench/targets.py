"""The acceptance bars on the CPU, and whether the measured values clear them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from bench.cases.mining import MINER
from bench.harness import Point
from bench.report import MISSING, markdown
from bench.results import DENSE_KINDS, Entries, Entry, fastest, median_ms, time_ratio

SMALL_N = (16, 64, 256, 1024)
WIDTHS = (128, 512)


@dataclass(frozen=True)
class Target:
    """A bar on one number computed from what was measured of a case at one point."""

    case: str
    text: str
    n: int
    d: int
    value: Callable[[Entries], float | None]
    at_least: float = float("-inf")
    at_most: float = float("inf")
    memory_of: str = ""  # the implementation whose peak memory is needed; empty: all are timed
    large: bool = False
    needs: str = ""  # the package that it compares with

    @property
    def missing(self) -> bool:
        return bool(self.needs) and find_spec(self.needs) is None

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


def ratio(case: str, n: int, d: int, slow: str, fast: str, **bar) -> Target:
    text = f"time of {slow} / {fast}"
    return Target(case, text, n, d, lambda entries: time_ratio(select(entries, slow), select(entries, fast)), **bar)


def peak(case: str, n: int, d: int, name: str, at_most: float, *, large: bool = False) -> Target:
    def value(entries: Entries) -> float | None:
        return entries[name]["peak_mb"] if name in entries else None

    return Target(case, f"peak extra MB of {name}", n, d, value, at_most=at_most, memory_of=name, large=large)


def seconds(case: str, n: int, d: int, name: str, at_most: float) -> Target:
    def value(entries: Entries) -> float | None:
        entry = entries.get(name)
        return median_ms(entry) / 1e3 if entry and entry["round_ms"] else None

    return Target(case, f"seconds of {name}", n, d, value, at_most=at_most)


def family(case: str, products: str, over_dense: dict[int, float]) -> list[Target]:
    """The bars common to several losses: over the best dense version, over the bare products, and memory."""
    floors = {128: 1.4, 512: 1.2}
    return [
        *(ratio(case, 8192, d, "best_dense", "ours", at_least=bar) for d, bar in over_dense.items()),
        *(ratio(case, 8192, d, "ours_budget_0", products, at_most=bar) for d, bar in floors.items()),
        peak(case, 8192, 512, "ours_budget_0", at_most=64),
    ]


TARGETS = (
    ratio("clip", 8192, 128, "best_dense", "ours", at_least=1.8),
    ratio("clip", 8192, 512, "best_dense", "ours", at_least=1.15),
    ratio("clip", 8192, 128, "eager_open_clip", "ours", at_least=4.0),
    ratio("clip", 8192, 512, "eager_open_clip", "ours", at_least=2.5),
    ratio("clip", 8192, 512, "ours_budget_0", "products_4", at_most=1.15),
    *(ratio("clip", n, d, "ours", "best_eager", at_most=1.10) for d in WIDTHS for n in SMALL_N),
    peak("clip", 8192, 512, "ours_budget_0", at_most=64),
    peak("clip", 131072, 128, "ours", at_most=1000, large=True),
    *family("siglip", "products_3", {128: 1.4, 512: 1.1}),
    *family("nt_xent", "products_2", {128: 1.8, 512: 1.4}),
    *family("sup_con", "products_2", {128: 1.8, 512: 1.4}),
    ratio("lifted", 8192, 128, "best_dense", "ours", at_least=2.5),
    ratio("contrastive", 8192, 128, "best_dense", "ours", at_least=2.0),
    ratio("batch_hard", 8192, 128, "best_dense", "ours", at_least=2.5),
    *(peak(case, 8192, 128, "ours_budget_0", at_most=64) for case in ("lifted", "contrastive", "batch_hard")),
    *(peak(case, 65536, 128, "ours", at_most=512, large=True) for case in ("lifted", "batch_hard", "semi_hard")),
    seconds("batch_all", 4096, 128, "ours", at_most=3),
    peak("batch_all", 4096, 128, "ours", at_most=128),
    peak("arcface", 1_000_000, 64, "ours", at_most=256 + 128),  # 256 MB are the weight's gradient
    peak("dino_head", 64, 256, "ours", at_most=256),
    *(
        ratio(f"{case}_ranks", 8192, 512, "ranks_ring", "ours", at_most=1.15)
        for case in ("clip", "siglip", "sup_con")
    ),
    ratio("mining", 4096, 128, f"eager_{MINER}", "ours", at_least=20, needs=MINER),
    peak("mining", 4096, 128, "ours", at_most=64),
)


def target_table(targets: Iterable[Target], entries_at: Callable[[str, Point], Entries]) -> tuple[str, bool]:
    """A Markdown table, and whether every target that can be was measured and met."""
    lines, all_met = [], True
    for target in targets:
        value = target.value(entries_at(target.case, target.point))
        met = value is not None and target.at_least <= value <= target.at_most
        verdict = "not measured" if value is None else "pass" if met else "FAIL"
        if value is None and target.missing:
            met, verdict = True, f"skipped: {target.needs} is not installed"
        shown = MISSING if value is None else f"{value:.3g}"
        lines.append([target.case, target.text, str(target.n), str(target.d), target.bar, shown, verdict])
        all_met = all_met and met
    return markdown(["loss", "target (fp32, CPU)", "N", "d", "bar", "measured", "verdict"], lines), all_met
