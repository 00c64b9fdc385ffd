"""Runs the stages of the GPU report within a time limit, and keeps what there is of it on disk. See bench/README.md.

Standard library alone: what starts the stages must not need what they test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu_stages import NORMAL_MINUTES, ROOT, Command, Setting, Stage, all_stages
from bench.gpu_summary import Result, failed_tests, write_archive, write_summary

MACHINE_SECONDS = 60.0
GRACE = 1.0  # seconds between asking a process to end and ending it, and again until its output is closed


class Process:
    """A command in a process group of its own; its output goes to the terminal and to the end of ``log``."""

    def __init__(self, command: Command, log: Path, environment: dict[str, str]):
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._copier = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._copier.start()

    def _copy(self, log: Path) -> None:
        with log.open("ab") as file:
            while part := self._process.stdout.read1():
                file.write(part)
                file.flush()
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None if it still runs after ``seconds``."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Ends all that is left of the group, also what the command has left behind."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            self.wait(GRACE)
        self._copier.join(GRACE)


class Report:
    """``run()`` the stages, so that they end before ``seconds`` have passed. ``clock`` and ``start`` are the tests'."""

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: Path,
        facts: dict[str, str],
        seconds: float,
        scale: float = 1.0,  # of the stages' own limits
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Command, Path], Process] | None = None,
    ):
        self.stages, self.folder, self.facts, self.scale, self.clock = stages, folder, facts, scale, clock
        self._deadline = clock() + seconds
        self._start = start or (lambda command, log: Process(command, log, os.environ | {"PYTHONUNBUFFERED": "1"}))
        self.results: list[Result] = []
        for name in ("results", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """The exit status: 1 if a stage failed."""
        self._write()
        for stage in self.stages:
            try:
                self.results.append(self._run_stage(stage))
            except BaseException:  # an interrupt too: what there is of the stage has to be found
                self.results.append(Result(stage.name, "interrupted"))
                raise
            finally:
                self._write()
        return int(any(result.outcome.startswith("failed") for result in self.results))

    def _write(self) -> None:
        write_summary(self.folder, self.facts, self.results, [stage.name for stage in self.stages])
        write_archive(self.folder)

    def _run_stage(self, stage: Stage) -> Result:
        began = self.clock()
        left = self._deadline - began
        if reason := stage.why_not():
            return Result(stage.name, "skipped", note=reason)
        if left < stage.least:
            return Result(stage.name, "skipped", note=f"{max(left, 0):.0f} s were left, it needs {stage.least:.0f}")
        limit = min(max(stage.seconds * self.scale, stage.least), left)
        say(f"stage {stage.name}: {limit:.0f} s at most, {left:.0f} s left in all")
        problems, finished = [], True
        for command in stage.commands:
            status = self._run_command(stage, command, began + limit)
            if status is None:
                finished = False
                break
            if status not in stage.accepted:
                problems.append(f"{name_of(command)}: {described(status)}")
        if failed := failed_tests(self.folder / "results" / stage.name):
            problems.append(f"{len(failed)} tests failed")
        seconds = self.clock() - began
        if not finished:
            problems.append(f"ended after its {limit:.0f} s")
            outcome = "failed, out of time" if len(problems) > 1 else "out of time"
        else:
            outcome = "failed" if problems else "passed"
        say(f"stage {stage.name}: {outcome}, {seconds:.0f} s")
        return Result(stage.name, outcome, seconds, "; ".join(problems))

    def _run_command(self, stage: Stage, command: Command, end: float) -> int | None:
        """Its exit status; None where the time is up first."""
        left = end - self.clock()
        if left <= 0:
            return None
        say(shown(command))
        process = self._start(command, self.folder / "logs" / f"{stage.name}.log")
        try:
            return process.wait(left)
        finally:
            process.end()


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def shown(command: Command) -> str:
    return " ".join(("python", *command[1:]))


def name_of(command: Command) -> str:
    """Without its options: what `python -m` runs, and its subcommand."""
    return " ".join(part for part in command[2:4] if not part.startswith("-"))


def described(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


def machine_facts(dry: bool) -> dict[str, str]:
    """What `bench.gpu_machine` says of this machine; the end, with its words, where that cannot run the report."""
    command = [sys.executable, "-m", "bench.gpu_machine", *["--dry"] * dry]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MACHINE_SECONDS)
    except subprocess.TimeoutExpired:
        sys.exit(f"gpu_report: torch did not tell of this machine within {MACHINE_SECONDS:.0f} s")
    if done.returncode:
        sys.exit(f"{done.stderr}gpu_report: this machine cannot run the report")
    return json.loads(done.stdout.splitlines()[-1])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu_report.sh", description=__doc__)
    names = [stage.name for stage in all_stages(Setting(Path(), 1, True))]
    parser.add_argument("--minutes", type=float, default=NORMAL_MINUTES, help="time limit of the whole (default: 6)")
    parser.add_argument(
        "--output", type=Path,
        help="where it goes, in place of an earlier report there (default: bench/local_results/gpu/DATE)",
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(names), help="which, with commas between (default: %(default)s)")
    parser.add_argument(
        "--dry", action="store_true", help="rehearse on the CPU, at tiny sizes, in Triton's interpreter; needs --output"
    )
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the time limit that are over already")
    given = parser.parse_args(arguments)
    if given.dry and given.output is None:
        parser.error("--dry needs --output, so that its figures never pass for results")
    if given.minutes <= 0:
        parser.error("--minutes has to be positive")
    given.stages = given.stages.split(",")
    if unknown := set(given.stages) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return given


def leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    given = parse_arguments()
    end = time.monotonic() + 60 * given.minutes - given.spent
    signal.signal(signal.SIGTERM, leave)  # by way of the stage's end, and of what there is of it
    os.environ.pop("TRITON_INTERPRET", None)
    if given.dry:
        # The tensors are tiny, and threads that wait for each other would take the cores from what runs beside.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    date = datetime.now(timezone.utc)
    facts = {"date": date.isoformat(timespec="seconds")} | machine_facts(given.dry)
    folder = given.output or ROOT / "bench" / "local_results" / "gpu" / f"{date:%Y-%m-%d_%H%M%S}"
    folder = folder.resolve()
    for name in ("results", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    setting = Setting(folder / "results", os.cpu_count() or 1, given.dry)
    stages = [stage for stage in all_stages(setting) if stage.name in given.stages]
    report = Report(stages, folder, facts, end - time.monotonic(), given.minutes / NORMAL_MINUTES)
    status = report.run()
    print((folder / "summary.md").read_text())
    say(f"results in {folder}: summary.md, and all of it in report.tar.gz")
    sys.exit(status)


if __name__ == "__main__":
    main()
