"""The Triton kernels: in the interpreter on the CPU, as compiled code, and on a GPU.

An fp64 run of the eager formula on the same (rounded) inputs is the truth. The kernels may err as much as the eager
formula in the features' dtype, plus ``tolerance``.
"""

from __future__ import annotations

import os
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from replearn_kernels import info_nce_loss
from replearn_kernels.engine.backends.triton import TritonBackend
from replearn_kernels.engine.counters import count_work
from replearn_kernels.triton_kernels.configs import Config, use_config

INTERPRETED = triton.knobs.runtime.interpret
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in the environment when triton is imported"),
    # exp of a masked entry goes through -inf on purpose, never through NaN.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("error:invalid value encountered:RuntimeWarning"),
]
aot = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="compiles: TRITON_INTERPRET must not be set"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no TRITON_INTERPRET"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Blocks so small that a few dozen rows make several of them: row blocks, regions of two column blocks, steps over d.
SMALL_BLOCKS = Config(16, 16, 16, warps=4, stages=2, column_blocks=2)
ALL_OF_D = Config(16, 32, 0, warps=4, stages=2, column_blocks=2)  # the fused gradient kernel needs a row at once

CASES = {
    "rectangular": {"n": 37, "m": 53, "d": 48},
    "one row": {"n": 1, "m": 1, "d": 1},
    "one feature": {"n": 20, "m": 33, "d": 1},
    "three features": {"n": 17, "m": 18, "d": 3},
    "ragged d": {"n": 33, "m": 40, "d": 100},
    "wide": {"n": 40, "m": 45, "d": 144},
    "symmetric": {"n": 37, "m": 37, "d": 48, "symmetric": True},
    "symmetric wide": {"n": 35, "m": 50, "d": 136, "symmetric": True, "target": "random"},
    "smoothed": {"n": 30, "m": 41, "d": 24, "symmetric": True, "label_smoothing": 0.2},
    "repeated targets": {"n": 40, "m": 20, "d": 16, "target": "random", "symmetric": True},
    "queue": {"n": 20, "m": 24, "d": 32, "queue": 37, "queue_grad": True, "label_smoothing": 0.1},
    "queue, wide, constant": {"n": 20, "m": 24, "d": 130, "queue": 37},
    "own negatives": {"n": 20, "m": 24, "d": 32, "own": 5, "own_grad": True},
    "own negatives, wide": {"n": 20, "m": 24, "d": 130, "own": 5, "symmetric": True},
    "no reduction": {"n": 33, "m": 33, "d": 32, "reduction": "none"},
    "sum": {"n": 33, "m": 33, "d": 32, "reduction": "sum", "symmetric": True},
    "strided": {"n": 33, "m": 40, "d": 32, "strided": True, "symmetric": True},
    "scale 100": {"n": 37, "m": 50, "d": 144, "scale": 100.0, "symmetric": True},
    "scale 1000": {"n": 37, "m": 50, "d": 144, "scale": 1000.0, "symmetric": True},
    "scale 0": {"n": 20, "m": 25, "d": 16, "scale": 0.0, "symmetric": True},
    "negative scale": {"n": 20, "m": 25, "d": 16, "scale": -10.0, "symmetric": True},
    "scale 1000, fused": {"n": 37, "m": 50, "d": 48, "scale": 1000.0, "near": 0.0},
}


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """Relative to the norm: W is rounded once to half precision (2^-8 for bf16, 2^-11 for fp16; the interpreter does
    not round to nearest but towards zero, 2^-7). Similarities formed again in another order differ in their last bits,
    of a logit of up to ``scale``: a GPU adds in the same order in both sweeps, NumPy depends on the blocks."""
    w_rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}[dtype]
    return 1e-6 + w_rounding + 2 * abs(scale) * 2**-24


def make_inputs(n, m, d, dtype, device="cpu", *, queue=0, own=0, strided=False, scale=10.0, near=0.5, **grads):
    """Normalised features, with a key near each query; tensors by name, requiring a gradient where asked."""
    generator = torch.Generator().manual_seed(n + m + d)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    query = normal(n, d)
    key = torch.cat([near * query[: min(n, m)] + normal(min(n, m), d), normal(max(m - n, 0), d)])
    features = {"query": query, "key": key}
    if queue or own:
        features["negatives"] = normal(queue, d) if queue else normal(n, own, d)
    features = {name: F.normalize(x, dim=-1).to(device, dtype) for name, x in features.items()}
    if strided:
        features = {name: torch.cat([x, x], dim=1)[:, :d] for name, x in features.items()}
    inputs = features | {"logit_scale": torch.tensor(scale, device=device)}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != "negatives" or grads.get("queue_grad", grads.get("own_grad", False)))
    return inputs


