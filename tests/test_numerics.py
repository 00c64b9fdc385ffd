"""Extreme scales, small probabilities, NaN, determinism, and gradients beyond the range of half precision."""

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, eager_clip, eager_info_nce, unit_rows, value_and_gradients

from replearn_kernels import clip_loss, info_nce_loss
from replearn_kernels.functional import rows


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1000.0, -50.0, 0.0])
@pytest.mark.parametrize("kind", ["random", "aligned", "opposed", "orthogonal"])
def test_any_scale(scale, kind, backend, rng):
    n, d = 130, 64
    x = unit_rows(rng, n, d)
    y = {
        "random": lambda: unit_rows(rng, n, d),
        "aligned": lambda: F.normalize(x + 1e-3 * torch.randn(n, d, generator=rng), dim=1),
        "opposed": lambda: -x,
        "orthogonal": lambda: torch.eye(d)[torch.arange(n) % d],
    }[kind]()
    if kind == "orthogonal":  # cosines of exactly 0 but for a few: exp of a fixed shift would underflow
        x = torch.eye(d)[(torch.arange(n) + 1) % d]
    check_against_eager(
        lambda *a: clip_loss(*a, backend=backend), eager_clip, x, y, torch.tensor(scale), scale=scale
    )


def test_rows_and_columns_of_very_different_size(backend, rng):
    """One row's logits are 1,000 above all others: a shift shared by the tile would flush the others to 0."""
    x, y = torch.randn(70, 16, generator=rng), torch.randn(70, 16, generator=rng)
    x[3] *= 300
    y[50] *= 300
    check_against_eager(lambda *a: clip_loss(*a, backend=backend), eager_clip, x, y, torch.tensor(2.0))


def test_positive_is_the_largest(backend):
    """A loss of 1e-5 under logits of 1,000 keeps its digits: max - positive is exactly 0."""
    x = torch.eye(8)
    loss = info_nce_loss(x, x * 0.5 + 0.4885, logit_scale=1000.0, backend=backend)
    exact = eager_info_nce(x.double(), (x * 0.5 + 0.4885).double(), torch.tensor(1000.0))
    assert loss.item() == pytest.approx(exact.item(), abs=1e-9)


def test_one_row_has_no_loss(backend):
    x = torch.randn(1, 4, requires_grad=True)
    loss = clip_loss(x, torch.randn(1, 4), 1000.0, backend=backend)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_hidden(bad, backend, rng):
    x, y = torch.randn(40, 8, generator=rng), torch.randn(40, 8, generator=rng)
    x[7, 2] = bad
    losses = info_nce_loss(x, y, backend=backend, reduction="none")
    assert losses[7].isnan() and losses[[0, 39]].isfinite().all()
    assert clip_loss(x, y, 1.0, backend=backend).isnan()


@pytest.mark.parametrize("symmetric", [False, True])
def test_deterministic(symmetric, backend, rng):
    x, y = unit_rows(rng, 1500, 32), unit_rows(rng, 1500, 32)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return value_and_gradients(
                lambda q, k: info_nce_loss(
                    q, k, logit_scale=20.0, symmetric=symmetric, backend=backend, memory_budget=0
                ),
                x, y,
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)

    for a, b in zip(run(2), run(2)):
        assert torch.equal(a, b)


def test_half_gradients_survive_a_loss_scaler(backend, rng):
    """1 / N is far below fp16's smallest normal number times a gradient: only the final product may round."""
    n, d = 2048, 16
    x, y = (unit_rows(rng, n, d, dtype=torch.float16) for _ in range(2))
    scaler = 65536.0

    def run(dtype, backend):
        q = x.detach().to(dtype).requires_grad_()
        loss = info_nce_loss(q, y.to(dtype), logit_scale=0.05, backend=backend, memory_budget=0) * scaler
        return torch.autograd.grad(loss, q)[0]

    exact = run(torch.float64, "eager")
    ours = run(torch.float16, backend)
    assert exact.abs().max() / scaler < 2**-14  # subnormal before the scaler
    error = (ours.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-10


@pytest.mark.parametrize("weight", [1e-18, 1e-25, 1e-30])
def test_rows_of_tiny_weight_keep_the_direction_of_their_gradient(weight, backend, rng):
    """Two blocks that do not meet, one with a tiny upstream gradient: relative to itself as exact as the other's."""
    x, y = torch.zeros(2, 64, 8).unbind()
    for t in (x, y):
        t[:32, :4], t[32:, 4:] = torch.randn(2, 32, 4, generator=rng) * 0.3
        t[:32, 3], t[32:, 7] = 6, 6

    def gradient(x, name):
        x = x.clone().requires_grad_()
        loss = clip_loss(x, y.to(x.dtype), 1.0, reduction="none", backend=name)
        loss.backward(torch.where(torch.arange(64) < 32, weight, 1.0).to(loss.dtype))
        return x.grad[:32, :4].double()

    exact = gradient(x.double(), "eager")
    assert (gradient(x, backend) - exact).norm() <= 1e-5 * exact.norm()


def test_tiny_and_mixed_upstream_gradients(backend, rng):
    """reduction="none" under upstream gradients of 1e-30, 0 and 1e30, and under all zeros."""
    x, y = unit_rows(rng, 6, 4, dtype=torch.float64), unit_rows(rng, 6, 4, dtype=torch.float64)
    for upstream in (torch.tensor([1e-30, 0, 1, 1e30, -1, 2]), torch.zeros(6)):
        gradients = []
        for name in (backend, "eager"):
            q = x.clone().requires_grad_()
            info_nce_loss(q, y, logit_scale=3.0, reduction="none", backend=name).backward(upstream.double())
            gradients.append(q.grad)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_of_rows_of_zeros_when_normalised(order, rng):
    """0, in both orders, and those of other rows as if there were none."""
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    x[2] = 0
    upstream = torch.randn(6, 3, generator=rng, dtype=torch.float64)

    def derivative(rows, weights, normalise):
        rows = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((normalise(rows) * weights).sum(), rows, create_graph=order == 2)
        if order == 2:
            (gradient,) = torch.autograd.grad(gradient.square().sum(), rows)
        return gradient

    found, others = derivative(x, upstream, rows.unit_rows), [0, 1, 3, 4, 5]
    expected = derivative(x[others], upstream[others], torch.nn.functional.normalize)
    assert (found[2] == 0).all()
    torch.testing.assert_close(found[others], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-38, 1e-44])
@pytest.mark.parametrize("name", ["clip", "info_nce", "symmetric", "target", "queue", "siglip", "siglip_groups"])
@pytest.mark.parametrize("size", [1.0, 1e15])
def test_a_scale_of_0_and_nearly(scale, name, size, backend, rng):
    """Every logit is 0, whatever the similarities: features of 1e15 have some of 1e30, for which 1e-30 is not 0."""
    x, y = (size * torch.randn(40, 8, generator=rng) for _ in range(2))
    labels = torch.arange(40) % 7
    exact = loss_cases.value_and_gradients(name, x.double(), y.double(), labels, scale, backend="eager")
    for a, b in zip(loss_cases.value_and_gradients(name, x, y, labels, scale, backend=backend), exact):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_scale_of_0(backend, rng):
    x, y = (torch.randn(70, 8, generator=rng) for _ in range(2))
    check_against_eager(lambda *a: clip_loss(*a, backend=backend), eager_clip, x, y, torch.tensor(0.0))
