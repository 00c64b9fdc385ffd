"""lightly's losses and ours in their place: values, gradients, memory banks, several processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
import without_torchvision_operators  # noqa: F401, before lightly
from lightly import loss as module
from processes import Ranks, needs_gloo

from replearn_kernels.integrations import lightly as ours

OURS, THEIRS = ours._classes.ours, ours._classes.theirs
EXACT = dict(rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _undone():
    yield
    ours.undo()


def views(n: int, count: int = 2, d: int = 12, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(count)]


def results(loss, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss(*rows)
    return [value.detach(), *torch.autograd.grad(value, rows)]


PAIRS = [
    ("NTXentLoss", {}), ("NTXentLoss", dict(temperature=0.07)), ("DCLLoss", {}), ("DCLLoss", dict(temperature=0.5)),
    ("DCLWLoss", {}), ("DCLWLoss", dict(temperature=0.3, sigma=0.2)),
    ("DCLLoss", dict(weight_fn=lambda a, b: 1 + (a.detach() * b.detach()).sum(1).square())),
]  # fmt: skip


@pytest.mark.parametrize("name, options", PAIRS)
def test_two_views(name, options):
    for n in (2, 33, 65):
        torch.testing.assert_close(*(results(each[name](**options), views(n)) for each in (OURS, THEIRS)), **EXACT)
    for more in (dict(backend="torch"), dict(backend="cpp", memory_budget=0, strategy="ring")):
        found = results(OURS[name](**options, **more), views(33))
        torch.testing.assert_close(found, results(THEIRS[name](**options), views(33)), **EXACT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
@pytest.mark.parametrize("name, options", PAIRS)
def test_dtypes(name, options, dtype, tolerance):
    """Near fp64's of the same rows, which are normalised in their dtype."""
    rows = views(33, dtype=dtype)
    value, *gradients = results(OURS[name](**options), rows)
    exact, *expected = results(THEIRS[name](**options), [each.detach().double().requires_grad_() for each in rows])
    assert value.dtype is torch.float32
    assert (value - exact).abs() <= 2 * tolerance * exact.abs().clamp(min=1)
    for a, b in zip(gradients, expected):
        assert a.dtype is dtype and (a - b).abs().max() <= 10 * tolerance * b.abs().max()


def test_memory_bank():
    """The same negatives in both, which both replace in the same way, and only while training."""
    losses = []
    for classes in (OURS, THEIRS):
        torch.manual_seed(0)
        losses.append(classes["NTXentLoss"](temperature=0.1, memory_bank_size=(40, 12)).double())
    for step in range(6):
        torch.testing.assert_close(*(results(loss, views(16, seed=step)) for loss in losses), **EXACT)
        banks = [loss.memory_bank.bank.clone() for loss in losses]
        torch.testing.assert_close(*banks, **EXACT)
        losses[0](*(view.detach() for view in views(16, seed=step)))
        assert torch.equal(losses[0].memory_bank.bank, banks[0])


def test_dino():
    rng = torch.Generator().manual_seed(0)
    options = dict(output_dim=33, warmup_teacher_temp=0.02, teacher_temp=0.05, warmup_teacher_temp_epochs=4)
    losses = [each["DINOLoss"](**options).double() for each in (OURS, THEIRS)]
    for (teachers, students), how in itertools.product(
        [(2, 2), (2, 8), (1, 4), (2, 1)], [{}, dict(epoch=1), dict(epoch=9), dict(teacher_temp=0.07)]
    ):
        teacher = list(torch.randn(teachers, 7, 33, generator=rng, dtype=torch.float64))
        found = []
        for loss in losses:
            student = [torch.randn(7, 33, generator=torch.Generator().manual_seed(i)).double() for i in range(students)]
            student = [view.requires_grad_() for view in student]
            value = loss(teacher, student, **how)
            gradients = torch.autograd.grad(value, student, materialize_grads=True, allow_unused=True)
            found.append([value.detach(), *gradients, loss.center.clone()])
        torch.testing.assert_close(*found, **EXACT)
    with pytest.raises(ValueError, match="at least two views"):
        losses[0](teacher[:1], teacher[:1])


def on_one_rank(rank: int, index: int) -> list:
    """Ours and theirs on the same ranks, before anything averages gradients."""
    name, options = PAIRS[index]
    rows = [view[6 * rank : 6 * rank + 6].detach().requires_grad_() for view in views(6 * dist.get_world_size())]
    losses = [each[name](gather_distributed=True, **options) for each in (OURS, THEIRS)]
    return [[value.numpy() for value in results(loss, rows)] for loss in losses]


@needs_gloo
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes(world_size, tmp_path):
    with Ranks(world_size, tmp_path) as ranks:
        for index in (1, 3, 5):
            for found, expected in ranks.run(on_one_rank, index):
                tensors = [[torch.as_tensor(value) for value in side] for side in (found, expected)]
                torch.testing.assert_close(*tensors, **EXACT)


def test_apply():
    ours.apply()
    ours.apply()
    for name, cls in OURS.items():
        assert getattr(module, name) is cls and issubclass(cls, THEIRS[name])
    ours.undo()
    for name, cls in THEIRS.items():
        assert getattr(module, name) is cls


def test_bad_input():
    with pytest.raises(ValueError, match="Illegal temperature"):  # theirs
        OURS["NTXentLoss"](temperature=0.0)
    for name in ("NTXentLoss", "DCLLoss"):
        with pytest.raises(ValueError, match="temperature"):
            OURS[name](temperature=-0.1)(*views(4))
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        with pytest.raises(ValueError, match="backend"):
            OURS[name](backend="cuda")
    with pytest.raises(ValueError, match="z_i|z_j|rows"):
        OURS["NTXentLoss"]()(views(4)[0], views(5)[0])
