"""What goes wrong on one rank is an error on all: at once where shards do not fit, in time where a rank is gone."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from processes import Ranks, needs_gloo
from torch.autograd import forward_ad

from replearn_kernels import (
    ClipLoss,
    clip_loss,
    gist_loss,
    info_nce_loss,
    lifted_structure_loss,
    nt_xent_loss,
    siglip_loss,
    soft_target_loss,
    sup_con_loss,
    triplet_margin_loss,
)

pytestmark = needs_gloo

GROUP_TIMEOUT = 5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(3, tmp_path_factory.mktemp("ranks"), timeout=GROUP_TIMEOUT) as ranks:
        yield ranks


def features(rows=4, d=3, dtype=torch.float64):
    return torch.ones(rows, d, dtype=dtype, requires_grad=True)


def in_group(loss, *args, **keywords):
    return loss(*args, group=dist.group.WORLD, **keywords)


ODD = 1  # the rank that differs
UNCOMPILED = {"backend": "torch"}  # no rank waits for a compiler for longer than the group's timeout


def width(odd):
    d = 5 if odd else 3
    return in_group(clip_loss, features(d=d), features(d=d), 1.0)


def dtype(odd):
    kind = torch.float32 if odd else torch.float64
    return in_group(sup_con_loss, features(dtype=kind), torch.zeros(4, dtype=torch.int64))


def scale(odd):
    return in_group(siglip_loss, features(), features(), 2.0 if odd else 1.0)


def bias(odd):
    return in_group(siglip_loss, features(), features(), 1.0, None if odd else -1.0)


def reduction(odd):
    return in_group(nt_xent_loss, features(), features(), reduction="sum" if odd else "mean")


def label_smoothing(odd):
    return in_group(clip_loss, features(), features(), 1.0, label_smoothing=0.1 if odd else 0.0)


def strategy(odd):
    return in_group(clip_loss, features(), features(), 1.0, strategy="ring" if odd else "gather")


def no_grad(odd):
    with torch.set_grad_enabled(not odd):
        return in_group(clip_loss, features(), features(), 1.0)


def frozen(odd):
    return in_group(clip_loss, features(), features().requires_grad_(not odd), 1.0)


def labels():
    return torch.arange(4) % 2


def frozen_rows(odd):
    return in_group(lifted_structure_loss, features().requires_grad_(not odd), labels(), margin=1.0)


def normalize(odd):
    return in_group(sup_con_loss, features(), labels(), normalize=odd)


def distance(odd):
    return in_group(triplet_margin_loss, features(), labels(), distance="cosine" if odd else "euclidean")


def negatives(odd):
    return in_group(info_nce_loss, features(), features(), negatives=features(2).detach() if odd else None)


def labels_on_some(odd):
    views = torch.ones(4, 2, 3, dtype=torch.float64)
    return in_group(sup_con_loss, views, labels() if odd else None)


def guide(odd):
    of_rows = torch.ones(4, 6 if odd else 5, dtype=torch.float16 if odd else torch.float32)
    x = features(dtype=torch.float32)
    return in_group(gist_loss, x, x, of_rows, of_rows, **UNCOMPILED)


def teacher_scale(odd):
    x = features()
    return in_group(soft_target_loss, x, x, x.detach(), x.detach(), guide_scale=3.0 if odd else 1.0, **UNCOMPILED)


def compared_texts(odd):
    x = features()
    return in_group(gist_loss, x, x, x.detach(), x.detach(), contrast_anchors=odd, **UNCOMPILED)


MISMATCHES = [
    (guide, "guide must be the same .* got 5 features in torch.float32 on rank 0, 2 and 6 features in torch.float16"),
    (teacher_scale, "guide_scale must be the same .* got 1.0 on rank 0, 2 and 3.0 on rank 1"),
    (compared_texts, "contrast_anchors must be the same .* got False on rank 0, 2 and True on rank 1"),
    (width, "d must be the same on every rank of the group, got 3 on rank 0, 2 and 5 on rank 1"),
    (dtype, "dtype must be the same .* got torch.float64 on rank 0, 2 and torch.float32 on rank 1"),
    (scale, "logit_scale must be the same .* got 1.0 on rank 0, 2 and 2.0 on rank 1"),
    (bias, "logit_bias must be the same .* got -1.0 on rank 0, 2 and None on rank 1"),
    (reduction, "reduction must be the same .* got mean on rank 0, 2 and sum on rank 1"),
    (label_smoothing, "label_smoothing must be the same .* on rank 0, 2 and .*0.1.* on rank 1"),
    (strategy, "strategy must be the same .* got gather on rank 0, 2 and ring on rank 1"),
    (no_grad, "requires_grad must be the same .* on rank 0, 2 and .*False, False, False.* on rank 1"),
    (frozen, r"requires_grad must be the same .* on rank 0, 2 and \[True, False, False\] on rank 1"),
    (frozen_rows, r"requires_grad must be the same .* got .*True.* on rank 0, 2 and .*False.* on rank 1"),
    (normalize, "normalize must be the same .* got False on rank 0, 2 and True on rank 1"),
    (distance, "distance must be the same .* got euclidean on rank 0, 2 and cosine on rank 1"),
    (labels_on_some, "labels must be the same .* got None on rank 0, 2 and a tensor on rank 1"),
    (negatives, "negatives must be the same .* got None on rank 0, 2 and queue on rank 1"),
]


def raises_everywhere(rank, case, message):
    with pytest.raises(ValueError, match=message):
        case(rank == ODD)
    assert in_group(clip_loss, features(), features(), 1.0).isfinite()  # the group is as it was


@pytest.mark.parametrize("case, message", MISMATCHES, ids=lambda case: getattr(case, "__name__", ""))
def test_shards_that_do_not_fit(ranks, case, message):
    ranks.run(raises_everywhere, case, message)


def unequal_pair(odd):
    return in_group(clip_loss, features(), features(3 if odd else 4), 1.0)


def wrong_flag(odd):
    x = features()
    return in_group(gist_loss, x, x, x.detach(), x.detach(), contrast_positives=3 if odd else True, **UNCOMPILED)


def wrong_reduction(odd):
    x = features()
    return in_group(gist_loss, x, x, x.detach(), x.detach(), reduction="avg" if odd else "mean", **UNCOMPILED)


def wrong_symmetric(odd):
    x = features()
    return in_group(soft_target_loss, x, x, x.detach(), x.detach(), symmetric=3 if odd else False, **UNCOMPILED)


def a_guide_that_learns(odd):
    x = features()
    return in_group(soft_target_loss, x, x, x if odd else x.detach(), x.detach(), **UNCOMPILED)


def not_a_tensor(odd):
    return in_group(clip_loss, features(), None if odd else features(), 1.0)


def nan_scale(odd):
    return in_group(clip_loss, features(), features(), float("nan") if odd else 1.0)


def labels_of_wrong_shape(odd):
    return in_group(sup_con_loss, features(), torch.zeros(3 if odd else 4, dtype=torch.int64))


def beyond_any_float(odd):
    return in_group(triplet_margin_loss, features(), labels(), margin=10**400 if odd else 1.0)


def a_temperature(odd):
    return in_group(clip_loss, features(), features(), 1.0, **({"temperature": 0.5} if odd else {}))


def nan_bias(odd):
    bias = torch.full((), float("nan") if odd else 1.0)
    return in_group(clip_loss, features(), features(), 1.0, logit_bias=bias)


def in_forward_mode(odd):
    if not odd:
        return in_group(triplet_margin_loss, features(), labels())
    with forward_ad.dual_level():
        x = forward_ad.make_dual(features().detach(), features().detach())
        return in_group(triplet_margin_loss, x, labels())


def another_world_size(odd):
    return ClipLoss(world_size=2 if odd else 3)(features(), features(), 1.0)


WRONG_ON_ONE = [
    (wrong_flag, TypeError, "contrast_positives must be a bool, got int"),
    (wrong_reduction, ValueError, "reduction must be one of"),
    (wrong_symmetric, TypeError, "symmetric must be a bool, got int"),
    (a_guide_that_learns, ValueError, "query_guide requires a gradient"),
    (another_world_size, ValueError, "world_size must be the group's, 3, got 2"),
    (a_temperature, TypeError, "clip_loss takes no temperature: call it with logit_scale = 1 / temperature"),
    (nan_bias, ValueError, "logit_bias must be finite in torch.float32, got nan"),
    (beyond_any_float, ValueError, r"margin must be in \[0, 3.40282e\+38\], got 1000"),
    (in_forward_mode, NotImplementedError, "replearn_kernels losses have no rule for forward-mode"),
    (unequal_pair, ValueError, "image_features and text_features must have the same number of rows, got 4 and 3"),
    (not_a_tensor, TypeError, "text_features must be a torch.Tensor, got NoneType"),
    (nan_scale, ValueError, "logit_scale must be finite in torch.float64, got nan"),
    (labels_of_wrong_shape, ValueError, r"labels must have shape \(4,\), one per row, got \(3,\)"),
]


def told_to_the_others(rank, case, exception, message):
    theirs = f"the call failed on other ranks of the group: rank 1: {exception.__name__}: {message}"
    kind, text = (exception, message) if rank == ODD else (ValueError, theirs)
    with pytest.raises(kind, match=text):
        case(rank == ODD)
    assert in_group(clip_loss, features(), features(), 1.0).isfinite()


@pytest.mark.parametrize("case, exception, message", WRONG_ON_ONE, ids=lambda case: getattr(case, "__name__", ""))
def test_a_wrong_argument_on_one_rank(ranks, case, exception, message):
    ranks.run(told_to_the_others, case, exception, message)


def target_out_of_range(rank):
    target = torch.tensor([0, 11, 12 if rank == ODD else 3, 0])
    message = re.escape("target must be in [0, 12), over all ranks, got 12 on rank 1")
    with pytest.raises(ValueError, match=message):
        in_group(info_nce_loss, features(), features(), target=target)


def test_target_out_of_range(ranks):
    ranks.run(target_out_of_range)


def nan_is_seen(rank):
    """On all ranks, whose columns a row of NaN is one of; SupCon's rows of NaN too."""
    x = torch.randn(4, 3)
    if rank == ODD:
        x[2, 1] = torch.nan
    for strategy in ("ring", "gather"):
        for loss in (
            in_group(clip_loss, x, torch.randn(4, 3), 1.0, strategy=strategy),
            in_group(siglip_loss, torch.randn(4, 3), x, 1.0, strategy=strategy),
            in_group(nt_xent_loss, x, torch.randn(4, 3), normalize=False, strategy=strategy),
        ):
            assert loss.isnan()


