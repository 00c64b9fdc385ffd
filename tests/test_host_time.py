"""The host's part of a GPU step without a GPU: launches reach Triton's own launcher (bench/host_time.py)."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.host_time import build

ROOT = Path(__file__).parents[1]
PLAIN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_every_loss_has_a_time(tmp_path):
    command = [sys.executable, "-m", "bench.host_time", "--rounds", "5", "--output", tmp_path / "times.csv"]
    subprocess.run(command, cwd=ROOT, env=PLAIN, check=True, stdout=subprocess.DEVNULL)
    with (tmp_path / "times.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["clip", "siglip", "nt_xent", "clip of 16 tiles"]
    for row in rows:
        assert 0 < float(row["us_least"]) <= float(row["us_median"])
        assert float(row["us_least"]) < 0.8 * float(row["us_first"])


def test_programs_launch_what_calls_launch(tmp_path):
    folder = str(tmp_path)
    build(tmp_path)
    environment = PLAIN | {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, ROOT / "tests" / "launches_of_programs.py"], env=environment, check=True)
