"""When the center of the DINO modules moves, and when it does not: activation checkpointing, micro-batches, values that
are not finite; in one process and in two.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from dino_oracle import heads
from processes import Ranks, needs_gloo
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from replearn_kernels import DINOHeadLoss, DINOLoss, dino_loss

K = 20
REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


def batches(count, head, rows=5):
    """Arguments of so many calls: the student's features require a gradient."""
    made = []
    for seed in range(count):
        rng = torch.Generator().manual_seed(seed)
        student, weight, teacher, teacher_weight, _ = heads(rng, 3, 2, rows + seed % 2, K, 6, torch.float32)
        if head:
            made.append((student.requires_grad_(), teacher, weight, teacher_weight))
        else:
            made.append(((student @ weight.t()).requires_grad_(), teacher @ teacher_weight.t()))
    return made


def module_of(head, **options):
    module = (DINOHeadLoss if head else DINOLoss)(K, **options)
    module.center.copy_(torch.randn(K, generator=torch.Generator().manual_seed(9)))
    return module


def gradients(total, calls):
    return torch.autograd.grad(total, [arguments[0] for arguments in calls])


def gradients_by_backward(total, calls):
    """What a reentrant checkpoint asks for."""
    total.backward()
    return [arguments[0].grad for arguments in calls]


def mean_logits(calls):
    rows = [(c[1] @ c[3].t() if len(c) > 2 else c[1]).flatten(0, 1) for c in calls]
    return torch.cat(rows).mean(0)


# -- activation checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
@REENTRANT
def test_checkpointed_calls_take_the_center_that_they_took_first(head, use_reentrant):
    """Three micro-batches, all computed again, the last one first; they count once in the center."""
    calls = batches(3, head)
    plain, module = module_of(head, defer_center=True), module_of(head, defer_center=True)
    expected = gradients(sum(plain(*c) for c in calls), calls)
    total = sum(checkpoint(module, *c, use_reentrant=use_reentrant) for c in calls)
    for got, truth in zip(gradients_by_backward(total, calls), expected):
        assert torch.equal(got, truth)
    plain.update_center()
    module.update_center()
    assert torch.equal(module.center, plain.center) and not torch.equal(plain.center, module_of(head).center)


@pytest.mark.parametrize("head", [False, True])
@REENTRANT
def test_a_center_that_has_moved_is_refused(head, use_reentrant):
    """With the call, or between it and its backward pass: not another gradient in silence."""
    calls = batches(1, head)
    for defer in (False, True):
        module = module_of(head, defer_center=defer)
        loss = checkpoint(module, *calls[0], use_reentrant=use_reentrant)
        if defer:
            module.update_center()
        with pytest.raises(RuntimeError, match="its center has moved since: construct it with defer_center=True"):
            loss.backward()