def test_nan_on_one_rank_shows_on_all(ranks):
    ranks.run(nan_is_seen)


def dies_before(rank):
    if rank == ODD:
        os._exit(1)
    return fails_in_time(lambda: in_group(clip_loss, features(), features(), 1.0, strategy="ring"))


def dies_before_backward(rank):
    loss = in_group(clip_loss, features(), features(), 1.0, strategy="ring")
    if rank == ODD:
        os._exit(1)
    return fails_in_time(loss.backward)


def fails_in_time(call):
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        call()
    return time.monotonic() - start


@pytest.mark.parametrize("check", [dies_before, dies_before_backward])
def test_a_rank_that_dies(ranks, check):
    for seconds in ranks.run(check, dying=frozenset({ODD})):
        assert seconds is None or seconds < GROUP_TIMEOUT + 4


def never_comes(rank):
    if rank == ODD:
        return time.sleep(1.3 * GROUP_TIMEOUT)
    return fails_in_time(lambda: in_group(siglip_loss, features(), features(), 1.0))


def no_backward(rank):
    loss = in_group(siglip_loss, features(), features(), 1.0, strategy="ring")
    return time.sleep(1.3 * GROUP_TIMEOUT) if rank == ODD else fails_in_time(loss.backward)


@pytest.mark.parametrize("check", [never_comes, no_backward])
def test_a_rank_that_does_not_come(tmp_path, check):
    with Ranks(2, tmp_path, timeout=GROUP_TIMEOUT) as pair:
        assert pair.run(check)[0] < GROUP_TIMEOUT + 4
