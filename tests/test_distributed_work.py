"""Counted: what ranks send and hold, against the model (bench/distributed_model.py) and the documented limits."""

import pytest
import torch
import torch.distributed as dist
from processes import Ranks, needs_gloo

from bench.distributed_model import CLIP, CONTRASTIVE, INFO_NCE, NT_XENT, SIGLIP, held_elements, sent_elements
from replearn_kernels import clip_loss, contrastive_loss, count_work, info_nce_loss, nt_xent_loss, siglip_loss

pytestmark = needs_gloo

def labels_of(x):
    return torch.arange(len(x)) // 2


CASES = {  # model, loss of (x, y, scale), gradients of scalars, limit in units of N d
    "clip": (CLIP, clip_loss, 1, 4),
    "info_nce": (INFO_NCE, lambda x, y, scale, **k: info_nce_loss(x, y, logit_scale=scale, **k), 1, 4),
    "siglip": (SIGLIP, lambda x, y, scale, **k: siglip_loss(x, y, scale, -2.0, **k), 1, 2),
    "contrastive": (CONTRASTIVE, lambda x, y, scale, **k: contrastive_loss(x, labels_of(x), **k), 0, 2),
    "nt_xent": (NT_XENT, lambda x, y, scale, **k: nt_xent_loss(x, y, temperature=0.5, **k), 0, 2),
}
BATCH, WIDTH = 512, 768


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def counted(rank, name, rows, d, options):
    """(sent elements, workspace bytes, FLOPs) of one step; ``rows`` of this rank, both views of NT-Xent."""
    pairs = rows // 2 if name == "nt_xent" else rows
    x, y = (torch.randn(pairs, d).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    with count_work() as work:
        CASES[name][1](x, y, scale, group=dist.group.WORLD, **options).backward()
    return work.sent_elements, work.workspace_bytes, work.flops


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("name", CASES)
def test_sent_elements(ranks, name, strategy):
    """As modelled, to the element, and within 4 N d for two sides, 2 N d for one sweep and for a batch with itself."""
    model, _, scalars, limit = CASES[name]
    rows, d, world = 24, 64, ranks.world_size
    for sent, *_ in ranks.run(counted, name, rows, d, dict(strategy=strategy)):
        assert sent == sent_elements(model, world, rows, d, scalars)
        assert sent <= limit * rows * world * d


@pytest.mark.parametrize("name", CASES)
def test_work_is_shared(ranks, name):
    """The FLOPs of one process, in R parts: of a batch each pair once. No rank does more than its share and a tile."""
    model, world = CASES[name][0], ranks.world_size
    rows, d = 96 // world, 8
    flops = [work for *_, work in ranks.run(counted, name, rows, d, dict(memory_budget=0))]
    batch = rows * world
    whole = model.units * 2 * batch**2 * d
    # Of each tile on the diagonal, formed whole, half a product too much in every sweep.
    diagonal = (1 if model.one_sweep else 2) * rows**2 * d * world if model.is_batch else 0
    assert sum(flops) == whole + diagonal
    assert max(flops) - min(flops) <= 2 * model.units * rows * d


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The most that a rank held of one global batch, by (loss, world size, strategy, budget)."""
    measured = {}
    for world in (2, 4, 8):
        with Ranks(world, tmp_path_factory.mktemp("ranks")) as ranks:
            for name in CASES:
                for strategy in ("ring", "gather"):
                    options = dict(strategy=strategy, memory_budget=0)
                    answers = ranks.run(counted, name, BATCH // world, WIDTH, options)
                    measured[name, world, strategy] = max(workspace for _, workspace, _ in answers)
    return measured


@pytest.mark.parametrize("name", CASES)
def test_memory_falls_with_the_world_size(held, name):
    """One global batch on 2, 4 and 8 ranks: O(local N d) as modelled, and nothing that does not shrink.

    With 2 ranks less is in flight than with more, so that twice the ranks need half the memory from 4 on.
    """
    for world in (2, 4, 8):
        rows = BATCH // world
        for strategy in ("ring", "gather"):
            modelled = 4 * held_elements(CASES[name][0], world, rows, WIDTH, strategy)
            beside = 4 * rows * (rows + 16) + 4 * 10 * (world + 2) * rows  # a tile, and tables
            assert held[name, world, strategy] <= modelled + beside
            if not CASES[name][0].centred:  # opposite ranks make less than two ranks' rows one batch
                assert held[name, world, strategy] >= modelled
    assert held[name, 4, "ring"] < 0.9 * held[name, 2, "ring"]
    assert held[name, 8, "ring"] <= (0.62 if CASES[name][0].is_batch else 0.5) * held[name, 4, "ring"]
    assert held[name, 4, "ring"] < held[name, 4, "gather"]


def kept(rank, rows, budget):
    x, y = (torch.randn(rows, 16).requires_grad_() for _ in range(2))
    with count_work() as work:
        clip_loss(x, y, 3.0, group=dist.group.WORLD, strategy="ring", memory_budget=budget).backward()
    return work.workspace_bytes, work.units(rows, rows, 16)


def test_kept_similarities_stay_within_the_budget(ranks):
    """Tiles kept from forward to backward save up to one unit, and take what is allowed."""
    rows, world = 400, ranks.world_size
    entries = rows * rows * world
    for budget, units in ((0, 4.0), (4 * entries, 3.0)):
        for workspace, done in ranks.run(kept, rows, budget):
            assert done == units * world
            assert workspace <= budget + 4 * (rows * (rows + 16) + 7 * rows * 16 + 40 * rows)
