"""Declared losses, shipped and toy ones: right to their papers' formulas, in every dtype, on every size and option."""

import math

import pytest
import torch
from accuracy import TOLERANCE
from declared_cases import CASES, SHIPPED, by_oracle, inputs_of, leaves_of, value_and_gradients
from metric_cases import LABELS, assert_same, small_batch_tiles

import replearn_kernels as rk

EVERY_LOSS = pytest.mark.parametrize("name", CASES)
EIGHTS = LABELS["eights"]


@EVERY_LOSS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_values_and_gradients_are_the_papers(name, backend, reduction):
    inputs = inputs_of(33, 7, EIGHTS(33))
    exact = by_oracle(CASES[name], inputs, reduction)
    with small_batch_tiles(16):
        ours = value_and_gradients(CASES[name].call, inputs, CASES[name], backend=backend, reduction=reduction)
    assert_same(ours, exact, rtol=1e-12, atol=1e-12)


@EVERY_LOSS
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("n", [2, 17])
def test_labels(name, labels, n):
    """Rows without a positive or a negative among them."""
    inputs = inputs_of(n, 5, LABELS[labels](n))
    exact = by_oracle(CASES[name], inputs, "sum")
    with small_batch_tiles(8):
        for backend in ("eager", "torch", "cpp"):
            ours = value_and_gradients(CASES[name].call, inputs, CASES[name], backend=backend, reduction="sum")
            assert_same(ours, exact, rtol=1e-10, atol=1e-10)


@EVERY_LOSS
@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one(name, n):
    case, inputs = CASES[name], inputs_of(n, 3, torch.zeros(n, dtype=torch.int64))
    value, *gradients = value_and_gradients(case.call, inputs, case)
    if n == 1 and name in ("decoupled", "toy everything"):
        assert value == -math.inf  # a logarithm of a sum over no pair
    else:
        if n:
            assert_same([value], by_oracle(case, inputs)[:1])
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
    if n == 0:
        assert value == 0


@EVERY_LOSS
@pytest.mark.parametrize("memory_budget", [0, 2000, 2**28])
def test_nothing_depends_on_tiles_or_budget(name, memory_budget):
    case, inputs = CASES[name], inputs_of(70, 5, EIGHTS(70))
    expected = value_and_gradients(case.call, inputs, case, backend="eager")
    with small_batch_tiles(16):
        ours = value_and_gradients(case.call, inputs, case, memory_budget=memory_budget)
        assert_same(ours, expected, rtol=1e-11, atol=1e-12)
        again = value_and_gradients(case.call, inputs, case, memory_budget=memory_budget)
        assert all(torch.equal(a, b) for a, b in zip(ours, again))


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_errors_are_those_of_eager(name, dtype, backend):
    case = CASES[name]
    inputs = inputs_of(65, 48, EIGHTS(65), dtype=dtype)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact, eager, ours = (
        value_and_gradients(case.call, given, case, backend=by, reduction="sum")
        for given, by in ((wide, "eager"), (inputs, "eager"), (inputs, backend))
    )
    for value, by_eager, truth in zip(ours, eager, exact):
        size = truth.abs().max()
        error, allowed = ((v.double() - truth).abs().max() / size for v in (value, by_eager))
        assert error <= allowed + TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.scaled and "everything" not in name])
@pytest.mark.parametrize("scale", [1000.0, 100.0, 1e-3])
def test_any_scale(name, scale):
    """As far from fp64 as eager, and for losses that are small beside their logits nearer."""
    case = CASES[name]
    inputs = inputs_of(40, 24, EIGHTS(40), scale=scale, dtype=torch.float32)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact = value_and_gradients(case.call, wide, case, backend="eager")
    eager = value_and_gradients(case.call, inputs, case, backend="eager")
    ours = value_and_gradients(case.call, inputs, case, memory_budget=0)
    for value, by_eager, truth in zip(ours, eager, exact):
        error, allowed = ((v.double() - truth).abs().max() for v in (value, by_eager))
        assert error <= allowed + (4e-7 + scale * 2**-24) * truth.abs().max()


@EVERY_LOSS
def test_strided_and_expanded_rows(name):
    case = CASES[name]
    x, y, labels, scale = inputs_of(20, 6, EIGHTS(20))
    strided = torch.stack([x, y], 2)[:, :, 0], y.t().contiguous().t()
    expected = value_and_gradients(case.call, (x, y, labels, scale), case)
    assert_same(value_and_gradients(case.call, (*strided, labels, scale), case), expected)
    one = x[:1].expand(20, 6)
    expected = value_and_gradients(case.call, (one.clone(), y, labels, scale), case, backend="eager")
    assert_same(value_and_gradients(case.call, (one, y, labels, scale), case), expected, rtol=1e-7, atol=1e-7)


