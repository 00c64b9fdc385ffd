"""The queue of negatives against a Python list, the moving average against hand-computed numbers."""

import copy
import io
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accuracy import unit_rows
from hypothesis import given, settings
from torch import nn

from replearn_kernels import info_nce_loss
from replearn_kernels.momentum import MomentumEncoder, NegativeQueue, update_momentum

NAN = float("nan")


def numbered(start, count):
    """Keys that tell their number: key n is (n, -n)."""
    n = torch.arange(start, start + count, dtype=torch.float32)
    return torch.stack([n, -n], dim=1)


def first_column(queue):
    return queue.negatives()[:, 0].tolist()


# The queue


def test_wrap_around_by_hand():
    """Size 5, batches of 2 that do not divide it, then one larger than the queue."""
    queue = NegativeQueue(5, 2)
    table = [[0, 1], [0, 1, 2, 3], [5, 1, 2, 3, 4], [5, 6, 7, 3, 4]]
    for step, expected in enumerate(table):
        queue.push(numbered(2 * step, 2))
        assert first_column(queue) == expected
    queue.push(numbered(8, 7))  # 8 to 14, of which 10 to 14 stay
    assert first_column(queue) == [10, 11, 12, 13, 14]
    queue.push(numbered(15, 12))  # 15 to 26, of which 22 to 26 stay
    assert first_column(queue) == [25, 26, 22, 23, 24]
    assert queue.negatives()[:, 1].tolist() == [-25, -26, -22, -23, -24]
    assert queue.pushed.item() == 27


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=8), resume=st.integers(0, 8))
def test_any_batches_equal_a_list(size, batches, resume):
    """Through a checkpoint in the middle: the last ``size`` keys of the list, each in row number % size."""
    queue, history = NegativeQueue(size, 2), []
    for step, count in enumerate(batches):
        if step == resume:
            restored = NegativeQueue(size, 2)
            restored.load_state_dict(queue.state_dict())
            queue = restored
        queue.push(numbered(len(history), count))
        history += range(len(history), len(history) + count)
        kept = history[-size:]
        assert first_column(queue) == sorted(kept, key=lambda number: number % size)
        assert queue.pushed.item() == len(history)


def test_state_dict_resumes_exactly():
    queue = NegativeQueue(4, 2)
    queue.push(numbered(0, 3))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sorted(state) == ["keys", "pushed"]
    restored = NegativeQueue(4, 2)
    restored.push(numbered(50, 9))
    assert len(restored.negatives()) == 4
    restored.load_state_dict(state)  # full before, not full after
    assert first_column(restored) == [0, 1, 2]
    for each in (queue, restored, copy.deepcopy(queue)):
        each.push(numbered(3, 3))
        assert first_column(each) == [4, 5, 2, 3]
    with pytest.raises(RuntimeError, match="size mismatch for keys"):
        NegativeQueue(5, 2).load_state_dict(state)


def test_push_before_backward_changes_nothing(backend, rng):
    """The negatives of the loss are those of its forward pass, until the backward pass and in it."""
    query, key, keys = (unit_rows(rng, n, 3) for n in (4, 4, 6))
    gradients = []
    for push_first in (False, True):
        queue = NegativeQueue(6, 3)
        queue.push(keys)
        leaf = query.clone().requires_grad_()
        negatives = queue.negatives()
        loss = info_nce_loss(leaf, key, negatives=negatives, logit_scale=10.0, backend=backend, memory_budget=0)
        if push_first:
            queue.push(key)
            queue.push(-keys)
        loss.backward()
        gradients.append(leaf.grad)
        assert torch.equal(negatives, keys) and not negatives.requires_grad
    assert torch.equal(*gradients)
    dense = query.double().requires_grad_()
    F.cross_entropy(10 * dense @ torch.cat([key, keys]).double().t(), torch.arange(4)).backward()
    torch.testing.assert_close(gradients[1], dense.grad.float())


@pytest.mark.parametrize("name", ["torch", "cpp", "eager"])
def test_empty_queue_is_no_negatives(name, rng):
    query, key = unit_rows(rng, 4, 3).requires_grad_(), unit_rows(rng, 4, 3)
    queue = NegativeQueue(6, 3)
    queue.push(key[:0])
    assert queue.negatives().shape == (0, 3)
    results = []
    for negatives in (queue.negatives(), None):
        loss = info_nce_loss(query, key, negatives=negatives, backend=name)
        results.append((loss, *torch.autograd.grad(loss, query)))
    for with_queue, without in zip(*results):
        torch.testing.assert_close(with_queue, without)


