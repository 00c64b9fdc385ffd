"""The Triton kernels of InfoNCE and CLIP in the interpreter and on a GPU; what all kernels compile to.

The other losses' are in test_triton_family.py; how values are compared, in triton_harness.py.
"""

from __future__ import annotations

import itertools
import os
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from triton_harness import DTYPES, aot, blocks_for, gpu, interpreter, relative_error, tolerance
from triton_harness import check as check_loss
from triton_harness import evaluate as evaluate_loss

from bench import triton_variants
from replearn_kernels import info_nce_loss
from replearn_kernels.engine.counters import count_work
from replearn_kernels.triton_kernels.configs import use_config

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
    "MoCo": {"n": 20, "m": 20, "d": 32, "queue": 37, "batch_negatives": False, "label_smoothing": 0.1},
    "MoCo, own negatives": {"n": 20, "m": 20, "d": 130, "own": 5, "own_grad": True, "batch_negatives": False},
    "no reduction": {"n": 33, "m": 33, "d": 32, "reduction": "none"},
    "sum": {"n": 33, "m": 33, "d": 32, "reduction": "sum", "symmetric": True},
    "strided": {"n": 33, "m": 40, "d": 32, "strided": True, "symmetric": True},
    "scale 100": {"n": 37, "m": 50, "d": 144, "scale": 100.0, "symmetric": True},
    "scale 1000": {"n": 37, "m": 50, "d": 144, "scale": 1000.0, "symmetric": True},
    "scale 0": {"n": 20, "m": 25, "d": 16, "scale": 0.0, "symmetric": True},
    "negative scale": {"n": 20, "m": 25, "d": 16, "scale": -10.0, "symmetric": True},
    "scale 1000, fused": {"n": 37, "m": 50, "d": 48, "scale": 1000.0, "near": 0.0},
}


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


def loss_of(leaves, backend, **options) -> torch.Tensor:
    return info_nce_loss(
        leaves["query"], leaves["key"], logit_scale=leaves["logit_scale"], negatives=leaves.get("negatives"),
        backend=backend, **({"memory_budget": 0} | options),
    )  # fmt: skip


def evaluate(inputs, backend, *, dtype=None, **options) -> dict[str, torch.Tensor]:
    """The loss and every gradient, by name."""
    return evaluate_loss(partial(loss_of, **options), inputs, backend, dtype)


def split(case: dict, device="cpu") -> tuple[dict, dict]:
    """A case as (arguments of make_inputs, arguments of the loss)."""
    options = {k: case[k] for k in ("symmetric", "label_smoothing", "reduction", "batch_negatives") if k in case}
    if case.get("target") == "random":
        generator = torch.Generator().manual_seed(0)
        options["target"] = torch.randint(case["m"], (case["n"],), generator=generator).to(device)
    return {k: v for k, v in case.items() if k not in (*options, "target")}, options


def sizes_before_cancellation(truth: dict[str, torch.Tensor], scale: float) -> dict[str, float]:
    """The scale's gradient, ``sum_i <x_i, dL/dx_i> / scale`` with unit x_i, is a sum of both signs."""
    return {"logit_scale": (truth["query"].norm(dim=1).sum() / abs(scale)).item() if scale else 0.0}


