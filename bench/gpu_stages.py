"""The stages of the GPU report, as data: what runs, for how long at most, and what it cannot run without.

Standard library alone: what starts the stages must not need what they test.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NORMAL_MINUTES = 6.0
MOST_WORKERS = 14

Command = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Commands that run one after another, also after one that failed.

    seconds:  the stage's limit in a report of NORMAL_MINUTES; in another report, in proportion
    least:    with fewer seconds left in all it does not start, since nothing would come of it
    modules:  Python modules that it cannot run without
    files:    files of the checkout that it cannot run without
    accepted: exit statuses that are no failure
    """

    name: str
    commands: tuple[Command, ...]
    seconds: float
    least: float
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    accepted: tuple[int, ...] = (0,)

    def why_not(self) -> str | None:
        """What is missing here, if anything."""
        missing = [f"the module {name}" for name in self.modules if importlib.util.find_spec(name) is None]
        missing += [name for name in self.files if not (ROOT / name).exists()]
        return f"needs {' and '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Setting:
    """Where the stages run. ``dry``: on a CPU, at tiny sizes, with Triton's interpreter where there is a triton."""

    results: Path
    cores: int
    dry: bool

    @property
    def workers(self) -> int:
        return max(1, min(self.cores - 2, MOST_WORKERS))

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def backend(self) -> str:
        """Of ours. By name in a rehearsal, where "auto" would take the kernels for CPUs, or refuse without them."""
        if not self.dry:
            return "auto"
        return "torch" if importlib.util.find_spec("triton") is None else "triton"

    @property
    def ours(self) -> str:
        return "ours" if self.backend == "auto" else f"ours[{self.backend}]"

    def points(self, cases: Sequence[str], n: Sequence[int], d: Sequence[int]) -> Command:
        """The options that `bench run` and `bench.gpu_warmup` share."""
        if self.dry:
            n, d = [32], [16]
        lists = {"case": cases, "n": n, "d": d}
        chosen = [part for name, values in lists.items() for value in values for part in (f"--{name}", str(value))]
        return *chosen, "--dtype", "bf16", "--device", self.device, "--backend", self.backend

    def warm_up(self, points: Command, *options: str) -> Command:
        return python("bench.gpu_warmup", *points, "--processes", str(self.workers), *options)

    def measure(self, stage: str, points: Command, *options: str, rounds: int = 5, seconds: float = 0.5) -> Command:
        if self.dry:
            rounds, seconds = 2, 0.0
        effort = ("--rounds", str(rounds), "--seconds", str(seconds), "--keep-going")
        return python("bench", "run", *points, *effort, "--output", str(self.results / stage), *options)

    def only_ours(self, stage: str, points: Command, *options: str) -> Command:
        options = ("--no-compiled", "--no-memory", *options)
        return self.measure(stage, points, "--implementation", self.ours, *options)

    def tests(self, stage: str, *options: str) -> Command:
        """pytest, each outcome in a file and each failure on the terminal as soon as there is one."""
        outcomes = self.results / stage / "outcomes.csv"
        streamed = ("-p", "bench.pytest_outcomes", "--outcomes", str(outcomes), "--tb=short", "--no-summary")
        # A test that hangs says where, before its stage is killed.
        return python("pytest", *streamed, "-o", "faulthandler_timeout=60", *options)

    def gpu_tests(self, stage: str, *options: str) -> Command:
        # Collecting is all that a CPU can do with them.
        side_by_side = ("--collect-only",) if self.dry else ("-n", str(self.workers), "--dist", "load")
        return self.tests(stage, "-m", "gpu", "--continue-on-collection-errors", *side_by_side, *options)


def python(module: str, *options: str) -> Command:
    return sys.executable, "-m", module, *options


def all_stages(setting: Setting) -> list[Stage]:
    """In the order of their value: the last ones are the first to go when the time is short."""
    return [
        *test_stages(setting),
        *time_stages(setting),
        baselines(setting),
        configs(setting),
        rest(setting),
    ]


