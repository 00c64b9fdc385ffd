"""Speed regressions, backend by backend: `pytest bench/regression.py` (see the README for comparing runs)."""

import pytest
import torch

from bench.cases import CASES
from bench.harness import Point, implementations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"cpu": ("cpp", "torch", "eager"), "cuda": ("triton", "torch", "eager")}[DEVICE]
SHAPES = ((64, 64), (1024, 128))
STEPS = [
    pytest.param(case, name, backend, id=f"{case.name}-{name}-{backend}")
    for case in CASES.values()
    if "torch" in case.backends  # DINO's head has too many prototypes
    for name in case.ours
    for backend in BACKENDS
    if backend in case.backends and (name == "ours" or backend != "eager")  # a formula has no memory budget
]


@pytest.mark.parametrize(("n", "d"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize(("case", "name", "backend"), STEPS)
def test_step(benchmark, case, name, backend, n, d):
    """One forward and backward pass in fp32."""
    (implementation,) = implementations(case, [backend], [f"{name}[{backend}]"])
    step = implementation.prepare(Point(n, d, "fp32", DEVICE).make_inputs(case))

    def synchronous_step():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    try:
        synchronous_step()
    except RuntimeError as error:
        if f"backend='{backend}'" not in str(error):
            raise
        pytest.skip(str(error))
    benchmark(synchronous_step)
