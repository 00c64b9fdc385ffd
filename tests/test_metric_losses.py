"""lifted_structure_loss and contrastive_loss: the papers' formulas in fp64, edge cases, near duplicates, accuracy."""

import math
from functools import partial

import hypothesis.strategies as st
import metric_oracle
import pytest
import torch
from accuracy import assert_as_accurate, check_against_eager
from conftest import BACKENDS
from hypothesis import given, settings
from metric_cases import LABELS, assert_same, collapsed_batch, near_duplicates, results, scaled_rows, small_batch_tiles

from replearn_kernels import contrastive_loss, lifted_structure_loss
from replearn_kernels.engine import native
from replearn_kernels.engine.distances import NEAR

LOSSES = {
    "lifted": (partial(lifted_structure_loss, margin=1.2), partial(metric_oracle.lifted, margin=1.2)),
    "hard lifted": (
        partial(lifted_structure_loss, margin=1.2, smooth=False),
        partial(metric_oracle.lifted, margin=1.2, smooth=False),
    ),
    "contrastive": (partial(contrastive_loss, margin=1.5), partial(metric_oracle.contrastive, margin=1.5)),
    "plain contrastive": (
        partial(contrastive_loss, margin=1.5, squared=False),
        partial(metric_oracle.contrastive, margin=1.5, squared=False),
    ),
}
EVERY = pytest.mark.parametrize("name", LOSSES)

# Points on a line, of two classes: positives at distances 1 and 4, negatives at 3, 7, 2 and 6.
POINTS, CLASSES = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64), torch.tensor([5, 5, -1, -1])


@pytest.mark.parametrize(
    "loss, losses, gradient",
    [
        # margin 3: r = 0, 1, 1, -3; J = 1 + 1 and 1 + 4, both over the negative pair of rows 1 and 2
        (partial(lifted_structure_loss, smooth=False, margin=3.0), [1, 1, 6.25, 6.25], [-1, 4.5, -6, 2.5]),
        (partial(contrastive_loss, margin=3.0), [0.5, 1, 8.5, 8], [-2 / 6, 4 / 6, -10 / 6, 8 / 6]),
        (partial(contrastive_loss, margin=3.0, squared=False), [0.5, 1, 2.5, 2], [-1 / 6, 2 / 6, -2 / 6, 1 / 6]),
    ],
)
def test_hand_computed(loss, losses, gradient, backend):
    pairs = 2 if loss.func is lifted_structure_loss else 6
    for name in (backend, "eager"):
        assert loss(POINTS, CLASSES, reduction="none", backend=name).tolist() == pytest.approx(losses, rel=1e-13)
        mean, d_points = results(lambda x: loss(x, CLASSES, backend=name), POINTS)  # noqa: B023
        assert mean.item() == pytest.approx(sum(losses) / pairs, rel=1e-13)
        assert d_points.flatten().tolist() == pytest.approx(gradient, rel=1e-13)


def test_hand_computed_smooth(backend):
    """Log-sum-exps over 3 - {3, 7, 2, 6}, the same four of both positive pairs."""
    bound = math.log(1 + math.exp(-4) + math.exp(1) + math.exp(-3))
    expected = ((bound + 1) ** 2 + (bound + 4) ** 2) / 4
    for name in (backend, "eager"):
        loss = lifted_structure_loss(POINTS, CLASSES, margin=3.0, backend=name)
        assert loss.item() == pytest.approx(expected, rel=1e-13)


@EVERY
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (5, 48), (63, 3)])
def test_is_the_papers_formula(name, kind, n, d, backend, rng):
    if n == 63 and kind not in ("all distinct", "pairs", "eights"):
        n = 20  # the oracle visits every positive pair
    (loss, oracle), x, labels = LOSSES[name], scaled_rows(rng, n, d), LABELS[kind](n)
    for reduction, upstream in [("mean", 1.0), ("sum", -0.7), ("none", torch.randn(n, generator=rng).double())]:
        exact = results(partial(oracle, labels=labels, reduction=reduction), x, upstream)
        for backend_name in (backend, "eager"):
            ours = partial(loss, labels=labels, reduction=reduction, backend=backend_name)
            assert_same(results(ours, x, upstream), exact)


@EVERY
@pytest.mark.parametrize(
    "n, d, dtype, memory_budget", [(257, 48, torch.float32, 0), (65, 1152, torch.float16, 2**28)]
)
def test_no_further_from_the_formula_than_eager(name, n, d, dtype, memory_budget, backend, rng):
    """Against fp64 of the same inputs. Eager is backend="eager": differences of the rows, fp32 statistics."""
    loss, oracle = LOSSES[name]
    x, labels = scaled_rows(rng, n, d, dtype), LABELS["pairs"](n)
    exact = results(partial(oracle, labels=labels), x.double())
    runs = [
        results(partial(loss, labels=labels, backend=b, memory_budget=memory_budget), x) for b in (backend, "eager")
    ]
    assert [t.dtype for t in runs[0]] == [torch.float32, dtype]
    assert_as_accurate(*runs, exact)


