"""The benchmarks' dense formulas: a rival counts only if it has our loss, and our gradients."""

import pytest
import torch

from bench.cases import CASES
from bench.harness import implementations

TILED = {name: case for name, case in CASES.items() if "torch" in case.backends}  # DINO's head has 65,536 prototypes
RIVALS = [(case, rival.name) for case in TILED.values() for rival in implementations(case) if rival.kind == "eager"]


def step(case, name, inputs):
    """Loss and gradients of one training step."""
    (implementation,) = implementations(case, names=[name])
    return implementation.prepare(inputs)()


@pytest.mark.parametrize("d", (4, 32))  # in few dimensions, random rows come near each other
@pytest.mark.parametrize(("case", "rival"), RIVALS, ids=lambda value: getattr(value, "name", value))
def test_rival_agrees(case, rival, d):
    inputs = case.make_inputs(64, d, torch.float64, "cpu")
    expected, expected_gradients = step(case, "ours", inputs)
    loss, gradients = step(case, rival, inputs)
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
