"""How many kernels a step launches, and which losses make the host wait for a GPU: bench/launches.py counts them.

On tensors without data, so without a GPU: fewer launches are a promise of the library, as fewer products are.
"""

from __future__ import annotations

import csv

import pytest
import torch
from loss_cases import CASES

pytest.importorskip("triton")

import triton

from bench import launches
from replearn_kernels.engine import prototypes

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="counts launches of compiled kernels")

# Those that a CUDA graph can capture (README), and those that read from the GPU how many pairs there are.
WAITS = [name for name in CASES if name.startswith(("lifted", "semi_hard", "batch_all"))]

# CLIP's eight, at one tile: begin, sums, finish, combine; W, two products, outputs. Above 2,048 rows W is formed in
# Gluon, and before it what that reads of the coefficients.
BOUNDS = {
    ("clip", 1024, 512): 8,
    ("clip", 8192, 512): 9,
    ("clip", 65536, 512): 110,
    ("info_nce", 1024, 512): 8,
    ("siglip", 1024, 512): 8,
    ("siglip", 8192, 512): 8,
    ("siglip", 65536, 512): 135,
    ("nt_xent", 1024, 512): 12,  # with labels, and both views in one matrix
    ("nt_xent", 65536, 128): 20,
    ("sup_con", 8192, 512): 17,  # with labels sorted, once, and their ranges twice
    ("moco", 256, 128): 70,
    ("arcface", 256, 512): 400,  # 31 tiles of classes, normalised on the way, in either sweep
}
STEPS = {loss.__name__: loss for loss, _, _ in launches.POINTS}


def total(name: str, n: int, d: int) -> int:
    forward, backward = launches.count(lambda: STEPS[name](n, d))
    return forward.total() + backward.total()


@pytest.mark.parametrize("point", BOUNDS, ids=str)
def test_few(point):
    assert total(*point) <= BOUNDS[point]


def test_one_tile_of_clip_is_one_launch_of_each():
    forward, backward = launches.count(lambda: launches.clip(8192, 512))
    assert forward == dict.fromkeys(("begin_kernel", "sums_kernel", "finish_kernel", "combine_kernel"), 1)
    assert backward == {"shares_kernel": 1, "weights_kernel": 1, "product by cuBLAS": 2, "outputs_kernel": 1}


def test_a_tile_more_is_few_launches_more():
    """Of W and its two products for each tile, and of two for each tile of sums: nothing else grows."""
    forward, backward = launches.count(lambda: launches.clip(65536, 512))
    assert backward["product by cuBLAS"] == 2 * backward["weights_kernel"]
    assert backward.total() - 3 * backward["weights_kernel"] <= 5
    assert forward["sums_kernel"] == forward["finish_kernel"] and forward.total() - 2 * forward["sums_kernel"] <= 2


def test_without_gradients_no_second_sweep():
    with launches.on_a_gpu_without_data() as counted, torch.no_grad():
        launches.clip(8192, 512)
    assert counted.total() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_who_waits_for_the_gpu(name, dtype):
    x, y = (launches.features(512, 64, dtype=dtype) for _ in range(2))

    def step():
        return CASES[name](x, y, launches.labels(512), 10.0, backend="triton")

    if name not in WAITS:
        forward, backward = launches.count(step)
        assert forward.total() and backward.total()
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == dtype
        return
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        launches.count(step)


def test_the_committed_table_is_today_s():
    with launches.RESULTS.open() as file:
        committed = list(csv.DictReader(file))
    assert committed == [{name: str(value) for name, value in row.items()} for row in launches.table()]


def test_dino_head(monkeypatch):
    """65,536 prototypes are 13 tiles. Whole features are never converted, nor prototypes: bf16 enters the products."""
    views, teacher_views, batch, width, prototype_count = 10, 2, 64, 256, 65536
    student, teacher = (launches.features(n, batch, width, needs_grad=False) for n in (views, teacher_views))
    weights = [launches.features(prototype_count, width, needs_grad=False) for _ in range(2)]
    given = student, weights[0], teacher, weights[1], torch.empty(prototype_count, device="meta"), 0.1, 0.04, "mean"
    tiles = 13
    with launches.on_a_gpu_without_data() as counted:

        def product(out, a, b):
            assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
            counted["product"] += 1

        monkeypatch.setattr(prototypes, "factors_dtype", lambda features: features.dtype)
        monkeypatch.setattr(prototypes, "mm_", product)
        monkeypatch.setattr(prototypes, "addmm_", product)
        _, *tables = prototypes.forward(prototypes.Heads, *given)
        assert counted.pop("product") == 2 * tiles and counted.total() <= 34 * tiles
        counted.clear()
        prototypes.backward(prototypes.Heads, torch.empty((), device="meta"), *tables, *given, [True, True])
        # The prototypes' gradient is a product whose result is rounded at once.
        assert counted.pop("product") == 3 * tiles and counted.pop("mm") == tiles
        assert counted.pop("_to_copy") == tiles + 2  # W; at last the gradient of the features, and a mask of views
        assert counted.total() <= 22 * tiles
