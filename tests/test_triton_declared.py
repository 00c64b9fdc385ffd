"""Declared losses on Triton's skeletons: in the interpreter against fp64, and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from declared_cases import CASES, Clip, Contrastive, Graded, inputs_of, leaves_of, value_and_gradients
from hardest_toys import Scaled, Shifted, Violation
from learned_toys import Steep
from metric_cases import LABELS
from test_declare_expressions import Random
from triton_harness import DTYPES, SMALL_BLOCKS, aot, blocks_for, gpu, interpreter, relative_error, tolerance

from bench.triton_resources import Case, measure
from bench.triton_variants import VARIANTS, Variant
from replearn_kernels.declare import PairLoss, fuse, logsumexp, total
from replearn_kernels.declare.objective import objective_of
from replearn_kernels.triton_kernels.configs import use_config

EIGHTS = LABELS["eights"]
SIZES = {"ragged": (33, 48), "wide": (37, 144), "one feature": (18, 1), "one row": (1, 3), "two rows": (2, 100)}


def check(case, inputs, allowed: float, **options) -> None:
    """No further from fp64 than eager in the features' dtype, plus what is ``allowed``."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact = value_and_gradients(case.call, wide, case, backend="eager", **options)
    eager = value_and_gradients(case.call, inputs, case, backend="eager", **options)
    fused = value_and_gradients(case.call, inputs, case, backend="triton", **options)
    for value, by_eager, truth in zip(fused, eager, exact, strict=True):
        assert value.dtype == by_eager.dtype
        if not truth.isfinite().all():
            assert torch.equal(value.double().nan_to_num(), truth.nan_to_num())
            continue
        size = 1.0 if truth.ndim == 0 else 0.0  # sums of both signs: a scale's gradient, a loss
        assert relative_error(value, truth, size) <= relative_error(by_eager, truth, size) + allowed


