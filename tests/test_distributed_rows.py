"""Rows fetched from other ranks, and what is found across ranks: equal pairs, memory, values that are not finite."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_cases import in_one_process, on_one_rank
from processes import Ranks, needs_gloo
from torch.utils.checkpoint import checkpoint

from replearn_kernels import count_work, lifted_structure_loss, triplet_margin_loss
from replearn_kernels.engine import shards
from replearn_kernels.engine.remote_rows import Route
from replearn_kernels.engine.world import World
from replearn_kernels.functional import fetched as triplets_over_ranks

pytestmark = needs_gloo

SIZES = {2: [(4, 4), (1, 6), (5, 0)], 3: [(3, 3, 3), (2, 0, 5)], 4: [(2, 2, 2, 2), (4, 0, 1, 3)]}


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def problem(sizes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64).to(dtype)
    wanted = [torch.randint(0, sum(sizes), (count,), generator=g) for count in (7, 0, 12, 1)[: len(sizes)]]
    return rows, wanted, [torch.randn(len(index), 3, generator=g, dtype=torch.float64).to(dtype) for index in wanted]


def fetched(rank, sizes, dtype):
    rows, wanted, upstream = problem(sizes, dtype)
    with count_work() as work:
        route = Route(World(dist.group.WORLD), list(sizes), wanted[rank])
        found = route.fetch(rows.split(list(sizes))[rank])
        gradient = route.send_back(upstream[rank])
    return found.double().numpy(), gradient.double().numpy(), work.sent_elements


def owners(index, sizes):
    return torch.searchsorted(torch.tensor(sizes).cumsum(0), index, right=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fetched_rows_and_their_gradients(ranks, dtype):
    """Asked for any number of times, also of the own rank; and nothing is sent that nobody asked for."""
    world = ranks.world_size
    for sizes in SIZES[world]:
        rows, wanted, upstream = problem(sizes, dtype)
        exact = rows.double().clone().requires_grad_()
        torch.cat([exact[index] for index in wanted]).backward(torch.cat(upstream).double())
        expected = exact.grad.to(dtype).double().split(list(sizes))
        for rank, (found, gradient, sent) in enumerate(ranks.run(fetched, sizes, dtype)):
            np.testing.assert_array_equal(found, rows[wanted[rank]].double().numpy())
            eps = torch.finfo(dtype).eps
            np.testing.assert_allclose(gradient, expected[rank].numpy(), rtol=4 * eps, atol=4 * eps)
            asked = [(owners(index, sizes) == rank).sum().item() for index in wanted]
            others = (owners(wanted[rank], sizes) != rank).sum().item()
            given = sum(asked) - asked[rank]
            assert sent == (world - 1) * world + others + 3 * given + 3 * others


def of_equal_distances(rank, sizes, labels):
    """Points of a lattice, where most distances have equals."""
    points = torch.tensor([[i % 2, i // 2 % 2] for i in range(sum(sizes))], dtype=torch.float64)
    own = points.split(list(sizes))[rank].clone().requires_grad_()
    loss = triplet_margin_loss(
        own, labels.split(list(sizes))[rank], margin=5.0, mining="batch_hard", group=dist.group.WORLD, strategy="ring"
    )
    loss.backward()
    return loss.item(), own.grad.numpy()


def test_of_equal_pairs_the_lower_number_is_taken(ranks):
    """As in one process, whoever has met whom first."""
    for sizes in SIZES[ranks.world_size]:
        labels = torch.arange(sum(sizes)) // 2 % 3
        answers = ranks.run(of_equal_distances, sizes, labels)
        points = torch.tensor([[i % 2, i // 2 % 2] for i in range(sum(sizes))], dtype=torch.float64, requires_grad=True)
        loss = triplet_margin_loss(points, labels, margin=5.0, mining="batch_hard", backend="eager")
        loss.backward()
        torch.testing.assert_close(sum(value for value, _ in answers) / len(sizes), loss.item())
        for rank, (_, gradient) in enumerate(answers):
            expected = len(sizes) * points.grad.split(list(sizes))[rank]
            np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-12, atol=1e-12)


LOSSES = {
    "batch_hard": partial(triplet_margin_loss, mining="batch_hard"),
    "semi_hard": triplet_margin_loss,
    "batch_all": partial(triplet_margin_loss, mining="batch_all"),
    "lifted": lifted_structure_loss,
    "hard_lifted": partial(lifted_structure_loss, smooth=False),
}


def held(rank, name, rows, d):
    """Each row has a partner on the next rank, and one on the rank before."""
    torch.manual_seed(rank)
    x, place = torch.randn(rows, d).requires_grad_(), torch.arange(rows)
    labels = (rank + place % 2) % dist.get_world_size() * rows + place // 2
    with count_work() as work:
        LOSSES[name](x, labels, group=dist.group.WORLD, strategy="ring", memory_budget=0).backward()
    return work.workspace_bytes, work.sent_elements


@pytest.mark.parametrize("name", LOSSES)
def test_memory_and_traffic_of_the_ring(ranks, name):
    """Of the local batch, not of all: blocks and gradients that travel, then single rows, asked for and given.

    Sent are, in units of the local rows: batch_hard: half a ring of rows, then a positive and a negative, and their
    gradients. semi_hard: the same, and before it the positives. Lifted: half a ring of rows in both passes, the
    gradients of one, and partners in both. Not smooth: half a ring once. batch_all: half a ring of rows and gradients,
    the positives twice, and their gradients.
    """
    world, batch, d = ranks.world_size, 480, 512
    rows, half = batch // world, world // 2
    workspace, sent = zip(*ranks.run(held, name, rows, d))
    blocks, units = {
        "batch_hard": (8, half + 4), "semi_hard": (8, half + 5), "batch_all": (12, 2 * half + 4),
        "lifted": (12, 3 * half + 2), "hard_lifted": (8, half + 4),
    }[name]  # fmt: skip
    tables = 4 * 5 * rows * 8
    assert max(workspace) <= 4 * (blocks * rows * d + rows * rows) + tables
    assert sum(sent) <= world * units * rows * d + 40 * world * batch


def few_held(rank, function, *arguments):
    """With parts of the pairs' rows, and of the triplets', that are small here."""
    before = shards._FETCHED_ELEMENTS, triplets_over_ranks._HELD_ROWS
    shards._FETCHED_ELEMENTS, triplets_over_ranks._HELD_ROWS = 40, 1
    try:
        return function(rank, *arguments)
    finally:
        shards._FETCHED_ELEMENTS, triplets_over_ranks._HELD_ROWS = before


@pytest.mark.parametrize("name", ["lifted", "triplet_semi_hard_cosine"])
def test_pairs_across_ranks_some_at_a_time(ranks, name):
    """All ranks fetch as often, also those with no pair."""
    for sizes in SIZES[ranks.world_size]:
        _, values, expected = in_one_process(name, sizes)
        for rank, (loss, gradients) in enumerate(ranks.run(few_held, on_one_rank, name, sizes, dict(strategy="ring"))):
            torch.testing.assert_close(loss.item(), values[rank], rtol=1e-12, atol=1e-12)
            own = len(sizes) * expected.x.grad.split(list(sizes))[rank]
            np.testing.assert_allclose(gradients["x"], own.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["triplet_semi_hard", "triplet_batch_hard"])
def test_triplets_some_at_a_time(ranks, name):
    """Their rows are fetched again in the backward pass, by all ranks as often, also those without a triplet."""
    factors = (2.0, -0.5, 3.0, 1.0)[: ranks.world_size]
    for sizes in SIZES[ranks.world_size]:
        _, values, expected = in_one_process(name, sizes, factors)
        answers = ranks.run(few_held, on_one_rank, name, sizes, dict(strategy="ring"), None, factors)
        for rank, (loss, gradients) in enumerate(answers):
            torch.testing.assert_close(loss.item(), values[rank], rtol=1e-12, atol=1e-12)
            own = len(sizes) * expected.x.grad.split(list(sizes))[rank]
            np.testing.assert_allclose(gradients["x"], own.numpy(), rtol=1e-12, atol=1e-12)


def in_half_precision(rank, rows):
    """In two classes: a row's gradient is a sum of many terms."""
    torch.manual_seed(rank)
    x = torch.randn(rows, 4).abs().bfloat16().requires_grad_()
    options = dict(margin=2.0, distance="squared_euclidean", group=dist.group.WORLD)
    loss = triplet_margin_loss(x, torch.arange(rows) % 2, **options)
    loss.backward()
    return loss.item(), x.grad.float().numpy()