def test_keys_are_detached_and_cast():
    queue = NegativeQueue(4, 2, dtype=torch.float64).half()
    assert queue.keys.dtype == torch.float16 and queue.pushed.dtype == torch.int64
    third = torch.full((1, 2), 1 / 3, dtype=torch.float64, requires_grad=True)
    queue.push(third)
    queue.push(torch.tensor([[NAN, 1.0], [2.0, 3.0]]).t())  # of any strides, with anything in it
    expected = torch.tensor([[1 / 3, 1 / 3], [NAN, 2.0], [1.0, 3.0]]).half()
    torch.testing.assert_close(queue.negatives(), expected, rtol=0, atol=0, equal_nan=True)
    assert not queue.negatives().requires_grad
    queue.to(torch.bfloat16).push(third)
    assert queue.negatives().dtype == torch.bfloat16 and len(queue.negatives()) == 4
    assert NegativeQueue(4, 2, device="meta").keys.is_meta
    assert NegativeQueue(4, 2).to("meta").keys.is_meta
    assert repr(queue) == "NegativeQueue(size=4, dim=2, gather=True)"


def test_fixed_memory():
    queue = NegativeQueue(3, 2)
    address = queue.keys.data_ptr()
    for step in range(5):
        queue.push(numbered(step, 2))
        assert queue.negatives().data_ptr() != queue.keys.data_ptr() == address


@pytest.mark.parametrize(
    "keys, exception, message",
    [
        ([[1.0, 2.0]], TypeError, "keys must be a torch.Tensor, got list"),
        (torch.ones(2), ValueError, r"keys must have 2 dimensions \[N, d\], got shape \(2,\)"),
        (torch.ones(1, 1, 2), ValueError, r"keys must have 2 dimensions \[N, d\], got shape \(1, 1, 2\)"),
        (torch.ones(4, 3), ValueError, "keys must have the queue's width 2, got 3"),
        (torch.ones(4, 2).long(), TypeError, "keys must be fp16, bf16, fp32 or fp64, got torch.int64"),
        (torch.ones(4, 2).to("meta"), ValueError, "keys must be on the queue's device cpu, got meta"),
    ],
)
def test_bad_keys(keys, exception, message):
    queue = NegativeQueue(4, 2)
    with pytest.raises(exception, match=message):
        queue.push(keys)
    assert queue.pushed == 0


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (dict(size=0), ValueError, "size must be at least 1, got 0"),
        (dict(size=2.0), TypeError, "size must be an int, got float"),
        (dict(size=True), TypeError, "size must be an int, got bool"),
        (dict(dim=-1), ValueError, "dim must be at least 1, got -1"),
        (dict(gather=1), TypeError, "gather must be a bool, got int"),
        (dict(dtype=torch.int64), TypeError, "dtype must be fp16, bf16, fp32 or fp64, got torch.int64"),
    ],
)
def test_bad_queue(arguments, exception, message):
    with pytest.raises(exception, match=message):
        NegativeQueue(**{"size": 4, "dim": 2, **arguments})


# The moving average


def linear(weight, bias):
    module = nn.Linear(1, 1)
    module.load_state_dict({"weight": torch.tensor([[weight]]), "bias": torch.tensor([bias])})
    return module


def test_moving_average_by_hand():
    """m = 3/4, exact in binary: 1 goes to 1.5, 1.875 on the way to 3."""
    target, source = linear(1.0, -2.0), linear(3.0, 2.0)
    for weight, bias in ((1.5, -1.0), (1.875, -0.25)):
        update_momentum(target, source, 0.75)
        assert (target.weight.item(), target.bias.item()) == (weight, bias)
        assert (source.weight.item(), source.bias.item()) == (3.0, 2.0)
    update_momentum(target, source, 1)
    assert target.weight.item() == 1.875
    update_momentum(target, source, 0)
    assert target.weight.item() == 3.0
    assert target.weight.requires_grad and target.weight.grad_fn is None


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
def test_moving_average_is_the_papers_formula(momentum):
    """In fp64, over steps in which the source moves; the default momentum is 0.999."""
    source = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    target = copy.deepcopy(source)
    expected = [p.detach().clone() for p in source.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for i, p in enumerate(source.parameters()):
                p.add_(torch.randn_like(p))
                expected[i] = momentum * expected[i] + (1 - momentum) * p
        update_momentum(target, source, momentum) if momentum != 0.999 else update_momentum(target, source)
    for ours, exact in zip(target.parameters(), expected):
        torch.testing.assert_close(ours.detach(), exact, rtol=1e-14, atol=1e-15)


def test_buffers_are_copied():
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for _ in range(2):
        source(torch.randn(8, 3) * 4 + 1)
    update_momentum(target, source)
    assert torch.equal(target.running_mean, source.running_mean) and target.running_mean.abs().sum() > 0
    assert torch.equal(target.running_var, source.running_var)
    assert target.num_batches_tracked == 2
    source(torch.randn(8, 3))
    assert target.num_batches_tracked == 2  # a copy, not an alias


def test_each_keeps_its_dtype():
    target, source = linear(1.0, 0.0), linear(3.0, 0.0).half()
    update_momentum(target, source, 0.75)
    assert target.weight.dtype == torch.float32 and target.weight.item() == 1.5
    update_momentum(source, target, 0.5)
    assert source.weight.dtype == torch.float16 and source.weight.item() == 2.25


def test_tied_parameters_move_once():
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source[1].weight = source[0].weight
    target = copy.deepcopy(source)
    nn.init.ones_(source[0].weight)
    nn.init.zeros_(target[0].weight)
    update_momentum(target, source, 0.75)
    assert target[1].weight is target[0].weight and (target[0].weight == 0.25).all()


def test_module_without_parameters():
    update_momentum(nn.Identity(), nn.Identity())
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(MomentumEncoder(nn.Identity())(x), x)


@pytest.mark.parametrize(
    "target, source, exception, message",
    [
        (None, nn.Linear(1, 1), TypeError, "target_module must be a torch.nn.Module, got NoneType"),
        (nn.Linear(1, 1), {}, TypeError, "source_module must be a torch.nn.Module, got dict"),
        (nn.Linear(1, 1), nn.Linear(1, 1, bias=False), ValueError, "source_module has no parameter 'bias', which"),
        (nn.Linear(1, 1, bias=False), nn.Linear(1, 1), ValueError, "target_module has no parameter 'bias', which"),
        (
            nn.Sequential(nn.Linear(2, 1)), nn.Sequential(nn.Linear(3, 1)), ValueError,
            r"parameter '0.weight' must have the same shape in both modules, got \(1, 2\) in target_module",
        ),
        (
            nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), ValueError,
            "source_module has no buffer 'running_mean', which target_module has",
        ),
    ],
)  # fmt: skip
def test_different_structures(target, source, exception, message):
    before = copy.deepcopy(target.state_dict()) if target else {}
    with pytest.raises(exception, match=message):
        update_momentum(target, source, 0.5)
    for name, value in before.items():
        assert torch.equal(value, target.state_dict()[name])


