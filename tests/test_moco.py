"""MoCo's loss, ``batch_negatives=False``: one positive, and negatives that are not the batch's other keys."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import unit_rows, value_and_gradients

from replearn_kernels import InfoNCELoss, NegativeQueue, count_work, info_nce_loss

EXACT = dict(rtol=1e-12, atol=1e-14)


def published(query, key, negatives, scale, **options):
    """Cross entropy of (positive, negatives), of which the first is right: as MoCo's code and lightly's form it."""
    positive = (query * key).sum(1, keepdim=True)
    negative = query @ negatives.t() if negatives.ndim == 2 else (query.unsqueeze(1) * negatives).sum(2)
    logits = torch.cat([positive, negative], dim=1) * scale
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64), **options)


def fused(query, key, negatives, scale, **options):
    return info_nce_loss(query, key, negatives=negatives, logit_scale=scale, batch_negatives=False, **options)


def rows(rng, *shape, dtype=torch.float64):
    return unit_rows(rng, *shape, 12, dtype=dtype)


@pytest.mark.parametrize("name", ["torch", "cpp", "eager"])
@pytest.mark.parametrize("negatives", [(37,), (1500,), (0,), "own", "no own"], ids=str)
@pytest.mark.parametrize("n", [1, 2, 33, 600])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_the_published_formula(name, negatives, n, smoothing, rng):
    """In fp64: value, and gradients of query, key, negatives and scale."""
    shape = {"own": (n, 5), "no own": (n, 0)}.get(negatives, negatives)
    inputs = rows(rng, n), rows(rng, n), rows(rng, *shape), torch.tensor(5.0, dtype=torch.float64)
    expected = value_and_gradients(lambda *x: published(*x, label_smoothing=smoothing), *inputs)
    for budget in (0, 2**28):
        options = dict(label_smoothing=smoothing, backend=name, memory_budget=budget)
        ours = value_and_gradients(lambda *x: fused(*x, **options), *inputs)  # noqa: B023
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", ["torch", "cpp", "eager"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(name, reduction, rng):
    inputs = rows(rng, 9), rows(rng, 9), rows(rng, 20), torch.tensor(3.0, dtype=torch.float64)
    weights = torch.randn(9, generator=rng, dtype=torch.float64) if reduction == "none" else 1.0
    ours, expected = (
        value_and_gradients(lambda *x: (loss(*x, reduction=reduction, **options) * weights).sum(), *inputs)  # noqa: B023
        for loss, options in ((fused, dict(backend=name)), (published, {}))
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_number_worked_by_hand(backend):
    """Query e1 with its key at cosine 0.6 and negatives at 0 and -1; the batch's other key, e1 itself, is none."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    key = torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    losses = fused(query, key, queue, 1.0, reduction="none", backend=backend)
    logits = torch.tensor([[0.6, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(losses, logits.logsumexp(1) - logits[:, 0], **EXACT)
    assert (info_nce_loss(query, key, negatives=queue, reduction="none", backend=backend) > losses).all()


def test_lightly(rng):
    """Their memory bank as our queue: equal values, step by step."""
    bank = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.1, memory_bank_size=(64, 12))
    query, key = rows(rng, 16, dtype=torch.float32), rows(rng, 16, dtype=torch.float32)
    for _ in range(3):
        bank(query.requires_grad_(), key)
    queue = bank.memory_bank.bank
    queue = (queue.t() if queue.shape[0] == 12 else queue).clone()
    torch.testing.assert_close(fused(query, key, queue, 10.0), bank(query, key))


@pytest.mark.parametrize("memory_budget", [0, 2**30])
def test_costs_two_units_and_forms_no_key_against_another(memory_budget, backend, rng):
    """Of N x K; the positives take three products of N x d."""
    n, k = 1000, 3000
    query, key, queue = (rows(rng, size, dtype=torch.float32) for size in (n, n, k))
    with count_work() as work:
        fused(
            query.requires_grad_(), key.requires_grad_(), queue, 5.0, backend=backend, memory_budget=memory_budget
        ).backward()
    assert work.units(n, 1, 12) == 2 * k + 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype, backend, rng):
    inputs = [rows(rng, size, dtype=dtype) for size in (40, 40, 200)]
    exact = value_and_gradients(lambda *x: published(*x, 10.0), *(x.double() for x in inputs))
    eager = value_and_gradients(lambda *x: fused(*x, 10.0, backend="eager"), *inputs)
    ours = value_and_gradients(lambda *x: fused(*x, 10.0, backend=backend), *inputs)
    for a, b, truth in zip(ours, eager, exact, strict=True):
        error, allowed = ((t.double() - truth).abs().max() for t in (a, b))
        assert error <= allowed + 2 * torch.finfo(a.dtype).eps * truth.abs().max()


def test_compiles(rng):
    query, key, queue = rows(rng, 7), rows(rng, 7), rows(rng, 20)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for negatives in (queue, rows(rng, 7, 3)):
        ours = value_and_gradients(lambda q, k: compiled(q, k, negatives, 4.0), query, key)  # noqa: B023
        for a, b in zip(ours, value_and_gradients(lambda q, k: published(q, k, negatives, 4.0), query, key)):  # noqa: B023
            torch.testing.assert_close(a, b, **EXACT)


def test_module_with_a_queue(rng):
    """A training step as the README has it: the queue is empty at first."""
    loss, queue = InfoNCELoss(batch_negatives=False, normalize=True), NegativeQueue(6, 12, dtype=torch.float64)
    query, key = rows(rng, 4), rows(rng, 4)
    for step in range(3):
        negatives = queue.negatives()
        assert len(negatives) == min(4 * step, 6)
        expected = published(query, key, negatives, 5.0)
        torch.testing.assert_close(loss(3 * query, 2 * key, negatives=negatives, logit_scale=5.0), expected, **EXACT)
        queue.push(key)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(negatives=None), "batch_negatives=False needs negatives"),
        (dict(symmetric=True), "batch_negatives=False takes no symmetric=True"),
        (dict(target=torch.arange(4)), r"batch_negatives=False takes no target: .* pass key\[target\]"),
        (dict(key=torch.randn(5, 3)), "query and key must have the same number of rows, got 4 and 5"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_what_it_does_not_go_with(options, message, backend):
    arguments = dict(query=torch.randn(4, 3), key=torch.randn(4, 3), negatives=torch.randn(6, 3)) | options
    with pytest.raises(ValueError, match=message):
        info_nce_loss(**arguments, batch_negatives=False, backend=backend)


def test_options_of_the_module():
    with pytest.raises(ValueError, match="batch_negatives=False takes no symmetric=True"):
        InfoNCELoss(batch_negatives=False, symmetric=True)
    for make in (InfoNCELoss, lambda **k: info_nce_loss(torch.randn(4, 3), torch.randn(4, 3), **k)):
        with pytest.raises(TypeError, match="batch_negatives must be a bool, got int"):
            make(batch_negatives=0)