def test_stages(setting: Setting) -> list[Stage]:
    needed = {"modules": ("pytest", "hypothesis", *(() if setting.dry else ("xdist",)))}
    if setting.dry:
        needed["accepted"] = (0, 5)  # 5: no test is marked gpu
    smoke_file = "tests/test_gpu_losses.py"
    smoke = setting.gpu_tests("smoke", smoke_file)
    # Collecting every file takes longer than any other stage of a rehearsal.
    tests = setting.gpu_tests("tests", "tests/test_triton.py" if setting.dry else "tests")
    return [
        Stage("smoke", (smoke,), seconds=100, least=10, files=(smoke_file,), **needed),
        Stage("tests", (tests,), seconds=90, least=20, **needed),
    ]


def time_stages(setting: Setting) -> list[Stage]:
    points = setting.points(["clip", "siglip", "nt_xent"], [1024, 8192, 65536], [512, 128])
    speed = setting.warm_up(points, "--implementation", setting.ours), setting.only_ours("speed", points)
    return [
        Stage("speed", speed, seconds=70, least=20),
        Stage("profile", (profile(setting),), seconds=40, least=15),
    ]


def profile(setting: Setting) -> Command:
    points = [("clip", 65536, 512), ("nt_xent", 65536, 128), ("siglip", 65536, 768), ("clip", 8192, 512),
              ("clip", 1024, 512)]  # fmt: skip
    if setting.dry:
        points = [("clip", 32, 16), ("nt_xent", 32, 16)]
    chosen = [part for point in points for part in ("--point", *map(str, point))]
    where = ("--device", setting.device, "--backend", setting.backend, "--processes", str(setting.workers))
    return python("bench.gpu_profile", *chosen, *where, "--output", str(setting.results / "profile"))


def baselines(setting: Setting) -> Stage:
    """Every implementation. The graphs of torch.compile hold for one N, so each N is warmed up as it is."""
    commands = []
    # The dense formulas take tens of GB at 32,768 rows: few of them fit side by side.
    for n, processes in ((8192, setting.workers), (32768, 3))[: 1 if setting.dry else 2]:
        points = setting.points(["clip", "siglip", "nt_xent"], [n], [512])
        compiled = "--no-compiled" if setting.dry else "--compiled"
        if not setting.dry:
            commands.append(setting.warm_up(points, compiled, "--processes", str(processes)))
        commands.append(setting.measure("baselines", points, compiled, "--no-memory", rounds=3))
    return Stage("baselines", tuple(commands), seconds=60, least=25)


def configs(setting: Setting) -> Stage:
    options = ["--device", setting.device, "--output", str(setting.results / "configs")]
    options += ["--processes", str(setting.workers)]
    if setting.dry:
        options += ["--n", "64", "--d", "32", "--most", "2", "--rows", "32"]
    return Stage("configs", (python("bench.gpu_configs", *options),), seconds=60, least=20, modules=("triton",))


def rest(setting: Setting) -> Stage:
    """The other losses, a large batch, memory, and the regression tests."""
    cases = ["info_nce", "sup_con", "lifted", "contrastive", "batch_hard", "semi_hard", "batch_all", "arcface"]
    losses = setting.points(cases, [4096, 16384], [128])
    memory = setting.points(["clip"], [8192, 65536], [512])
    commands = [
        setting.only_ours("rest", losses),
        setting.measure("rest", memory, "--no-speed", "--implementation", setting.ours),
    ]
    if not setting.dry:  # DINO's head has 65,536 prototypes; `make test` runs the regression tests beside a rehearsal
        large, head = setting.points(["clip"], [262144], [512]), setting.points(["dino_head"], [64], [256])
        commands.insert(0, setting.warm_up(losses, "--implementation", setting.ours))
        commands.append(setting.only_ours("rest", large))
        commands.append(setting.measure("rest", head, "--no-compiled", "--no-memory"))
        if list((ROOT / "replearn_kernels").glob("_native_cuda*.so")):
            commands.append(setting.only_ours("rest", setting.points(["mining"], [4096, 16384], [128])))
        short = ("--benchmark-max-time=0.1", "--benchmark-min-rounds=3", "--benchmark-columns=median,min,rounds")
        commands.append(setting.tests("rest", "bench/regression.py", *short))
    return Stage("rest", tuple(commands), seconds=60, least=20)
