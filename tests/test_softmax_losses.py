"""info_nce_loss and clip_loss: values and gradients, against hand-computed numbers, F.cross_entropy and fp64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, eager_clip, eager_info_nce, unit_rows, value_and_gradients

from replearn_kernels import clip_loss, info_nce_loss, n_pair_loss

SIZES = [(1, 1), (2, 3), (63, 48), (65, 100), (257, 640), (40, 1152)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def test_hand_computed(backend):
    """Two orthogonal pairs at scale ln 3: every row has probabilities 3/4 and 1/4."""
    eye = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(math.log(3.0), dtype=torch.float64)
    loss, d_query, d_key, d_scale = value_and_gradients(
        lambda q, k, s: info_nce_loss(q, k, logit_scale=s, backend=backend), eye, eye, scale
    )
    w = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 8  # (P - I) / 2
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-15)
    torch.testing.assert_close(d_query, w * math.log(3.0))
    torch.testing.assert_close(d_key, w.t() * math.log(3.0))
    assert d_scale.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("n, d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_clip_as_accurate_as_eager(n, d, dtype, memory_budget, backend, rng):
    x, y = unit_rows(rng, n, d, dtype=dtype), unit_rows(rng, n, d, dtype=dtype)
    scale = torch.tensor(14.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    eager = eager_clip if dtype in (torch.float32, torch.float64) else lambda *a: eager_clip(*a).float()
    check_against_eager(
        lambda *a: clip_loss(*a, backend=backend, memory_budget=memory_budget), eager, x, y, scale
    )


@pytest.mark.parametrize("n, m, d", [(1, 5, 3), (2, 63, 1), (65, 257, 48), (257, 65, 100), (1100, 1500, 16)])
@pytest.mark.parametrize("memory_budget", [0, 100_000, 2**28])
def test_info_nce_with_target(n, m, d, memory_budget, backend, rng):
    """N != M, repeated targets, several tiles, kept in part or not at all."""
    x, y = unit_rows(rng, n, d), unit_rows(rng, m, d)
    target = torch.randint(m, (n,), generator=rng)
    check_against_eager(
        lambda q, k, s: info_nce_loss(
            q, k, target=target, logit_scale=s, backend=backend, memory_budget=memory_budget
        ),
        lambda q, k, s: eager_info_nce(q, k, s, target),
        x, y, torch.tensor(20.0),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("negatives", [None, "queue", "own"])
@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_every_option_equals_the_specification(
    reduction, symmetric, label_smoothing, negatives, memory_budget, backend, rng
):
    """In fp64, against the plain formula, gradients of every input under a random upstream gradient."""
    n, m, k, d = 33, 50, 17, 12
    inputs = [torch.randn(s, d, generator=rng, dtype=torch.float64) for s in (n, m)]
    inputs.append(torch.tensor(1.7, dtype=torch.float64))
    if negatives:
        shape = (k, d) if negatives == "queue" else (n, k, d)
        inputs.append(torch.randn(shape, generator=rng, dtype=torch.float64))
    target = torch.randint(m, (n,), generator=rng)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64)

    def run(backend):
        def loss(query, key, scale, negatives=None):
            value = info_nce_loss(
                query, key, target=target, negatives=negatives, logit_scale=scale, symmetric=symmetric,
                label_smoothing=label_smoothing, reduction=reduction, backend=backend, memory_budget=memory_budget,
            )  # fmt: skip
            return (value * upstream).sum() if reduction == "none" else value * 3

        return value_and_gradients(loss, *inputs)

    for ours, exact in zip(run(backend), run("eager")):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_specification_is_cross_entropy(rng):
    """The eager backend itself, against F.cross_entropy on the concatenated logits."""
    q, k, queue = (torch.randn(s, 5, generator=rng, dtype=torch.float64) for s in (4, 6, 3))
    target = torch.tensor([5, 0, 0, 2])
    expected = F.cross_entropy(2.0 * q @ torch.cat([k, queue]).t(), target, label_smoothing=0.2)
    ours = info_nce_loss(
        q, k, negatives=queue, target=target, logit_scale=2.0, label_smoothing=0.2, backend="eager"
    )
    torch.testing.assert_close(ours, expected)


def test_own_negatives_in_several_tiles(backend, rng):
    """[N, K, d] wide enough that one tile cannot hold it."""
    n, k, d = 600, 130, 96
    q, key = unit_rows(rng, n, d), unit_rows(rng, n, d)
    own = unit_rows(rng, n, k, d)

    def eager(q, key, own, s):
        logits = torch.cat([q @ key.t(), torch.einsum("nd,nkd->nk", q, own)], 1) * s
        return F.cross_entropy(logits, torch.arange(n))

    check_against_eager(
        lambda q, key, own, s: info_nce_loss(
            q, key, negatives=own, logit_scale=s, backend=backend, memory_budget=0
        ),
        eager, q, key, own, torch.tensor(10.0),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_strides(layout, backend, rng):
    n, d = 37, 24
    make = {
        "transposed": lambda: torch.randn(d, n, generator=rng).t(),
        "strided": lambda: torch.randn(2 * n, 3 * d, generator=rng)[::2, ::3],
        "expanded": lambda: torch.randn(1, d, generator=rng).expand(n, d),
        "offset": lambda: torch.randn(n, d + 5, generator=rng)[:, 5:],
    }[layout]
    x, y = make(), make()
    assert not x.is_contiguous()
    strided = value_and_gradients_of_views(x, y, backend)
    plain = value_and_gradients_of_views(x.contiguous(), y.contiguous(), backend)
    for a, b in zip(strided, plain):
        torch.testing.assert_close(a, b)


def value_and_gradients_of_views(x, y, backend):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = clip_loss(x, y, 5.0, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def test_normalize(backend, rng):
    x, y = torch.randn(20, 8, generator=rng) * 7, torch.randn(20, 8, generator=rng)
    ours = clip_loss(x, y, 10.0, normalize=True, backend=backend)
    torch.testing.assert_close(ours, clip_loss(F.normalize(x), F.normalize(y), 10.0, backend="eager"))


def test_gradients_only_where_asked(backend, rng):
    """A queue without gradient, frozen features with a learnable scale, and one tower frozen."""
    q, k, queue = unit_rows(rng, 9, 6), unit_rows(rng, 9, 6), unit_rows(rng, 30, 6)
    scale = torch.tensor(4.0)
    exact = value_and_gradients(
        lambda q, k, s: info_nce_loss(q, k, negatives=queue, logit_scale=s, backend="eager"), q, k, scale
    )[1:]
    for wanted in range(3):
        inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((q, k, scale))]
        for memory_budget in (0, 2**20):
            loss = info_nce_loss(
                *inputs[:2], negatives=queue, logit_scale=inputs[2], backend=backend, memory_budget=memory_budget
            )
            (gradient,) = torch.autograd.grad(loss, inputs[wanted])
            torch.testing.assert_close(gradient, exact[wanted])
    assert queue.grad is None


def test_backward_twice_with_retained_graph(backend, rng):
    for symmetric in (False, True):
        for memory_budget in (0, 2**28):
            x = unit_rows(rng, 300, 8).requires_grad_()
            y = unit_rows(rng, 300, 8)
            loss = info_nce_loss(
                x, y, logit_scale=9.0, symmetric=symmetric, backend=backend, memory_budget=memory_budget
            )
            first = torch.autograd.grad(loss, x, retain_graph=True)[0]
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], first, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["grad", "hook", "data"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_changed_in_place_do_not_reach_a_second_backward(change, symmetric, backend, rng):
    """Gradients made in the forward call are handed over; those of a retained graph are made again."""
    x, y = unit_rows(rng, 20, 8).requires_grad_(), unit_rows(rng, 20, 8)
    expected = value_and_gradients(lambda x: info_nce_loss(x, y, symmetric=symmetric, backend="eager"), x)[1]
    loss = info_nce_loss(x, y, symmetric=symmetric, backend=backend)
    if change == "hook":
        hook = x.register_hook(lambda gradient: gradient.mul_(0))
        loss.backward(retain_graph=True)
        hook.remove()
    else:
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        (first if change == "grad" else first.data).mul_(0)
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 0.5, x)[0], expected / 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_n_pair_in_chunks_of_rows(reduction, backend, rng):
    """Every chunk has groups of its own."""
    n = 2049
    x, y, labels = torch.randn(n, 8, generator=rng), torch.randn(n, 8, generator=rng), torch.randint(99, (n,))
    loss = partial(n_pair_loss, labels=labels)
    check_against_eager(
        lambda x, y: loss(x, y, backend=backend, memory_budget=1000, reduction=reduction).mean(),
        lambda x, y: loss(x, y, backend="eager"),
        x, y,
    )  # fmt: skip


def n_pair_formula(anchor, positive, labels):
    """Sohn, eq. 4, an anchor at a time: log(1 + sum over other labels of exp(a p_j - a p_i))."""
    losses = []
    for i in range(len(anchor)):
        others = [j for j in range(len(anchor)) if j != i and (labels is None or labels[j] != labels[i])]
        gaps = [anchor[i] @ positive[j] - anchor[i] @ positive[i] for j in others]
        losses.append(torch.stack([(anchor[i] * positive[i]).sum() * 0, *gaps]).logsumexp(0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("labels", [None, "one class", "all distinct", "some"])
@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (40, 12)])
@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_n_pair(labels, n, d, memory_budget, backend, rng):
    anchor, positive = (torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = {
        None: None,
        "one class": torch.full((n,), -5),
        "all distinct": torch.arange(n) - 3,
        "some": torch.randint(6, (n,), generator=rng),
    }[labels]
    expected = value_and_gradients(lambda a, p: n_pair_formula(a, p, labels), anchor, positive)
    for name in (backend, "eager"):
        loss = partial(n_pair_loss, labels=labels, backend=name, memory_budget=memory_budget)
        for a, b in zip(value_and_gradients(loss, anchor, positive), expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_repeated_targets_give_the_same_bits_every_time(symmetric, backend, rng):
    """The column of many rows' positive sums their weights in a fixed order."""
    x, y, target = unit_rows(rng, 3000, 8), unit_rows(rng, 30, 8), torch.randint(30, (3000,), generator=rng)
    upstream = torch.rand(3000, generator=rng)

    def run():
        return value_and_gradients(
            lambda x, y: info_nce_loss(
                x, y, target=target, symmetric=symmetric, reduction="none", backend=backend
            ) @ upstream,
            x, y,
        )  # fmt: skip

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))