def test_parts_do_not_round_the_sum(ranks):
    for whole, parts in zip(ranks.run(in_half_precision, 64), ranks.run(few_held, in_half_precision, 64)):
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
        np.testing.assert_allclose(parts[1], whole[1], rtol=2**-7, atol=1e-6)  # one unit in the last place


def changed_in_place(rank):
    """Rows that a backward pass has to fetch again."""
    w = torch.randn(6, 3).requires_grad_()
    x = w * 1
    loss = triplet_margin_loss(x, torch.arange(6) % 2, margin=3.0, group=dist.group.WORLD)
    torch.nn.functional.relu_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_changed_in_place_are_refused(ranks):
    ranks.run(changed_in_place)
    ranks.run(few_held, changed_in_place)


def recomputed(rank, mining):
    labels, x = torch.arange(6) % 2, torch.randn(6, 3).requires_grad_()

    def loss(x):
        return triplet_margin_loss(x * 1, labels, margin=3.0, mining=mining, group=dist.group.WORLD)

    checkpointed = checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (loss(x), checkpointed)))


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
def test_triplets_inside_an_activation_checkpoint(ranks, mining):
    """Saved tensors may be read once there."""
    ranks.run(recomputed, mining)
    ranks.run(few_held, recomputed, mining)


def rows_held(rank, rows, d):
    torch.manual_seed(rank)
    x, labels = torch.randn(rows, d).requires_grad_(), torch.arange(rows) % 2
    with count_work() as work:
        triplet_margin_loss(x, labels, group=dist.group.WORLD, strategy="ring").backward()
    return work.workspace_bytes


