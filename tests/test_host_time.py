"""The host's part of a GPU step, measured without a GPU: launches reach Triton's own launcher (bench/host_time.py)."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_every_loss_has_a_time(tmp_path):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host_time", "--rounds", "5", "--output", tmp_path / "times.csv"]
    subprocess.run(command, cwd=ROOT, env=plain, check=True, stdout=subprocess.DEVNULL)
    with (tmp_path / "times.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["clip", "siglip", "nt_xent"]
    for row in rows:
        assert 0 < float(row["us_least_without_launches"]) < float(row["us_least"]) <= float(row["us_median"])