@EVERY
@pytest.mark.parametrize(
    "n, d, dtype, memory_budget",
    [
        (150, 640, torch.float32, 0),
        (300, 16, torch.float64, 100_000),
        (150, 640, torch.float16, 50_000),
        (300, 100, torch.bfloat16, 0),
    ],
)
def test_several_tiles_as_accurate_as_eager(name, n, d, dtype, memory_budget, backend, rng):
    """Half precision: the statistics and distances of eager are fp32, only its gradient is rounded."""
    x, labels = scaled_rows(rng, n, d, dtype), LABELS["eights"](n)
    loss = partial(LOSSES[name][0], labels=labels)
    with small_batch_tiles(80):
        check_against_eager(
            partial(loss, backend=backend, memory_budget=memory_budget), partial(loss, backend="eager"), x
        )


@EVERY
def test_rows_over_several_tiles(name, backend, rng):
    """Losses of rows under random upstream gradients: two sweeps, tiles on and off the diagonal, kept or not."""
    x, labels = scaled_rows(rng, 1100, 3), torch.randint(-90, 90, (1100,), generator=rng)
    upstream = torch.randn(1100, generator=rng, dtype=torch.float64)
    loss = partial(LOSSES[name][0], labels=labels, reduction="none")
    exact = results(partial(loss, backend="eager"), x, upstream)
    for budget in (0, 200_000, 2**28):
        assert_same(results(partial(loss, backend=backend, memory_budget=budget), x, upstream), exact)


@settings(max_examples=15, deadline=None)
@given(
    labels=st.lists(st.integers(-4, 4), min_size=1, max_size=70),
    d=st.integers(1, 9),
    margin=st.floats(0, 4),
    budget=st.integers(0, 30_000),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend_name", ["torch", "cpp"])
@EVERY
def test_any_labels_equal_the_specification(name, backend_name, labels, d, margin, budget, reduction, seed):
    rng, n = torch.Generator().manual_seed(seed), len(labels)
    x, labels = torch.randn(n, d, generator=rng, dtype=torch.float64), torch.tensor(labels)
    upstream = torch.randn(n if reduction == "none" else (), generator=rng, dtype=torch.float64)
    loss = partial(LOSSES[name][0], labels=labels, margin=margin, reduction=reduction)
    ours = results(partial(loss, backend=backend_name, memory_budget=budget), x, upstream)
    assert_same(ours, results(partial(loss, backend="eager"), x, upstream), atol=1e-10)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
def test_gradcheck(name, reduction, memory_budget, backend):
    """Random points: no ties of the nearest negatives, and no distance at the margin."""
    x, labels = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 0, 2, 1, 0, 9])
    loss = partial(
        LOSSES[name][0], labels=labels, reduction=reduction, backend=backend, memory_budget=memory_budget
    )
    assert torch.autograd.gradcheck(loss, x)


@EVERY
def test_strides(name, backend, rng):
    """Columns of a wider matrix, a transposed one, one row expanded: the values and gradients of a plain copy."""
    loss, labels = partial(LOSSES[name][0], backend=backend), torch.arange(12) % 4
    wide = scaled_rows(rng, 12, 30)
    for view in (lambda x: x[:, 3:10], lambda x: x[:, ::3], lambda x: x.t()[:12, :12], lambda x: x[2:3].expand(12, 30)):
        plain = results(lambda x: loss(view(x).contiguous(), labels), wide)  # noqa: B023
        assert_same(results(lambda x: loss(view(x), labels), wide), plain, rtol=1e-12, atol=1e-13)  # noqa: B023
    strided = torch.stack([labels, -labels], dim=1)[:, 0]
    assert torch.equal(loss(wide, strided), loss(wide, labels))


