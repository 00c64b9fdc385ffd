"""The rule of every comparison: no further from fp64 than eager PyTorch in the same dtype, plus a stated tolerance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to eager's own error, relative to the largest exact value: some units in the last place of the dtype in which
# the result is returned. It covers the cases in which eager happens to round in its favour.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def eager_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's formula: two logit matrices, two cross entropies, in the features' dtype."""
    labels = torch.arange(len(image))
    per_image, per_text = scale * image @ text.t(), scale * text @ image.t()
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def eager_info_nce(query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None = None, **kwargs) -> Tensor:
    target = torch.arange(len(query)) if target is None else target
    return F.cross_entropy(scale * query @ key.t(), target, **kwargs)


def value_and_gradients(loss_fn, *inputs: Tensor) -> list[Tensor]:
    """``loss_fn(*inputs)`` and its gradient for every input, as new leaves."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = loss_fn(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_accurate(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], scale: float = 0.0) -> None:
    """Of value and gradients each: ``error(ours) <= error(eager) + TOLERANCE * max |exact|``.

    For a 0-d result (loss, scale's gradient) at least ``TOLERANCE / 10``: it is a sum of terms of order 1 that cancel.
    Given the ``scale`` of an extreme case, also one unit in the last place of a cosine times it, which every logit
    carries, eager's too, as a relative error of its probability; and 1 - probability has that resolution at best.
    """
    logit_error = abs(scale) * 2**-23
    assert len(ours) == len(eager) == len(exact)
    for i, (a, b, truth) in enumerate(zip(ours, eager, exact)):
        assert a.isfinite().all(), f"result {i} is not finite"
        assert a.shape == truth.shape
        error, allowed = ((t.double() - truth).abs().amax().item() for t in (a, b))
        size = truth.abs().amax().item()
        slack = TOLERANCE[a.dtype] * (max(size, 0.1) if truth.ndim == 0 else size)
        slack += logit_error * (size + 1 / len(ours[1]))
        assert error <= allowed + slack, f"result {i}: error {error:.3e}, eager's {allowed:.3e} + {slack:.3e}"


def check_against_eager(ours_fn, eager_fn, *inputs: Tensor, scale: float = 0.0) -> None:
    """Hold ``ours_fn`` against ``eager_fn`` in the inputs' dtype, both measured by ``eager_fn`` in fp64."""
    exact = value_and_gradients(eager_fn, *(tensor.double() for tensor in inputs))
    assert_as_accurate(value_and_gradients(ours_fn, *inputs), value_and_gradients(eager_fn, *inputs), exact, scale)


def unit_rows(generator: torch.Generator, *shape: int, dtype=torch.float32) -> Tensor:
    """Random rows of length 1."""
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
