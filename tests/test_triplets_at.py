"""The triplet loss over given triplets: values and gradients against autograd over the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from replearn_kernels import mine_triplets
from replearn_kernels.engine import native
from replearn_kernels.engine.triplets import triplet_loss_at

DISTANCES = ("euclidean", "squared_euclidean", "cosine")


def naive(x, anchor, positive, negative, margin, distance):
    """The formula on gathered rows; for "cosine" x has unit rows and rows of zeros."""

    def measure(i, j):
        if distance == "cosine":
            return 1 - (x[i] * x[j]).sum(1)
        squared = (x[i] - x[j]).pow(2).sum(1)
        return squared if distance == "squared_euclidean" else squared.sqrt()

    return F.relu(measure(anchor, positive) - measure(anchor, negative) + margin)


def some_triplets(n, count):
    """Random rows, each triplet's of three kinds, so that no distance is 0."""
    return (torch.randint(n // 3, (count,)) * 3 + kind for kind in range(3))


def sample(n, d, distance, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64)
    return (F.normalize(x) if distance == "cosine" else x).to(dtype)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("d", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients(distance, d, dtype, tolerance, backend):
    x = sample(60, d, distance, dtype)
    triplets = list(some_triplets(60, 500))
    upstream = torch.rand(500, dtype=dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = triplet_loss_at(ours, *triplets, 0.3, distance, backend)
    expected = naive(exact, *triplets, 0.3, distance)
    assert loss.dtype == dtype and 0 < (loss == 0).sum() < 500
    # Distances have relative errors; a loss is the difference of two.
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=tolerance * max(1.0, expected.max().item()))
    (gradient,) = torch.autograd.grad(loss, ours, upstream)
    (exact_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    if distance == "cosine":  # 1 - <u, v> and |u - v|^2 / 2 differ along u, which unit rows' own gradient removes
        gradient, exact_gradient = (
            g - (g * y).sum(1, keepdim=True) * y for g, y in ((gradient, x), (exact_gradient, exact.detach()))
        )
    size = exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance, backend):
    x, triplets = sample(12, 3, distance).requires_grad_(), list(some_triplets(12, 20))
    torch.autograd.gradcheck(lambda x: triplet_loss_at(x, *triplets, 0.5, distance, backend), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_once(dtype, backend):
    x, triplets = torch.randn(30, 8).to(dtype), list(some_triplets(30, 90))
    half, single = x.clone().requires_grad_(), x.float().requires_grad_()
    losses = [triplet_loss_at(leaf, *triplets, 0.2, "euclidean", backend) for leaf in (half, single)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, (half, single))]
    assert gradients[0].dtype == dtype and torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("distance, slope", [("euclidean", 1.0), ("squared_euclidean", 2.0)])
def test_zero_distances_and_zero_losses_have_zero_gradients(distance, slope, backend):
    # Row 0 is at distance 0 from row 1 and 1 from row 2: 0 - 1 + margin.
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    triplet = [torch.tensor([index]) for index in (0, 1, 2)]
    for margin, expected in ((1.0, 0.0), (0.5, 0.0), (1.5, 0.5)):
        leaf = x.clone().requires_grad_()
        loss = triplet_loss_at(leaf, *triplet, margin, distance, backend)
        assert loss.item() == expected
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        by_hand = torch.zeros(3, 2)
        if expected:  # of -|x_0 - x_2|, or its square: rows 0 and 2 shall part
            by_hand[0, 0], by_hand[2, 0] = slope, -slope
        assert torch.equal(gradient, by_hand)


def test_cosine_distance_from_a_row_of_zeros_is_1(backend):
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    triplets = [torch.tensor(index) for index in ([0, 1, 1], [1, 0, 2], [2, 3, 0])]
    loss = triplet_loss_at(x, *triplets, 0.25, "cosine", backend)
    torch.testing.assert_close(loss, torch.tensor([0.25, 1 - 0.4 + 0.25, 1 - 1 + 0.25]))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    # Only D_13 of the second triplet (negative) and D_12 of the third (positive) have one.
    expected = torch.zeros(4, 2)
    rows = x.detach()
    expected[1] = -(rows[1] - rows[3]) + (rows[1] - rows[2])
    expected[3], expected[2] = rows[1] - rows[3], rows[2] - rows[1]
    torch.testing.assert_close(gradient, expected)


def test_nan_stays_nan(backend):
    x = torch.randn(6, 3)
    x[1] = float("nan")
    x.requires_grad_()
    loss = triplet_loss_at(x, *(torch.tensor(i) for i in ([0, 3], [1, 4], [2, 5])), 5.0, "euclidean", backend)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss[0].isnan() and loss[1].isfinite()
    assert gradient[:2].isnan().all() and gradient[3:].isfinite().all()


@pytest.mark.parametrize("n, d, count", [(0, 3, 0), (4, 0, 6), (1, 3, 1), (5, 3, 0)])
def test_nothing_to_do(n, d, count, backend):
    x = torch.randn(n, d, requires_grad=True)
    triplets = [torch.zeros(count, dtype=torch.int64)] * 3
    loss = triplet_loss_at(x, *triplets, 0.5, "euclidean", backend)
    assert torch.equal(loss, torch.full((count,), 0.5))
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], torch.zeros(n, d))


def test_strides(backend):
    x = torch.randn(8, 30).t()
    triplets = [index.repeat_interleave(2)[::2] for index in some_triplets(30, 40)]
    assert torch.equal(
        triplet_loss_at(x, *triplets, 0.2, "euclidean", backend),
        triplet_loss_at(x.contiguous(), *(t.contiguous() for t in triplets), 0.2, "euclidean", backend),
    )


def test_threads_do_not_matter():
    if not native.available():
        pytest.skip(native.why_missing())
    x, labels = torch.randn(600, 32, requires_grad=True), torch.randint(30, (600,))
    triplets = mine_triplets(x, labels, mining="batch_all_semi_hard")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = triplet_loss_at(x, *triplets, 0.2, "euclidean", "cpp")
            results.append((loss.detach(), torch.autograd.grad(loss.mean(), x)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("bad", [-1, 7])
def test_indices_out_of_range(bad):
    if not native.available():
        pytest.skip(native.why_missing())
    x, good, wrong = torch.randn(7, 2), torch.tensor([0, 1]), torch.tensor([2, bad])
    ops = torch.ops.replearn_kernels
    for triplets in ((wrong, good, good), (good, wrong, good), (good, good, wrong)):
        with pytest.raises(ValueError, match=r"triplets must be in \[0, 7\)"):
            triplet_loss_at(x, *triplets, 0.2, "euclidean", "cpp")
    for pairs in ((wrong, good), (good, wrong)):
        with pytest.raises(RuntimeError, match=r"indices of pairs must be in \[0, 7\)"):
            ops.add_differences_(torch.zeros(7, 2), x, *pairs, torch.ones(2))
    with pytest.raises(RuntimeError, match="j must be a contiguous int64"):
        ops.pair_squares(x, good, good.int())
    with pytest.raises(RuntimeError, match=r"weight must be .* \[2\]"):
        ops.add_differences_(torch.zeros(7, 2), x, good, good, torch.ones(3))


def test_differentiable_once(backend):
    x = torch.randn(9, 2, requires_grad=True)
    loss = triplet_loss_at(x, *some_triplets(9, 5), 3.0, "euclidean", backend)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda x: triplet_loss_at(x, *some_triplets(9, 5), 0.2, "euclidean", backend).sum())(x)


@pytest.mark.parametrize("distance", DISTANCES)
def test_opcheck(distance, backend):
    x, triplets = sample(9, 4, distance, torch.float32).requires_grad_(), list(some_triplets(9, 6))
    ops = torch.ops.replearn_kernels
    torch.library.opcheck(ops.triplet_losses.default, (x, *triplets, 0.4, distance, backend))
    if backend == "cpp":
        torch.library.opcheck(ops.pair_squares.default, (x.detach(), *triplets[:2]))
        gradient = torch.zeros(9, 4)
        torch.library.opcheck(ops.add_differences_.default, (gradient, x.detach(), *triplets[:2], torch.rand(6)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend):
    torch._dynamo.reset()
    x, triplets = torch.randn(21, 4), list(some_triplets(21, 30))

    def step(x, *triplets):
        return triplet_loss_at(x * 2, *triplets, 0.2, "euclidean", backend).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    results = []
    for function in (step, compiled):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, *triplets)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_mined_and_compiled_in_one_graph(backend):
    """The number of triplets is known only when the graph runs."""
    torch._dynamo.reset()
    labels = torch.randint(4, (24,))

    def step(x):
        triplets = mine_triplets(x, labels, backend=backend)
        return triplet_loss_at(x, *triplets, 0.2, "euclidean", backend).mean()

    x = torch.randn(24, 5)
    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            loss = function(leaf)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