@EVERY
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_pair_that_counts_zero(name, n, reduction, backend, rng):
    """Lifted: no positive pair; contrastive: all further apart than the margin."""
    x = 100 * torch.eye(5, 6)[:n]
    for backend_name in (backend, "eager"):
        loss = partial(LOSSES[name][0], labels=torch.arange(n), reduction=reduction, backend=backend_name)
        value, gradient = results(loss, x)
        assert value.shape == ((n,) if reduction == "none" else ()) and (value == 0).all()
        assert torch.equal(gradient, torch.zeros(n, 6))


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_shows(name, bad, dtype, backend, rng):
    """Also a row of no positive pair, whose negatives are beyond the margin, and one that is alone."""
    for kind in ("pairs", "all distinct", "one class"):
        for n in (1, 40):
            x = torch.rand(n, 8, generator=rng).to(dtype)
            x[0, 2] = bad
            for backend_name in (backend, "eager"):
                loss = partial(LOSSES[name][0], labels=LABELS[kind](n), backend=backend_name)
                assert loss(x).isnan() and loss(x, reduction="none")[0].isnan()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_have_no_gradient_between_them(name, dtype, backend, rng):
    """Equal rows of one label and of two: as eager says, a difference of 0 whose gradient is 0."""
    x = scaled_rows(rng, 9, 5, dtype)[torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4])]
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1, 1])
    loss = partial(LOSSES[name][0], labels=labels)
    check_against_eager(partial(loss, backend=backend), partial(loss, backend="eager"), x)
    same = x[:1].expand(9, 5)
    value, gradient = results(partial(loss, backend=backend), same)
    assert value.isfinite() and torch.equal(gradient, torch.zeros(9, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset, clusters", [(0.0, 0), (100.0, 0), (0.0, 7), (100.0, 7)])
@pytest.mark.parametrize("d", [3, 128, 1152])
def test_near_duplicates(d, offset, clusters, dtype, backend, rng):
    """With margin 0 the plain contrastive loss of a row is half the distance of its pair, and that gradient a unit
    vector's half: both within the bound that engine/distances.py states, from 1e-1 to 1e-7 of the length."""
    bound = (1 + d**0.5 / 2) * torch.finfo(dtype).eps / (2 * NEAR)
    for ratio in (1e-1, 10**-1.25, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        x, labels = near_duplicates(rng, dtype, ratio, offset, clusters, d)
        difference = x[:100].double() - x[100:].double()
        distance = difference.norm(dim=1)
        direction = difference / distance.clamp(min=1e-300).unsqueeze(1)
        loss = partial(contrastive_loss, labels=labels, margin=0.0, squared=False, backend=backend, reduction="none")
        value, gradient = results(loss, x)
        assert ((2 * value[:100].double() - distance).abs() <= bound * distance).all()
        assert ((gradient[:100].double() - direction).norm(dim=1) <= bound).all()
        assert ((gradient[100:].double() + direction).norm(dim=1) <= bound).all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_near_duplicates_in_every_loss(name, dtype, backend, rng):
    """Positives and negatives that all but coincide, far from the origin: eager forms all differences."""
    x, labels = near_duplicates(rng, dtype, 1e-3, 10.0, 7, 48, pairs=60)
    loss = partial(LOSSES[name][0], labels=labels.roll(3) // 2)
    check_against_eager(partial(loss, backend=backend), partial(loss, backend="eager"), x)


@EVERY
def test_a_collapsed_batch(name, rng):
    """Every fourth pair is near: the loss and gradient of eager in fp64, in seconds."""
    x, labels = collapsed_batch(rng)
    exact = results(partial(LOSSES[name][0], labels=labels, backend="eager"), x.double())
    if name == "hard lifted":  # which row of a centre is the nearest hangs on rounding
        exact[1] = exact[1].view(-1, 4, x.shape[1]).sum(0)
    for backend in BACKENDS if native.available() else ["torch"]:
        ours = [t.double() for t in results(partial(LOSSES[name][0], labels=labels, backend=backend), x)]
        if name == "hard lifted":
            ours[1] = ours[1].view(-1, 4, x.shape[1]).sum(0)
        assert_same(ours, exact, rtol=2e-5, atol=2e-5 * exact[1].abs().max().item())


@EVERY
@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_bits_do_not_depend_on_the_run(name, memory_budget, backend, rng):
    x, labels = scaled_rows(rng, 1100, 32, torch.float32), torch.randint(150, (1100,), generator=rng)
    loss = partial(LOSSES[name][0], labels=labels, backend=backend, memory_budget=memory_budget)
    assert all(torch.equal(a, b) for a, b in zip(results(loss, x), results(loss, x)))


@EVERY
def test_backward_twice(name, backend, rng):
    x = scaled_rows(rng, 20, 4).requires_grad_()
    loss = LOSSES[name][0](x, torch.arange(20) // 2, backend=backend)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(LOSSES[name][0](x, torch.arange(20) // 2, backend=backend), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@EVERY
def test_normalize_and_autocast(name, backend, rng):
    x, labels = scaled_rows(rng, 24, 6, torch.float32) * 5, torch.arange(24) // 3
    loss = partial(LOSSES[name][0], labels=labels, backend=backend)
    by_hand = results(lambda x: loss(torch.nn.functional.normalize(x)), x)
    assert_same(results(partial(loss, normalize=True), x), by_hand, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x)
    assert value.dtype == torch.float32 and torch.equal(value, loss(x.bfloat16()))
