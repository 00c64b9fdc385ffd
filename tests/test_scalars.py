"""Scales, biases, temperatures and other numbers: as tensors of one element, as NumPy scalars, out of range."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from accuracy import unit_rows

from replearn_kernels import (
    ArcFaceLoss,
    DINOLoss,
    InfoNCELoss,
    NegativeQueue,
    NTXentLoss,
    SupConLoss,
    TripletMarginLoss,
    arcface_loss,
    clip_loss,
    dino_loss,
    info_nce_loss,
    lifted_structure_loss,
    mine_triplets,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
    update_momentum,
)

LABELS = torch.arange(12) % 4
# name of the scalar, loss(x, y, scalar, **options), the scalar
SCALARS = [
    ("logit_scale", lambda x, y, s, **k: clip_loss(x, y, s, **k), 9.0),
    ("logit_scale", lambda x, y, s, **k: info_nce_loss(x, y, logit_scale=s, **k), 9.0),
    ("logit_scale", lambda x, y, s, **k: siglip_loss(x, y, s, -3.0, **k), 9.0),
    ("logit_bias", lambda x, y, s, **k: siglip_loss(x, y, 9.0, s, **k), -3.0),
    ("temperature", lambda x, y, s, **k: nt_xent_loss(x, y, temperature=s, **k), 0.25),
    ("temperature", lambda x, y, s, **k: sup_con_loss(x, LABELS, temperature=s, **k), 0.25),
]
NUMBERS = [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int64, np.uint32, Fraction]


@pytest.fixture
def pair(rng):
    return unit_rows(rng, 12, 8), unit_rows(rng, 12, 8)


@pytest.mark.parametrize("name, loss, value", SCALARS)
@pytest.mark.parametrize("options", [*(dict(backend=b) for b in ("torch", "cpp", "eager")), dict(reduction="none")])
def test_a_tensor_of_shape_1_gets_the_gradient_of_a_0d_one(name, loss, value, options, pair):
    values, gradients = [], []
    for shape in ((), (1,)):
        scalar = torch.nn.Parameter(torch.full(shape, value))
        result = loss(*pair, scalar, **options)
        result.sum().backward()
        values.append(result)
        gradients.append(scalar.grad)
    assert torch.equal(*values)
    assert gradients[1].shape == (1,) and gradients[0].abs() > 1e-3
    torch.testing.assert_close(gradients[1].squeeze(), gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("name, loss, value", SCALARS)
def test_scalars_compile(name, loss, value, pair):
    """Of shape [1], as open_clip's exp() of its parameter; and NumPy's, which a graph takes as a 0-d array."""
    expected = loss(*pair, value)
    logarithm = torch.full((1,), abs(value)).log().requires_grad_()
    sign = 1.0 if value > 0 else -1.0
    compiled = torch.compile(lambda s: loss(*pair, s.exp() * sign), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(logarithm), logarithm)
    (eager,) = torch.autograd.grad(loss(*pair, logarithm.exp() * sign), logarithm)
    assert gradient.shape == (1,)
    torch.testing.assert_close(gradient, eager)
    of_number = torch.compile(lambda s: loss(*pair, s), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(of_number(np.float32(value)), expected)
    torch.testing.assert_close(of_number(np.float32(2 * value)), loss(*pair, 2 * value))


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name, loss, value", SCALARS)
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_numpy_scalars_are_numbers(kind, name, loss, value, backend, pair):
    value = kind(abs(value) if abs(value) > 1 else 1)
    assert torch.equal(loss(*pair, value, backend=backend), loss(*pair, float(value), backend=backend))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_numpy_scalars_as_options(kind, pair):
    """Wherever a number is taken: functions, modules, DINO, momentum."""
    one = kind(1)
    x, y = pair
    logits = torch.randn(2, 3, 8)
    for loss in (
        lambda v: info_nce_loss(x, y, label_smoothing=v),
        lambda v: lifted_structure_loss(x, LABELS, margin=v),
        lambda v: triplet_margin_loss(x, LABELS, margin=v),
        lambda v: mine_triplets(x, LABELS, margin=v, mining="batch_all")[0],
        lambda v: arcface_loss(x, y, LABELS, margin=v, scale=v),
        lambda v: dino_loss(logits, logits, torch.zeros(8), student_temp=v, teacher_temp=v),
        lambda v: InfoNCELoss(label_smoothing=v)(x, y),
        lambda v: NTXentLoss(v)(x, y),
        lambda v: SupConLoss(v)(x, LABELS),
        lambda v: TripletMarginLoss(v)(x, LABELS),
        lambda v: DINOLoss(8, student_temp=v, warmup_teacher_temp=v, center_momentum=v)(logits, logits, epoch=v),
    ):
        assert torch.equal(loss(one), loss(1.0))
    assert type(ArcFaceLoss(8, 4, scale=one).options["scale"]) is float
    module = torch.nn.Linear(2, 2)
    update_momentum(module, module, one)


def test_numpy_integers_are_counts(pair):
    queue = NegativeQueue(np.int64(4), np.int32(8))
    assert type(queue.size) is int and queue.keys.shape == (4, 8)
    assert ArcFaceLoss(np.int64(8), np.int64(4)).weight.shape == (4, 8)
    torch.testing.assert_close(info_nce_loss(*pair, memory_budget=np.int64(0)), info_nce_loss(*pair))
    with pytest.raises(TypeError, match="size must be an int, got float32"):
        NegativeQueue(np.float32(4), 8)


def test_numpy_options_compile_or_say_why_not(pair):
    """A graph knows the value of an fp64 scalar (a Python float); of the others it says what to write."""

    def smoothed(value):
        return torch.compile(lambda v: info_nce_loss(*pair, label_smoothing=v), fullgraph=True, backend="eager")(value)

    torch.testing.assert_close(smoothed(np.float64(0.25)), info_nce_loss(*pair, label_smoothing=0.25))
    for other in (np.float32(0.25), np.int64(1)):
        with pytest.raises(Exception, match=r"use float\(label_smoothing\)"):
            smoothed(other)


@pytest.mark.parametrize("wrong", [np.bool_(True), True, np.array(1.0), np.complex64(1), "1", None])
def test_what_is_no_number(wrong, pair):
    for name, loss, _ in SCALARS[:5]:
        if wrong is None and name == "logit_bias":
            continue
        with pytest.raises(TypeError, match=f"{name} must be a float"):
            loss(*pair, wrong)
    with pytest.raises(TypeError, match="label_smoothing must be a float"):
        info_nce_loss(*pair, label_smoothing=wrong)


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_integers_of_any_size(backend, pair):
    """2^64 is finite in fp32; 10^400 in no dtype."""
    zero = torch.zeros(12, 8)
    for scale in (2**64, -(2**100)):
        torch.testing.assert_close(clip_loss(zero, zero, scale, backend=backend), torch.tensor(12.0).log())
    assert siglip_loss(zero, zero, 1, -(2**64), backend=backend) == pytest.approx(2.0**64)
    assert nt_xent_loss(*pair, temperature=2**64, backend=backend).isfinite()
    info_nce_loss(*pair, memory_budget=2**70, backend=backend)
    for loss in (lambda v: clip_loss(zero, zero, v), lambda v: siglip_loss(zero, zero, 1.0, v)):
        with pytest.raises(ValueError, match="must be finite in torch.float32, got 1000"):
            loss(10**400)


NESTED = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
JAGGED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize("nested", [NESTED, JAGGED])
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_nested_tensors_are_refused(nested, backend, pair):
    x, y = pair
    calls = {
        "logit_scale": lambda **k: clip_loss(x, y, nested, **k),
        "logit_bias": lambda **k: siglip_loss(x, y, 1.0, nested, **k),
        "temperature": lambda **k: nt_xent_loss(x, y, temperature=nested, **k),
        "target": lambda **k: info_nce_loss(x, y, target=nested, **k),
        "negatives": lambda **k: info_nce_loss(x, y, negatives=nested, **k),
        "labels": lambda **k: sup_con_loss(x, nested, **k),
        "query_group": lambda **k: siglip_loss(x, y, 1.0, query_group=nested, key_group=LABELS, **k),
        "image_features": lambda **k: clip_loss(nested, nested, 1.0, **k),
        "anchor": lambda **k: n_pair_loss(nested, nested, **k),
        "features": lambda **k: sup_con_loss(nested, **k),
        "embeddings": lambda **k: triplet_margin_loss(nested, LABELS, **k),
        "triplets: anchor": lambda **k: triplet_margin_loss(x, triplets=(nested, LABELS, LABELS), **k),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} must be .*got a nested tensor"):
            call(backend=backend)
    with pytest.raises(TypeError, match="labels must be .*got a nested tensor"):
        arcface_loss(x, y, nested, backend=backend)
    with pytest.raises(TypeError, match="center must be .*got a nested tensor"):
        dino_loss(x[None], y[None], nested)
