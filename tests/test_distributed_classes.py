"""Classes and prototypes spread over the ranks of a process group, against all of them in one process, in fp64."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from class_cases import (
    CASES,
    DIFFERENTIABLE,
    EXACT,
    SHARDS,
    WIDTH,
    check,
    gradients_of,
    head_problem,
    in_one_process,
    leaves,
    margin_problem,
    on_one_rank,
    own_part,
)
from processes import Ranks, needs_gloo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from replearn_kernels import (
    ArcFaceLoss,
    CosFaceLoss,
    DINOHeadLoss,
    DINOLoss,
    arcface_loss,
    clip_loss,
    cosface_loss,
    count_work,
    dino_head_loss,
    triplet_margin_loss,
)

pytestmark = needs_gloo


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name, sharded):
    for case, (rows, classes) in enumerate(SHARDS[ranks.world_size]):
        if name == "dino_head":  # a head without a prototype is refused
            classes = tuple(max(count, 1) for count in classes)
        options = {} if name == "dino_head" or case % 2 else dict(memory_budget=0)
        check(ranks.run(on_one_rank, name, rows, classes, sharded, options), name, rows, classes, sharded)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("name", CASES)
def test_reductions_and_upstream_gradients(ranks, name, sharded):
    """Each rank weighs what it returns; the gradients are those of the weighted sum."""
    rows, classes = SHARDS[ranks.world_size][1]
    for reduction in ("none", "sum"):
        answers = ranks.run(on_one_rank, name, rows, classes, sharded, dict(reduction=reduction))
        check(answers, name, rows, classes, sharded, reduction)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_many_tiles(ranks, backend):
    rows, classes = [((300, 290), (900, 1200)), ((200, 1, 290), (700, 3, 1300)), ((9, 300, 80, 1), (600, 500, 1, 900))][
        ranks.world_size - 2
    ]
    options = dict(backend=backend, memory_budget=2**20)
    check(ranks.run(on_one_rank, "arcface", rows, classes, True, options), "arcface", rows, classes, True)


def frozen(rank, name, leaf):
    """What needs no gradient gets none, and the others theirs."""
    problem, loss = CASES[name]
    rows, classes = SHARDS[2][1]
    of_rows, of_classes = problem(sum(rows), sum(classes))
    tensors = leaves({**own_part(of_rows, rank, rows), **own_part(of_classes, rank, classes)})
    tensors[leaf].requires_grad_(False)
    loss(**tensors, group=dist.group.WORLD).backward()
    with torch.no_grad():
        loss(**tensors, group=dist.group.WORLD)
    return gradients_of(tensors)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("arcface", "embeddings"), ("arcface", "weight"), ("dino_head", "student"), ("dino_head", "student_weight")],
)
def test_frozen(ranks, name, leaf):
    if ranks.world_size == 2:
        rows, classes = SHARDS[2][1]
        _, whole = in_one_process(name, rows, classes)
        for rank, gradients in enumerate(ranks.run(frozen, name, leaf)):
            ((other, gradient),) = gradients.items()
            assert {leaf, other} == DIFFERENTIABLE & (whole.keys() | {leaf})
            spread = classes if "weight" in other else rows
            factor = 1 if "weight" in other else 2
            np.testing.assert_allclose(gradient, factor * own_part(whole, rank, spread)[other], **EXACT)


def what_is_sent(rank, rows, classes, d):
    g = torch.Generator().manual_seed(rank)
    embeddings, weight = torch.randn(rows, d, generator=g), torch.randn(classes, d, generator=g)
    labels = torch.randint(0, classes, (rows,), generator=g)
    with count_work() as work:
        loss = arcface_loss(
            embeddings.requires_grad_(), weight.requires_grad_(), labels, group=dist.group.WORLD, memory_budget=0
        )
        loss.backward()
    return work.sent_elements, work.flops


def test_the_weight_stays_where_it_is(ranks):
    """Sent are rows and their gradients, labels, statistics and upstream gradients; the products are divided evenly."""
    world, rows, classes, d = ranks.world_size, 6, 50, 16
    for sent, flops in ranks.run(what_is_sent, rows, classes, d):
        assert sent == (world - 1) * (2 * rows * d + rows + 3 * rows * world + rows)
        assert flops == 4 * 2 * (rows * world) * classes * d


def refusals(rank):
    embeddings, weight = torch.randn(2, 3), torch.randn(4, 3)
    group = dist.group.WORLD
    with pytest.raises(ValueError, match=r"labels must be in \[0, 8\), over all ranks, got 8 on rank 1"):
        arcface_loss(embeddings, weight, torch.tensor([0, 7 + rank]), group=group)
    with pytest.raises(ValueError, match="classes must be the same on every rank of the group, got 4 on rank 0 and 5"):
        own = torch.randn(4 + rank, 3)
        arcface_loss(embeddings, own, torch.tensor([0, 1]), group=group, shard_classes=False)
    with pytest.raises(ValueError, match="margin must be the same on every rank"):
        cosface_loss(embeddings, weight, torch.tensor([0, 1]), margin=0.1 * (rank + 1), group=group)
    with pytest.raises(ValueError, match="backend='eager' is the formula for the batch of one process"):
        arcface_loss(embeddings, weight, torch.tensor([0, 1]), backend="eager", group=group)
    with pytest.raises(ValueError, match=r"the weights of all ranks must have 9 classes, got \[4, 4\]"):
        arcface_loss(embeddings, weight, torch.tensor([0, 7]), classes=9, group=group)
    with pytest.raises(ValueError, match="classes must be the same on every rank"):
        ArcFaceLoss(3, 6 + rank, group=group)(embeddings, torch.tensor([0, 1]))
    arcface_loss(embeddings, weight, torch.tensor([0, 7]), margin=1 if rank else 1.0, group=group)
    with torch.device("meta"):
        assert ArcFaceLoss(3, 7, group=group).weight.shape == (4 - rank, 3)
    with pytest.raises(TypeError, match="group must be a torch.distributed process group, got str"):
        DINOLoss(4, group="world")
    with pytest.raises(TypeError, match="shard_classes must be a bool, got int"):
        arcface_loss(embeddings, weight, torch.tensor([0, 1]), shard_classes=1, group=group)
    features, center = torch.randn(2, 3, 4), torch.zeros(6)
    weight = torch.randn(6, 4)
    with pytest.raises(ValueError, match="student_temp must be the same on every rank"):
        dino_head_loss(features, features, weight, weight, center, student_temp=0.1 * (rank + 1), group=group)
    with pytest.raises(ValueError, match=r"views must be the same on every rank of the group, got \(2, 2\) on rank 0"):
        dino_head_loss(torch.randn(2 + rank, 3, 4), features, weight, weight, center, group=group)
    with pytest.raises(ValueError, match="backend='eager' is the formula for the batch of one process"):
        dino_head_loss(features, features, weight, weight, center, backend="eager", group=group)


def test_bad_input_is_refused_on_every_rank(ranks):
    if ranks.world_size == 2:
        ranks.run(refusals)


def differentiated_twice(rank):
    """Refused, and not taken for constants."""
    group, labels = dist.group.WORLD, torch.tensor([0, 1])
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    features = torch.randn(2, 2, 4, requires_grad=True)
    for loss, inputs in (
        (arcface_loss(x, weight, labels, group=group), (x, weight)),
        (dino_head_loss(features, features, weight, weight, torch.zeros(3), group=group), (features, weight)),
    ):
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(gradient.requires_grad for gradient in gradients)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            sum(gradient.square().sum() for gradient in gradients).backward()


def test_second_derivatives_are_refused(ranks):
    ranks.run(differentiated_twice)


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def traced_on_one_rank(rank):
    """What no other rank can know is told before anything is exchanged."""
    group, x, weight, labels = dist.group.WORLD, torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    losses = (
        lambda x: arcface_loss(x, weight, labels, group=group),
        lambda x: arcface_loss(x, weight, labels, group=group, shard_classes=False),
        lambda x: triplet_margin_loss(x, labels, mining="batch_hard", group=group),
        lambda x: triplet_margin_loss(x, labels, group=group),
        lambda x: clip_loss(x, x, 1.0, group=group),
        lambda x: dino_head_loss(x[None], x[None], weight, weight, torch.zeros(3), group=group),
    )
    for loss in losses:
        if rank == 0:
            with pytest.raises(NotImplementedError, match="with group= takes plain tensors"), PassThrough():
                loss(x)
            with pytest.raises(NotImplementedError, match="no rule for torch.func"):
                torch.func.grad(loss)(x)
        else:
            for _ in range(2):
                with pytest.raises(ValueError, match="failed on other ranks of the group: rank 0: NotImplementedError"):
                    loss(x)


def test_tracing_on_one_rank_is_an_error_on_all(ranks):
    if ranks.world_size == 2:
        ranks.run(traced_on_one_rank)


def margin_modules(rank, rows, classes):
    """(first class, weight, loss, its gradient) of a module whose ranks were seeded alike, and of its copy."""
    answers = []
    for kind in (ArcFaceLoss, CosFaceLoss):
        torch.manual_seed(0)
        module = kind(WIDTH, classes, group=dist.group.WORLD)
        after = torch.rand(())
        of_rows, _ = margin_problem(sum(rows), classes)
        own = own_part(of_rows, rank, rows)
        loss = copy.deepcopy(module)(own["embeddings"].float(), own["labels"])
        loss.backward()
        answers.append((module.first_class, module.weight.detach().numpy(), loss.item(), after.item()))
    whole = ArcFaceLoss(WIDTH, classes, group=dist.group.WORLD, shard_classes=False)
    assert whole.weight.shape == (classes, WIDTH) and whole.first_class == 0
    return answers


def test_margin_modules(ranks):
    classes = 11
    for rows, _ in SHARDS[ranks.world_size][:2]:
        of_rows, _ = margin_problem(sum(rows), classes)
        for kind, answers in zip((arcface_loss, cosface_loss), zip(*ranks.run(margin_modules, rows, classes))):
            firsts, weights, losses, states = zip(*answers)
            assert list(firsts) == np.cumsum([0] + [len(w) for w in weights[:-1]]).tolist()
            assert sum(len(w) for w in weights) == classes
            assert max(len(w) for w in weights) - min(len(w) for w in weights) <= 1
            assert not np.isclose(weights[0][0], weights[1][0]).any()
            assert len(set(states)) == 1  # ranks that were seeded alike still are
            weight = torch.from_numpy(np.concatenate(weights))
            expected = kind(of_rows["embeddings"].float(), weight, of_rows["labels"], backend="eager")
            torch.testing.assert_close(sum(losses) / len(losses), expected.item(), rtol=1e-5, atol=1e-5)


class Head(nn.Module):
    """An encoder before a loss whose weight every rank has."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(WIDTH, WIDTH).double()
        self.loss = ArcFaceLoss(WIDTH, classes, group=dist.group.WORLD, shard_classes=False).double()

    def forward(self, x, labels):
        return self.loss(self.encoder(x), labels)


