"""Every loss over the shards of a process group, against the whole batch in one process, in fp64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_cases import LOSSES, SPREAD, WIDTH, Batch, in_one_process, on_one_rank
from processes import Ranks, needs_gloo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from replearn_kernels import ClipLoss, SigLipLoss, clip_loss, nt_xent_loss, siglip_loss, sup_con_loss

pytestmark = needs_gloo

SIZES = {  # rows of each rank
    2: [(6, 6), (1, 8), (5, 0)],
    3: [(4, 4, 4), (1, 7, 3), (0, 2, 5)],
    4: [(3, 3, 3, 3), (5, 1, 2, 4), (1, 1, 1, 1), (4, 0, 0, 3)],
}
EXACT = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def check(answers, name, sizes, factors=None):
    """Values, and gradients under DistributedDataParallel's mean, are those of one process."""
    _, values, expected = in_one_process(name, sizes, factors)
    whole = expected.gradients()
    for rank, (loss, gradients) in enumerate(answers):
        torch.testing.assert_close(loss.item(), values[rank], **EXACT)
        check_gradients(gradients, whole, rank, sizes)
    if "queue" in whole:  # as any parameter that each rank has a copy of
        mean = sum(torch.from_numpy(gradients["queue"]) for _, gradients in answers) / len(sizes)
        torch.testing.assert_close(mean, whole["queue"], **EXACT)


def check_gradients(gradients, whole, rank, sizes):
    """R times those of the own rows; of scale and bias those of the whole, on every rank."""
    assert gradients.keys() == whole.keys()
    for leaf in gradients.keys() - {"queue"}:
        expected = whole[leaf]
        if leaf in SPREAD:
            start = sum(sizes[:rank])
            expected = len(sizes) * expected[start : start + sizes[rank]]
        torch.testing.assert_close(torch.from_numpy(np.asarray(gradients[leaf])), expected, **EXACT)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_one_process(ranks, name, strategy):
    for case, sizes in enumerate(SIZES[ranks.world_size]):
        options = dict(strategy=strategy, memory_budget=2**20 if case % 2 else 0)
        check(ranks.run(on_one_rank, name, sizes, options), name, sizes)


@pytest.mark.parametrize("name", ["clip", "info_nce_target_symmetric", "siglip", "nt_xent", "sup_con"])
def test_plain_mean_over_ranks_is_the_mean_over_the_batch(ranks, name):
    for sizes in SIZES[ranks.world_size]:
        losses = [loss.item() for loss, _ in ranks.run(on_one_rank, name, sizes, {})]
        whole = LOSSES[name](Batch.random(sum(sizes)), backend="eager")
        torch.testing.assert_close(sum(losses) / len(losses), whole.item(), **EXACT)


@pytest.mark.parametrize(
    "name", ["clip", "siglip", "siglip_groups", "n_pair", "sup_con", "contrastive", "lifted", "triplet_batch_hard"]
)
def test_each_rank_has_its_own_upstream_gradient(ranks, name):
    """Accumulation steps, or weights of ranks: what one scales its loss by scales the gradients of its rows."""
    sizes = SIZES[ranks.world_size][1]
    factors = (2.0, 0.0, -3.0, 0.5)[: ranks.world_size]
    answers = ranks.run(on_one_rank, name, sizes, {}, None, factors)
    _, _, expected = in_one_process(name, sizes, factors)
    for rank, (_, gradients) in enumerate(answers):
        check_gradients(gradients, expected.gradients(), rank, sizes)


@pytest.mark.parametrize(
    "name",
    ["clip", "siglip", "nt_xent", "sup_con_views", "contrastive", "lifted", "triplet_semi_hard", "triplet_batch_hard"],
)
def test_reductions(ranks, name):
    """"none": the own rows in their order; "sum": their sum. Gradients are those of the sum over the ranks."""
    sizes = SIZES[ranks.world_size][1]
    rows, *_ = in_one_process(name, sizes)
    batch = Batch.random(sum(sizes)).leaves()
    LOSSES[name](batch, backend="eager", reduction="sum").backward()
    for reduction in ("none", "sum"):
        answers = ranks.run(on_one_rank, name, sizes, dict(reduction=reduction))
        for rank, (loss, gradients) in enumerate(answers):
            expected = rows[rank] if reduction == "none" else rows[rank].sum()
            torch.testing.assert_close(torch.from_numpy(np.asarray(loss)), expected, **EXACT)
            whole = {leaf: g / ranks.world_size for leaf, g in batch.gradients().items()}
            check_gradients(gradients, whole, rank, sizes)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    "name", ["clip", "info_nce_target", "siglip", "sup_con", "nt_xent", "contrastive", "lifted", "triplet_batch_hard"]
)
def test_many_tiles(ranks, name, backend):
    """Shards of several tiles, and a budget that ends within one of them."""
    sizes = [(640, 530), (600, 1, 570), (540, 1, 10, 560)][ranks.world_size - 2]
    options = dict(memory_budget=3 * 2**20, backend=backend)
    check(ranks.run(on_one_rank, name, sizes, options), name, sizes)


