"""nt_xent_loss and sup_con_loss: a batch against itself. The papers' formulas in fp64, edge cases, accuracy, units."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, unit_rows, value_and_gradients
from hypothesis import given, settings

from replearn_kernels import count_work, nt_xent_loss, sup_con_loss
from replearn_kernels.engine import columns

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def formula(z, labels, temperature, reduction="mean"):
    """Khosla et al., eq. 2, a row at a time: -1/|P| sum_p log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t))."""
    losses, anchors = [], 0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            losses.append((z[i] * 0).sum() / temperature)
            continue
        anchors += 1
        logits = z[others] @ z[i] / temperature
        mean = torch.stack([z[i] @ z[p] / temperature for p in positives]).mean()
        losses.append(logits.logsumexp(0) - mean)
    losses = torch.stack(losses) if losses else z.sum(1)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(anchors, 1)}[reduction]


LABELS = {
    "one class": lambda n: torch.zeros(n, dtype=torch.int64),
    "all distinct": lambda n: torch.arange(n),
    "pairs": lambda n: torch.arange(n) // 2,
    "negative and huge": lambda n: torch.randint(-3, 3, (n,)) * 2**40 - 7,
    "some singletons": lambda n: torch.where(torch.arange(n) % 3 == 0, torch.arange(n), -1),
}


def test_hand_computed(backend):
    """Four orthogonal rows but for one pair of equals, at temperature 1 / ln 3: a pair among 3, 1, 1."""
    z = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]
    losses = sup_con_loss(
        z, torch.tensor([5, 5, 6, 7]), temperature=1 / math.log(3.0), reduction="none", backend=backend
    )
    assert losses.tolist() == pytest.approx([math.log(5 / 3), math.log(5 / 3), 0, 0], rel=1e-14)
    mean = sup_con_loss(z, torch.tensor([5, 5, 6, 7]), temperature=1 / math.log(3.0), backend=backend)
    assert mean.item() == pytest.approx(math.log(5 / 3), rel=1e-14)  # over the two rows that have a positive


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (3, 5), (65, 48)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sup_con_is_the_papers_formula(kind, n, d, reduction, backend, rng):
    z, labels = torch.randn(n, d, generator=rng, dtype=torch.float64), LABELS[kind](n)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64)

    def results(loss):
        def scalar(z, t):
            return (loss(z, labels, temperature=t, reduction=reduction) * upstream).sum()

        return value_and_gradients(scalar, z, torch.tensor(0.6, dtype=torch.float64))

    expected = results(formula)
    for name in (backend, "eager"):
        for a, b in zip(results(partial(sup_con_loss, normalize=False, backend=name)), expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n, d", [(1, 3), (63, 48), (257, 100), (600, 640), (40, 1152)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_budget", [0, 200_000, 2**28])
def test_nt_xent_as_accurate_as_eager(n, d, dtype, memory_budget, backend, rng):
    """SimCLR's own code: cross entropy over the 2N x 2N matrix without its diagonal."""
    x, y = unit_rows(rng, n, d, dtype=dtype), unit_rows(rng, n, d, dtype=dtype)

    def eager(x, y):
        z = torch.cat([x, y])
        logits = (z @ z.t() / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * n).roll(n))
        return loss if x.dtype == torch.float64 else loss.float()

    check_against_eager(
        lambda x, y: nt_xent_loss(
            x, y, temperature=0.2, normalize=False, backend=backend, memory_budget=memory_budget
        ),
        eager, x, y,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 100.0])
@pytest.mark.parametrize("n", [130, 700])
def test_sup_con_at_any_temperature(temperature, n, backend, rng):
    """Rows of few, many and no positives; rows and columns near and far (logits up to 1,000)."""
    z = unit_rows(rng, n, 32)
    labels = torch.randint(n // 4, (n,), generator=rng)
    loss = partial(sup_con_loss, labels=labels, temperature=temperature, normalize=False)
    check_against_eager(
        partial(loss, backend=backend, memory_budget=0), partial(loss, backend="eager"), z, scale=1 / temperature
    )


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(-4, 4), min_size=1, max_size=90),
    d=st.integers(1, 12),
    temperature=st.floats(0.05, 20),
    budget=st.integers(0, 40_000),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_any_labels_equal_the_specification(name, labels, d, temperature, budget, seed):
    z = torch.randn(len(labels), d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = partial(sup_con_loss, labels=torch.tensor(labels), temperature=temperature, memory_budget=budget)
    results = [value_and_gradients(partial(loss, backend=backend), z) for backend in (name, "eager")]
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


def test_views_are_rows_of_their_sample(backend, rng):
    """[B, V, d] is [B * V, d] with repeated labels; without labels two views are NT-Xent."""
    views, labels = torch.randn(9, 3, 6, generator=rng), torch.randint(4, (9,), generator=rng)
    flat = sup_con_loss(views.flatten(0, 1), labels.repeat_interleave(3), reduction="none", backend=backend)
    torch.testing.assert_close(sup_con_loss(views, labels, reduction="none", backend=backend), flat)
    pairs = sup_con_loss(views[:, :2], temperature=0.5, backend=backend)
    torch.testing.assert_close(pairs, nt_xent_loss(views[:, 0], views[:, 1], backend=backend))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
def test_gradcheck(reduction, memory_budget, backend):
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 9])
    assert torch.autograd.gradcheck(
        lambda z, t: sup_con_loss(
            z, labels, temperature=t, reduction=reduction, backend=backend, memory_budget=memory_budget
        ),
        (z, temperature),
    )