def replicated_in_distributed_data_parallel(rank, rows, classes):
    head = Head(classes)
    of_rows, _ = margin_problem(sum(rows), classes)
    own = own_part(of_rows, rank, rows)
    model = nn.parallel.DistributedDataParallel(head)
    model(own["embeddings"], own["labels"]).backward()
    return head.loss.weight.detach().numpy(), [p.grad.numpy() for p in head.parameters()]


def test_replicated_in_distributed_data_parallel(ranks):
    for rows, classes in SHARDS[ranks.world_size][:2]:
        of_rows, _ = margin_problem(sum(rows), sum(classes))
        answers = ranks.run(replicated_in_distributed_data_parallel, rows, sum(classes))
        torch.manual_seed(0)
        encoder = nn.Linear(WIDTH, WIDTH).double()
        weight = torch.from_numpy(answers[0][0]).requires_grad_()
        arcface_loss(encoder(of_rows["embeddings"]), weight, of_rows["labels"], backend="eager").backward()
        expected = [encoder.weight.grad, encoder.bias.grad, weight.grad]
        for _, gradients in answers:
            for gradient, exact in zip(gradients, expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(gradient), exact, **EXACT)


def head_module(rank, rows, classes, sharded):
    """The losses of two steps and the center after them."""
    of_rows, of_classes = head_problem(sum(rows), sum(classes))
    own_rows = own_part(of_rows, rank, rows)
    own_classes = own_part(of_classes, rank, classes) if sharded else of_classes
    weights = own_classes["student_weight"], own_classes["teacher_weight"]
    module = DINOHeadLoss(len(weights[0]), group=dist.group.WORLD, shard_prototypes=sharded).double()
    module = copy.deepcopy(module)
    losses = []
    for _ in range(2):
        features = own_rows["student"].transpose(0, 1), own_rows["teacher"].transpose(0, 1)
        losses.append(module(*features, *weights).item())
    return losses, module.center.numpy()


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
def test_head_module(ranks, sharded):
    """The center is that of all ranks' samples: each rank has that of its prototypes."""
    for rows, classes in SHARDS[ranks.world_size][:2]:
        of_rows, of_classes = head_problem(sum(rows), sum(classes))
        whole = DINOHeadLoss(sum(classes), backend="eager").double()
        features = of_rows["student"].transpose(0, 1), of_rows["teacher"].transpose(0, 1)
        expected = [whole(*features, of_classes["student_weight"], of_classes["teacher_weight"]).item() for _ in "ab"]
        answers = ranks.run(head_module, rows, classes, sharded)
        for step in range(2):
            mean = sum(losses[step] for losses, _ in answers) / len(rows)
            torch.testing.assert_close(mean, expected[step], **EXACT)
        for rank, (_, center) in enumerate(answers):
            of_rank = own_part({"center": whole.center.numpy()}, rank, classes)["center"] if sharded else whole.center
            np.testing.assert_allclose(center, of_rank, **EXACT)


def logits_of_a_sub_group(rank):
    """Two groups of two: each has its own center."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module = DINOLoss(4, group=pairs[rank // 2])
    logits = torch.full((2, 3, 4), float(rank))
    module(logits, logits)
    return module.center.numpy()


def test_center_of_a_sub_group(ranks):
    if ranks.world_size == 4:
        for rank, center in enumerate(ranks.run(logits_of_a_sub_group)):
            np.testing.assert_allclose(center, 0.1 * (0.5 if rank < 2 else 2.5), rtol=1e-6)
