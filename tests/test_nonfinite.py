"""A row that is not finite shows in loss and gradients wherever it does in the plain formula.

A gradient scaler, or ``clip_grad_norm_(error_if_nonfinite=True)``, sees gradients alone.
"""

import math

import pytest
import torch
from loss_cases import CASES, value_and_gradients

LABELS = {
    "triples": torch.arange(24) // 3,
    "all distinct": torch.arange(24),
    "one class": torch.zeros(24, dtype=torch.int64),
    "one pair": torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(1, 23)]),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", CASES)
def test_shows_in_loss_and_gradients(name, labels, bad, backend, rng):
    for place in range(2):  # of the rows, and of what they are compared with
        inputs = [torch.randn(24, 8, generator=rng) / 8**0.5 for _ in range(2)]
        inputs[place][1, 2] = bad
        formula = value_and_gradients(name, *inputs, LABELS[labels], 3.0, backend="eager")
        ours = value_and_gradients(name, *inputs, LABELS[labels], 3.0, backend=backend)
        for a, b in zip(ours, formula):
            assert b.isfinite().all() or not a.isfinite().all()
