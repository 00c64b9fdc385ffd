"""The rows that a loss compares: stacked and normalised in held memory, as by the formula for all rows at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from replearn_kernels import clip_loss, empty_cache, nt_xent_loss, reference
from replearn_kernels.engine import workspace
from replearn_kernels.functional import rows

N, D = 3000, 200  # of every view: 2.3 MiB in fp32


@pytest.fixture(autouse=True)
def nothing_held():
    empty_cache()
    yield
    empty_cache()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two rows of 3: every input is large."""
    monkeypatch.setattr(rows, "_BLOCK_ELEMENTS", 6)


def views(rng, count, dtype=torch.float32):
    return [torch.randn(N + k, D, generator=rng, dtype=torch.float64).to(dtype) for k in range(count)]


def results(function, given, upstream):
    leaves = [view.detach().clone().requires_grad_() for view in given]
    out = function(*leaves)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows_are_those_of_fp64(count, dtype, rng):
    given = views(rng, count, dtype)
    upstream = torch.randn(sum(map(len, given)), D, generator=rng, dtype=torch.float64).to(dtype)
    exact = results(lambda *v: F.normalize(torch.cat(v)), [view.double() for view in given], upstream.double())
    for ours, truth in zip(results(rows.unit_rows, given, upstream), exact):
        assert ours.dtype == dtype
        # Rounded once to the dtype, after two or three operations in fp32.
        assert (ours.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("function", [rows.stacked, rows.unit_rows])
def test_any_strides(function, rng):
    wide = torch.randn(D, 2 * N, generator=rng)
    upstream = torch.randn(2 * N, D, generator=rng)
    for given in ([wide.t()[::2], wide.t()[1::2]], [wide[:, 0].expand(N, D), wide.t()[:N]]):
        expected = results(function, [view.contiguous() for view in given], upstream)
        leaf = wide.clone().requires_grad_()
        same = [leaf.as_strided(view.shape, view.stride(), view.storage_offset()) for view in given]
        found = function(*same)
        torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(found, leaf, upstream)
        (through_views,) = torch.autograd.grad(same, leaf, expected[1:])
        torch.testing.assert_close(gradient, through_views, rtol=1e-6, atol=1e-6)


def test_views_are_stacked_in_their_order(rng):
    given = views(rng, 3)
    upstream = torch.randn(sum(map(len, given)), D, generator=rng)
    assert all(
        map(torch.equal, results(rows.stacked, given, upstream), (torch.cat(given), *upstream.split([N, N + 1, N + 2])))
    )
    assert rows.stacked(given[0]) is given[0]


def test_own_columns_keep_their_shape(rng):
    own = torch.randn(300, 4, D, generator=rng)
    upstream = torch.randn(300, 4, D, generator=rng)
    for ours, theirs in zip(
        results(rows.unit_rows, [own], upstream), results(lambda x: F.normalize(x, dim=2), [own], upstream)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_out_of_range(rng):
    """Zeros: rows and gradients of 0; squares below the range: gradients without the projection; above it: 0; NaN
    stays with its row. As the formula for all rows at once has it."""
    (given,) = views(rng, 1)
    given[:6] = torch.tensor([0, 1e-30, 1e-21, 1e-20, 1e25, torch.nan]).unsqueeze(1)
    upstream = torch.randn(N, D, generator=rng)
    ours = results(rows.unit_rows, [given], upstream)
    formula = results(lambda view: reference.unit_rows(view), [given], upstream)
    for a, b in zip(ours, formula):
        assert (a[0] == 0).all() and a[5].isnan().all() and a[torch.arange(N) != 5].isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (ours[1][2] == upstream[2] / 2**-63).all()


def test_only_views_that_need_a_gradient_get_one(rng):
    first, second = views(rng, 2)
    second.requires_grad_()
    for function in (rows.stacked, rows.unit_rows):
        out = function(first, second)
        (gradient,) = torch.autograd.grad(out.sum(), second)
        assert gradient.shape == second.shape and first.grad is None
        assert not function(first, first).requires_grad


@pytest.mark.parametrize("function", [rows.stacked, rows.unit_rows])
def test_both_derivatives(function, small_blocks, rng):
    given = [torch.randn(n, 3, generator=rng, dtype=torch.float64).requires_grad_() for n in (1, 4, 5)]
    assert gradcheck(function, given) and gradgradcheck(function, given)


@pytest.mark.parametrize("function", [rows.stacked, rows.unit_rows])
def test_forward_mode_and_transforms_take_the_formula(function, small_blocks, rng):
    first, second, tangent = (torch.randn(5, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    expected = torch.func.jvp(lambda x: function(x, second), (first,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(first, tangent), second)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    central = (function(first + 1e-6 * tangent, second) - function(first - 1e-6 * tangent, second)) / 2e-6
    torch.testing.assert_close(expected, central, rtol=1e-6, atol=1e-8)


def test_one_gradient_after_another_or_all_at_once(rng):
    """is_grads_batched, and a dual upstream gradient."""
    given = views(rng, 1)[0].requires_grad_()
    out, upstream, tangent = rows.unit_rows(given), *torch.randn(2, N, D, generator=rng)
    both = torch.stack([upstream, tangent])
    (batched,) = torch.autograd.grad(out, given, both, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, given, one, retain_graph=True)[0] for one in both]
    for a, b in zip(batched, alone):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(out, given, forward_ad.make_dual(upstream, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, alone[1], rtol=1e-6, atol=1e-6)


def test_memory_is_taken_again_once_nobody_has_it(rng):
    given = views(rng, 2)
    first, second, third = (rows.unit_rows(*given) for _ in range(3))
    places = [t.data_ptr() for t in (first, second, third)]
    assert len(set(places)) == 3 and torch.equal(first, third)  # two are held, the third is its own
    view = second[5:]
    del second
    assert rows.stacked(*given).data_ptr() not in places[:2]  # a view is a use
    del first, view
    again = rows.stacked(*given), rows.unit_rows(*given)
    assert sorted(t.data_ptr() for t in again) == sorted(places[:2])
    del again
    empty_cache()
    assert not workspace.rows._buffers


def test_losses_that_wait_for_their_backward_calls(rng):
    """Three steps overlap; each has the gradients that it has alone."""
    pairs = [[view[:N].clone().requires_grad_() for view in views(rng, 2)] for _ in range(3)]
    losses = [
        lambda x, y: nt_xent_loss(x, y, memory_budget=0),
        lambda x, y: nt_xent_loss(x, y, normalize=False, temperature=20.0, memory_budget=0),
        lambda x, y: clip_loss(x, y, 10.0, normalize=True, memory_budget=0),
    ]
    alone = [torch.autograd.grad(loss(*pair), pair) for loss, pair in zip(losses, pairs)]
    waiting = [loss(*pair) for loss, pair in zip(losses, pairs)]
    for loss, pair, expected in zip(waiting, pairs, alone):
        assert all(map(torch.equal, torch.autograd.grad(loss, pair), expected))
