"""arcface_loss and cosface_loss: the papers' formulas by trigonometry, the ends of the cosine, units."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, unit_rows, value_and_gradients

from replearn_kernels import ArcFaceLoss, CosFaceLoss, arcface_loss, cosface_loss, count_work

LOSSES = {"arcface": arcface_loss, "cosface": cosface_loss}


def paper(name, embeddings, weight, labels, margin, scale):
    """By angles: cos(theta + m) while theta + m <= pi, beyond it cos(theta) - m sin(m); or cos(theta) - m."""
    cosine = F.normalize(embeddings) @ F.normalize(weight).t()
    rows = torch.arange(len(labels))
    true = cosine[rows, labels]
    if name == "arcface":
        theta = true.acos()
        true = torch.where(theta + margin <= math.pi, (theta + margin).cos(), true - margin * math.sin(margin))
    else:
        true = true - margin
    logits = cosine.index_put((rows, labels), true) * scale
    return F.cross_entropy(logits, labels)


def test_hand_computed(backend):
    """Two classes at right angles, an embedding at 60 degrees to its own: cos(60 + 30) = 0 and 0.5 - 0.3."""
    x = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64) * 7
    weight, label = torch.eye(2, dtype=torch.float64) * 3, torch.tensor([0])
    others = math.sqrt(0.75) * 2
    arc = arcface_loss(x, weight, label, margin=math.pi / 6, scale=2.0, backend=backend)
    cos = cosface_loss(x, weight, label, margin=0.3, scale=2.0, backend=backend)
    assert arc.item() == pytest.approx(math.log(math.exp(others) + 1), rel=1e-14)
    assert cos.item() == pytest.approx(math.log(math.exp(others) + math.exp(0.4)) - 0.4, rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.5])
@pytest.mark.parametrize("b, c, d", [(1, 1, 3), (3, 2, 2), (63, 257, 48), (300, 1100, 16)])
def test_is_the_papers_formula(name, margin, b, c, d, backend, rng):
    x, weight = (torch.randn(n, d, generator=rng, dtype=torch.float64) for n in (b, c))
    labels = torch.randint(c, (b,), generator=rng)
    expected = value_and_gradients(lambda x, w: paper(name, x, w, labels, margin, 16.0), x, weight)
    loss = partial(LOSSES[name], labels=labels, margin=margin, scale=16.0)
    for chosen in (backend, "eager"):
        for memory_budget in (0, 2**28):
            ours = value_and_gradients(partial(loss, backend=chosen, memory_budget=memory_budget), x, weight)
            for a, b in zip(ours, expected):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_accurate_as_eager(name, dtype, backend, rng):
    x, weight = (torch.randn(n, 64, generator=rng).to(dtype) for n in (65, 300))
    labels = torch.randint(300, (65,), generator=rng)
    check_against_eager(
        lambda x, w: LOSSES[name](x, w, labels, backend=backend),
        lambda x, w: LOSSES[name](x, w, labels, backend="eager"),
        x, weight, scale=64.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("direction", [1, -1])
def test_gradients_are_finite_at_the_ends_of_the_cosine(name, dtype, direction, backend):
    """Embeddings on their class centre, and opposite to it, where the derivative of the angle is infinite."""
    weight = torch.randn(5, 8, dtype=dtype)
    labels = torch.arange(5)
    value, d_x, d_weight = value_and_gradients(
        lambda x, w: LOSSES[name](x, w, labels, backend=backend), weight * direction, weight
    )
    assert value.isfinite() and d_x.isfinite().all() and d_weight.isfinite().all()
    assert max(d_x.abs().max(), d_weight.abs().max()) < 200  # the scale is 64, and a row's norm may be below 1


def test_the_loss_falls_with_the_angle_past_pi(backend):
    """A larger angle to the true class never lowers the loss, also where angle and margin exceed pi."""
    angle = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    weight = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    losses = arcface_loss(
        x, weight[:1], torch.zeros(400).long(), margin=0.8, scale=4.0, reduction="none", backend=backend
    )
    assert torch.equal(losses, torch.zeros(400, dtype=torch.float64))  # one class: certain, whatever the angle
    weight = torch.cat([weight[:1], torch.tensor([[0.0, 0.0]], dtype=torch.float64)])  # cosine 0 with all
    losses = arcface_loss(
        x, weight, torch.zeros(400).long(), margin=0.8, scale=4.0, reduction="none", backend=backend
    )
    within = angle + 0.8 <= math.pi
    assert (losses[within].diff() > 0).all() and (losses[~within].diff() > 0).all()


def near_their_centres(angle, dtype, rng, rows=64, d=512):
    """Embeddings at ``angle`` from their classes, whose neighbours are as near: the margin counts, and so does P."""
    weight = unit_rows(rng, 100, d, dtype=torch.float64)
    weight = torch.cat([weight, F.normalize(weight + angle * unit_rows(rng, 100, d, dtype=torch.float64))])
    x = weight[:rows] + angle * unit_rows(rng, rows, d, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), torch.arange(rows)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("chosen", ["torch", "cpp", "eager"])
def test_near_the_centre(name, dtype, tolerance, angle, chosen, rng):
    """As the very same numbers have it in fp64, to the rounding of gradients, and in fp32 of logits and unit rows."""
    x, weight, labels = near_their_centres(angle, dtype, rng)

    def loss(x, w, backend=chosen):
        return LOSSES[name](x, w, labels, backend=backend)

    exact = value_and_gradients(partial(loss, backend="eager"), x.double(), weight.double())
    for ours, truth in zip(value_and_gradients(loss, x, weight), exact):
        # A logit of 64 has an error of 64 eps, a relative one in its probability; an angle one of eps.
        assert (ours.double() - truth).norm() <= (tolerance + (64 + 1 / angle) * 2**-23) * truth.norm()


def test_near_the_centre_under_autocast(rng):
    """Rows of fp32 are rounded to bf16, and then exact."""
    x, weight, labels = near_their_centres(1e-2, torch.float32, rng)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(lambda x, w: arcface_loss(x, w, labels), x, weight)
    rounded = [t.bfloat16().double() for t in (x, weight)]
    exact = value_and_gradients(lambda x, w: arcface_loss(x, w, labels, backend="eager"), *rounded)
    for a, b in zip(ours, exact):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 3])
def test_on_the_centre(name, dtype, length, backend):
    """Nothing turns a row of its class's direction towards it; others pull along it, or at right angles."""
    a, w = length * torch.eye(3, dtype=dtype)[:1], torch.eye(3, dtype=dtype)[[0, 0, 1]]
    value, d_a, d_w = value_and_gradients(
        lambda a, w: LOSSES[name](a, w, torch.tensor([0]), scale=8.0, backend=backend), a, w
    )
    assert value.isfinite() and (d_a[0, [0, 2]] == 0).all() and (d_w[:2, [0, 2]] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_longer_class_of_the_same_direction(name, dtype, backend, rng):
    """Its unit row may be rounded otherwise than the row's: that is no angle, whose gradient would be of length 1."""
    x = F.normalize(torch.randn(6, 48, generator=rng, dtype=torch.float64)).to(dtype)
    loss = partial(LOSSES[name], labels=torch.arange(6), backend=backend)
    same, longer = (value_and_gradients(loss, x, size * x)[1] for size in (1, 3))
    torch.testing.assert_close(longer, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("margin", [0.5, 2.3, 2.4, 2.8, math.pi])
@pytest.mark.parametrize("chosen", ["torch", "cpp", "eager"])
def test_the_loss_rises_with_the_angle_at_any_margin(margin, chosen):
    """Where angle and margin exceed pi, too; up to a margin of 2.33 by the published c - m sin m."""
    angle = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    losses = arcface_loss(
        x, weight, torch.zeros(1000).long(), margin=margin, scale=4.0, reduction="none", backend=chosen
    )
    assert (losses.diff() > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_of_rows_and_weights_do_not_matter(name, backend, rng):
    x, weight = torch.randn(8, 4, generator=rng), torch.randn(5, 4, generator=rng)
    labels, loss = torch.arange(8) % 5, LOSSES[name]
    expected = loss(x, weight, labels, backend="eager")
    for size in (2.0**-60, 2.0**60):  # beyond, squares are not in fp32's range
        torch.testing.assert_close(loss(size * x, weight, labels, backend=backend), expected)
        scaled = (size * weight).requires_grad_()
        ours = loss(x, scaled, labels, backend=backend)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(loss(x, scaled, labels, backend="eager"), expected)
        ours.backward()
        as_given = weight.clone().requires_grad_()
        loss(x, as_given, labels, backend=backend).backward()
        torch.testing.assert_close(scaled.grad * size, as_given.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_too_short_to_be_squared(name, backend, rng):
    """They count by the length that can be, as the formula has it; a class of zeros has the gradient 0."""
    x, weight = torch.randn(8, 4, generator=rng), torch.randn(5, 4, generator=rng)
    weight[:2] *= torch.tensor([[0.0], [6e-20]])
    results = []
    for of in (backend, "eager"):
        leaf = weight.clone().requires_grad_()
        loss = LOSSES[name](x, leaf, torch.arange(8) % 5, backend=of)
        loss.backward()
        results.append((loss, leaf.grad / leaf.grad.abs().amax(1, keepdim=True).clamp(min=1e-30)))
    for ours, formula in zip(*results):
        torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-5)
    assert (results[0][1][0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction, backend):
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda x, w: LOSSES[name](x, w, labels, scale=4.0, reduction=reduction, backend=backend), (x, weight)
    )


@pytest.mark.parametrize("trained", ["both", "embeddings", "weight"])
def test_units(trained, backend, rng):
    """Statistics, recomputation and a product for each side that is trained; what is kept is not recomputed."""
    b, c, d = 64, 40_000, 16
    x = torch.randn(b, d, generator=rng).requires_grad_(trained != "weight")
    weight = torch.randn(c, d, generator=rng).requires_grad_(trained != "embeddings")
    for memory_budget, expected in ((0, 4), (2**28, 3)):
        with count_work() as work:
            arcface_loss(x, weight, torch.arange(b), backend=backend, memory_budget=memory_budget).backward()
        assert work.units(b, c, d) in (expected - (trained != "both"), 3 - (trained != "both"))


@pytest.mark.parametrize("module, function", [(ArcFaceLoss, arcface_loss), (CosFaceLoss, cosface_loss)])
def test_modules_own_the_weight(module, function, rng):
    loss = module(8, 5, margin=0.4, scale=10.0)
    assert loss.weight.shape == (5, 8) and list(loss.state_dict()) == ["weight"] and "classes=5" in repr(loss)
    x, labels = torch.randn(6, 8, generator=rng), torch.randint(5, (6,), generator=rng)
    torch.testing.assert_close(loss(x, labels), function(x, loss.weight, labels, margin=0.4, scale=10.0))
    torch.testing.assert_close(loss.logits(x), 10 * F.normalize(x) @ F.normalize(loss.weight).t())