def check(case: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    shape, options = split(case, device)
    inputs, scale = make_inputs(**shape, dtype=dtype, device=device), shape.get("scale", 10.0)
    sizes_of = partial(sizes_before_cancellation, scale=scale)
    check_loss(partial(loss_of, **options), inputs, dtype, scale, sizes_of)


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_values_and_gradients(self, case, dtype):
        with use_config(blocks_for(case["d"])):
            check(case, dtype)

    @pytest.mark.parametrize("name", ["symmetric", "symmetric wide", "queue", "own negatives, wide"])
    def test_several_tiles(self, name, small_tiles):
        with use_config(blocks_for(CASES[name]["d"])):
            check(CASES[name], torch.float32)

    @pytest.mark.parametrize("name", ["symmetric", "wide"])
    def test_shipped_blocks(self, name):
        check(CASES[name], torch.float16)

    def test_compiles(self):
        """What is asked of Triton on the way is none of the graph's business."""
        torch._dynamo.reset()
        step = partial(info_nce_loss, logit_scale=3.0, symmetric=True, backend="triton")
        x = torch.randn(6, 16)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x.flip(0)), step(x, x.flip(0)))

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
        with use_config(blocks_for(CASES[name]["d"])):
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

    KERNELS: ClassVar = (
        "statistics", "weights", "gradient", "begin", "sums", "finish", "combine", "total", "outputs",
        "gluon sums", "gluon weights", "gluon gradient",
    )  # fmt: skip

    def test_table_is_of_these_kernels(self, resources):
        """Of what they are compiled from, to the last of the functions that they call."""
        stale = [row.case for row in resources.load() if row.source != resources.source_of(row.case)]
        assert not stale, "the table is out of date: run python -m bench.triton_resources --missing"

    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_no_spills_and_fits(self, resources, kernel, target):
        """Compiled anew: of each kernel the variant that is closest to spilling; of a Triton that the table is not of,
        that of each epilogue."""
        rows = [row for row in resources.load() if self.is_of(row, kernel, target)]
        of_this_triton = all(row.triton == resources.triton.__version__ for row in rows)
        closest: dict[str, resources.Row] = {}
        for row in rows:
            epilogue = "any" if of_this_triton else resources.epilogue_name(row.variant)
            closest[epilogue] = max(closest.get(epilogue, row), row, key=lambda row: row.registers)
        assert closest or target not in {row.target for row in resources.load() if row.kernel.startswith(kernel)}
        for committed in closest.values():
            row = resources.measure(committed.case)
            assert row.problems() == committed.problems()
            assert row.config == committed.config
            if of_this_triton:
                assert (row.registers, row.shared_bytes) == (committed.registers, committed.shared_bytes)

    @staticmethod
    def is_of(row, kernel: str, target: str) -> bool:
        return row.kernel.startswith(kernel) and row.product == "bf16" and row.target == target

    def test_kernels_take_flat_tuples_of_numbers(self, resources):
        """Triton 3.6 loses constants (None, 1, a constexpr) of a tuple in a tuple; its interpreter refuses bools."""
        with resources.launching(resources.TARGETS["sm_90"]) as launches:
            for variant in resources.VARIANTS.values():
                for kernel in variant.kernels("bf16", "sm_90"):
                    resources.launch(variant, kernel, torch.bfloat16)
            for kernel in resources.OUTPUTS:
                resources.launch(None, kernel, torch.bfloat16)
        tuples = [arg for _, args, _ in launches for arg in args if isinstance(arg, tuple)]
        assert len({kernel for kernel, *_ in launches}) == 18
        for value in itertools.chain(*tuples):
            assert not isinstance(value, (tuple, bool, resources.triton.language.constexpr))

    @pytest.mark.parametrize("kernel, d", [("statistics", 1), ("weights", 512)])
    @pytest.mark.parametrize("variant, roots", [("batch_all", True), ("batch_all squared", False)])
    def test_no_root_of_squares(self, resources, variant, roots, kernel, d):
        """One feature: strides and widths of 1 are constants, too."""
        with resources.compiling(resources.TARGETS["sm_90"]) as compiled:
            resources.launch(resources.VARIANTS[variant], kernel, torch.bfloat16, d)
        assert ("sqrt" in compiled[0][0].asm["ttir"]) == roots

    def test_one_row(self, resources, monkeypatch):
        """An integer of 1 is a constant to the compiler, which then is asked for its maximum, its dtype, ..."""
        monkeypatch.setattr(triton_variants, "EVEN", (1, 1))
        cases = [(None, kernel) for kernel in resources.OUTPUTS]
        for name in ("softmax symmetric", "sup_con", "sigmoid", "circle", "hard_negatives"):
            kernels = {"begin", "sums", "finish", "combine", "total", "add rows", "weights apart"}
            kernels |= {"gluon sums", "gluon finish", "gluon weights", "gluon gradient", "shares", "ranges"}
            kernels |= {"statistics", "weights"} if resources.VARIANTS[name].loss else set()
            variant = resources.VARIANTS[name]
            cases += [(variant, kernel) for kernel in variant.kernels("bf16", "sm_90") if kernel in kernels]
        with resources.compiling(resources.TARGETS["sm_90"]) as compiled:
            for variant, kernel in cases:
                resources.launch(variant, kernel, torch.bfloat16, 16)
        assert len(compiled) >= len(cases)

    def test_portable(self, resources):
        assert resources.measure(resources.Case("sup_con", "weights", "bf16", "gfx942")).matrix

    # (rows, most instructions) of kernels that are held to 128 registers, so that a multiprocessor has room for two
    # programs, which is faster though they spill (configs.py has the times); of kernels in Gluon, nearly all in the
    # loop of the diagonal's blocks, or where blocks have positives (SupCon's sums); and how many others spill.
    SPILLING: ClassVar = {
        "triton_resources": ({"sums": (11, 154), "weights": (35, 197), "gluon": (12, 1747)}, 5),
        "triton_3_6_resources": ({"sums": (6, 32), "weights": (20, 461), "gluon": (18, 1506)}, 24),
    }

    @pytest.mark.parametrize("name", SPILLING)
    def test_table_is_complete_and_clean(self, resources, name):
        """The block sizes are the largest that do not spill under Triton 3.9, but where registers are bounded and in
        Gluon, and of the margin's W on sm_80, by 4 instructions at most. Under 3.6 a few others spill, and nothing else
        is wrong."""
        rows = resources.load(resources.RESULTS.with_name(f"{name}.csv"))
        assert [row.case for row in rows] == resources.cases()
        problems = [problem for row in rows for problem in row.problems()]
        assert all(problem.endswith("instructions spill registers") for problem in problems)
        bounded = [row for row in rows if "registers at most" in row.config]
        assert all(row.programs() == 2 for row in bounded)
        expected = [*bounded, *(row for row in rows if row.kernel.startswith("gluon"))]
        spills = {
            kernel: [row.spills for row in expected if row.spills and row.kernel.startswith(kernel)]
            for kernel in ("sums", "weights", "gluon")
        }
        found = {kernel: (len(of_kernel), max(of_kernel)) for kernel, of_kernel in spills.items()}
        others = len(problems) - sum(map(len, spills.values()))
        assert (found, others) == self.SPILLING[name]


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
        """16,384 x 16,384 similarities would take 1 GiB in fp32. W takes the budget, or 32 MiB; gradients and their
        fp32 sums at most 96."""
        n, mib = 16384, 2**20
        inputs = make_inputs(n, n, d, torch.bfloat16, "cuda")
        for budget, w in ((0, 32 * mib), (100 * mib, 100 * mib), (256 * mib, 256 * mib)):
            options = {"symmetric": True, "memory_budget": budget}
            evaluate(inputs, "triton", **options)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            evaluate(inputs, "triton", **options)
            assert torch.cuda.max_memory_allocated() - before < w + 150 * mib

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
