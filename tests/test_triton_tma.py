"""Losses by the kernels that TMA moves the features of, in Triton's interpreter: values, gradients, work, tiles.

Under a Config with ``parts`` every dtype takes them, as half precision does on Hopper; a softmax's sums alone are in
test_triton_sums.py. How values are compared: test_gpu_losses.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from loss_cases import CASES, value_and_gradients
from test_gpu_losses import SCALE, compare_with_fp64, sample
from triton_harness import SMALL_BLOCKS, few_programs, interpreter

import replearn_kernels as rk
from replearn_kernels import count_work
from replearn_kernels.engine.backends.triton import TritonBackend
from replearn_kernels.objectives import OBJECTIVES
from replearn_kernels.triton_kernels.configs import Config, use_config

pytestmark = interpreter

BLOCKS = Config(32, 32, 32, warps=4, stages=2, column_blocks=2, parts=2)
BY_TMA = (
    "clip", "info_nce", "symmetric", "queue", "n_pair", "nt_xent", "sup_con",
    "target", "siglip", "siglip_groups", "arcface", "cosface",
)  # fmt: skip
OF_EACH_KIND = ("symmetric", "queue", "sup_con", "siglip")
MIB = 2**20


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    few_programs(monkeypatch)


def parts(count: int):
    return use_config(replace(BLOCKS, parts=count))


def part_of(n: int, m: int, d: int, dtype: torch.dtype) -> tuple:
    x, y, labels = sample(max(n, m), d, dtype, "cpu")
    return x[:n], y[:m], labels[:n]


SMALL = [(1, 1, torch.float32, 1), (2, 3, torch.bfloat16, 4), (33, 144, torch.bfloat16, 1)]
LARGER = [(63, 48, torch.bfloat16, 4), (65, 100, torch.float32, 2)]


@pytest.mark.parametrize(
    "name, n, d, dtype, count",
    [(name, *case) for name in BY_TMA for case in SMALL + (LARGER if name in OF_EACH_KIND else [])],
)
def test_values_and_gradients(name, n, d, dtype, count):
    with parts(count):
        truth = compare_with_fp64(name, *sample(n, d, dtype, "cpu"), SCALE)
    assert n < 3 or truth[1].any()


@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_TMA])
def test_losses_over_distances(name):
    """They ship without TMA: here W and, in one sweep, its statistics come in parts."""
    with parts(2):
        compare_with_fp64(name, *sample(33, 20, torch.float32, "cpu"), SCALE)


@pytest.mark.parametrize("n, m", [(20, 33), (33, 20)])
@pytest.mark.parametrize("name", ["info_nce", "symmetric", "target", "queue", "arcface"])
def test_other_numbers_of_columns(name, n, m):
    """Columns that are nobody's positive; a queue and classes may be fewer than the rows."""
    if m < n and name in ("info_nce", "symmetric"):  # a row's positive is the column of its own number
        n, m = 1, 33
    with parts(2):
        compare_with_fp64(name, *part_of(n, m, 48, torch.float32), SCALE)


@pytest.mark.parametrize("name", [*OF_EACH_KIND, "nt_xent", "n_pair", "siglip_groups"])
def test_several_tiles(name, small_tiles):
    """Of 32 x 16: the diagonal is inside of a tile, passes through a half of it, or by it."""
    with parts(2):
        compare_with_fp64(name, *sample(40, 32, torch.float32, "cpu"), SCALE)


@pytest.mark.parametrize("name", ["clip", "sup_con", "siglip"])
def test_the_same_bits_again(name, small_tiles):
    inputs = *sample(33, 32, torch.bfloat16, "cpu"), SCALE
    with parts(2):
        first, second = (value_and_gradients(name, *inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides, or of its first row alone with a stride of 0."""
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.t().contiguous().t()
    whole = x.new_full((2 * len(x), x.shape[1] + 3), float("nan"))  # read by nobody
    whole[::2, 1 : x.shape[1] + 1] = x
    return whole[::2, 1 : x.shape[1] + 1]


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_strides(name, layout):
    x, y, labels = sample(33, 48, torch.bfloat16, "cpu")
    strided = [laid_out(t, layout) for t in (x, y)]
    results = []
    with parts(2):
        for features in (strided, [t.contiguous() for t in strided]):
            leaves = [t.detach().requires_grad_() for t in features]
            loss = CASES[name](*leaves, labels, SCALE, backend="triton")
            results.append([loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["symmetric", "queue", "sup_con"])
def test_what_is_not_finite_shows_where_it_did(name, value):
    """As through pointers: in the losses of the same rows, and the same places of the gradients."""
    x, y, labels = sample(40, 16, torch.float32, "cpu")
    x[33, 5] = value
    results = []
    for config in (BLOCKS, replace(BLOCKS, parts=0)):
        with use_config(config), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN is what is asked for
            results.append(value_and_gradients(name, x, y, labels, SCALE, backend="triton", reduction="none"))
    for by_tma, by_pointers in zip(*results):
        assert torch.equal(by_tma.isnan(), by_pointers.isnan())
    assert results[0][0].isnan().any()


@pytest.mark.parametrize("name", ["siglip", "siglip_groups"])
def test_an_infinite_feature_meets_no_column_past_the_edge(name):
    """There TMA reads zeros, and a product of the two is NaN; the loss is infinite, as eager's."""
    x, y, labels = sample(40, 16, torch.float32, "cpu")
    x[3], y[3] = 0, 0
    x[3, 5] = torch.inf  # in a block of rows whose ragged block of columns is off the diagonal
    y[:, 5] = y[:, 5].abs() + 0.1
    with parts(2), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of inf - inf, in gradients
        loss, *gradients = value_and_gradients(name, x, y, labels, SCALE, backend="triton")
        expected, *others = value_and_gradients(name, x, y, labels, SCALE, backend="eager")
    assert loss == expected == torch.inf
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(gradients, others))


def test_identical_views_at_scale_1000():
    """No other entry counts beside a row's positive: a loss of 0, not the rounding of 1000."""
    x = torch.eye(65, 144).requires_grad_()
    y = torch.eye(65, 144).requires_grad_()
    with parts(2):
        loss = rk.clip_loss(x, y, 1000.0, backend="triton")
        gradients = torch.autograd.grad(loss, [x, y])
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["symmetric", "queue", "sup_con"])
@pytest.mark.parametrize("scale", [1e-3, 100.0, 300.0])
def test_scales(name, scale):
    """At 300 what is past the edge lies below every reference."""
    with parts(2):
        compare_with_fp64(name, *sample(33, 48, torch.float32, "cpu"), scale)


