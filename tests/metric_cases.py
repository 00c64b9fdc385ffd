"""Batches and labels that the tests of the losses over distances share."""

from contextlib import contextmanager

import pytest
import torch

from replearn_kernels.engine import schedules
from replearn_kernels.engine.backends.dense import CppBackend, TorchBackend

LABELS = {
    "one class": lambda n: torch.zeros(n, dtype=torch.int64),
    "all distinct": lambda n: torch.arange(n),
    "pairs": lambda n: torch.arange(n) // 2,
    "eights": lambda n: torch.arange(n) % max(n // 8, 1),
    "negative and huge": lambda n: torch.randint(-3, 3, (n,)) * 2**40 - 7,
    "some singletons": lambda n: torch.where(torch.arange(n) % 3 == 0, torch.arange(n), -1),
}


def scaled_rows(generator, n, d, dtype=torch.float64):
    """Random rows whose distances are around 1.4, whatever d."""
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5).to(dtype)


def results(loss, x, upstream=1.0):
    """Value and gradient of ``(loss(x) * upstream).sum()``, the value before the sum."""
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), leaf)
    return [value.detach(), gradient]


def assert_same(ours, exact, rtol=1e-9, atol=1e-11):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def near_duplicates(generator, dtype, ratio, offset, clusters, d, pairs=100):
    """``[2 pairs, d]``: row i + pairs is row i moved by ``ratio`` of its length. Labels: of the pairs."""
    x = torch.randn(pairs, d, generator=generator, dtype=torch.float64)
    if clusters:  # far apart beside the spread of each: centring does not help
        centres = 30 * torch.randn(clusters, d, generator=generator, dtype=torch.float64)
        x = x + centres[torch.arange(pairs) % clusters]
    x = x + offset
    step = torch.randn(pairs, d, generator=generator, dtype=torch.float64)
    moved = x + ratio * step * (x.norm(dim=1) / step.norm(dim=1)).unsqueeze(1)
    return torch.cat([x, moved]).to(dtype), torch.arange(pairs).repeat(2)


def collapsed_batch(generator, n=2000, d=8, centres=4):
    """Every row within 1e-6 of one of a few centres."""
    points = torch.randn(centres, d, generator=generator)
    x = points[torch.arange(n) % centres] + 1e-6 * torch.randn(n, d, generator=generator)
    return x, torch.arange(n) // 8


@contextmanager
def small_batch_tiles(size):
    """The CPU backends with square tiles of at most ``size`` rows, that a small batch has several of."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (TorchBackend, CppBackend):
            patch.setattr(kind, "tile_shape", staticmethod(lambda *args: (size, size)))
        schedules._make_plan.cache_clear()  # plans made with other tiles
        yield
    schedules._make_plan.cache_clear()
