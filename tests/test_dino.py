"""The DINO losses: values and gradients, against hand-computed numbers and a loop over samples and pairs of views."""

import math

import pytest
import torch
from accuracy import check_against_eager, value_and_gradients
from dino_oracle import DTYPES, head_loss, heads, logits, naive, naive_head, results

from replearn_kernels import dino_head_loss, dino_loss
from replearn_kernels.engine import prototypes

SHAPES = [  # V, U, B, K, d
    (1, 1, 3, 5, 4), (3, 1, 2, 1, 3), (1, 2, 1, 65, 24), (2, 2, 3, 257, 48), (5, 2, 3, 65, 1), (2, 4, 2, 8, 7),
    (4, 3, 1, 257, 2),
]  # fmt: skip
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Also with one sample, or 16 prototypes, a tile."""
    if request.param == "many tiles":
        monkeypatch.setattr(prototypes, "CPU_TILE", 1)
        monkeypatch.setattr(prototypes, "SMALLEST_WIDTH", 16)


# -- values and gradients ----------------------------------------------------------------------------------------------


def test_hand_computed():
    """Two teacher and three student views of one sample, two prototypes; four pairs."""
    student_temp, teacher_temp = 0.5, 0.25
    p_s = torch.tensor([[1 / 8, 7 / 8], [1 / 2, 1 / 2], [1 / 4, 3 / 4]], dtype=torch.float64).unsqueeze(1)
    p_t = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]], dtype=torch.float64).unsqueeze(1)
    center = torch.tensor([3.0, -1.0], dtype=torch.float64)
    teacher = p_t.log() * teacher_temp + center
    loss, gradient = value_and_gradients(
        lambda s: dino_loss(s, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp),
        p_s.log() * student_temp,
    )
    ln2, ln3, ln7 = math.log(2), math.log(3), math.log(7)
    pairs = {(0, 1): ln2, (0, 2): 2 * ln2 - ln3 / 4, (1, 0): 3 * ln2 - ln7 / 2, (1, 2): 2 * ln2 - ln3 / 2}
    assert loss.item() == pytest.approx(sum(pairs.values()) / 4, rel=1e-14)
    first = torch.tensor([1 / 8 - 1 / 2, 1 / 2 - 3 / 4, 2 * 1 / 4 - 3 / 4 - 1 / 2], dtype=torch.float64)
    expected = torch.stack([first, -first], -1).unsqueeze(1) / (4 * student_temp)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("v, u, b, k", [shape[:4] for shape in SHAPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_as_accurate_as_eager(v, u, b, k, dtype, tiles, rng):
    student, teacher, center = logits(rng, v, u, b, k, dtype)
    check_against_eager(
        lambda s: dino_loss(s, teacher, center),
        lambda s: naive(s, teacher.to(s.dtype), center.to(s.dtype)),
        student,
    )


@pytest.mark.parametrize("v, u, b, k, d", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_as_accurate_as_eager(v, u, b, k, d, dtype, tiles, rng):
    student, weight, teacher, teacher_weight, center = heads(rng, v, u, b, k, d, dtype)
    check_against_eager(
        lambda s, w: dino_head_loss(s, teacher, w, teacher_weight, center),
        lambda s, w: naive_head(s, w, *(t.to(s.dtype) for t in (teacher, teacher_weight, center))),
        student, weight, scale=1 / 0.04,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_reductions_temperatures_and_upstream_gradients(reduction, name, tiles, rng):
    """Both backends, with a random upstream gradient for every sample."""
    options = dict(student_temp=0.3, teacher_temp=0.2, reduction=reduction)
    options["upstream"] = torch.randn(4 if reduction == "none" else (), generator=rng, dtype=torch.float64)
    student, *fixed = logits(rng, 5, 2, 4, 65)
    ours = results(dino_loss, [student], fixed, backend=name, **options)
    torch.testing.assert_close(ours, results(naive, [student], fixed, **options), rtol=1e-11, atol=1e-12)
    student, weight, *fixed = heads(rng, 5, 2, 4, 65, 7)
    ours = results(head_loss, [student, weight], fixed, backend=name, **options)
    torch.testing.assert_close(ours, results(naive_head, [student, weight], fixed, **options), rtol=1e-11, atol=1e-12)


def test_several_tiles_of_true_size(rng):
    student, weight, *fixed = heads(rng, 2, 2, 20, 15000, 8)
    assert prototypes.CPU_TILE // (4 * 20) < 15000 / 2
    ours, exact = (results(loss, [student, weight], fixed) for loss in (head_loss, naive_head))
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_loss_is_the_loss_of_its_logits(dtype, rng):
    inputs = heads(rng, 4, 2, 6, 257, 16, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    student, weight, teacher, teacher_weight, center = (tensor.to(exact) for tensor in inputs)
    expected = dino_loss(student @ weight.t(), teacher @ teacher_weight.t(), center)
    torch.testing.assert_close(head_loss(*inputs), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, tiles, rng):
    student, teacher, center = logits(rng, 3, 2, 2, 5)
    kwargs = dict(student_temp=0.7, teacher_temp=0.5, reduction=reduction)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center, **kwargs), student.requires_grad_())
    student, weight, *fixed = heads(rng, 3, 2, 2, 20, 3)
    leaves = student.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, w: head_loss(s, w, *fixed, **kwargs), leaves)


@pytest.mark.parametrize("layout", ["permuted", "strided", "expanded"])
def test_strides(layout, tiles, rng):
    def make(*shape):
        return {
            "permuted": lambda: torch.randn(shape[::-1], generator=rng).permute(*range(len(shape))[::-1]),
            "strided": lambda: torch.randn([2 * s for s in shape], generator=rng)[(slice(None, None, 2),) * len(shape)],
            "expanded": lambda: torch.randn(1, *shape[1:], generator=rng).expand(shape),
        }[layout]()

    cases = [
        (dino_loss, [make(4, 3, 40), make(2, 3, 40)], 1),
        (head_loss, [make(4, 3, 8), make(40, 8), make(2, 3, 8), make(40, 8)], 2),
    ]
    for loss, inputs, wanted in cases:
        assert not inputs[0].is_contiguous()
        center = make(2, 40)[1]
        found = []
        for tensors in (inputs, [tensor.contiguous() for tensor in inputs]):
            leaves = [tensor.detach().requires_grad_(i < wanted) for i, tensor in enumerate(tensors)]
            value = loss(*leaves, center)
            found.append([value, *torch.autograd.grad(value, leaves[:wanted])])
        torch.testing.assert_close(*found)


# -- numerics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temp", [1e-3, 1e3])
def test_extreme_temperatures(temp, tiles, rng):
    student, teacher, center = logits(rng, 4, 2, 3, 65, torch.float32)
    options = dict(student_temp=temp, teacher_temp=temp)
    check_against_eager(
        lambda s: dino_loss(s, teacher, center, **options),
        lambda s: naive(s, teacher.to(s.dtype), center.to(s.dtype), **options),
        student, scale=1 / temp,
    )  # fmt: skip


@pytest.mark.parametrize("temp", [1e-3, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_overflows(temp, dtype, tiles):
    """Logits of 60,000 with the largest first, last and in between: student and teacher are one-hot, and agree."""
    large = torch.full((3, 3, 40), -60000.0, dtype=dtype)
    large[:, torch.arange(3), torch.tensor([0, 20, 39])] = 60000.0
    options = dict(student_temp=temp, teacher_temp=temp)
    for result in results(dino_loss, [large], [large, torch.zeros(40)], **options):
        assert (result == 0).all()
    feature = torch.tensor([[[240.0], [1.0]]], dtype=dtype).expand(3, 2, 1).contiguous()
    weight = torch.linspace(-240, 240, 40).to(dtype).unsqueeze(1)
    for result in results(head_loss, [feature, weight], [feature, weight, torch.zeros(40)], **options):
        assert (result == 0).all()


def test_small_gradients_keep_their_digits():
    """Each view's own teacher is sure of what the other is not: the sum over teachers, less its own, would be 0."""
    student = torch.tensor([[[0.0, 200.0, 0.0]], [[200.0, 0.0, 0.0]]])
    fixed = torch.tensor([[[20.0, 0.0, 0.0]], [[0.0, 20.0, 0.0]]]), torch.zeros(3)
    options = dict(student_temp=1.0, teacher_temp=1.0)
    (_, ours), (_, exact) = (
        results(loss, [leaf], fixed, **options) for loss, leaf in ((dino_loss, student), (naive, student.double()))
    )
    small = student == 0
    assert (exact[small] < 0).all() and (exact[small] > -1e-8).all()
    torch.testing.assert_close(ours[small].double(), exact[small], rtol=1e-5, atol=0)


