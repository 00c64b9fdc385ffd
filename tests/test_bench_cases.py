"""The benchmarks' dense formulas: a rival counts only if it has our loss, and our gradients."""

import processes
import pytest
import torch

from bench.cases import CASES
from bench.cases.mining import MINER, MINING
from bench.cases.ranks import RANKS_CASES
from bench.harness import implementations

TILED = {name: case for name, case in CASES.items() if "torch" in case.backends}  # DINO's head has 65,536 prototypes
TRAINED = [case for case in TILED.values() if case.training]
RIVALS = [(case, rival.name) for case in TRAINED for rival in implementations(case) if rival.kind == "eager"]


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


def test_the_miner_of_pytorch_metric_learning_finds_the_same_set():
    pytest.importorskip("pytorch_metric_learning")
    inputs = MINING.make_inputs(256, 16, torch.float32, "cpu")
    ours, theirs = (step(MINING, name, inputs)[0] for name in ("ours", f"eager_{MINER}"))
    assert ours.nbytes == theirs.nbytes > 0 and ours.item() == theirs.item()


@processes.needs_gloo
@pytest.mark.parametrize("case", RANKS_CASES, ids=lambda case: case.name)
def test_a_batch_divided_among_processes_has_the_same_loss(case):
    inputs = case.make_inputs(64, 16, torch.float32, "cpu")
    expected, *others = (step(case, name, inputs)[0] for name in ("ours", "ranks_ring", "ranks_gather"))
    for loss in others:
        torch.testing.assert_close(loss, expected)
