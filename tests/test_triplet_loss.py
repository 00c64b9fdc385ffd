"""triplet_margin_loss: three minings, three distances, given triplets, against the definition in fp64."""

import math
from functools import partial

import hypothesis.strategies as st
import metric_oracle
import pytest
import torch
from accuracy import assert_as_accurate, check_against_eager
from hypothesis import given, settings
from metric_cases import LABELS, assert_same, collapsed_batch, near_duplicates, results, scaled_rows, small_batch_tiles

from replearn_kernels import mine_triplets, triplet_margin_loss
from replearn_kernels.engine import native
from replearn_kernels.engine.problem import Inputs
from replearn_kernels.engine.schedules import Config, row_statistics
from replearn_kernels.objectives.semi_hard import triplets_of
from replearn_kernels.objectives.triplet_distance import TripletDistance

MINING = ["batch_hard", "semi_hard", "batch_all"]
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
EVERY = pytest.mark.parametrize("mining", MINING)
EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)

# Points on a line, of two classes: positives at distances 1 and 4, negatives at 3, 7, 2 and 6.
POINTS, CLASSES = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64), torch.tensor([5, 5, -1, -1])


@pytest.mark.parametrize(
    "mining, losses, triplets, violated",
    [
        ("batch_hard", [1, 2, 5, 1], 4, 4),  # 1 - 3 + 3, 1 - 2 + 3, 4 - 2 + 3, 4 - 6 + 3
        ("semi_hard", [1, 2, 4, 1], 4, 4),  # no negative of row 2 is beyond 4: its farthest is at 3
        ("batch_all", [1, 2, 9, 1], 8, 5),  # 4 - 7 + 3 is exactly 0: neither a loss nor a gradient
    ],
)
def test_hand_computed(mining, losses, triplets, violated, backend):
    for name in (backend, "eager"):
        loss = partial(triplet_margin_loss, POINTS, CLASSES, margin=3.0, mining=mining, backend=name)
        assert loss(reduction="none").tolist() == losses
        assert loss(reduction="sum").item() == sum(losses)
        assert loss(reduction="mean").item() == pytest.approx(sum(losses) / triplets, rel=1e-15)
        assert loss(reduction="mean_nonzero").item() == pytest.approx(sum(losses) / violated, rel=1e-15)


def test_hand_computed_gradient(backend):
    """Of all triplets: (0, 1, 2), (1, 0, 2), (2, 3, 0), (2, 3, 1) and (3, 2, 1) are violated."""
    for name in (backend, "eager"):
        loss = partial(triplet_margin_loss, labels=CLASSES, margin=3.0, reduction="sum", backend=name)
        of_all = results(partial(loss, mining="batch_all"), POINTS)[1]
        expected = torch.zeros(4)
        for a, p, n in [(0, 1, 2), (1, 0, 2), (2, 3, 0), (2, 3, 1), (3, 2, 1)]:
            to_p, to_n = 1 if a > p else -1, 1 if a > n else -1
            expected[a] += to_p - to_n
            expected[p] -= to_p
            expected[n] += to_n
        assert of_all.flatten().tolist() == expected.tolist()


def test_hand_computed_cosine(backend):
    """Rows at 0, 60, 90 and 180 degrees, of any length; a row of zeros is at 1 from all."""
    root = math.sqrt(3)
    x = torch.tensor([[2.0, 0], [0.5, root / 2], [0, 3], [-1, 0], [0, 0]], dtype=torch.float64)
    labels, triplets = torch.tensor([0, 0, 1, 1, 0]), [(0, 1, 2), (1, 0, 3), (2, 3, 1), (0, 4, 3), (4, 1, 2)]
    expected = [0.0, 0.0, 1 - (1 - root / 2) + 0.2, 0.0, 0.2]
    for name in (backend, "eager"):
        loss = partial(triplet_margin_loss, x, distance="cosine", backend=name, reduction="none")
        given_ones = loss(triplets=tuple(torch.tensor(triplets).t()))
        assert given_ones.tolist() == pytest.approx(expected, rel=1e-14, abs=1e-15)
        of_batch = results(lambda y: loss.func(y, labels, distance="cosine", mining="batch_all", backend=name), x)  # noqa: B023
        assert of_batch[0].isfinite() and not of_batch[1][4].any()


