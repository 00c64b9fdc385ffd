"""siglip_loss: the paper's formula, groups, extreme scales and biases, units."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, unit_rows, value_and_gradients

from replearn_kernels import SigLipLoss, count_work, siglip_loss


def paper(image, text, scale, bias, positive=None):
    """Zhai et al., algorithm 1: -sum(log_sigmoid(labels * logits)) / n, labels 1 on the diagonal, -1 off it."""
    logits = image @ text.t() * scale + bias
    positive = torch.eye(*logits.shape, dtype=torch.bool) if positive is None else positive
    labels = 2 * positive.to(logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def test_hand_computed(backend):
    """Two orthogonal pairs, scale 2 ln 3, bias -ln 3: logits are ln 3 on the diagonal, -ln 3 off it; 4 log(4/3) / 2."""
    eye = torch.eye(2, dtype=torch.float64)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (2 * math.log(3), -math.log(3)))
    loss, d_image, _, d_scale, d_bias = value_and_gradients(
        lambda *a: siglip_loss(*a, backend=backend), eye, eye, scale, bias
    )
    assert loss.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-14)
    w = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 8  # -z sigmoid(-z l) / N
    torch.testing.assert_close(d_image, w * scale)
    assert d_scale.item() == pytest.approx(-0.25) and d_bias.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (63, 48), (257, 100), (65, 640), (1030, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_as_accurate_as_eager(n, d, dtype, backend, rng):
    x, y = unit_rows(rng, n, d, dtype=dtype), unit_rows(rng, n, d, dtype=dtype)
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    half = dtype in (torch.float16, torch.bfloat16)
    check_against_eager(
        lambda *a: siglip_loss(*a, backend=backend),
        lambda *a: paper(*a).float() if half and a[0].dtype == dtype else paper(*a),
        x, y, torch.tensor(10.0, dtype=scalar), torch.tensor(-10.0, dtype=scalar),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["few", "one group", "all distinct", "none shared"])
def test_groups(reduction, kind, backend, rng):
    """N != M; several positives for a row, or none."""
    n, m, d = 37, 61, 12
    x, y = (torch.randn(size, d, generator=rng, dtype=torch.float64) for size in (n, m))
    rows, columns = {
        "few": lambda: (torch.randint(-4, 9, (n,)), torch.randint(-4, 9, (m,))),
        "one group": lambda: (torch.zeros(n).long(), torch.zeros(m).long()),
        "all distinct": lambda: (torch.arange(n), torch.arange(m) * 2**33),
        "none shared": lambda: (torch.arange(n), -1 - torch.arange(m)),
    }[kind]()
    upstream = torch.randn(n, generator=rng, dtype=torch.float64)

    def exact(x, y, scale, bias):
        z = torch.where(rows[:, None] == columns, 1.0, -1.0).double()
        losses = -F.logsigmoid(z * (scale * x @ y.t() + bias)).sum(1)
        return {"mean": losses.sum() / n, "sum": losses.sum(), "none": (losses * upstream).sum()}[reduction]

    def ours(x, y, scale, bias, backend):
        loss = siglip_loss(
            x, y, scale, bias, query_group=rows, key_group=columns, reduction=reduction, backend=backend
        )
        return (loss * upstream).sum() if reduction == "none" else loss

    inputs = x, y, torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    expected = value_and_gradients(exact, *inputs)
    for name in (backend, "eager"):
        for a, b in zip(value_and_gradients(partial(ours, backend=name), *inputs), expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale, bias", [(1000.0, -10.0), (1000.0, -1000.0), (-50.0, 3.0), (0.0, -10.0), (1e-3, 80.0)])
@pytest.mark.parametrize("kind", ["random", "aligned"])
def test_any_scale_and_bias(scale, bias, kind, backend, rng):
    x = unit_rows(rng, 130, 64)
    y = unit_rows(rng, 130, 64) if kind == "random" else F.normalize(x + 1e-3 * torch.randn(130, 64, generator=rng))
    check_against_eager(
        lambda *a: siglip_loss(*a, backend=backend), paper, x, y, torch.tensor(scale), torch.tensor(bias), scale=scale
    )


def test_a_tiny_loss_keeps_its_digits(backend):
    """softplus(-50) is 2e-22, far below the rounding of 1."""
    x = torch.eye(2)
    losses = siglip_loss(x, x, 100.0, -50.0, reduction="none", backend=backend)
    expected = 2 * math.log1p(math.exp(-50.0))
    assert losses.tolist() == pytest.approx([expected, expected], rel=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(grouped, reduction, backend):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = leaf(5, 4), leaf(5 + grouped, 4), leaf(), leaf()
    groups = dict(query_group=torch.tensor([0, 1, 1, 2, 5]), key_group=torch.tensor([1, 1, 0, 5, 7, 0]))
    assert torch.autograd.gradcheck(
        lambda *a: siglip_loss(*a, **(groups if grouped else {}), reduction=reduction, backend=backend), inputs
    )


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_only_where_asked(wanted, backend, rng):
    """The losses come from the same sweep, whatever else it has to do."""
    tensors = [unit_rows(rng, 40, 8), unit_rows(rng, 40, 8), torch.tensor(5.0), torch.tensor(-2.0)]
    exact = value_and_gradients(paper, *tensors)
    tensors[wanted] = tensors[wanted].clone().requires_grad_()
    loss = siglip_loss(*tensors, backend=backend)
    torch.testing.assert_close(loss.detach(), exact[0])
    torch.testing.assert_close(torch.autograd.grad(loss, tensors[wanted])[0], exact[1 + wanted])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("groups", [False, True])
def test_any_one_gradient(reduction, wanted, groups, backend, rng):
    """Of the bias too, which is a sum that only the passes over all tiles make."""
    inputs = [unit_rows(rng, 8, 4), unit_rows(rng, 8, 4), torch.tensor(5.0), torch.tensor(-3.0)]
    inputs[wanted].requires_grad_()
    options = dict(query_group=torch.arange(8) % 3, key_group=torch.arange(8) % 2) if groups else {}
    options["reduction"] = reduction
    ours, exact = (
        torch.autograd.grad(siglip_loss(*inputs, backend=name, **options).sum(), inputs[wanted])[0]
        for name in (backend, "eager")
    )
    assert exact.any()
    torch.testing.assert_close(ours, exact)


def test_units(backend, rng):
    """3 for losses and gradients in one sweep, 1 without gradients, and 4 under an upstream gradient per row."""
    n, d = 2100, 16
    x, y = unit_rows(rng, n, d).requires_grad_(), unit_rows(rng, n, d).requires_grad_()
    for reduction, expected in (("mean", 3.0), ("none", 4.0)):
        with count_work() as work:
            siglip_loss(x, y, 10.0, -10.0, reduction=reduction, backend=backend).sum().backward()
        assert work.units(n, n, d) == expected
        assert work.workspace_bytes < 6 * 2**20
    with torch.no_grad(), count_work() as work:
        siglip_loss(x, y, 10.0, -10.0, backend=backend)
    assert work.units(n, n, d) == 1.0


def test_module_as_open_clip_calls_it(rng):
    x, y, scale, bias = unit_rows(rng, 30, 16), unit_rows(rng, 30, 16), torch.tensor(10.0), torch.tensor(-10.0)
    module = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="bidir")
    losses = module(image_features=x, text_features=y, logit_scale=scale, logit_bias=bias, output_dict=True)
    torch.testing.assert_close(losses["contrastive_loss"], paper(x, y, scale, bias))
    torch.testing.assert_close(module(x, y, scale), paper(x, y, scale, 0.0))
    groups = dict(query_group=torch.arange(30) % 4, key_group=torch.arange(30) % 3)
    grouped = SigLipLoss(normalize=True)(3 * x, y, scale, bias, **groups)
    torch.testing.assert_close(grouped, siglip_loss(x, y, scale, bias, **groups))