DETACHING = ("circle", "toy everything", "log_sum_exp, by hardness")  # whose gradient is not that of the value


@pytest.mark.parametrize("name", [name for name in CASES if name not in DETACHING])
def test_gradcheck(name):
    case = CASES[name]
    x, y, labels, scale = leaves_of(inputs_of(9, 3, torch.arange(9) // 2, scale=1.3), case)
    wanted = [leaf for leaf in (x, y, scale) if leaf.requires_grad]
    for reduction in ("mean", "none"):

        def loss(*leaves, reduction=reduction):
            given = dict(zip(map(id, wanted), leaves))
            return case.call(*(given.get(id(t), t) for t in (x, y)), labels, given.get(id(scale), scale),
                             reduction=reduction)  # fmt: skip

        assert torch.autograd.gradcheck(loss, wanted, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_known_losses_declared():
    """The toy ones are the library's own, hand-written, losses."""
    x, y, labels, scale = inputs_of(30, 8, EIGHTS(30))
    n = len(x)
    for ours, known in (
        (CASES["toy clip"].call(x, y, labels, scale), rk.clip_loss(x, y, scale)),
        (CASES["toy siglip"].call(x, y, labels, scale), rk.siglip_loss(x, y, scale)),
        (CASES["toy contrastive"].call(x, y, labels, scale) / (n - 1), rk.contrastive_loss(x, labels, margin=1.3)),
        (rk.hard_negative_loss(x, y, beta=0.0, logit_scale=scale), rk.info_nce_loss(x, y, logit_scale=scale)),
        (rk.multi_positive_clip_loss(x, y, scale, image_group=torch.arange(n)), rk.clip_loss(x, y, scale)),
        (rk.sampled_softmax_loss(x, y, logit_scale=scale), rk.info_nce_loss(x, y, logit_scale=scale)),
        (
            rk.gist_loss(x, y, x, y, logit_scale=scale, margin=-3.0, contrast_anchors=False, contrast_positives=False),
            rk.info_nce_loss(x, y, logit_scale=scale, normalize=True),
        ),
    ):
        torch.testing.assert_close(ours, known, rtol=1e-12, atol=0)


def test_more_keys_than_queries_and_given_targets():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (19, 41))
    target = torch.randint(41, (19,), generator=generator)
    for options in ({}, {"beta": 0.0}, {"tau_plus": 0.05}):
        fused, eager = (
            rk.hard_negative_loss(x, y, target=target, logit_scale=0.5, backend=backend, **options)
            for backend in ("torch", "eager")
        )
        torch.testing.assert_close(fused, eager, rtol=1e-13, atol=0)
    expected = rk.info_nce_loss(x, y, target=target, logit_scale=0.5)
    torch.testing.assert_close(rk.hard_negative_loss(x, y, beta=0.0, target=target, logit_scale=0.5), expected)


def test_groups_of_keys_alone():
    """More keys than queries: query i has the group of key i."""
    x, y = (torch.randn(n, 6, dtype=torch.float64) for n in (7, 12))
    group = torch.tensor([0, 1, 2, 3, 0, 5, 6, 0, 1, 7, 8, 3])
    expected = rk.sampled_softmax_loss(x, y, query_group=group[:7], key_group=group)
    assert rk.sampled_softmax_loss(x, y, key_group=group) == expected
    assert expected < rk.sampled_softmax_loss(x, y)


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_queries_and_keys_that_are_padding(backend):
    """Weight 0 and log-probability +inf: as if they were not there."""
    x, y = (torch.randn(9, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight, log_probability = torch.ones(9), torch.zeros(9)
    weight[7:], log_probability[7:] = 0, math.inf
    padded = rk.sampled_softmax_loss(x, y, query_weight=weight, key_log_probability=log_probability, backend=backend)
    alone = rk.sampled_softmax_loss(x[:7], y[:7], backend=backend)
    torch.testing.assert_close(padded, alone)
    assert_same(torch.autograd.grad(padded, (x, y)), torch.autograd.grad(alone, (x, y)))


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_guide_that_sees_no_difference(dtype, backend):
    """Texts that are as near to the anchor as its own positive are negatives: all of them, however sums are rounded."""
    x, y, _, _ = inputs_of(33, 8, EIGHTS(33))
    of_text = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).expand(33, 7)
    options = dict(contrast_anchors=False, contrast_positives=False, logit_scale=3.0)
    everyone = rk.info_nce_loss(x, y, logit_scale=3.0, normalize=True)
    with small_batch_tiles(8):
        found = rk.gist_loss(x, y, torch.rand(33, 7).to(dtype), of_text, backend=backend, **options)
    torch.testing.assert_close(found, everyone)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_student_that_is_its_teacher_learns_nothing(backend, scale, symmetric):
    """The loss is the entropy of the probabilities, and its gradient 0, at any scale."""
    x, y, _, _ = inputs_of(40, 8, EIGHTS(40))
    leaf = x.clone().requires_grad_()
    loss = rk.soft_target_loss(
        leaf, y, x, y, logit_scale=scale, guide_scale=scale, symmetric=symmetric, backend=backend
    )
    logits = scale * x @ y.t()
    entropies = [-(log.exp() * log).sum() / 40 for log in (logits.log_softmax(1), logits.log_softmax(0))]
    expected = sum(entropies) / 2 if symmetric else entropies[0]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-14 * scale**2


@pytest.mark.parametrize("name", SHIPPED)
def test_one_row_that_is_not_finite_is_seen(name):
    case, (x, y, labels, scale) = CASES[name], inputs_of(12, 4, EIGHTS(12))
    x[3, 1] = math.nan
    assert case.call(x, y, labels, scale).isnan()
    assert case.call(x, y, labels, scale, backend="eager").isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, n: rk.circle_loss(x, n, gamma=0.0), "gamma must be positive and finite, got 0.0"),
        (lambda x, y, n: rk.circle_loss(x, n, margin=math.nan), "margin must be finite"),
        (lambda x, y, n: rk.circle_loss(x, n[:3]), r"labels must have shape \(8,\)"),
        (lambda x, y, n: rk.multi_similarity_loss(x, n, alpha=-1.0), "alpha must be positive"),
        (lambda x, y, n: rk.hard_negative_loss(x, y, beta=-0.1), "beta must be at least 0, got -0.1"),
        (lambda x, y, n: rk.hard_negative_loss(x, y, tau_plus=1.0), "tau_plus must be below 1"),
        (lambda x, y, n: rk.hard_negative_loss(x, y[:5]), "target is needed when there are more queries than keys"),
        (lambda x, y, n: rk.hard_negative_loss(x, y, target=n + 1), r"target must be in \[0, 8\), got 8"),
        (lambda x, y, n: rk.multi_positive_clip_loss(x, y[:5], 1.0, image_group=n), "same number of rows"),
        (lambda x, y, n: rk.multi_positive_clip_loss(x, y, 1.0, image_group=n[1:]), "image_group must have shape"),
        (lambda x, y, n: rk.sampled_softmax_loss(x, y, key_group=n, target=n), "query_group is needed beside"),
        (lambda x, y, n: rk.sampled_softmax_loss(x, y, query_group=n), "must be given together"),
        (lambda x, y, n: rk.sampled_softmax_loss(x, y, query_weight=n[1:].double()), "query_weight must have shape"),
        (lambda x, y, n: rk.soft_target_loss(x, y, x[1:], y), "query_guide must have 8 rows"),
        (lambda x, y, n: rk.soft_target_loss(x, y, x, y[:, 1:]), "key_guide and query_guide must have the same width"),
        (lambda x, y, n: rk.soft_target_loss(x, y, x, y, guide_scale=math.inf), "guide_scale must be finite"),
        (lambda x, y, n: rk.soft_target_loss(x, y[1:], x, y[1:], symmetric=True), "query and key must have the same"),
        (lambda x, y, n: rk.soft_target_loss(x, y, x, y, symmetric=1), "symmetric must be a bool"),
        (lambda x, y, n: rk.gist_loss(x, y, x, y, margin=math.nan), "margin must be finite"),
        (lambda x, y, n: rk.gist_loss(x, y, x, y, contrast_anchors=1), "contrast_anchors must be a bool"),
        (lambda x, y, n: rk.gist_loss(x, y, x, y, reduction="avg"), "reduction must be one of"),
        (lambda x, y, n: rk.gist_loss(x, y, x, y[1:]), "positive_guide must have 8 rows"),
        (lambda x, y, n: rk.gist_loss(x, y[1:], x, y), "anchor and positive must have the same number of rows"),
        (lambda x, y, n: rk.gist_loss(x, y, x, y, negative=x), "negative and negative_guide must be given together"),
        (lambda x, y, n: rk.decoupled_contrastive_loss(x, y, temperature=0.0), "temperature must be positive"),
        (lambda x, y, n: rk.decoupled_contrastive_loss(x, y[:3]), "same number of rows"),
    ],
)
def test_bad_input_is_named(call, message):
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        call(x, y, torch.arange(8))


def test_a_temperature_is_told_what_to_be():
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match="hard_negative_loss takes no temperature"):
        rk.hard_negative_loss(x, x, temperature=0.1)


@pytest.mark.parametrize("name", SHIPPED)
def test_autocast(name):
    case, inputs = CASES[name], inputs_of(16, 8, EIGHTS(16), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, *gradients = value_and_gradients(case.call, inputs, case)
    rounded = [t.to(torch.bfloat16) if t.ndim == 2 else t for t in inputs]
    assert value.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    expected = value_and_gradients(case.call, rounded, case)[0]
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)
