"""Counted work: units of N x M x d products and workspace, against the documented minimum (docs/design.md)."""

from functools import partial

import pytest
import torch
from accuracy import unit_rows

from replearn_kernels import (
    clip_loss,
    contrastive_loss,
    count_work,
    info_nce_loss,
    lifted_structure_loss,
    triplet_margin_loss,
)
from replearn_kernels.engine.plan import balanced_block, make_plan

N, M, D = 2100, 3000, 32
MIB = 2**20


def units(loss_fn, *inputs, n=N, m=M):
    leaves = [t.detach().requires_grad_() for t in inputs]
    with count_work() as work:
        loss_fn(*leaves).backward()
    return work.units(n, m, D), work.workspace_bytes


@pytest.mark.parametrize("memory_budget, expected", [(0, 4.0), (2**30, 3.0)])
def test_clip(memory_budget, expected, backend, rng):
    x, y = unit_rows(rng, N, D), unit_rows(rng, N, D)
    done, workspace = units(
        lambda x, y: clip_loss(x, y, 9.0, backend=backend, memory_budget=memory_budget), x, y, m=N
    )
    assert done == expected
    assert workspace < (4 * MIB if memory_budget == 0 else N * N * 4 + 4 * MIB)


def test_clip_keeps_what_the_budget_holds(backend, rng):
    """Half of S kept: half of the recomputation is saved, to within a tile."""
    x, y = unit_rows(rng, N, D), unit_rows(rng, N, D)
    budget = N * N * 2
    done, workspace = units(
        lambda x, y: clip_loss(x, y, 9.0, backend=backend, memory_budget=budget), x, y, m=N
    )
    assert 3.4 < done < 3.7
    assert budget * 0.85 < workspace < budget + 4 * MIB


@pytest.mark.parametrize("memory_budget", [0, 10 * MIB, 2**30])
def test_one_direction(memory_budget, backend, rng):
    x, y = unit_rows(rng, N, D), unit_rows(rng, M, D)
    done, workspace = units(
        lambda x, y: info_nce_loss(x, y, backend=backend, memory_budget=memory_budget), x, y
    )
    assert done == 3.0
    assert workspace < (20 * MIB if memory_budget < 2**30 else N * M * 4 + 4 * MIB)


def test_queue_without_gradient(backend, rng):
    """MoCo: a queue that needs no gradient takes part in two products, the keys in three."""
    x, y, queue = unit_rows(rng, N, D), unit_rows(rng, N, D), unit_rows(rng, M, D)
    done, _ = units(
        lambda x: info_nce_loss(x, y, negatives=queue, backend=backend, memory_budget=0), x, m=N + M
    )
    assert done == 2.0


def test_reduction_none_takes_two_sweeps(backend, rng):
    x, y = unit_rows(rng, N, D), unit_rows(rng, M, D)
    done, _ = units(
        lambda x, y: info_nce_loss(x, y, reduction="none", backend=backend, memory_budget=0).sum(), x, y
    )
    assert done == 4.0


def test_frozen_features_with_learnable_scale(backend, rng):
    """The scale's gradient needs one product beyond the statistics, not two."""
    x, y, scale = unit_rows(rng, N, D), unit_rows(rng, N, D), torch.tensor(3.0, requires_grad=True)
    with count_work() as work:
        clip_loss(x, y, scale, backend=backend).backward()
    assert work.units(N, N, D) == 2.0


def test_backward_gives_only_what_is_needed(backend, rng):
    x, y = unit_rows(rng, N, D), unit_rows(rng, N, D)
    done, _ = units(lambda x: clip_loss(x, y, 9.0, backend=backend), x, m=N)
    assert done == 2.0


def plan(rows, widths, d, budget, **kwargs):
    options = dict(itemsize=4, tile_shapes=((1024, 512),) * 2, needs_grad=True, one_gradient=True, needs_columns=False)
    return make_plan(rows, widths, d, memory_budget=budget, **(options | kwargs))


def test_plan():
    assert plan(8192, (8192,), 128, 2**28).schedule == "two_sweeps"  # S fits the budget
    assert plan(8192, (8192,), 128, 0).schedule == "row_chunks"
    assert plan(8192, (8192,), 128, 0, needs_columns=True).kept_elements == 0
    assert plan(8192, (8192,), 128, 0, one_gradient=False).schedule == "two_sweeps"
    assert plan(256, (256,), 128, 2**20, needs_columns=True).schedule == "row_chunks"  # one chunk sees all
    assert plan(256, (256,), 128, 2**20, needs_columns=True, one_gradient=False).schedule == "two_sweeps"
    assert plan(8192, (8192,), 128, 0, needs_grad=False).schedule == "two_sweeps"
    many = plan(256, (1_000_000,), 64, 0)  # a chunk would be 16 rows: reading dY 16 times costs more than a unit
    assert many.schedule == "two_sweeps"
    assert plan(131_072, (131_072,), 128, 0).statistics_tile.rows * 131_072 * 4 <= 64 * MIB


def test_balanced_blocks():
    assert balanced_block(1025, 1024) == 528
    assert balanced_block(1, 1024) == 1
    assert balanced_block(0, 1024) == 1
    assert balanced_block(1024, 1024) == 1024
    for size in (5, 100, 1023, 3000, 12345):
        block = balanced_block(size, 512)
        assert block <= 512 and -(-size // block) == -(-size // 512)


STRIP = 256  # rows of a tile on the diagonal of which no more is formed than what is on and above it


@pytest.mark.parametrize(
    "loss, memory_budget, products, gradients",
    [
        (lifted_structure_loss, 0, 2, 1),
        (lifted_structure_loss, 2**28, 1, 1),  # distances kept from the first sweep to the second
        (partial(lifted_structure_loss, smooth=False), 2**28, 1, 0),  # the hardest pairs' gradient needs no sweep
        (contrastive_loss, 2**28, 1, 1),
        (partial(triplet_margin_loss, mining="batch_hard"), 2**28, 1, 0),
        (partial(triplet_margin_loss, mining="batch_all"), 2**28, 1, 1),
    ],
)
def test_over_distances(loss, memory_budget, products, gradients, backend, rng):
    """Half a unit for every time the products are formed, with the squares on the diagonal whole, and one for the
    gradient of both images of a tile."""
    n, labels = 3072, torch.arange(3072) // 4
    x = (torch.randn(n, 16, generator=rng) / 4).requires_grad_()
    with count_work() as work:
        loss(x, labels, backend=backend, memory_budget=memory_budget).backward()
    assert work.units(n, n, 16) == pytest.approx(products * (0.5 + STRIP / n / 2) + gradients, rel=1e-12)
    kept = n * n * 2.7 if loss is lifted_structure_loss and memory_budget else 0
    assert work.workspace_bytes < kept + 10 * MIB  # two tiles, weights and distances, and tables


def test_gradients_of_many_rows_in_little_memory(backend, rng):
    """reduction="none" sweeps twice where one upstream gradient would do with one sweep."""
    n, labels = 3072, torch.arange(3072) // 4
    x = (torch.randn(n, 16, generator=rng) / 4).requires_grad_()
    with count_work() as work:
        contrastive_loss(x, labels, reduction="none", backend=backend).sum().backward()
    assert work.units(n, n, 16) == pytest.approx(2 * (0.5 + STRIP / n / 2) + 1, rel=1e-12)
    assert work.workspace_bytes < 10 * MIB
