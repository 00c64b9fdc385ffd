"""The modules: open_clip's signatures, and the functional forms behind them."""

import copy
import inspect

import pytest
import torch
from accuracy import eager_clip, unit_rows

from replearn_kernels import (
    ClipLoss,
    ContrastiveLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    NPairLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    TripletMarginLoss,
    clip_loss,
    contrastive_loss,
    info_nce_loss,
    lifted_structure_loss,
    n_pair_loss,
    nt_xent_loss,
    sup_con_loss,
    triplet_margin_loss,
)


def test_clip_loss_has_open_clips_signature():
    constructor = list(inspect.signature(ClipLoss.__init__).parameters)[1:7]
    assert constructor == ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"]
    call = list(inspect.signature(ClipLoss.forward).parameters)[1:]
    assert call == ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]


def test_clip_loss_as_open_clip_calls_it(rng):
    x, y, scale = unit_rows(rng, 30, 16), unit_rows(rng, 30, 16), torch.tensor(14.0)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    torch.testing.assert_close(loss(x, y, scale), eager_clip(x, y, scale))
    losses = loss(image_features=x, text_features=y, logit_scale=scale, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    torch.testing.assert_close(losses["contrastive_loss"], eager_clip(x, y, scale))


def test_clip_loss_refuses_what_it_would_compute_wrongly(rng):
    with pytest.raises(NotImplementedError, match="torch.distributed, got use_horovod=True"):
        ClipLoss(use_horovod=True)
    x = unit_rows(rng, 4, 3)
    for loss in (ClipLoss(world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(RuntimeError, match="world_size=2 needs torch.distributed.init_process_group"):
            loss(x, x, 1.0)


def test_info_nce_module(rng):
    q, k, queue = unit_rows(rng, 5, 4), unit_rows(rng, 7, 4), unit_rows(rng, 9, 4)
    module = InfoNCELoss(label_smoothing=0.1, reduction="sum", normalize=True)
    target = torch.tensor([0, 6, 1, 1, 3])
    torch.testing.assert_close(
        module(q * 3, k, target=target, negatives=queue, logit_scale=5.0),
        info_nce_loss(q, k, target=target, negatives=queue, logit_scale=5.0, label_smoothing=0.1, reduction="sum"),
    )


def test_modules_have_no_state_and_say_what_they_are():
    module = InfoNCELoss(symmetric=True)
    assert not module.state_dict() and "symmetric=True" in repr(module)
    assert "label_smoothing=0.1" in repr(ClipLoss(label_smoothing=0.1))


def test_modules_are_their_functions(rng):
    x, y, labels = torch.randn(8, 4, generator=rng), torch.randn(8, 4, generator=rng), torch.arange(8) % 3
    options = dict(reduction="none", backend="torch", memory_budget=0)
    assert torch.equal(NTXentLoss(0.3, **options)(x, y), nt_xent_loss(x, y, temperature=0.3, **options))
    assert torch.equal(SupConLoss(0.3, **options)(x, labels), sup_con_loss(x, labels, temperature=0.3, **options))
    assert torch.equal(
        NPairLoss(normalize=True, **options)(x, y, labels),
        n_pair_loss(x, y, labels=labels, normalize=True, **options),
    )


def test_modules_over_distances_are_their_functions(rng):
    x, labels = torch.randn(8, 4, generator=rng), torch.arange(8) % 3
    options = dict(reduction="none", normalize=True, backend="torch", memory_budget=0)
    for smooth in (False, True):
        module = LiftedStructureLoss(0.7, smooth=smooth, **options)
        assert ("smooth=False" in repr(module)) == (not smooth) and not module.state_dict()
        assert torch.equal(module(x, labels), lifted_structure_loss(x, labels, margin=0.7, smooth=smooth, **options))
        module = ContrastiveLoss(0.7, squared=smooth, **options)
        assert torch.equal(module(x, labels), contrastive_loss(x, labels, margin=0.7, squared=smooth, **options))
    for mining in ("batch_hard", "semi_hard", "batch_all"):
        options.update(mining=mining, distance="squared_euclidean", reduction="mean_nonzero")
        module = TripletMarginLoss(0.3, **options)
        assert torch.equal(module(x, labels), triplet_margin_loss(x, labels, margin=0.3, **options))
    triplets = (labels, labels + 3, labels + 1)
    assert torch.equal(module(x, triplets=triplets), triplet_margin_loss(x, triplets=triplets, margin=0.3, **options))


def test_a_copy_shares_the_process_group():
    class Group:
        def __reduce__(self):
            raise TypeError("a process group cannot be copied")

    module = LiftedStructureLoss(0.7)
    module.options["group"] = group = Group()
    copied = copy.deepcopy(torch.nn.ModuleList([module]))[0]
    assert copied is not module and copied.options is not module.options
    assert copied.options["group"] is group and copied.options["margin"] == 0.7


@pytest.mark.parametrize("module", [InfoNCELoss, ClipLoss, SigLipLoss, NPairLoss, NTXentLoss, SupConLoss])
@pytest.mark.parametrize("wrong", [dict(reduction="avg"), dict(backend="gpu"), dict(memory_budget=-1)])
def test_modules_refuse_bad_options_at_once(module, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        module(**wrong)


def test_clip_is_symmetric_info_nce(rng):
    x, y = unit_rows(rng, 11, 4), unit_rows(rng, 11, 4)
    torch.testing.assert_close(clip_loss(x, y, 3.0), info_nce_loss(x, y, logit_scale=3.0, symmetric=True))


def test_training_lowers_the_loss(rng):
    """Two linear towers on noisy pairs, with a learnable temperature: the loss falls below a tenth of log N."""
    n = 64
    a = torch.randn(n, 20, generator=rng)
    b = a @ torch.randn(20, 20, generator=rng)
    towers = torch.nn.ModuleList([torch.nn.Linear(20, 16), torch.nn.Linear(20, 16)])
    log_scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([*towers.parameters(), log_scale], lr=0.02)
    loss_fn = InfoNCELoss(symmetric=True, normalize=True)
    for _ in range(150):
        loss = loss_fn(towers[0](a), towers[1](b), logit_scale=log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * torch.tensor(float(n)).log().item()