@pytest.mark.parametrize("n", [0, 1, 5])
def test_without_a_positive_pair_zero(n, backend):
    z = torch.randn(n, 4, requires_grad=True)
    loss = sup_con_loss(z, torch.arange(n), backend=backend)
    loss.backward()
    assert loss.item() == 0 and torch.equal(z.grad, torch.zeros(n, 4))


@pytest.mark.parametrize("n", [2, 5, 300])
def test_without_a_negative_pair_the_papers_formula(n, backend):
    """log(N - 1) where all similarities are equal: of orthogonal rows, of one row N times. Not 0, as some have it."""
    for z in (torch.eye(n), torch.ones(n, 3)):
        loss = sup_con_loss(z, torch.zeros(n, dtype=torch.int64), backend=backend)
        torch.testing.assert_close(loss, torch.tensor(math.log(n - 1)), rtol=1e-6, atol=1e-6)
    nt_xent = nt_xent_loss(torch.eye(1, 3), torch.ones(1, 3), backend=backend)
    torch.testing.assert_close(nt_xent, torch.tensor(0.0))


@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_bits_do_not_depend_on_the_run(memory_budget, backend, rng):
    z, labels = unit_rows(rng, 1500, 32), torch.randint(40, (1500,), generator=rng)
    runs = [
        value_and_gradients(lambda z: sup_con_loss(z, labels, backend=backend, memory_budget=memory_budget), z)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


STRIP = 256  # rows of a tile on the diagonal of which no more is formed than what is on and above it


@pytest.mark.parametrize("memory_budget, expected", [(0, 2.0), (2**28, 1.5)])
def test_units(memory_budget, expected, backend, rng):
    """Half a unit for statistics, half to recompute, one for both images of every tile; and the diagonal's share."""
    n, d = 4096, 16
    z, labels = unit_rows(rng, n, d).requires_grad_(), torch.arange(n) // 4
    with count_work() as work:
        sup_con_loss(z, labels, normalize=False, backend=backend, memory_budget=memory_budget).backward()
    diagonal = STRIP / n * (expected - 1)  # its squares are formed whole
    assert work.units(n, n, d) == expected + diagonal
    assert work.workspace_bytes < (5 * 2**20 if memory_budget == 0 else n * n * 2.6 + 5 * 2**20)


def test_without_gradients_half_a_unit(backend, rng):
    z, labels = unit_rows(rng, 4096, 16), torch.arange(4096) // 4
    with torch.no_grad(), count_work() as work:
        sup_con_loss(z, labels, backend=backend)
    assert work.units(4096, 4096, 16) == 0.5 + STRIP / 4096 / 2


@pytest.mark.parametrize("n", [*range(4, 13), 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [100, 1e4])
def test_one_similarity_for_both_of_a_pair(n, dtype, size, backend, rng):
    """BLAS may round <x_i, x_j> and <x_j, x_i> differently, and at logits of 1e5 to 1e9 a unit is a factor in W."""
    z = size * unit_rows(rng, 2 * (n // 2), 16, dtype=dtype)
    labels = torch.arange(len(z)) // 2
    check_against_eager(
        lambda z: sup_con_loss(z, labels, normalize=False, backend=backend),
        lambda z: sup_con_loss(z, labels, normalize=False, backend="eager"),
        z,
    )
    check_against_eager(
        lambda z: nt_xent_loss(*z.chunk(2), temperature=0.07, normalize=False, backend=backend),
        lambda z: nt_xent_loss(*z.chunk(2), temperature=0.07, normalize=False, backend="eager"),
        z,
    )


@pytest.mark.parametrize("n", [2, 7, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tile_on_the_diagonal_is_symmetric(n, dtype):
    x, s = torch.randn(n, 17, dtype=dtype), torch.empty(n, n, dtype=dtype)
    whole = slice(0, n)
    batch = columns.BatchColumns(x, False)
    columns.run(batch.products(columns.Tile(x, whole, batch, 0, whole), s))
    assert torch.equal(s, s.t())
    torch.testing.assert_close(s, x @ x.t())