def test_encoders_inside_and_checkpoints_inside_checkpoints():
    """The teacher's logits are computed again too, and the student's with dropout."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(4, K), torch.nn.Dropout(0.3))
    teacher, module = torch.nn.Linear(4, K), module_of(False, defer_center=True)

    def step(x):
        with torch.no_grad():
            targets = teacher(x[:2])
        return module(student(x), targets)

    def nested(x):
        return checkpoint(step, x, use_reentrant=False)

    results = []
    for wrapped in (step, partial(checkpoint, nested, use_reentrant=False)):
        module.center.zero_()
        torch.manual_seed(1)
        total = sum(wrapped(torch.randn(3, 5, 4)) for _ in range(2))
        gradient = torch.autograd.grad(total, list(student.parameters()))
        module.update_center()
        results.append((*gradient, module.center.clone()))
    assert all(map(torch.equal, *results))


def test_selective_checkpoint():
    """A policy that keeps what it can of the first call: also whether it was the first."""

    def policy(context, op, *args, **kwargs):
        return checkpointing.CheckpointPolicy.PREFER_SAVE

    calls, module = batches(2, False), module_of(False, defer_center=True)
    expected = gradients(sum(module_of(False)(*c) for c in calls[:1]), calls[:1])
    contexts = partial(checkpointing.create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=True)
    loss = checkpoint(module, *calls[0], use_reentrant=False, context_fn=contexts)
    module(*calls[1])
    assert torch.equal(gradients(loss, calls[:1])[0], expected[0])
    center = module.center.clone()
    module.update_center()
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * mean_logits(calls))


def alike(calls):
    """Of one shape, which one graph takes."""
    return [tuple(tensor[:, :5].detach().requires_grad_(tensor.requires_grad) for tensor in c) for c in calls]


@REENTRANT
def test_compiled_module_in_a_checkpoint(use_reentrant):
    """The graph of the first call is that of the second: when it runs it asks again."""
    torch._dynamo.reset()
    calls = alike(batches(2, False))
    plain, module = (module_of(False, defer_center=True) for _ in range(2))
    expected = gradients(sum(plain(*c) for c in calls), calls)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    total = sum(checkpoint(compiled, *c, use_reentrant=use_reentrant) for c in calls)
    for got, truth in zip(gradients_by_backward(total, calls), expected):
        torch.testing.assert_close(got, truth)
    plain.update_center()
    module.update_center()
    torch.testing.assert_close(module.center, plain.center)
    moves = torch.compile(module_of(False), backend="aot_eager", fullgraph=True)
    loss = checkpoint(moves, *calls[0], use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="its center has moved since"):
        loss.backward()


def test_compiled_checkpoint():
    """Here it is the graph's backward part that computes the call again. (With defer_center it has no graph at all:
    what calls add up is a side effect, which PyTorch takes out of a compiled checkpoint by an error of its own.)
    """
    torch._dynamo.reset()
    module, (call,) = module_of(False), batches(1, False)
    compiled = torch.compile(
        lambda *c: checkpoint(module, *c, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    loss = compiled(*call)
    torch.testing.assert_close(loss, module_of(False)(*call))
    with pytest.raises(RuntimeError, match="its center has moved since"):
        loss.backward()


def test_traced_module():
    """Whenever the program runs, its center moves, by batches of any size."""
    (call, other), plain, module = batches(2, False), module_of(False), module_of(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        program = torch.jit.trace(module, call, check_trace=False)
    plain(*call)  # as the tracing did
    torch.testing.assert_close(program(*other), plain(*other))
    torch.testing.assert_close(program.center, plain.center)


def test_a_checkpointed_call_that_is_not_finite():
    """The gradients tell a GradScaler; an error would end the training."""
    ((student, teacher),) = batches(1, False)
    teacher[0, 0, 0] = torch.inf
    loss = checkpoint(module_of(False, defer_center=True), student, teacher, use_reentrant=False)
    loss.backward()
    assert loss.isnan() and student.grad.isnan().any()


def test_bad_input_is_named_as_ever():
    ((student, teacher),) = batches(1, False)
    for given in ((None, teacher), (student.to_sparse(), teacher), (student[0], teacher), (student, 3.0)):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match="must be a |must have 3 dimensions"):
            module_of(False)(*given)


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_deferred_center_moves_once_by_the_mean_of_all_rows(head):
    """Micro-batches of 5 and 6 samples: as one batch of 11."""
    calls, module = batches(2, head), module_of(head, defer_center=True)
    center = module.center.clone()
    for c in calls:
        module(*c)
        assert torch.equal(module.center, center)
    module.eval()(*calls[0])
    module.update_center()
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * mean_logits(calls))
    moved = module.center.clone()
    module.update_center()
    assert torch.equal(module.center, moved)
    module.train()(*calls[1])
    module.double().update_center()
    expected = 0.9 * moved.double() + 0.1 * mean_logits(calls[1:])
    torch.testing.assert_close(module.center, expected, rtol=1e-6, atol=1e-6)


def test_deferred_center_compiled():
    torch._dynamo.reset()
    calls, plain, module = batches(4, True), module_of(True, defer_center=True), module_of(True, defer_center=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for k, c in enumerate(calls):
        torch.testing.assert_close(compiled(*c), plain(*c))
        if k % 2:
            plain.update_center()
            module.update_center()
    torch.testing.assert_close(module.center, plain.center)


def test_defer_center_is_a_flag():
    with pytest.raises(TypeError, match="defer_center must be a bool, got int"):
        DINOLoss(K, defer_center=1)
    assert "defer_center=True" in repr(DINOLoss(K, defer_center=True))
    with pytest.raises(RuntimeError, match=r"update_center\(\) is for defer_center=True"):
        DINOLoss(K).update_center()


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_does_not_enter_the_center(value, defer):
    """One logit of one step; the loss is that of the formula, the next step moves the center."""
    (bad, good), module = batches(2, False), module_of(False, defer_center=defer)
    bad[1][0, 1, 2] = value
    center = module.center.clone()
    for _ in range(2):
        eager = dino_loss(*bad, center, backend="eager")
        torch.testing.assert_close(module(*bad), eager, equal_nan=True)
        if defer:
            module.update_center()
        assert torch.equal(module.center, center)
    module(*good)
    if defer:
        module.update_center()
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * mean_logits([good]))


def test_weights_that_are_not_finite():
    ((student, teacher, weight, teacher_weight),) = batches(1, True)
    teacher_weight[3, 0] = torch.nan
    module = module_of(True)
    center = module.center.clone()
    module(student, teacher, weight, teacher_weight)
    assert torch.equal(module.center, center)


# -- in two processes --------------------------------------------------------------------------------------------------


def own_calls(rank, head, count=2):
    """Of a rank: batches that differ in number of samples from the other's, under the same weights."""
    return batches(4, head)[count * rank : count * (rank + 1)]