def test_half_gradients_survive_a_loss_scaler(rng):
    """1 / (P B) would take them below fp16's smallest normal number: only the final product may round."""
    student, *fixed = logits(rng, 4, 2, 500, 65, torch.float16)
    scaler = 65536.0
    _, ours = results(dino_loss, [student], fixed, upstream=scaler)
    _, exact = results(dino_loss, [student.double()], fixed, upstream=scaler, backend="eager")
    assert exact.abs().median() / scaler < 2**-14
    assert (ours.double() - exact).abs().max() < 2**-10 * exact.abs().max()


def test_factors_in_bf16(tiles, rng, monkeypatch):
    """As on a GPU: W is rounded once more, to bf16, and the logits, products of bf16 numbers, are not."""
    student, weight, *fixed = heads(rng, 4, 2, 7, 257, 48, torch.bfloat16)
    loss, *plain = results(head_loss, [student, weight], fixed)
    monkeypatch.setattr(prototypes, "factors_dtype", lambda features: features.dtype)
    rounded_loss, *rounded = results(head_loss, [student, weight], fixed)
    _, *exact = results(head_loss, [student.double(), weight.double()], fixed, backend="eager")
    torch.testing.assert_close(rounded_loss, loss, rtol=1e-6, atol=0)
    for a, b, truth in zip(rounded, plain, exact):
        assert a.dtype == b.dtype == torch.bfloat16
        errors = [(x.double() - truth).norm() / truth.norm() for x in (a, b)]
        assert 0 < errors[0] <= errors[1] + 2**-8


