"""Losses on the meta device: shapes without data, but where only data tell a shape."""

import pytest
import torch
from loss_cases import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from replearn_kernels import mine_triplets, triplet_margin_loss
from replearn_kernels.engine.mining import MODES

COUNTED = [name for name in CASES if not name.startswith("semi_hard")]
ONLY_DATA_TELL = "on the meta device: how many triplets are mined from them only their data tells"


def batch():
    x, y = torch.randn(2, 8, 4, device="meta").requires_grad_().unbind()
    return x, y, torch.zeros(8, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("backend", ["auto", "torch", "eager"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_loss_and_its_gradients_have_shapes(name, backend):
    x, y, labels = batch()
    loss = CASES[name](x, y, labels, 10.0, backend=backend)
    gradients = torch.autograd.grad(loss, [x, y], allow_unused=True)
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    assert gradients[0].is_meta and all(g is None or g.shape == (8, 4) for g in gradients)


@pytest.mark.parametrize("backend", ["auto", "torch", "eager"])
def test_the_loss_of_mined_triplets_is_refused(backend):
    x, _, labels = batch()
    with pytest.raises(NotImplementedError, match=ONLY_DATA_TELL):
        triplet_margin_loss(x, labels, mining="semi_hard", backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mining", MODES)
def test_mining_is_refused(mining, backend):
    x, _, labels = batch()
    with pytest.raises(NotImplementedError, match=ONLY_DATA_TELL):
        mine_triplets(x, labels, mining=mining, backend=backend)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors_have_sizes_that_nobody_knows(device):
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, labels = torch.randn(8, 4, device=device), torch.zeros(8, dtype=torch.int64, device=device)
        assert triplet_margin_loss(x, labels, mining="semi_hard").shape == ()
        sizes = [index.shape[0] for index in mine_triplets(x, labels)]
        assert all(isinstance(size, torch.SymInt) for size in sizes) and len(set(map(str, sizes))) == 1
