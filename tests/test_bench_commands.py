"""`python -m bench`: what is refused as a measurement of ours, and where figures go."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS, options
from bench.cases import CASES
from bench.commands import refuse_fallback, run, targets
from bench.harness import Point, implementations, why_fallback
from bench.results import load
from replearn_kernels.engine import native

ROOT = Path(__file__).parents[1]
NOT_BUILT = "it was not built: no compiler"
SHORT = {"n": [16], "d": [8], "rounds": 1, "seconds": 0.0, "compiled": False, "memory": False}


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "_missing", NOT_BUILT)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "cpp" in case.backends])
def test_the_fallback_is_not_measured_as_ours(case, without_native):
    with pytest.raises(SystemExit, match=f"{case} is not measured: .* plain PyTorch .*{NOT_BUILT}.* --backend torch"):
        refuse_fallback(CASES[case], Point(16, 8, "fp32", "cpu"), implementations(CASES[case]))


def test_nothing_is_written_unless_the_fallback_is_asked_for_by_name(without_native, tmp_path):
    with pytest.raises(SystemExit, match="not measured"):
        run(["clip"], **SHORT, output=tmp_path)
    with pytest.raises(SystemExit, match="not measured"):
        targets(["clip"], rounds=1, seconds=0.0, output=tmp_path)
    assert not list(tmp_path.iterdir())
    run(["clip"], **SHORT, backend=["torch"], implementation=["ours[torch]"], output=tmp_path)
    assert [row["implementation"] for row in load(tmp_path)] == ["ours[torch]"]


def test_what_needs_no_kernels_is_measured(without_native):
    assert why_fallback(CASES["dino_head"], Point(64, 256, "fp32", "cpu")) is None


def test_on_a_gpu(monkeypatch):
    """No GPU is asked: what counts is what is installed."""
    clip, mining = CASES["clip"], CASES["mining"]
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton fails
    assert "needs the triton package" in why_fallback(clip, Point(16, 8, "bf16", "cuda"))
    assert why_fallback(clip, Point(16, 8, "fp64", "cuda")) is None  # "auto" takes torch for it wherever it runs
    monkeypatch.setattr(native, "_missing_cuda", NOT_BUILT)
    assert f"CUDA kernels are not available: {NOT_BUILT}" in why_fallback(mining, Point(16, 8, "fp32", "cuda"))
    monkeypatch.setattr(native, "_missing_cuda", None)
    assert why_fallback(mining, Point(16, 8, "fp32", "cuda")) is None


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_figures_go_where_git_does_not_look():
    places = [options(command)["output"][2] for command in COMMANDS]
    assert len(set(places)) == 1
    for place in (places[0], places[0] / "gpu"):
        ignored = subprocess.run(["git", "check-ignore", "-q", place / "loss_clip_cpu.csv"], cwd=ROOT)
        assert ignored.returncode == 0, f"git looks at {place}"


def failing_at(n):
    """CLIP, ours failing at N rows."""

    ours = CASES["clip"].ours["ours"]

    def loss(**inputs):
        if len(inputs["image_features"]) == n:
            raise RuntimeError("no such kernel\nand more of it")
        return ours(**inputs)

    return replace(CASES["clip"], ours={"ours": loss})


def test_a_run_goes_on_where_ours_fails_if_it_is_told_to(monkeypatch, tmp_path):
    monkeypatch.setitem(CASES, "clip", failing_at(16))
    options = SHORT | {"n": [16, 32], "backend": ["torch"], "implementation": ["ours[torch]"]}
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(["clip"], **options, output=tmp_path)
    assert load(tmp_path) == []
    with pytest.raises(SystemExit, match="1"):
        run(["clip"], **options, keep_going=True, output=tmp_path)
    rows = [(row["n"], row["error"], bool(row["round_ms"])) for row in load(tmp_path)]
    assert rows == [(16, "RuntimeError: no such kernel", False), (32, "", True)]


def test_each_point_is_on_disk_before_the_next_one(monkeypatch, tmp_path):
    monkeypatch.setitem(CASES, "clip", failing_at(32))
    with pytest.raises(RuntimeError):
        run(["clip"], **SHORT | {"n": [16, 32]}, backend=["torch"], implementation=["ours[torch]"], output=tmp_path)
    assert [row["n"] for row in load(tmp_path)] == [16]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_loss_is_no_rival(monkeypatch, tmp_path, dtype):
    """In half precision a formula may lose all digits, which its row says; otherwise it would be a mistake."""
    ours = CASES["clip"].ours["ours"]
    other = {"open_clip": lambda **inputs: 2 * ours(**inputs)}
    monkeypatch.setitem(CASES, "clip", replace(CASES["clip"], dense=other, chunked={}, products={}))
    options = SHORT | {"dtype": [dtype], "backend": ["torch"]}
    if dtype == "fp32":
        with pytest.raises(RuntimeError, match="implementations disagree: ours.torch. gives .*eager_open_clip gives"):
            run(["clip"], **options, output=tmp_path)
        return
    run(["clip"], **options, output=tmp_path)
    timed = {row["implementation"]: (bool(row["round_ms"]), row["error"][:12]) for row in load(tmp_path)}
    assert timed.pop("eager_open_clip") == (False, "another loss")
    assert timed == dict.fromkeys(["ours[torch]", "ours_budget_0[torch]"], (True, ""))
