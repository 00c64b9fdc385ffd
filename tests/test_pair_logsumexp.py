"""pair_logsumexp: which pairs count, empty sets, large scales, and losses that are put together from it."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, unit_rows

from replearn_kernels import info_nce_loss, pair_logsumexp


def dense(query, key, scale, over="every", groups=None, hardness=0.0):
    """The formula on the whole matrix."""
    logits = scale * query @ key.t()
    n, m = logits.shape
    same = torch.eye(n, m, dtype=torch.bool) if groups is None else groups[0][:, None] == groups[1]
    counted = {"every": same | ~same, "same": same, "other": ~same}[over]
    exponents = torch.where(counted, logits + hardness * logits.detach(), -math.inf)
    return exponents.logsumexp(1) if m else logits.new_full((n,), -math.inf)


@pytest.mark.parametrize("hardness", [0.0, 0.45])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("over", ["every", "same", "other"])
@pytest.mark.parametrize("n, m, d", [(2, 2, 1), (33, 65, 48), (63, 257, 3), (65, 65, 100)])
def test_which_pairs_count(backend, n, m, d, over, by_group, hardness):
    rng = torch.Generator().manual_seed(n)
    query, key = (torch.randn(rows, d, generator=rng, dtype=torch.float64, requires_grad=True) for rows in (n, m))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    # Every query has a key of its group and one of another.
    groups = (torch.arange(n) % 2, torch.arange(m) % 2) if by_group else None
    given = dict(query_group=groups[0], key_group=groups[1]) if by_group else {}
    ours = pair_logsumexp(
        query, key, over=over, logit_scale=scale, hardness=hardness, backend=backend, memory_budget=0, **given
    )
    expected = dense(query, key, scale, over, groups, hardness)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(n, generator=rng, dtype=torch.float64)
    gradients = [torch.autograd.grad(value, (query, key, scale), upstream) for value in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_rows_without_a_pair(backend):
    """-inf, and no NaN in what other rows, or a sum of exponentials, get for a gradient."""
    query = unit_rows(torch.Generator().manual_seed(0), 5, 4).requires_grad_()
    group = torch.tensor([0, 0, 0, 0, 1])
    values = pair_logsumexp(query, query, over="same", query_group=group, key_group=group + 1, backend=backend)
    assert values[:4].tolist() == [-math.inf] * 4 and values[4].isfinite()
    values.exp().sum().backward()
    assert query.grad.isfinite().all()
    alone = query[:1].detach().requires_grad_()
    value = pair_logsumexp(alone, alone, over="other", backend=backend)
    assert value.item() == -math.inf
    torch.logaddexp(value, value.new_zeros(1)).sum().backward()
    assert not alone.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("over", ["every", "other"])
def test_no_further_from_fp64_than_eager(over, scale, dtype):
    rng = torch.Generator().manual_seed(1)
    query, key = (unit_rows(rng, 65, 48, dtype=dtype) for _ in range(2))
    weight = torch.rand(65, generator=rng, dtype=torch.float64)

    def mean(values):
        return (values * weight.to(values.dtype)).mean()

    check_against_eager(
        lambda x, y, s: mean(pair_logsumexp(x, y, over=over, logit_scale=s)),
        lambda x, y, s: mean(dense(x, y, s, over)),
        query, key, torch.tensor(scale, dtype=torch.float32 if dtype != torch.float64 else dtype), scale=scale,
    )  # fmt: skip


def test_as_in_the_docstring():
    rng = torch.Generator().manual_seed(2)
    query, key = (unit_rows(rng, 33, 16, dtype=torch.float64).requires_grad_() for _ in range(2))
    positive = 20 * (query * key).sum(1)
    parts = [pair_logsumexp(query, each, over="other", logit_scale=20.0) for each in (key, query)]
    loss = F.cross_entropy(torch.stack([positive, *parts], 1), torch.zeros(len(query), dtype=torch.int64))
    logits = 20 * query @ torch.cat([key, query]).t()
    own = torch.cat([torch.zeros(33, 33, dtype=torch.bool), torch.eye(33, dtype=torch.bool)], 1)
    expected = F.cross_entropy(logits.masked_fill(own, -math.inf), torch.arange(33))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, (query, key)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_info_nce_is_the_whole_less_the_own():
    rng = torch.Generator().manual_seed(3)
    query, key = (unit_rows(rng, 40, 8, dtype=torch.float64) for _ in range(2))
    values = pair_logsumexp(query, key, logit_scale=5.0, reduction="mean") - (5 * (query * key).sum(1)).mean()
    torch.testing.assert_close(values, info_nce_loss(query, key, logit_scale=5.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options, error, match", [
    (dict(over="all"), ValueError, "over"),
    (dict(hardness=-1.0), ValueError, "hardness must be at least 0, got -1.0"),
    (dict(hardness="hard"), TypeError, "hardness"),
    (dict(hardness=math.inf), ValueError, "hardness"),
    (dict(query_group=torch.arange(4)), ValueError, "given together"),
    (dict(temperature=0.1), TypeError, "pair_logsumexp takes no temperature"),
    (dict(reduction="max"), ValueError, "reduction"),
    (dict(logit_scale=math.nan), ValueError, "logit_scale"),
])  # fmt: skip
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        pair_logsumexp(torch.randn(4, 3), torch.randn(4, 3), **options)


@pytest.mark.parametrize("over", ["same", "other"])
def test_fewer_keys_than_queries(over):
    with pytest.raises(ValueError, match="needs query_group and key_group, got 4 queries and 3 keys"):
        pair_logsumexp(torch.randn(4, 3), torch.randn(3, 3), over=over)
    groups = dict(query_group=torch.arange(4) % 2, key_group=torch.arange(3) % 2)
    assert pair_logsumexp(torch.randn(4, 3), torch.randn(3, 3), over=over, **groups).isfinite().all()
