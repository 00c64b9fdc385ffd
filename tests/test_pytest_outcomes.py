"""The plugin by which a run of tests that is killed has told of its failures; in runs of their own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_report import Report
from bench.gpu_stages import Stage
from bench.pytest_outcomes import error_line

pytest.importorskip("xdist")
ROOT = Path(__file__).parents[1]
STREAMED = ("-p", "bench.pytest_outcomes", "-p", "no:cacheprovider", "--tb=short", "--no-summary", "-n", "2")

FAILING_AND_HANGING = """
import time

def test_fails():
    computed = 41
    assert computed == 42

def test_passes():
    pass

def test_hangs():
    time.sleep(600)
"""

BREAKING = """
import pytest

state = {"broken": False}

@pytest.mark.parametrize("i", range(12))
def test_one(i):
    assert not state["broken"], "of an earlier error"
    if i == 2:
        state["broken"] = True
        raise RuntimeError("CUDA error: an illegal memory access")
"""

BROKEN = """
import sys
import bench.pytest_outcomes

bench.pytest_outcomes.gpu_is_broken = lambda: sys.modules["test_breaking"].state["broken"]
"""


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_failures_are_told_before_a_run_is_killed(tmp_path):
    (tmp_path / "test_it.py").write_text(FAILING_AND_HANGING)
    outcomes = tmp_path / "results" / "tests" / "outcomes.csv"
    command = (sys.executable, "-m", "pytest", *STREAMED, "--outcomes", str(outcomes), str(tmp_path / "test_it.py"))
    report = Report([Stage("tests", (command,), seconds=10, least=1)], tmp_path, {}, 60)
    assert report.run() == 1 and report.results[0].outcome == "failed, out of time"
    log = (tmp_path / "logs" / "tests.log").read_text()
    assert "test_it.py::test_fails" in log and "assert computed == 42" in log and "assert 41 == 42" in log
    assert {row["test"].split("::")[1]: row["outcome"] for row in read(outcomes)} == {
        "test_fails": "failed", "test_passes": "passed",
    }  # fmt: skip
    assert "::test_fails`: assert 41 == 42" in (tmp_path / "summary.md").read_text()


def test_a_worker_ends_after_an_error_that_stays_with_it(tmp_path):
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    (tmp_path / "conftest.py").write_text(BROKEN)
    outcomes = tmp_path / "outcomes.csv"
    command = [sys.executable, "-m", "pytest", *STREAMED, "--outcomes", str(outcomes), "--rootdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = read(outcomes)
    failed = {row["test"].split("::")[1] for row in rows if row["outcome"] == "failed"}
    assert failed == {"test_one[2]"}, done.stdout
    assert {row["test"] for row in rows if row["outcome"] == "passed"} == {
        row["test"] for row in rows if "[2]" not in row["test"]
    }
    assert len({row["test"] for row in rows}) == 12
    assert any("CUDA error: an illegal memory access" in row["error"] for row in rows)


def test_an_error_at_collection_is_told(tmp_path):
    (tmp_path / "test_it.py").write_text("import no_such_module\n")
    outcomes = tmp_path / "outcomes.csv"
    command = [sys.executable, "-m", "pytest", *STREAMED, "--outcomes", str(outcomes), str(tmp_path / "test_it.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "No module named 'no_such_module'" in done.stdout
    assert {row["outcome"] for row in read(outcomes)} == {"failed"}
    assert "no_such_module" in read(outcomes)[0]["error"]


def test_error_lines():
    assert error_line("") == ""
    assert error_line("x.py:1: in f\n    g()\nE   ValueError: no") == "ValueError: no"
    assert error_line("E   CompileError: at 3:4\nE   a\nE   b is wrong") == "CompileError: at 3:4 ... b is wrong"
    assert error_line("worker 'gw1' crashed") == "worker 'gw1' crashed"