def test_infinite_upstream_gradient_stays_in_its_sample(tiles, rng):
    student, *fixed = logits(rng, 3, 2, 4, 20)
    gradients = []
    for name, last in (("auto", INF), ("eager", 0.0)):
        leaf = student.clone().requires_grad_()
        loss = dino_loss(leaf, *fixed, reduction="none", backend=name)
        loss.backward(torch.tensor([0.0, 1e-30, -1.0, last], dtype=torch.float64))
        gradients.append(leaf.grad[:, :3])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-45)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_is_not_hidden(bad, tiles, rng):
    student, teacher, center = logits(rng, 3, 2, 4, 20)
    teacher[1, 2, 7] = bad
    losses = dino_loss(student, teacher, center, reduction="none")
    assert losses[2].isnan() and losses[[0, 1, 3]].isfinite().all()


def test_deterministic(rng):
    student, *fixed = logits(rng, 8, 2, 16, 1000, torch.float32)
    for a, b in zip(*(results(dino_loss, [student], fixed) for _ in range(2))):
        assert torch.equal(a, b)
    student, weight, *fixed = heads(rng, 8, 2, 16, 5000, 32, torch.float32)
    for a, b in zip(*(results(head_loss, [student, weight], fixed) for _ in range(2))):
        assert torch.equal(a, b)


