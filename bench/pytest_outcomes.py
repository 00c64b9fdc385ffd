"""A pytest plugin: `-p bench.pytest_outcomes --outcomes FILE` tells of every test as soon as it has ended.

pytest itself shows tracebacks at the end alone, which a run that is killed does not reach. Here a failure is on the
terminal at once, and FILE gets a line per test. Under xdist, a worker whose GPU context an error has broken ends.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import pytest

COLUMNS = ("test", "outcome", "seconds", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write a line of CSV per test")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(BrokenGpu())
    elif config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(config, config.getoption("outcomes")))


class Outcomes:
    """The file and the terminal; in the process that the workers report to."""

    def __init__(self, config: pytest.Config, path: Path):
        self._config = config
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._write(COLUMNS)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            self._tell(report, report.outcome, f"{report.duration:.2f}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(report, "failed", "")

    def pytest_unconfigure(self) -> None:
        self._file.close()

    def _tell(self, report: pytest.TestReport | pytest.CollectReport, outcome: str, seconds: str) -> None:
        text = report.longreprtext if outcome == "failed" else ""
        self._write((report.nodeid, outcome, seconds, error_line(text)))
        if text:
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_sep("_", f"FAILED {report.nodeid}")
            terminal.write_line(text)
            terminal.flush()

    def _write(self, row: tuple[str, ...]) -> None:
        csv.writer(self._file).writerow(row)
        self._file.flush()


class BrokenGpu:
    """Ends a worker after a test whose error stays with the process: every later test there would fail of it.

    xdist starts another one, and calls the test crashed, besides failed.
    """

    def __init__(self):
        self._failed = False

    @pytest.hookimpl(trylast=True)  # when the report has been sent
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed
        if report.when == "teardown" and self._failed:
            self._failed = False
            if gpu_is_broken():
                os._exit(1)


def gpu_is_broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def error_line(text: str) -> str:
    """What kind of error, and what it says last: of the lines that pytest marks with an E, the first and the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
    return " ... ".join(dict.fromkeys(line[:200] for line in (*marked[:1], *marked[-1:])))