@EVERY
@EVERY_DISTANCE
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (17, 48)])
def test_is_the_definition(mining, distance, kind, n, d, backend, rng):
    x, labels = scaled_rows(rng, n, d), LABELS[kind](n)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64)
    config = dict(labels=labels, mining=mining, distance=distance, margin=0.4)
    for reduction in ("mean", "sum", "none", "mean_nonzero"):
        weight = upstream if reduction == "none" else 0.7
        if n < 17 and reduction == "sum":
            continue
        exact = results(partial(metric_oracle.triplet, reduction=reduction, **config), x, weight)
        for name in (backend, "eager"):
            ours = partial(triplet_margin_loss, reduction=reduction, backend=name, **config)
            assert_same(results(ours, x, weight), exact)


@EVERY_DISTANCE
@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("kind", LABELS)
def test_the_soft_margin_is_the_definition(mining, distance, kind, backend, rng):
    x, labels = scaled_rows(rng, 17, 48), LABELS[kind](17)
    upstream = torch.randn(17, generator=rng, dtype=torch.float64)
    config = dict(labels=labels, mining=mining, distance=distance, margin=None)
    for reduction in ("mean", "none"):
        weight = upstream if reduction == "none" else 0.7
        exact = results(partial(metric_oracle.triplet, reduction=reduction, **config), x, weight)
        for name in (backend, "eager"):
            ours = partial(triplet_margin_loss, reduction=reduction, backend=name, **config)
            assert_same(results(ours, x, weight), exact)


def test_the_soft_margin_of_any_gap(backend):
    """log(1 + exp(D_ap - D_an)), of positives nearer and farther by 0 to 800."""
    x = torch.tensor([[0.0], [0.0], [1.0], [30.0], [800.0]], dtype=torch.float64).requires_grad_()
    anchor, positive, negative = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 2], [0, 4, 1], [0, 1, 4]]).t()
    for name in (backend, "eager"):
        losses = triplet_margin_loss(
            x, triplets=(anchor, positive, negative), margin=None, reduction="none", backend=name
        )
        gaps = torch.tensor([-1.0, -29.0, 29.0, 800.0, -800.0], dtype=torch.float64)
        torch.testing.assert_close(losses, torch.logaddexp(gaps, gaps * 0), rtol=1e-15, atol=0)
        (gradient,) = torch.autograd.grad(losses[3], x)
        assert gradient.flatten().tolist() == [-1, 0, 0, 0, 1]  # row 1 is at a distance of 0


@EVERY_DISTANCE
def test_given_triplets(distance, backend, rng):
    """Any rows in any roles, repeated ones too, whatever mining says."""
    x = scaled_rows(rng, 30, 7)
    x[4] = 0
    triplets = torch.stack([torch.randperm(30, generator=rng)[:3] for _ in range(200)])
    triplets = torch.cat([triplets, triplets[:20], torch.tensor([[3, 3, 5], [2, 9, 9]])])
    upstream = torch.randn(len(triplets), generator=rng, dtype=torch.float64)
    for reduction in ("mean", "sum", "none", "mean_nonzero"):
        weight = upstream if reduction == "none" else 1.0
        config = dict(distance=distance, margin=None if reduction == "sum" else 0.3, reduction=reduction)
        exact = results(partial(metric_oracle.triplet, labels=None, triplets=triplets.tolist(), **config), x, weight)
        for name in (backend, "eager"):
            for columns in (tuple(triplets.t()), list(triplets.t().contiguous())):  # strided, and not
                ours = partial(triplet_margin_loss, triplets=columns, mining="batch_hard", backend=name, **config)
                assert_same(results(ours, x, weight), exact)


