"""Numerical derivatives in fp64, for every differentiable input, and arbitrary shapes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from replearn_kernels import clip_loss, info_nce_loss


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
@pytest.mark.parametrize("negatives_shape", [None, (3, 4), (5, 3, 4)])
def test_gradcheck(symmetric, reduction, memory_budget, negatives_shape, backend):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = [leaf(5, 4), leaf(6, 4), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)]
    if negatives_shape:
        inputs.append(leaf(*negatives_shape))

    def loss(query, key, scale, negatives=None):
        return info_nce_loss(
            query, key, negatives=negatives, logit_scale=scale, symmetric=symmetric, label_smoothing=0.1,
            reduction=reduction, backend=backend, memory_budget=memory_budget,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, inputs)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    extra=st.integers(0, 40),
    d=st.integers(1, 20),
    scale=st.floats(-30, 30),
    budget=st.integers(0, 3000),
    seed=st.integers(0, 2**31),
    symmetric=st.booleans(),
)
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_any_shape_equals_the_specification(name, n, extra, d, scale, budget, seed, symmetric):
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(s, d, generator=rng, dtype=torch.float64) for s in (n, n + extra))
    target = torch.randint(n + extra, (n,), generator=rng)
    results = []
    for backend in (name, "eager"):
        leaves = [t.clone().requires_grad_() for t in (q, k, torch.tensor(scale, dtype=torch.float64))]
        loss = info_nce_loss(
            *leaves[:2], target=target, logit_scale=leaves[2], symmetric=symmetric, backend=backend,
            memory_budget=budget,
        )  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_second_derivative_is_refused_not_zero(symmetric, wanted, backend):
    """Whichever input the gradient is of, and for the upstream gradient too."""
    inputs = [torch.randn(4, 3), torch.randn(4, 3), torch.tensor(2.0)]
    inputs[wanted].requires_grad_()
    for upstream in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        loss = info_nce_loss(
            *inputs[:2], logit_scale=inputs[2], symmetric=symmetric, backend=backend, memory_budget=0
        )
        (gradient,) = torch.autograd.grad(loss * upstream, inputs[wanted], create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once.*backend='eager'"):
            gradient.sum().backward()


def test_second_derivative_of_eager():
    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda x, y: clip_loss(x, y, 1.5, backend="eager"), inputs)