# -- empty sets, and who gets a gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("v, u, b", [(1, 1, 3), (3, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_without_pairs_or_samples(v, u, b, reduction, name):
    """The loss is 0 and the gradients are zeros."""
    leaves = torch.randn(v, b, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    losses = [
        dino_loss(leaves[0], torch.randn(u, b, 5), torch.zeros(5), reduction=reduction, backend=name),
        head_loss(*leaves, torch.randn(u, b, 5), torch.randn(9, 5), torch.zeros(9), reduction=reduction, backend=name),
    ]
    for loss in losses:
        assert loss.shape == ((b,) if reduction == "none" else ()) and (loss == 0).all()
    sum(loss.sum() for loss in losses).backward()
    assert all(leaf.grad.shape == leaf.shape and (leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_features_without_width(name):
    """d = 0: all logits are 0, and the loss is log K."""
    features, weight = torch.randn(3, 4, 0, requires_grad=True), torch.randn(9, 0, requires_grad=True)
    loss = head_loss(features, weight, features[:2], weight, torch.zeros(9), backend=name)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(9)) and features.grad.shape == (3, 4, 0)


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_no_gradient_for_teacher_and_center(name, rng):
    student, *fixed = (t.requires_grad_() for t in logits(rng, 3, 2, 4, 20))
    dino_loss(student, *fixed, backend=name).backward()
    assert student.grad is not None and all(tensor.grad is None for tensor in fixed)
    assert not dino_loss(student.detach(), *fixed, backend=name).requires_grad
    student, weight, *fixed = (t.requires_grad_() for t in heads(rng, 3, 2, 4, 20, 5))
    head_loss(student, weight, *fixed, backend=name).backward()
    assert weight.grad is not None and all(tensor.grad is None for tensor in fixed)
    assert not head_loss(student.detach(), weight.detach(), *fixed, backend=name).requires_grad


def test_gradients_only_where_asked_and_twice(tiles, rng):
    """Frozen features, frozen prototypes: the same gradients, and the same again from a retained graph."""
    student, weight, *fixed = heads(rng, 3, 2, 4, 40, 5)
    _, *exact = results(naive_head, [student, weight], fixed)
    for wanted in range(2):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((student, weight))]
        loss = head_loss(*leaves, *fixed)
        first, second = (torch.autograd.grad(loss, leaves[wanted], retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, exact[wanted], rtol=1e-11, atol=1e-12)
        assert torch.equal(first, second)


@pytest.mark.parametrize("wanted", [0, 1])
def test_second_derivative_is_refused_not_zero(wanted, rng):
    """Whichever input the gradient is of, and for the upstream gradient too."""
    inputs = heads(rng, 3, 2, 2, 9, 4)
    inputs[wanted].requires_grad_()
    student, *fixed = logits(rng, 3, 2, 2, 9)
    student.requires_grad_()
    for upstream in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        for leaf, loss in ((inputs[wanted], head_loss(*inputs)), (student, dino_loss(student, *fixed))):
            (gradient,) = torch.autograd.grad(loss * upstream, leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="differentiable once.*backend='eager'"):
                gradient.sum().backward()


def test_second_derivative_of_eager(rng):
    student, weight, *fixed = heads(rng, 2, 2, 1, 3, 2)
    leaves = student.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s, w: head_loss(s, w, *fixed, student_temp=1.0, backend="eager"), leaves)


def test_functional_transforms_are_refused(rng):
    student, *fixed = logits(rng, 3, 2, 2, 9)
    features, *others = heads(rng, 3, 2, 2, 9, 4)
    for function, tensor in ((lambda s: dino_loss(s, *fixed), student), (lambda s: head_loss(s, *others), features)):
        with pytest.raises(NotImplementedError, match="torch.func transforms.*backend='eager'"):
            torch.func.grad(function)(tensor)


def test_huge_logits_stay_finite():
    """A row's first maximum rises from that of nothing; the rise must not overflow."""
    student = torch.zeros(2, 1, 3)
    student[..., 0] = 1e37
    teacher = torch.tensor([[[1.0, 0, 0]], [[1.0, 0, 0]]])
    ours, eager = (dino_loss(student, teacher, torch.zeros(3), backend=backend) for backend in ("auto", "eager"))
    torch.testing.assert_close(ours, eager)
