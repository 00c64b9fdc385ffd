"""Blocks of other ranks through the Triton kernels, in Triton's interpreter: against the cpp or torch backend."""

import os

import pytest
import torch
from distributed_cases import LOSSES, Batch
from processes import Ranks, needs_gloo

pytest.importorskip("triton")

from replearn_kernels.triton_kernels.configs import Config, use_config

pytestmark = [needs_gloo, pytest.mark.interpreter]


NAMES = (
    "clip", "info_nce_target", "n_pair_labels", "siglip_groups", "nt_xent", "sup_con", "contrastive", "lifted",
    "lifted_hard", "triplet_batch_hard", "triplet_semi_hard",
    "triplet_semi_hard_cosine", "triplet_batch_all",
)  # fmt: skip
NAMES_BY_TMA = ("clip", "info_nce_target", "n_pair_labels", "siglip_groups", "nt_xent", "sup_con")


def by_tma(rank, name, sizes, dtype):
    """Blocks of other ranks have numbers of their own: no entry of theirs is a row with itself."""
    with use_config(Config(32, 32, 16, warps=4, stages=2, parts=2)):
        as_the_plain_backend(rank, name, sizes, dtype)


def as_the_plain_backend(rank, name, sizes, dtype):
    batches = [Batch.random(sum(sizes)).shard(rank, sizes).to(dtype) for _ in range(2)]
    losses = [
        LOSSES[name](batch, group=torch.distributed.group.WORLD, backend=backend, strategy="ring")
        for batch, backend in zip(batches, ("triton", "torch"))
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=2e-6, atol=2e-6)
    triton, plain = (batch.gradients() for batch in batches)
    for leaf in plain:
        torch.testing.assert_close(triton[leaf], plain[leaf], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_kernels_meet_other_ranks(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        for name in NAMES:
            ranks.run(as_the_plain_backend, name, (9, 14), torch.float32)
        for name in NAMES_BY_TMA:
            ranks.run(by_tma, name, (9, 14), torch.float32)