def evaluate(inputs, backend, *, dtype=None, **options) -> dict[str, torch.Tensor]:
    """The loss and every gradient, by name; with ``dtype``, of the inputs cast to it."""
    leaves = {
        name: (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }
    query, key, scale = leaves["query"], leaves["key"], leaves["logit_scale"]
    loss = info_nce_loss(
        query, key, logit_scale=scale, negatives=leaves.get("negatives"), backend=backend, memory_budget=0, **options
    )
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    loss.backward(upstream)
    return {"loss": loss.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def split(case: dict, device="cpu") -> tuple[dict, dict]:
    """A case as (arguments of make_inputs, arguments of the loss)."""
    options = {k: case[k] for k in ("symmetric", "label_smoothing", "reduction") if k in case}
    if case.get("target") == "random":
        generator = torch.Generator().manual_seed(0)
        options["target"] = torch.randint(case["m"], (case["n"],), generator=generator).to(device)
    return {k: v for k, v in case.items() if k not in (*options, "target")}, options


def relative_error(value: torch.Tensor, truth: torch.Tensor, size: float = 0.0) -> float:
    """The norm of the error over the norm of the truth, or over ``size`` if that is larger."""
    return ((value.double() - truth).norm() / max(truth.norm().item(), size, 1e-30)).item()


def sizes_before_cancellation(truth: dict[str, torch.Tensor], scale: float) -> dict[str, float]:
    """The scale's gradient, ``sum_i <x_i, dL/dx_i> / scale`` with unit x_i, is a sum of both signs."""
    return {"logit_scale": (truth["query"].norm(dim=1).sum() / abs(scale)).item() if scale else 0.0}


def check(case: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    shape, options = split(case, device)
    inputs = make_inputs(**shape, dtype=dtype, device=device)
    truth = evaluate(inputs, "eager", dtype=torch.float64, **options)
    eager = evaluate(inputs, "eager", **options)
    fused = evaluate(inputs, "triton", **options)
    assert fused.keys() == truth.keys()
    scale = shape.get("scale", 10.0)
    sizes = sizes_before_cancellation(truth, scale)
    for name, expected in truth.items():
        assert fused[name].dtype == eager[name].dtype and fused[name].shape == expected.shape
        error, allowed = (relative_error(values[name], expected, sizes.get(name, 0.0)) for values in (fused, eager))
        assert error <= allowed + tolerance(dtype, scale), name


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a small problem has several of, in both directions."""
    monkeypatch.setattr(TritonBackend, "tile_shape", staticmethod(lambda sweep, query: (32, 16)))


def blocks_for(case: dict) -> Config:
    return ALL_OF_D if case["d"] <= 128 else SMALL_BLOCKS


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_values_and_gradients(self, case, dtype):
        with use_config(blocks_for(case)):
            check(case, dtype)

    @pytest.mark.parametrize("name", ["symmetric", "symmetric wide", "queue", "own negatives, wide"])
    def test_several_tiles(self, name, small_tiles):
        with use_config(blocks_for(CASES[name])):
            check(CASES[name], torch.float32)

    @pytest.mark.parametrize("name", ["symmetric", "wide"])
    def test_shipped_blocks(self, name):
        check(CASES[name], torch.float16)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_same_as_torch_backend(self, dtype):
        shape, options = split(CASES["symmetric wide"])
        inputs = make_inputs(**shape, dtype=dtype)
        fused, plain = (evaluate(inputs, backend, **options) for backend in ("triton", "torch"))
        for name, value in plain.items():
            assert relative_error(fused[name], value.double()) <= 2 * tolerance(dtype, 10.0), name

    @pytest.mark.parametrize("name", ["symmetric", "symmetric wide"])
    def test_deterministic(self, name, small_tiles):
        shape, options = split(CASES[name])
        inputs = make_inputs(**shape, dtype=torch.float16)
        with use_config(blocks_for(CASES[name])):
            first, second = (evaluate(inputs, "triton", **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("d", [32, 144])
    def test_perfect_match_at_scale_1000(self, d):
        """The positive is the largest logit, and all others underflow: the loss is 0, not the rounding of 1000."""
        query = torch.eye(32, d)
        inputs = {"query": query, "key": query.clone(), "logit_scale": torch.tensor(1000.0)}
        for tensor in inputs.values():
            tensor.requires_grad_()
        result = evaluate(inputs, "triton", symmetric=True)
        assert result["loss"] == 0
        assert all(result[name].count_nonzero() == 0 for name in inputs)

    def test_counted_work(self):
        """Products as designed: 1 for statistics, then 3 with W in memory, or 2 x 2 fused."""
        for d, units in ((144, 4), (32, 5)):
            inputs = make_inputs(32, 32, d, torch.float32)
            with count_work() as work:
                evaluate(inputs, "triton", symmetric=True)
            assert work.units(32, 32, d) == units

    def test_no_columns_of_statistics_without_symmetric(self):
        inputs = make_inputs(64, 64, 32, torch.float32)
        workspaces = []
        for symmetric in (False, True):
            with count_work() as work:
                evaluate(inputs, "triton", symmetric=symmetric)
            workspaces.append(work.workspace_bytes)
        assert workspaces[0] < workspaces[1]


class TestCompiled:
    pytestmark = aot

    @pytest.fixture
    def resources(self):
        return pytest.importorskip("bench.triton_resources")

    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
    @pytest.mark.parametrize("kernel", ["statistics", "weights ragged", "gradient transposed"])
    def test_no_spills_and_fits(self, resources, kernel, target):
        row = resources.measure(resources.Case(kernel, "bf16", target))
        assert not row.problems()
        committed = {row.case: row for row in resources.load()}[row.case]
        assert row.config == committed.config, "the table is out of date: run python -m bench.triton_resources"
        if row.triton == committed.triton:
            assert (row.registers, row.shared_bytes) == (committed.registers, committed.shared_bytes)

    def test_portable(self, resources):
        assert resources.measure(resources.Case("weights", "bf16", "gfx942")).matrix

    def test_table_is_complete_and_clean(self, resources):
        rows = resources.load()
        assert [row.case for row in rows] == resources.cases()
        assert [problem for row in rows for problem in row.problems()] == []


class TestGPU:
    pytestmark = gpu

    LARGE: ClassVar = {
        "clip": {"n": 1111, "m": 1111, "d": 640, "symmetric": True, "scale": 100.0},
        "clip, fused": {"n": 1000, "m": 1000, "d": 128, "symmetric": True, "scale": 100.0},
        "wide": {"n": 300, "m": 700, "d": 1152, "label_smoothing": 0.1, "symmetric": True},
        "queue": {"n": 257, "m": 300, "d": 512, "queue": 5000, "queue_grad": True},
    }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", (CASES | LARGE).values(), ids=(CASES | LARGE).keys())
    def test_values_and_gradients(self, case, dtype):
        check(case, dtype, "cuda")

    @pytest.mark.parametrize("name", ["clip", "clip, fused"])
    def test_deterministic(self, name):
        shape, options = split(self.LARGE[name], "cuda")
        inputs = make_inputs(**shape, dtype=torch.bfloat16, device="cuda")
        first, second = (evaluate(inputs, "triton", **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("d", [128, 512])
    def test_memory(self, d):
        """8192 x 8192 similarities would take 256 MiB in fp32. W takes 32 MiB, gradients and their fp32 sums 48."""
        n = 8192
        inputs = make_inputs(n, n, d, torch.bfloat16, "cuda")
        evaluate(inputs, "triton", symmetric=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        evaluate(inputs, "triton", symmetric=True)
        assert torch.cuda.max_memory_allocated() - before < n * n * 4 // 2

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("d", [48, 128, 640])
    def test_both_sweeps_form_the_same_similarities(self, d, dtype):
        """Every kernel adds along d in the same order. If one did not, P - 1 would be off by 1000 roundings here."""
        inputs = make_inputs(300, 300, d, dtype, "cuda", scale=1000.0)
        inputs["key"] = inputs["query"].detach().clone().requires_grad_()
        result = evaluate(inputs, "triton", symmetric=True)
        assert result["loss"] == 0
        assert all(result[name].count_nonzero() == 0 for name in ("query", "key"))

    def test_tf32_follows_the_setting(self):
        before = torch.get_float32_matmul_precision()
        inputs = make_inputs(256, 256, 512, torch.float32, "cuda")
        truth = evaluate(inputs, "eager", dtype=torch.float64)["query"]
        errors = []
        try:
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                errors.append(relative_error(evaluate(inputs, "triton")["query"], truth))
        finally:
            torch.set_float32_matmul_precision(before)
        assert errors[0] < 1e-5 < errors[1] < 1e-2

    @pytest.mark.skipif(os.environ.get("REPLEARN_KERNELS_TUNE") != "1", reason="set REPLEARN_KERNELS_TUNE=1")
    def test_tuned(self):
        check(self.LARGE["clip, fused"], torch.bfloat16, "cuda")