@EVERY
def test_mined_triplets_given_back_are_the_mined_loss(mining, backend, rng):
    """The margin selects nothing that the hinge does not: batch_all's sum is that of its list."""
    x, labels = scaled_rows(rng, 63, 100, torch.float32), torch.arange(63) // 4
    mined = mine_triplets(x, labels, mining=mining, margin=0.2)
    listed = partial(triplet_margin_loss, triplets=mined, reduction="sum", backend=backend)
    direct = partial(triplet_margin_loss, labels=labels, mining=mining, reduction="sum", backend=backend)
    assert_same(results(direct, x), results(listed, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_of_half_precision_are_mined_and_compared_alike(dtype, backend, rng):
    """Rows are normalised once, in fp32: at margin 0 no semi-hard triplet has a loss, and the two routes agree."""
    x, labels = torch.randn(256, 64, generator=rng).to(dtype), torch.arange(256) // 2
    direct = partial(triplet_margin_loss, labels=labels, distance="cosine", backend=backend)
    assert direct(x, margin=0.0) == 0
    listed = partial(triplet_margin_loss, triplets=mine_triplets(x, labels, distance="cosine"), distance="cosine")
    assert_same(results(direct, x), results(partial(listed, backend=backend), x), rtol=1e-5, atol=1e-6)


@EVERY
def test_cosines_do_not_depend_on_lengths(mining, backend, rng):
    x, labels = torch.randn(40, 8, generator=rng), torch.arange(40) // 4
    length = torch.tensor([1.0, 1e-18, 1e18, 1e-12]).repeat(10).unsqueeze(1)
    loss = partial(triplet_margin_loss, labels=labels, mining=mining, distance="cosine", backend=backend)
    torch.testing.assert_close(loss(x * length), loss(x))


def test_no_features_are_all_equal(backend):
    """d = 0: every distance is 0, and every loss the margin."""
    x, labels = torch.zeros(4, 0), torch.tensor([0, 0, 1, 1])
    for mining in ("batch_hard", "semi_hard", "batch_all"):
        for name in (backend, "eager"):
            assert triplet_margin_loss(x, labels, mining=mining, backend=name).item() == pytest.approx(0.2)


@EVERY
@EVERY_DISTANCE
@pytest.mark.parametrize("n, d, dtype", [(65, 100, torch.float32), (66, 1152, torch.float16), (64, 64, torch.bfloat16)])
def test_no_further_from_the_definition_than_eager(mining, distance, n, d, dtype, backend, rng):
    """Against fp64 of the same inputs. Eager is backend="eager": differences of the rows, fp32 statistics, and for
    cosines the rows normalised in fp32 and, but for semi_hard, rounded to the inputs' dtype."""
    x = scaled_rows(rng, n, d, dtype)
    if distance == "cosine":  # the rounding of the normalised rows is both's
        x = torch.nn.functional.normalize(x.double()).to(dtype)
    config = dict(labels=torch.arange(n) // 4, mining=mining, distance=distance)
    exact = results(partial(metric_oracle.triplet, **config), x.double())
    runs = [results(partial(triplet_margin_loss, backend=b, **config), x) for b in (backend, "eager")]
    assert [t.dtype for t in runs[0]] == [torch.float32, dtype]
    assert_as_accurate(*runs, exact)


@pytest.mark.parametrize("mining, per_class", [("batch_hard", 8), ("batch_all", 8), ("batch_all", 60)])
@EVERY_DISTANCE
@pytest.mark.parametrize("reduction", ["mean", "none", "mean_nonzero"])
def test_several_tiles(mining, per_class, distance, reduction, backend, rng):
    """On and off the diagonal; batch_all with few and with many thresholds: O(N^3) eager, so a smaller N."""
    n = 300 if mining == "batch_hard" else 130
    x, labels = scaled_rows(rng, n, 6), torch.randint(n // per_class, (n,), generator=rng)
    upstream = torch.randn(n if reduction == "none" else (), generator=rng, dtype=torch.float64)
    loss = partial(triplet_margin_loss, labels=labels, mining=mining, distance=distance, reduction=reduction)
    exact = results(partial(loss, backend="eager"), x, upstream)
    with small_batch_tiles(48):
        assert_same(results(partial(loss, backend=backend, memory_budget=0), x, upstream), exact)


@settings(max_examples=15, deadline=None)
@given(
    labels=st.lists(st.integers(-4, 4), min_size=1, max_size=40),
    d=st.integers(1, 9),
    margin=st.floats(0, 4),
    reduction=st.sampled_from(["mean", "sum", "none", "mean_nonzero"]),
    distance=st.sampled_from(DISTANCES),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend_name", ["torch", "cpp"])
@EVERY
def test_any_labels_equal_the_specification(mining, backend_name, labels, d, margin, reduction, distance, seed):
    rng, n = torch.Generator().manual_seed(seed), len(labels)
    if distance == "cosine":
        d += 1  # on a line all cosines are 1 or -1: ties, which rounding breaks
    x, labels = torch.randn(n, d, generator=rng, dtype=torch.float64), torch.tensor(labels)
    upstream = torch.randn(n if reduction == "none" else (), generator=rng, dtype=torch.float64)
    loss = partial(triplet_margin_loss, labels=labels, margin=margin, mining=mining, distance=distance)
    loss = partial(loss, reduction=reduction)
    exact = results(partial(loss, backend="eager"), x, upstream)
    assert_same(results(partial(loss, backend=backend_name), x, upstream), exact, atol=1e-10)


@EVERY
@EVERY_DISTANCE
def test_gradcheck(mining, distance, backend):
    """Random points: no ties, and no violation at 0."""
    x, labels = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 0, 2, 1, 0, 9])
    for reduction in ("mean", "none"):
        loss = partial(triplet_margin_loss, labels=labels, mining=mining, distance=distance, reduction=reduction)
        assert torch.autograd.gradcheck(partial(loss, backend=backend), x)


@EVERY
def test_strides(mining, backend, rng):
    loss, labels = partial(triplet_margin_loss, mining=mining, backend=backend), torch.arange(12) % 4
    wide = scaled_rows(rng, 12, 30)
    for view in (lambda x: x[:, 3:10], lambda x: x[:, ::3], lambda x: x.t()[:12, :12], lambda x: x[2:3].expand(12, 30)):
        plain = results(lambda x: loss(view(x).contiguous(), labels), wide)  # noqa: B023
        assert_same(results(lambda x: loss(view(x), labels), wide), plain, rtol=1e-12, atol=1e-13)  # noqa: B023


@EVERY
@pytest.mark.parametrize("kind", ["one class", "all distinct"])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "mean_nonzero"])
def test_without_a_triplet_zero(mining, kind, n, reduction, backend, rng):
    x = scaled_rows(rng, n, 6)
    for name in (backend, "eager"):
        loss = partial(triplet_margin_loss, labels=LABELS[kind](n), mining=mining, reduction=reduction, backend=name)
        value, gradient = results(loss, x)
        assert value.shape == ((n,) if reduction == "none" else ()) and (value == 0).all()
        assert not gradient.any()
    none = torch.zeros(0, dtype=torch.int64)
    value, gradient = results(partial(triplet_margin_loss, triplets=(none,) * 3, backend=backend), x)
    assert value == 0 and not gradient.any()


@EVERY
@EVERY_DISTANCE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(mining, distance, bad, backend, rng):
    """Also a row in no triplet, and a batch without any."""
    for dtype in (torch.float32, torch.float16):
        for kind in ("pairs", "all distinct", "one class"):
            x = torch.rand(40, 8, generator=rng).to(dtype)
            x[0, 2] = bad
            for name in (backend, "eager"):
                loss = partial(triplet_margin_loss, x, distance=distance, backend=name)
                for reduction in ("mean", "sum", "mean_nonzero"):
                    assert loss(LABELS[kind](40), mining=mining, reduction=reduction).isnan()
                losses = loss(LABELS[kind](40), mining=mining, reduction="none").isnan()
                assert losses[0] and (name == "eager" or losses.all())
                assert loss(triplets=(torch.tensor([1]), torch.tensor([2]), torch.tensor([3]))).isnan()


@EVERY
@EVERY_DISTANCE
def test_equal_rows_have_no_gradient_between_them(mining, distance, backend, rng):
    """Of equal distances the lower index is taken, by all; a distance of 0 has the gradient 0."""
    x = scaled_rows(rng, 9, 5)[torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4])]
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1, 1])
    loss = partial(triplet_margin_loss, labels=labels, mining=mining, distance=distance)
    same = results(partial(loss, backend=backend), x[:1].expand(9, 5))
    assert same[0].item() == pytest.approx(0.2, rel=1e-14) and same[1].abs().max() < 1e-15
    assert results(partial(loss, backend=backend), x)[1].isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_near_duplicates(mining, dtype, backend, rng):
    """Positives and negatives that all but coincide, far from the origin: eager forms all differences."""
    x, labels = near_duplicates(rng, dtype, 1e-3, 10.0, 7, 48, pairs=40)
    labels = labels.roll(3) // 2
    loss = partial(triplet_margin_loss, labels=labels, mining=mining)
    eager = partial(loss, backend="eager")
    if mining == "semi_hard":  # among equal distances rounding decides what is beyond: the same triplets for all
        eager = partial(eager, triplets=mine_triplets(x, labels, backend=backend))
    largest = torch.cdist(x.double(), x.double()).max().item()  # a difference of two has the rounding of either
    check_against_eager(partial(loss, backend=backend), eager, x, scale=largest)