@dataclass(frozen=True)
class Offered(PairLoss):
    """Two values of rows, two of columns, and a guide."""

    scaled, symmetric, guide = True, True, "product"
    row_values, column_values = ("weight", "threshold"), ("price", "bonus")

    def terms(self, logit, pair):
        return {
            "every": logsumexp(logit + pair.column.bonus, where=pair.target | (pair.guide > pair.row.threshold)),
            "own": total(logit * pair.column.price, where=pair.target),
        }

    def loss(self, row, column):
        return row.weight * (row.every - row.own) + column.price * column.every


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("name", CASES)
    def test_several_tiles(self, name, small_tiles):
        with use_config(blocks_for(20)):
            check(CASES[name], inputs_of(45, 20, EIGHTS(45), dtype=torch.float32), 2e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_half_precision(self, name, dtype):
        with use_config(blocks_for(20)):
            check(CASES[name], inputs_of(37, 20, EIGHTS(37), dtype=dtype), 2 * tolerance(dtype, 80.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_more_keys_than_queries(self, dtype, small_tiles):
        """Two values of each, and features of the guide of a width that no vector loads fit."""
        generator = torch.Generator().manual_seed(0)
        x, y, of_x, of_y = (torch.randn(n, d, generator=generator) for n, d in ((19, 20), (45, 20), (19, 7), (45, 7)))
        rows, columns = ({name: torch.rand(n, generator=generator) for name in names} for n, names in (
            (19, ("weight", "threshold")), (45, ("price", "bonus"))
        ))  # fmt: skip
        results = {}
        for backend in ("triton", "eager", "exact"):
            kind = torch.float64 if backend == "exact" else dtype
            leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, y)]
            guides = {"row_guide": of_x.to(dtype).to(kind), "column_guide": of_y.to(dtype).to(kind)}
            loss = fuse(Offered(), backend="eager" if backend == "exact" else backend)
            with use_config(blocks_for(20)):
                value = loss(*leaves, 2.0, row_values=rows, column_values=columns, **guides)
                results[backend] = [value.detach(), *torch.autograd.grad(value, leaves)]
        for ours, eager, exact in zip(*results.values()):
            assert relative_error(ours, exact) <= relative_error(eager, exact) + 2 * tolerance(dtype, 2.0)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", ["circle", "debiased", "multi_positive", "toy contrastive", "toy squares"])
    def test_sizes(self, name, size):
        n, d = SIZES[size]
        with use_config(blocks_for(d)):
            check(CASES[name], inputs_of(n, d, EIGHTS(n), dtype=torch.float32), 4e-6, reduction="sum")

    @pytest.mark.parametrize("labels", LABELS)
    @pytest.mark.parametrize("name", ["circle", "multi_similarity", "toy contrastive, plain", "toy siglip by group"])
    def test_labels(self, name, labels):
        """Rows without a positive or a negative among them."""
        with use_config(SMALL_BLOCKS):
            check(CASES[name], inputs_of(21, 16, LABELS[labels](21), dtype=torch.float32), 1e-5, reduction="none")

    @pytest.mark.parametrize("scale", [1000.0, 0.0, -20.0])
    @pytest.mark.parametrize("name", ["toy clip", "toy siglip", "hard_negative", "multi_positive"])
    def test_scales(self, name, scale):
        inputs = inputs_of(30, 16, EIGHTS(30), scale=scale, dtype=torch.float32)
        with use_config(blocks_for(16)):
            check(CASES[name], inputs, tolerance(torch.float32, 3 * scale))

    @pytest.mark.parametrize("seed", range(12))
    def test_random_losses(self, seed):
        x, y, labels, scale = inputs_of(35, 16, LABELS["pairs"](35), dtype=torch.float32)
        results = {}
        with use_config(blocks_for(16)):
            for backend, dtype in (("eager", torch.float64), ("triton", torch.float32)):
                leaves = [t.to(dtype).requires_grad_() for t in (x, y, scale)]
                value = fuse(Random(seed), backend=backend)(*leaves, query_group=labels, key_group=labels)
                results[backend] = [value.detach(), *torch.autograd.grad(value, leaves)]
        for value, truth in zip(results["triton"], results["eager"]):
            assert relative_error(value, truth, 0.1) <= 2e-5

    def test_what_is_not_finite_is_seen(self):
        for name in ("circle", "toy clip", "toy siglip", "toy contrastive", "toy squares", "vse", "toy hard triplets"):
            x, y, labels, scale = inputs_of(20, 16, EIGHTS(20), dtype=torch.float32)
            x[3, 1] = math.nan
            with use_config(SMALL_BLOCKS):
                assert CASES[name].call(x, y, labels, scale, backend="triton").isnan(), name

    def test_of_equal_pairs_the_first_has_the_gradient(self, small_tiles):
        """In a block, among blocks, and among tiles; of rows as of columns."""
        x, y = torch.ones(70, 16), torch.ones(70, 16) / 16
        y[[11, 12, 40, 69]] *= 2
        leaves = [t.requires_grad_() for t in (x, y)]
        with use_config(SMALL_BLOCKS):
            loss = fuse(Violation(), backend="triton", reduction="sum")(*leaves, 1.0)
            of_rows, of_keys = torch.autograd.grad(loss, leaves)
        expected = torch.autograd.grad(fuse(Violation(), backend="eager", reduction="sum")(*leaves, 1.0), leaves)
        torch.testing.assert_close(of_rows, expected[0])
        torch.testing.assert_close(of_keys, expected[1])
        assert of_keys[11].abs().sum() > 20 * of_keys[12].abs().sum()

    @pytest.mark.parametrize("power", [0.0, 1.5])
    def test_a_pair_that_is_nan_and_a_factor_of_0(self, power, small_tiles):
        """Which pair has the gradient is what the formula says."""
        x, labels = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
        shift = {"shift": torch.zeros(40).index_fill(0, torch.tensor([4, 34]), math.nan)}
        results = {}
        for backend in ("triton", "eager"):
            learned, leaf = torch.tensor(power, requires_grad=True), x.clone().requires_grad_()
            with use_config(SMALL_BLOCKS):
                losses = fuse(Shifted(learned), backend=backend, reduction="none")(leaf, labels, row_values=shift)
                losses = torch.cat([losses, fuse(Scaled(learned), backend=backend, reduction="none")(leaf, leaf)])
                results[backend] = [losses.detach(), *torch.autograd.grad(losses.sum(), (leaf, learned))]
        assert results["triton"][0].isnan().any()
        for ours, expected in zip(*results.values()):
            torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)

    def test_parameters_are_no_part_of_the_kernels(self):
        first, second = (objective_of(Contrastive(margin))(False, [margin]).epilogue for margin in (0.3, 0.5))
        assert first is second


def test_the_text_of_clip_is_pinned():
    """What kernels are printed as changes by intent alone."""
    text = fuse(Clip()).source("triton").split('"""', 2)[2]
    assert text == PINNED


