"""Ranks whose calls differ: each has an error that says which calls met, none dies, and the group can go on."""

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import LOSSES as PAIR_LOSSES
from distributed_cases import Batch
from processes import Ranks, needs_gloo
from torch.utils.checkpoint import checkpoint

import replearn_kernels
from replearn_kernels import (
    ClipLoss,
    DINOHeadLoss,
    DINOLoss,
    arcface_loss,
    clip_loss,
    dino_head_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
)
from replearn_kernels.engine.world import World
from replearn_kernels.momentum import NegativeQueue

pytestmark = needs_gloo

ODD = 1  # the rank that differs
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks"), timeout=20) as ranks:
        yield ranks


def fixed(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def dino_head(x, **options):
    return dino_head_loss(x.expand(2, -1, -1), fixed(2, 4, 3), fixed(5, 3), fixed(5, 3), torch.zeros(5), **options)


LOSSES = {  # of x[4, 3]; what is sent differs in size from one to the next
    "clip_loss": lambda x, **options: clip_loss(x, fixed(4, 3), 2.0, **options),
    "siglip_loss": lambda x, **options: siglip_loss(x, fixed(4, 3), 2.0, -1.0, **options),
    "sup_con_loss": lambda x, **options: sup_con_loss(x, LABELS, **options),
    "nt_xent_loss": lambda x, **options: nt_xent_loss(x, fixed(4, 3), **options),
    "triplet_margin_loss": lambda x, **options: triplet_margin_loss(x, LABELS, mining="batch_hard", **options),
    "arcface_loss": lambda x, **options: arcface_loss(x, fixed(5, 3), LABELS, **options),
    "dino_head_loss": dino_head,
}


def rows():
    return fixed(4, 3).requires_grad_()


def gradient(loss, group):
    x = rows()
    loss(x, group=group).backward()
    return x.grad


def check(rank, world, case, names, of_others, of_odd):
    """``names``: of the losses. Calls are numbered by group."""
    group = dist.new_group()
    losses = [LOSSES[name] for name in names]
    calls = rf"rank {'0, 2' if world == 3 else '0'}: {of_others}; rank {ODD}: {of_odd}\. "
    with pytest.raises(RuntimeError, match="^different calls met on the ranks of the group: " + calls.format(*names)):
        case(rank == ODD, group, *losses)
    for loss in losses:  # as on a group where nothing happened
        assert torch.equal(gradient(loss, group), gradient(loss, dist.group.WORLD))


def other_order(odd, group, first, second):
    losses = [loss(rows(), group=group) for loss in (first, second)]
    for loss in reversed(losses) if odd else losses:
        loss.backward()


def other_order_of_one_loss(odd, group, loss):
    other_order(odd, group, loss, loss)


def skipped_backward(odd, group, first, second):
    loss = first(rows(), group=group)
    if not odd:
        loss.backward()
    second(rows(), group=group)


def next_step(odd, group, loss):
    skipped_backward(odd, group, loss, loss)


def another_loss(odd, group, first, second):
    (second if odd else first)(rows(), group=group)


ORDERS = [
    (other_order, "backward of {0}, call 1", "backward of {1}, call 2"),
    (skipped_backward, "backward of {0}, call 1", "forward of {1}, call 2"),
    (another_loss, "forward of {0}, call 1", "forward of {1}, call 1"),
]
ORDERS_OF_ONE = [
    (other_order_of_one_loss, "backward of {0}, call 1", "backward of {0}, call 2"),
    (next_step, "backward of {0}, call 1", "forward of {0}, call 2"),
]
PAIRS = [
    ("clip_loss", "sup_con_loss"), ("siglip_loss", "triplet_margin_loss"), ("nt_xent_loss", "sup_con_loss"),
    ("arcface_loss", "dino_head_loss"), ("dino_head_loss", "clip_loss"), ("triplet_margin_loss", "arcface_loss"),
]  # fmt: skip


def named(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("case, of_others, of_odd", ORDERS, ids=named)
def test_two_losses(ranks, case, of_others, of_odd, names):
    ranks.run(check, ranks.world_size, case, names, of_others, of_odd)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case, of_others, of_odd", ORDERS_OF_ONE, ids=named)
def test_one_loss(ranks, case, of_others, of_odd, name):
    ranks.run(check, ranks.world_size, case, (name,), of_others, of_odd)


def gradients_apart(odd, group):
    """Of rows and classes at once, and of the classes alone twice: parts of one call."""
    x, weight = rows(), fixed(5, 3).requires_grad_()
    loss = arcface_loss(x, weight, LABELS, group=group)
    for _ in range(2):
        torch.autograd.grad(loss, [weight] if odd else [x, weight], retain_graph=True)


def center(odd, group):
    if odd:
        clip_loss(rows(), rows(), 1.0, group=group)
    else:
        DINOLoss(3, group=group)(fixed(2, 4, 3), fixed(2, 4, 3))


def head_with_center(odd, group):
    features, weight = fixed(2, 4, 3).requires_grad_(), fixed(5, 3)
    if odd:
        dino_head_loss(features, features, weight, weight, torch.zeros(5), group=group).backward()
    else:
        DINOHeadLoss(5, group=group)(features, features, weight, weight)


def mean_of_open_clip(odd, group):
    loss = ClipLoss(local_loss=odd, group=group)(rows(), fixed(4, 3), 1.0)
    loss.backward()


def queue(odd, group):
    if odd:
        NegativeQueue(7, 3).push(fixed(4, 3))
    else:
        clip_loss(rows(), rows(), 1.0, group=dist.group.WORLD)


def recomputation(odd, group):
    """The forward call of an activation checkpoint, and that of the next step."""
    loss = partial(LOSSES["triplet_margin_loss"], group=group)
    value = checkpoint(loss, rows(), use_reentrant=False)
    if not odd:
        value.backward()
    loss(rows())


OTHER_EXCHANGES = [
    (recomputation, "recomputed forward of triplet_margin_loss, call 2", "forward of triplet_margin_loss, call 2"),
    (gradients_apart, r"backward \(gathered rows\) of arcface_loss, call 1", "backward of arcface_loss, call 1"),
    (center, "forward of DINOLoss, call 1", "forward of clip_loss, call 1"),
    (head_with_center, "forward of DINOHeadLoss, call 2", "backward of dino_head_loss, call 1"),
    (mean_of_open_clip, "mean of ClipLoss, call 2", "backward of clip_loss, call 1"),
    (queue, r"forward of clip_loss, call \d+", r"push of NegativeQueue, call \d+"),
]


@pytest.mark.parametrize("case, of_others, of_odd", OTHER_EXCHANGES, ids=named)
def test_other_exchanges(ranks, case, of_others, of_odd):
    ranks.run(check, ranks.world_size, case, (), of_others, of_odd)


def failed_elsewhere(rank):
    """A rank that skips its backward and fails in its next call: the others, in their backward, are told."""
    group = dist.new_group()
    loss = LOSSES["clip_loss"](rows(), group=group)
    if rank == ODD:
        with pytest.raises(TypeError, match="text_features must be a torch.Tensor"):
            clip_loss(rows(), None, 1.0, group=group)
    else:
        theirs = "the call failed on other ranks of the group: rank 1: TypeError: text_features must be"
        with pytest.raises(ValueError, match=theirs):
            loss.backward()
    loss.backward()  # nothing of it was exchanged, nor freed
    assert gradient(LOSSES["siglip_loss"], group).isfinite().all()


def test_a_call_that_fails_meets_a_backward(ranks):
    ranks.run(failed_elsewhere)


CALLS = {  # of losses that are made of several, forward and backward
    "soft_target": (2, 1), "soft_target_symmetric": (3, 1), "gist": (2, 1), "gist_negatives": (3, 2),
}  # fmt: skip


def begins_with_a_meeting(rank):
    """What every loss exchanges, forward and backward."""
    seen = []

    def recorded(what, function):
        def call(*args, **options):
            seen.append(what)
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_meet", recorded("meeting", World._meet))
        for function in ("all_gather", "batch_isend_irecv", "all_reduce"):
            patch.setattr(dist, function, recorded("exchange", getattr(dist, function)))
        for name, loss in PAIR_LOSSES.items():
            value = loss(Batch.random(4).leaves(), group=dist.group.WORLD)
            forward, backward = CALLS.get(name, (1, 1))
            assert seen[0] == "meeting" and seen.count("meeting") == forward, name
            seen.clear()
            if value.requires_grad:
                value.sum().backward()
                assert seen[0] == "meeting" and seen.count("meeting") == backward, name
                seen.clear()


def test_every_exchange_begins_with_a_meeting(ranks):
    ranks.run(begins_with_a_meeting)


COLLECTIVE = re.compile(r"all_gather|all_reduce|all_to_all|barrier|broadcast|gather|i?send|i?recv|reduce|scatter|P2POp")


def test_one_module_exchanges():
    """Where no call can forget to meet the others first."""
    package = Path(replearn_kernels.__file__).parent
    exchanging = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed")
        if COLLECTIVE.search(node.attr)
    }
    assert exchanging == {"engine/world.py"}
