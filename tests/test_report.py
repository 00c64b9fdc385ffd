"""``python -m replearn_kernels``, and the version."""

import importlib.metadata
import platform
import subprocess
import sys
import warnings

import torch

import replearn_kernels
from replearn_kernels.__main__ import facts
from replearn_kernels.engine import native
from replearn_kernels.engine.backends import resolve_backend


def test_the_version_is_the_packages():
    assert replearn_kernels.__version__ == importlib.metadata.version("replearn-kernels")


def test_what_a_bug_report_needs():
    result = subprocess.run([sys.executable, "-m", "replearn_kernels"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    report = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert report["replearn_kernels"].startswith(replearn_kernels.__version__)
    assert report["python"].startswith(platform.python_version())
    assert report["torch"].startswith(torch.__version__)
    automatic = resolve_backend("auto", torch.device("cpu"), torch.float32)
    assert report['"auto" takes, for CPU tensors'].startswith(automatic)
    assert '"auto" takes, for GPU tensors' in report and "GPU" in report and "triton" in report
    if native.available():
        assert report["backend cpp"] == f"available, {torch.ops.replearn_kernels.instruction_set()}"


def test_what_is_missing_and_why(monkeypatch):
    monkeypatch.setattr(native, "_missing", "it was not built: no working C++ compiler was found at installation")
    monkeypatch.setattr(native, "_missing_cuda", "_native_cuda.abi3.so could not be loaded")
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton fails
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = dict(facts())
    assert report["backend cpp"].startswith("it was not built")
    assert report["mine_triplets on a GPU"] == "torch: _native_cuda.abi3.so could not be loaded"
    assert report["triton"].startswith("none: ModuleNotFoundError")
    assert report["backend triton"].startswith("missing: backend='triton' needs the triton package")
    assert report['"auto" takes, for CPU tensors'] == "torch (fp64: torch)"
    assert report['"auto" takes, for GPU tensors'] == "torch (fp64: torch)"