def twice_the_same(rank, sizes):
    first, second = (on_one_rank(rank, "clip", sizes, dict(strategy=strategy)) for strategy in ("ring", "gather"))
    assert np.array_equal(first[0], second[0])
    assert all(np.array_equal(first[1][leaf], second[1][leaf]) for leaf in first[1])


def test_the_order_of_sums_is_fixed(ranks):
    """The same bits in every run, and with either strategy."""
    ranks.run(twice_the_same, SIZES[ranks.world_size][1])


def test_sub_groups(ranks):
    world = ranks.world_size
    if world > 2:
        members, sizes = list(range(1, world)), SIZES[world - 1][1]
        answers = ranks.run(on_one_rank, "clip", sizes, {}, members)
        assert answers[0] is None
        check(answers[1:], "clip", sizes)
    alone = ranks.run(on_one_rank, "sup_con", (7,), {}, [world - 1])
    check(alone[-1:], "sup_con", (7,))


def refuses_a_group_of_others(rank, world):
    group = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="group must be one that this process is a rank of"):
            clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=group)
    with pytest.raises(TypeError, match="group must be a torch.distributed process group, got str"):
        clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group="world")
    with pytest.raises(ValueError, match="backend='eager' is the formula for the batch of one process"):
        clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=dist.group.WORLD, backend="eager")


def test_groups_that_do_not_do(ranks):
    ranks.run(refuses_a_group_of_others, ranks.world_size)


