"""Which machines the GPU report refuses, and what it says of the others."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench.gpu_machine import at_least, compiled_libraries, driver, why_not
from replearn_kernels.engine import native

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_report.sh"


@pytest.mark.parametrize(
    "version, enough", [("2.10.0", True), ("2.11.0+cu130", True), ("3.0.0a0", True), ("2.9.1+cpu", False)]
)
def test_versions(version, enough):
    assert at_least(version, (2, 10)) == enough


def test_refusals(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not() is None
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "2.9.1")
        assert why_not() == "torch >= 2.10 is needed, found 2.9.1"
    with monkeypatch.context() as changed:
        changed.setattr(triton, "__version__", "3.5.1")
        assert why_not() == "triton >= 3.6 is needed, found 3.5.1"
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "triton", None)  # import triton fails
        assert "triton is not installed" in why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in why_not()


def test_what_is_left_out_without_compiled_libraries(monkeypatch):
    monkeypatch.setattr(native, "_missing", "it was not built")
    monkeypatch.setattr(native, "_missing_cuda", "it was not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_libraries().endswith(
            "no C++ kernels, so no CPU backend cpp; no CUDA kernels of mine_triplets, which is then not timed on a GPU"
        )
    monkeypatch.setattr(native, "_missing_cuda", None)
    monkeypatch.setattr(native, "_missing", None)
    assert ";" not in compiled_libraries()


def test_a_machine_without_the_driver(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert driver() == "unknown: nvidia-smi does not tell"


def test_the_script_says_why_it_does_not_start(tmp_path):
    def told(*options, **environment):
        command = ["bash", SCRIPT, "--output", tmp_path / "report", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and not (tmp_path / "report").exists()
        return done.stderr

    path = "/usr/bin:/bin"
    assert "gpu_report: /nowhere is no Python >= 3.10" in told(PYTHON="/nowhere", PATH=path)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    assert "has no torch; set PYTHON" in told(PYTHON=str(bare), PATH=path)
    if not torch.cuda.is_available():
        assert "gpu_report: this machine cannot run the report" in told(PYTHON=sys.executable, PATH=path)


def test_facts_of_a_rehearsal():
    command = [sys.executable, "-m", "bench.gpu_machine", "--dry"]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["torch"].startswith(torch.__version__) and "no results" in facts["GPU"] and facts["Python"]