def test_triplets_of_few_classes_do_not_gather_the_batch(ranks):
    """Two classes: every row is chosen by some anchor of every rank, and held for some of the anchors only."""
    rows, d = 16, 2048
    whole, in_parts = max(ranks.run(rows_held, rows, d)), max(ranks.run(few_held, rows_held, rows, d))
    shard = rows * d * 4
    assert whole >= 3 * ranks.world_size * shard  # those given, and those that came, before and after they were sorted
    assert in_parts <= 8 * shard  # the ring's blocks


def without_features(rank, name):
    x, labels = torch.zeros(6, 0, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 0]])[rank % 2]
    return LOSSES[name](x, labels, group=dist.group.WORLD).item()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_features(ranks, name):
    """All distances are 0, and pairs across ranks count as others do."""
    world = ranks.world_size
    labels = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 0]])[torch.arange(world) % 2].flatten()
    expected = LOSSES[name](torch.zeros(6 * world, 0, dtype=torch.float64), labels, backend="eager").item()
    assert sum(ranks.run(without_features, name)) / world == pytest.approx(expected, rel=1e-12)


def not_finite(rank, dtype, mining):
    x = torch.randn(4, 3).to(dtype)
    if rank == 1:
        x[2, 1] = float("nan")
    x.requires_grad_()
    loss = triplet_margin_loss(x, torch.tensor([0, 0, 1, 1]), mining=mining, group=dist.group.WORLD)
    loss.backward()
    assert loss.isnan() and x.grad.isnan().all()  # every row is compared with the one that is not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard", "batch_all"])
def test_a_nan_shows_on_every_rank(ranks, dtype, mining):
    ranks.run(not_finite, dtype, mining)