@EVERY_DISTANCE
@pytest.mark.parametrize("kind", ["copies", "rows of zeros", "a lattice"])
def test_no_negative_is_beyond_at_the_same_distance(distance, kind):
    """By tiles of products too, as over ranks, whose rounding must not tell a negative from a positive's copy."""
    measure = TripletDistance(distance)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        n, d = (int(torch.randint(low, high, (), generator=g)) for low, high in ((8, 60), (1, 90)))
        x, labels = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)
        if kind == "copies":
            x = x[torch.randint(n // 2, (n,), generator=g)] + 5
        elif kind == "rows of zeros":
            x[torch.randint(n, (n // 3,), generator=g)] = 0
        elif distance != "cosine":  # where a lattice's unit rows have distances that are equal only nearly
            x = torch.randint(-2, 3, (n, d), generator=g).double()
        rows = torch.nn.functional.normalize(x) if measure.unit_rows else x
        inputs = Inputs(rows, [], None, None, labels, None, torch.ones((), dtype=x.dtype), None)
        for backend in ("torch", "cpp") if native.available() else ("torch",):
            config = Config("semi_hard", [measure.number], "none", backend, 0, [False, False])
            found, mined = triplets_of(*row_statistics(inputs, config)), mine_triplets(x, labels, distance=distance)
            losses = [triplet_margin_loss(x, triplets=t, distance=distance, reduction="none") for t in (found, mined)]
            torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


@EVERY
def test_a_collapsed_batch(mining, rng):
    """Every fourth pair is near; which negative is the nearest hangs on rounding, its distance does not. Which is the
    nearest beyond a positive does, and its distance with it: of semi_hard the loss of the triplets found."""
    x, labels = collapsed_batch(rng)
    loss = partial(triplet_margin_loss, labels=labels, mining=mining, reduction="sum", backend="cpp")
    value, gradient = results(loss, x)
    triplets = mine_triplets(x, labels) if mining == "semi_hard" else None
    exact, _ = results(partial(loss, triplets=triplets), x.double())
    assert gradient.isfinite().all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)


@EVERY
def test_bits_do_not_depend_on_the_run(mining, backend, rng):
    x, labels = scaled_rows(rng, 600, 32, torch.float32), torch.randint(90, (600,), generator=rng)
    loss = partial(triplet_margin_loss, labels=labels, mining=mining, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results(loss, x), results(loss, x)))


@EVERY
def test_backward_twice(mining, backend, rng):
    x = scaled_rows(rng, 20, 4).requires_grad_()
    call = partial(triplet_margin_loss, x, torch.arange(20) // 2, mining=mining, backend=backend)
    loss = call()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)
    (gradient,) = torch.autograd.grad(call(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@EVERY
@EVERY_DISTANCE
def test_rows_without_features(mining, distance, backend):
    """All distances are 0, or 1 of cosines: every triplet's loss is the margin."""
    x, labels = torch.zeros(5, 0, requires_grad=True), torch.tensor([0, 0, 1, 1, 1])
    options = dict(mining=mining, distance=distance, margin=0.5, reduction="none")
    loss = triplet_margin_loss(x, labels, backend=backend, **options)
    torch.testing.assert_close(loss, triplet_margin_loss(x, labels, backend="eager", **options))
    assert (loss >= 0.5).all() and (loss / 0.5 == (loss / 0.5).round()).all()
    loss.sum().backward()
    assert x.grad.shape == (5, 0)