@pytest.mark.parametrize(
    "momentum, exception, message",
    [
        (-0.1, ValueError, r"momentum must be in \[0, 1\], got -0.1"),
        (1.5, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        (NAN, ValueError, r"momentum must be in \[0, 1\], got nan"),
        ("0.9", TypeError, "momentum must be a float, got str"),
        (None, TypeError, "momentum must be a float, got NoneType"),
    ],
)
def test_bad_momentum(momentum, exception, message):
    with pytest.raises(exception, match=message):
        update_momentum(nn.Linear(1, 1), nn.Linear(1, 1), momentum)
    with pytest.raises(exception, match=message):
        MomentumEncoder(nn.Linear(1, 1), momentum)
    encoder = MomentumEncoder(nn.Linear(1, 1))
    encoder.momentum = momentum
    with pytest.raises(exception, match=message):
        encoder.update(nn.Linear(1, 1))


# The momentum encoder


def test_momentum_encoder_follows():
    encoder = linear(1.0, 0.0)
    follower = MomentumEncoder(encoder, momentum=0.75)
    nn.init.constant_(encoder.weight, 3.0)
    assert follower.encoder.weight.item() == 1.0  # a deep copy
    follower.update(encoder)
    assert follower.encoder.weight.item() == 1.5
    follower.momentum = 0.5  # a schedule
    follower.update(encoder)
    assert follower.encoder.weight.item() == 2.25
    output = follower(torch.tensor([[2.0]], requires_grad=True))
    assert output.item() == 4.5 and not output.requires_grad
    assert encoder.weight.requires_grad and not any(p.requires_grad for p in follower.parameters())
    assert sorted(follower.state_dict()) == ["encoder.bias", "encoder.weight"]
    assert "momentum=0.5" in repr(follower)
    with pytest.raises(TypeError, match="encoder must be a torch.nn.Module, got function"):
        MomentumEncoder(lambda x: x)


def test_momentum_encoder_passes_arguments_on():
    follower = MomentumEncoder(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4)
    output, weights = follower(x, x, value=x, need_weights=True)
    assert output.shape == x.shape and weights.shape == (2, 3, 3)


def test_momentum_encoder_modes():
    """It starts in the encoder's mode, parts of it too, and follows train() and eval()."""
    encoder = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    follower = MomentumEncoder(encoder)
    assert [m.training for m in (follower, *follower.encoder)] == [True, True, False]
    assert not MomentumEncoder(encoder.eval()).training
    follower(torch.randn(5, 2))
    assert follower.encoder[0].num_batches_tracked == 1 and encoder[0].num_batches_tracked == 0
    follower.eval()(torch.randn(5, 2))
    assert follower.encoder[0].num_batches_tracked == 1
    assert all(m.training for m in follower.train().modules())
    follower.update(encoder)
    assert follower.encoder[0].num_batches_tracked == 0


def test_training_with_momentum_contrast(rng):
    """Encoder, momentum encoder and queue on noisy pairs: the loss falls below a tenth of the log of the columns."""
    n, size = 16, 64
    encoder = nn.Linear(20, 16)
    follower, queue = MomentumEncoder(encoder, momentum=0.9), NegativeQueue(size, 16)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for _ in range(120):
        x = torch.randn(n, 20, generator=rng)
        query, key = encoder(x), follower(x + 0.1 * torch.randn(n, 20, generator=rng))
        loss = info_nce_loss(query, key, negatives=queue.negatives(), logit_scale=10.0, normalize=True)
        queue.push(key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follower.update(encoder)
    assert len(queue.negatives()) == size
    assert loss.item() < 0.1 * math.log(n + size)