class TestCompiled:
    pytestmark = aot

    @pytest.mark.parametrize("kernel", ["statistics", "weights"])
    def test_terms_seen_from_either_side_spill_nothing(self, kernel, monkeypatch):
        variant = Variant("declared_large", groups=True, columns=True, quantities=5, loss=Graded())
        monkeypatch.setitem(VARIANTS, "toy graded", variant)
        assert measure(Case("toy graded", kernel, "bf16", "sm_90")).problems() == []

    @pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
    @pytest.mark.parametrize("product", ["bf16", "tf32", "fp32"])
    @pytest.mark.parametrize("kernel", ["statistics", "merge rows", "weights"])
    def test_parameters_that_learn_spill_nothing(self, kernel, product, target, monkeypatch):
        loss = Steep(*(torch.ones((), requires_grad=True) for _ in range(2)))
        variant = Variant("declared_many", groups=True, columns=True, quantities=10, loss=loss)
        assert variant.functions.name == variant.epilogue
        monkeypatch.setitem(VARIANTS, "toy steep", variant)
        assert measure(Case("toy steep", kernel, product, target)).problems() == []


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", CASES)
    def test_every_loss(self, name, dtype):
        inputs = [t.cuda() for t in inputs_of(300, 72, EIGHTS(300), dtype=dtype)]
        check(CASES[name], inputs, 2 * tolerance(dtype, 80.0))

    @pytest.mark.parametrize("name", [
        "circle", "debiased", "vse", "toy clip", "toy contrastive", "toy learned steepness", "toy hard triplets",
    ])  # fmt: skip
    def test_in_a_graph(self, name):
        """Captured once, replayed on other values."""
        case = CASES[name]
        leaves = [t.cuda() for t in inputs_of(256, 64, EIGHTS(256), dtype=torch.float32)]
        leaves = leaves_of(leaves, case)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for _ in range(3):
            torch.autograd.grad(case.call(*leaves), wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(case.call(*leaves), wanted)
        leaves[0].data.mul_(0.5)
        graph.replay()
        for ours, expected in zip(captured, torch.autograd.grad(case.call(*leaves), wanted)):
            torch.testing.assert_close(ours, expected)


PINNED = """

import triton
import triton.language as tl

from replearn_kernels.triton_kernels.declared import (
    every_pairs, fold, fold_largest, fold_weights, guide_tile, is_larger, maximum, merged, minimum, other_pairs,
    rate_of, relu, rescaled, same_pairs, share, sigmoid, signed, signed_or_0, softplus, target_pairs,
)
from replearn_kernels.triton_kernels.tiles import (
    LOWEST, Epilogue, table_quantity, value_of_columns, value_of_rows,
)


@triton.jit
def empty(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    zero, low = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], LOWEST, tl.float32)
    return (low, zero, zero)


@triton.jit
def reduce(s, row, column, inputs, AXIS: tl.constexpr):
    scale = tl.load(inputs.scale).to(tl.float32)
    every = every_pairs(row, column, inputs)
    target = target_pairs(row, column, inputs)
    every_max, every_sum = fold(tl.where(every, signed(scale, s), float("-inf")), rate_of(scale), AXIS)
    own_sum = tl.sum(tl.where(target, s, 0.0), AXIS)
    return (every_max, every_sum, own_sum)


@triton.jit
def merge(a, b, inputs):
    scale = tl.load(inputs.scale).to(tl.float32)
    every_max, every_sum = merged(a[0], a[1], b[0], b[1], rate_of(scale))
    return (every_max, every_sum, a[2] + b[2])


@triton.jit
def weights(s, row, column, inputs):
    scale = tl.load(inputs.scale).to(tl.float32)
    every = every_pairs(row, column, inputs)
    target = target_pairs(row, column, inputs)
    w = tl.zeros_like(s)
    every_v = tl.where(every, signed(scale, s), float("-inf"))
    every_rate = rate_of(scale)
    shared = share(every_v, every_rate, inputs.row_table + 0 * inputs.row_stride, inputs.row_stride, row, inputs.rows)
    if inputs.column_table is not None:
        shared += share(every_v, every_rate, inputs.column_table + 0 * inputs.column_stride, inputs.column_stride, column, inputs.columns)
    w = w + tl.where(every, shared, 0.0)
    shared = table_quantity(row, column, inputs, 3, 1)
    if inputs.column_table is not None:
        shared += table_quantity(row, column, inputs, 3, 0)
    w = w + tl.where(target, shared, 0.0)
    return w


EPILOGUE = Epilogue("declared", empty, reduce, merge, weights, takes_roles=False, takes_given=False, folds_columns=False, additive=False)
"""  # noqa: E501