def test_scales_of_zero_and_below():
    inputs = sample(33, 48, torch.float32, "cpu")[:2]
    for scale in (0.0, -14.3, -300.0):
        results = []
        for backend, dtype in (("eager", torch.float64), ("triton", torch.float32)):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            with parts(2):
                loss = rk.info_nce_loss(*leaves, logit_scale=scale, symmetric=True, backend=backend)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for exact, ours in zip(*results):
            assert (ours - exact).norm() <= (1e-6 + abs(scale) * 2**-23) * exact.norm(), scale


class TestWork:
    @staticmethod
    def units(name: str, n: int, d: int, config: Config, columns: int) -> float:
        with use_config(config), count_work() as work:
            value_and_gradients(name, *sample(n, d, torch.float32, "cpu"), SCALE, backend="triton")
        return work.units(n, columns, d)

    @pytest.mark.parametrize("name, units", [("clip", 4), ("info_nce", 4), ("siglip", 3), ("arcface", 4), ("queue", 7)])
    def test_as_many_products_as_through_pointers(self, name, units):
        """Two sources of a queue's loss: keys and queries of the first are one tensor, and give one gradient each."""
        for config in (BLOCKS, SMALL_BLOCKS):
            assert self.units(name, 32, 144, config, 32) == units

    def test_w_in_memory_where_rows_are_narrow_too(self):
        """Through pointers products of W in registers form the similarities twice: 5 units."""
        assert self.units("clip", 32, 32, BLOCKS, 32) == 4
        assert self.units("clip", 32, 32, SMALL_BLOCKS, 32) == 5

    def test_a_batch_takes_the_sums_of_a_tile_for_each_side(self, small_tiles):
        """Positives by group are summed for rows alone, so a tile off the diagonal is formed once as it is and once as
        its mirror image: a unit in all, where statistics of both sides take (1 + rows / n) / 2."""
        n, rows = 64, 32
        visited, on_diagonal = (1 + rows / n) / 2, rows / n
        products = on_diagonal + 2 * (visited - on_diagonal)
        assert self.units("sup_con", n, 48, BLOCKS, n) == 1 + visited + products
        assert self.units("sup_con", n, 48, SMALL_BLOCKS, n) == visited + visited + products


def tile(sweep, rows, objective, dtype=torch.bfloat16, is_batch=False, budget=256 * MIB, d=512) -> tuple[int, int]:
    with use_config(BLOCKS):
        return TritonBackend.tile_shape(sweep, rows, d, dtype, "cuda", objective, is_batch, budget)


def objective(name: str):
    parameters = {"softmax": [1.0, 0.0, 0.0, 0.0], "margin_softmax": [0.5, 1.0], "lifted": [1.0], "sup_con": [0.0]}
    return OBJECTIVES[name].from_parameters(parameters.get(name, []))


class TestTiles:
    @pytest.mark.parametrize("budget", [0, MIB, 100 * MIB, 256 * MIB, 1024 * MIB, 2**36])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name, is_batch", [("softmax", False), ("sup_con", True)])
    def test_w_is_within_the_budget(self, name, is_batch, dtype, budget):
        most = min(max(budget, 32 * MIB), 1024 * MIB)
        for rows in (None, 1, 16, 300, 4096, 10_000, 10**6):
            high, wide = tile("gradients", rows, objective(name), dtype, is_batch, budget)
            assert wide > 0 and wide % 16 == 0
            assert high * wide * dtype.itemsize <= most
            if rows is None or rows * wide * dtype.itemsize > most:
                assert high * wide * dtype.itemsize > 0.9 * most  # nor is it left empty

    def test_few_rows_take_wide_tiles(self):
        """ArcFace, 256 rows: normalised classes are copied, of a tile, so 32,768 of them at most: 31 tiles."""
        for sweep in ("statistics", "gradients"):
            high, wide = tile(sweep, 256, objective("margin_softmax"))
            assert (high, wide) == (256, 32_768)
            assert -(-1_000_000 // wide) == 31
        assert tile("gradients", 256, objective("softmax"))[1] == 2**19

    def test_a_batch_has_low_tiles(self):
        """As wide as high on the diagonal, of which half is for nothing."""
        assert tile("gradients", 10**6, objective("sup_con"), is_batch=True)[0] == 8192
        assert tile("statistics", 10**6, objective("lifted"), is_batch=True)[0] == 4096

    def test_sums_of_a_batch_have_high_ones(self):
        """They are of rows alone, so that a tile on the diagonal does nothing twice."""
        assert tile("statistics", 10**6, objective("sup_con"), is_batch=True)[0] == 32_768
