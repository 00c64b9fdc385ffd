"""Type checkers on what users write (typing_usage.py): signatures survive the decorators of the losses.

basedpyright in place of pyright: its wheel needs nothing but PyPI, where pyright's fetches its program from npm.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import replearn_kernels

USAGE = Path(__file__).with_name("typing_usage.py")


def run(*command, cwd=USAGE.parents[1]):
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_says_that_it_is_typed():
    assert Path(replearn_kernels.__file__).with_name("py.typed").exists()


def test_mypy(pytestconfig):
    pytest.importorskip("mypy")
    cache = pytestconfig.cache.mkdir("mypy")
    # Of the library itself no more is checked than what users see of it.
    options = "--follow-imports=silent", "--check-untyped-defs", "--warn-unused-ignores", f"--cache-dir={cache}"
    run("mypy", *options, str(USAGE))


def test_pyright(tmp_path):
    pytest.importorskip("basedpyright")
    config = {
        "include": [str(USAGE)],
        "extraPaths": [str(USAGE.parents[1])],
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": True,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    run("basedpyright", "--project", str(tmp_path), "--pythonpath", sys.executable)