class Towers(nn.Module):
    """Two linear encoders, scale and bias: everything that has a gradient."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4).double(), nn.Linear(5, 4).double()
        self.log_scale = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.loss = loss

    def forward(self, image, text):
        image, text = (nn.functional.normalize(f, dim=1) for f in (self.image(image), self.text(text)))
        return self.loss(image, text, self.log_scale.exp(), self.bias)


def clip_and_bias(image, text, scale, bias, **keywords):
    return clip_loss(image, text, scale, logit_bias=bias, **keywords)


def sup_con_of_both(image, text, scale, bias, **keywords):
    labels = (image.detach()[:, 0] > 0).long()
    return sup_con_loss(image, labels, temperature=1 / scale, **keywords) + 0 * (text.sum() + bias)


def sum_of_two(image, text, scale, bias, **keywords):
    return siglip_loss(image, text, scale, bias, **keywords) + clip_loss(text, image, scale, **keywords)


TOWER_LOSSES = [clip_and_bias, siglip_loss, sup_con_of_both, sum_of_two]


def in_distributed_data_parallel(rank, index, sizes, steps):
    """The gradients of all parameters after DDP's average, over ``steps`` of accumulation."""
    loss = TOWER_LOSSES[index]
    towers = Towers(lambda *features: loss(*features, group=dist.group.WORLD))
    model = nn.parallel.DistributedDataParallel(towers)
    image, text = tower_inputs(sum(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for step in range(steps):
        with model.no_sync() if step < steps - 1 else torch.enable_grad():
            (model(image[own] + step, text[own]) / steps).backward()
    return [parameter.grad.numpy() for parameter in towers.parameters()]


def fully_sharded(rank, index, sizes):
    """The same under FSDP2, which shards every parameter over the ranks and averages their gradients too."""
    loss = TOWER_LOSSES[index]
    towers = Towers(lambda *features: loss(*features, group=dist.group.WORLD))
    towers.log_scale = nn.Parameter(towers.log_scale.detach().reshape(1))
    scalars = {towers.bias}  # 0-d: FSDP shards along a dimension
    fully_shard(towers, mesh=init_device_mesh("cpu", (len(sizes),)), ignored_params=scalars)
    image, text = tower_inputs(sum(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    towers(image[own], text[own]).backward()
    gradients = []
    for parameter in towers.parameters():
        gradient = parameter.grad
        if parameter in scalars:
            dist.all_reduce(gradient.div_(len(sizes)))
        gradients.append(gradient.full_tensor().numpy() if isinstance(gradient, DTensor) else gradient.numpy())
    return gradients


def with_activation_checkpoint(rank, index, sizes):
    """The towers and the loss are run again in the backward pass, on all ranks alike."""
    loss = TOWER_LOSSES[index]
    towers = Towers(lambda *features: loss(*features, group=dist.group.WORLD))
    image, text = tower_inputs(sum(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    checkpoint(towers, image[own], text[own], use_reentrant=False).backward()
    for parameter in towers.parameters():
        dist.all_reduce(parameter.grad.div_(len(sizes)))
    return [parameter.grad.numpy() for parameter in towers.parameters()]


@pytest.mark.parametrize("how", [fully_sharded, with_activation_checkpoint], ids=lambda how: how.__name__)
@pytest.mark.parametrize("index", range(len(TOWER_LOSSES)), ids=lambda i: TOWER_LOSSES[i].__name__)
def test_composes(ranks, index, how):
    for sizes in SIZES[ranks.world_size][:2]:
        towers = Towers(lambda *features: TOWER_LOSSES[index](*features, backend="eager"))
        towers(*tower_inputs(sum(sizes))).backward()
        for gradients in ranks.run(how, index, sizes):
            for gradient, parameter in zip(gradients, towers.parameters(), strict=True):
                gradient = torch.from_numpy(np.asarray(gradient)).view_as(parameter)
                torch.testing.assert_close(gradient, parameter.grad, **EXACT)


def tower_inputs(rows):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(rows, d, generator=g, dtype=torch.float64) for d in (6, 5))


@pytest.mark.parametrize("index", range(len(TOWER_LOSSES)), ids=lambda i: TOWER_LOSSES[i].__name__)
def test_distributed_data_parallel_averages_to_the_whole_batch(ranks, index):
    for sizes, steps in zip(SIZES[ranks.world_size], (1, 2, 1)):
        towers = Towers(lambda *features: TOWER_LOSSES[index](*features, backend="eager"))
        image, text = tower_inputs(sum(sizes))
        for step in range(steps):
            (towers(image + step, text) / steps).backward()
        for gradients in ranks.run(in_distributed_data_parallel, index, sizes, steps):
            for gradient, parameter in zip(gradients, towers.parameters()):
                torch.testing.assert_close(torch.from_numpy(np.asarray(gradient)), parameter.grad, **EXACT)


def open_clip_modules(rank, world, sizes):
    """Values and gradients of the modules, given open_clip's settings."""
    answers = []
    for module in (ClipLoss(True, True, rank=rank, world_size=world), ClipLoss(rank=rank, world_size=world),
                   SigLipLoss(rank=rank, world_size=world)):  # fmt: skip
        batch = Batch.random(sum(sizes)).shard(rank, sizes).leaves()
        loss = module(batch.x, batch.y, batch.scale, batch.bias)
        loss.backward()
        answers.append((loss.item(), {n: g.numpy() for n, g in batch.gradients().items()}))
    with pytest.raises(ValueError, match=f"world_size must be the group's, {world}, got {world + 1}"):
        ClipLoss(world_size=world + 1)(batch.x, batch.y, 1.0)
    return answers


def test_modules_with_open_clips_settings(ranks):
    sizes = SIZES[ranks.world_size][0]
    _, clip, of_clip = in_one_process("clip", sizes)
    _, siglip, of_siglip = in_one_process("siglip", sizes)
    of_clip.bias.grad = torch.zeros_like(of_clip.bias)
    expected = [(clip, of_clip), ([sum(clip) / len(clip)] * len(sizes), of_clip), (siglip, of_siglip)]
    by_rank = ranks.run(open_clip_modules, ranks.world_size, sizes)
    assert len({answers[1][0] for answers in by_rank}) == 1  # the mean over all rows: the same bits on every rank
    for rank, answers in enumerate(by_rank):
        for (loss, gradients), (values, whole) in zip(answers, expected):
            torch.testing.assert_close(loss, values[rank], **EXACT)
            check_gradients(gradients, whole.gradients(), rank, sizes)


def graphs_kept(rank, sizes):
    """Two backward passes through one graph; a second derivative is refused."""
    for name in ("clip", "siglip"):
        batch = Batch.random(sum(sizes)).shard(rank, sizes).leaves()
        loss = LOSSES[name](batch, group=dist.group.WORLD)
        first = torch.autograd.grad(loss, [batch.x, batch.scale], retain_graph=True)
        second = torch.autograd.grad(loss, [batch.x, batch.scale], create_graph=True)
        assert all(map(torch.equal, first, second))
        with pytest.raises(NotImplementedError, match="differentiable once"):
            second[0].sum().backward()


def test_retained_graphs(ranks):
    ranks.run(graphs_kept, SIZES[ranks.world_size][0])


def compiled(rank, sizes):
    """torch.compile leaves the exchange out of its graphs."""
    batch = Batch.random(sum(sizes)).shard(rank, sizes).leaves()

    @torch.compile(backend="aot_eager")
    def loss(x, y):
        return clip_loss(2 * x, y, 1.5, group=dist.group.WORLD) * 3

    result = loss(batch.x, batch.y)
    result.backward()
    plain = batch.x.detach().requires_grad_()
    expected = clip_loss(2 * plain, batch.y.detach().requires_grad_(), 1.5, group=dist.group.WORLD) * 3
    expected.backward()
    assert torch.equal(result, expected) and torch.equal(batch.x.grad, plain.grad)


def test_compile(ranks):
    if ranks.world_size == 2:
        ranks.run(compiled, [5, 3])


def views_of_own_number(rank, world):
    """Each rank has one view more than the one before. Also what a single process says of the whole, by labels."""
    g = torch.Generator().manual_seed(0)
    shards = [torch.randn(3, 2 + i, WIDTH, generator=g, dtype=torch.float64) for i in range(world)]
    own = shards[rank].clone().requires_grad_()
    sup_con_loss(own, group=dist.group.WORLD, reduction="sum").backward()
    rows = [shard.flatten(0, 1).clone().requires_grad_() for shard in shards]
    labels = [torch.arange(3).repeat_interleave(2 + i) + 3 * i for i in range(world)]
    sup_con_loss(torch.cat(rows), torch.cat(labels), reduction="sum").backward()
    return own.grad.flatten(0, 1).numpy(), rows[rank].grad.numpy()


def test_ranks_may_have_different_numbers_of_views(ranks):
    for own, expected in ranks.run(views_of_own_number, ranks.world_size):
        np.testing.assert_allclose(own, expected, rtol=1e-10)


def numbers_of_two_kinds(rank, sizes):
    batch, half = Batch.random(sum(sizes)).shard(rank, sizes), np.float32(0.5) if rank else 0.5
    group = dist.group.WORLD
    nt_xent = nt_xent_loss(batch.x, batch.y, temperature=half, group=group)
    return nt_xent.item(), clip_loss(batch.x, batch.y, half, label_smoothing=half, group=group).item()


def test_ranks_agree_on_numbers_of_numpy_and_of_python(ranks):
    sizes = SIZES[ranks.world_size][0]
    batch = Batch.random(sum(sizes))
    expected = nt_xent_loss(batch.x, batch.y), clip_loss(batch.x, batch.y, 0.5, label_smoothing=0.5)
    values = torch.tensor(ranks.run(numbers_of_two_kinds, sizes), dtype=torch.float64)
    torch.testing.assert_close(values.mean(0), torch.stack(expected), **EXACT)


def in_low_precision(rank, dtype):
    """As close to fp64 as the dtype allows; half-precision features travel as they are."""
    batch = Batch.random(600).shard(rank, [300, 300])
    x, y, scale = (t.to(dtype).requires_grad_() for t in (batch.x, batch.y, batch.scale))
    loss = clip_loss(x, y, scale, group=dist.group.WORLD)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, y, scale)]
    clip_loss(*exact, group=dist.group.WORLD).backward()
    assert loss.dtype == torch.float32
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    for tensor, reference in zip((x, y, scale), exact):
        assert (tensor.grad - reference.grad).abs().max() <= tolerance * reference.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(ranks, dtype):
    if ranks.world_size == 2:
        ranks.run(in_low_precision, dtype)