def not_finite_on_one_rank(rank):
    for head in (False, True):
        module, calls = module_of(head), own_calls(rank, head)
        center = module.center.clone()
        teacher = calls[0][1].clone()
        if rank == 1:
            teacher[0, 0, 0] = torch.inf
        module(calls[0][0], teacher, *calls[0][2:])
        assert torch.equal(module.center, center)
        module(*calls[1])
        assert not torch.equal(module.center, center)


def defers(rank):
    """Calls exchange nothing, so that the ranks may have different numbers of them; the move is over all rows."""
    module = module_of(False, defer_center=True)
    center = module.center.clone()
    for c in own_calls(rank, False)[: 1 + rank]:
        module(*c)
    assert torch.equal(module.center, center)
    module.update_center()
    everyone = batches(4, False)
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * mean_logits([everyone[k] for k in (0, 2, 3)]))
    moved = module.center.clone()
    module.update_center()
    assert torch.equal(module.center, moved)


def defers_with_prototypes_of_its_own(rank):
    """The features have met in the calls; each rank's part of the center is that of one process."""
    calls, whole = own_calls(rank, True), batches(4, True)
    own = slice(0, 8) if rank == 0 else slice(8, K)
    module = DINOHeadLoss(own.stop - own.start, group=dist.group.WORLD, defer_center=True)
    _, _, weight, teacher_weight = whole[0]
    for student, teacher, *_ in calls:
        module(student, teacher, weight[own].contiguous(), teacher_weight[own].contiguous()).backward()
    module.update_center()
    expected = 0.1 * mean_logits([(None, c[1], None, teacher_weight) for c in whole])
    torch.testing.assert_close(module.center, expected[own])


def checkpoints(rank):
    """Computed again without an exchange, whatever the order: of two calls each rank asks for another one first."""
    for head in (False, True):
        calls = own_calls(rank, head)
        plain, module = (module_of(head, defer_center=True) for _ in range(2))
        expected = [gradients(plain(*c), [c])[0] for c in calls]
        losses = [checkpoint(module, *c, use_reentrant=False) for c in calls]
        for k in ((0, 1), (1, 0))[rank]:
            assert torch.equal(gradients(losses[k], calls[k : k + 1])[0], expected[k])
        plain.update_center()
        module.update_center()
        assert torch.equal(module.center, plain.center)


def checkpoints_where_the_loss_meets(rank):
    """The loss exchanges its features again, the teacher's sum not."""
    calls = own_calls(rank, True)
    plain, module = (DINOHeadLoss(K, group=dist.group.WORLD, defer_center=True) for _ in range(2))
    expected = gradients(sum(plain(*c) for c in calls), calls)
    got = gradients(sum(checkpoint(module, *c, use_reentrant=False) for c in calls), calls)
    plain.update_center()
    module.update_center()
    assert all(map(torch.equal, got, expected)) and torch.equal(module.center, plain.center)


def differ(rank):
    module = DINOLoss(K + rank, defer_center=True)
    try:
        module.update_center()
    except ValueError as error:
        return str(error)


@needs_gloo
def test_two_processes(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        for check in (
            not_finite_on_one_rank, defers, defers_with_prototypes_of_its_own,
            checkpoints, checkpoints_where_the_loss_meets,
        ):  # fmt: skip
            ranks.run(check)
        message = f"out_dim must be the same on every rank of the group, got {K} on rank 0 and {K + 1} on rank 1"
        assert ranks.run(differ) == [message] * 2
