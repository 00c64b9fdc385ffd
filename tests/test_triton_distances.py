"""The Triton kernels of the losses over distances, in the interpreter and on a GPU.

How values are compared, and the rule of tolerances, is in triton_harness.py. Half-precision gradients are those of
pairs whose w was rounded, whatever the points' distance from the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from triton_harness import (
    DTYPES,
    SMALL_BLOCKS,
    Values,
    blocks_for,
    check,
    evaluate,
    gpu,
    interpreter,
    relative_error,
    tolerance,
)

from replearn_kernels import contrastive_loss, count_work, lifted_structure_loss, reference, triplet_margin_loss
from replearn_kernels.engine.backends import make_backend
from replearn_kernels.engine.backends.base import KeptTiles
from replearn_kernels.engine.distances import NEAR
from replearn_kernels.engine.plan import Plan, TileShape
from replearn_kernels.engine.problem import Inputs, Problem
from replearn_kernels.engine.sweeps import Gradients, sweep_gradients, sweep_statistics
from replearn_kernels.functional.call import Options, run
from replearn_kernels.objectives import BatchHard, HardLifted, Lifted
from replearn_kernels.objectives.triplet_distance import TripletDistance
from replearn_kernels.triton_kernels.configs import use_config

CASES = {
    "contrastive": {"loss": "contrastive", "n": 37, "d": 48, "classes": 5},
    "contrastive, none": {"loss": "contrastive", "n": 35, "d": 144, "classes": 9, "reduction": "none"},
    "contrastive, hinge": {"loss": "contrastive", "n": 40, "d": 100, "classes": 4, "squared": False},
    "contrastive, one class": {"loss": "contrastive", "n": 33, "d": 3, "classes": 1, "reduction": "sum"},
    "contrastive, all distinct": {"loss": "contrastive", "n": 20, "d": 16, "squared": False, "reduction": "none"},
    "contrastive, one row": {"loss": "contrastive", "n": 1, "d": 1, "classes": 1},
    "contrastive, two rows": {"loss": "contrastive", "n": 2, "d": 3},
    "lifted": {"loss": "lifted", "n": 45, "d": 48, "classes": 5},
    "lifted, wide": {"loss": "lifted", "n": 37, "d": 144, "classes": 9, "reduction": "none"},
    "lifted, one class": {"loss": "lifted", "n": 20, "d": 16, "classes": 1},
    "lifted, all distinct": {"loss": "lifted", "n": 18, "d": 3},
    "lifted, one row": {"loss": "lifted", "n": 1, "d": 3, "classes": 1},
    "lifted, two rows": {"loss": "lifted", "n": 2, "d": 3, "classes": 1},
    "hard lifted": {"loss": "hard lifted", "n": 45, "d": 100, "classes": 6},
    "hard lifted, one class": {"loss": "hard lifted", "n": 17, "d": 3, "classes": 1, "reduction": "none"},
    "batch hard": {"loss": "batch hard", "n": 40, "d": 48, "classes": 7},
    "batch hard, squared": {"loss": "batch hard", "n": 33, "d": 3, "classes": 4, "distance": "squared_euclidean"},
    "batch hard, cosine": {"loss": "batch hard", "n": 37, "d": 144, "classes": 5, "distance": "cosine"},
    "batch hard, all distinct": {"loss": "batch hard", "n": 20, "d": 16, "reduction": "none"},
    "batch hard, one row": {"loss": "batch hard", "n": 1, "d": 1, "classes": 1},
    "semi hard": {"loss": "semi hard", "n": 40, "d": 48, "classes": 7},
    "semi hard, squared": {"loss": "semi hard", "n": 33, "d": 3, "classes": 9, "distance": "squared_euclidean"},
    "semi hard, cosine": {"loss": "semi hard", "n": 37, "d": 144, "classes": 12, "distance": "cosine"},
    "semi hard, one class": {"loss": "semi hard", "n": 20, "d": 16, "classes": 1},
    "semi hard, two rows": {"loss": "semi hard", "n": 2, "d": 1},
    "batch all": {"loss": "batch all", "n": 40, "d": 48, "classes": 7},
    "batch all, squared": {"loss": "batch all", "n": 33, "d": 3, "classes": 9, "distance": "squared_euclidean"},
    "batch all, cosine": {"loss": "batch all", "n": 37, "d": 144, "classes": 12, "distance": "cosine"},
    "batch all, none": {"loss": "batch all", "n": 35, "d": 100, "classes": 9, "reduction": "none"},
    "batch all, violated": {"loss": "batch all", "n": 30, "d": 16, "classes": 5, "reduction": "mean_nonzero"},
    "batch all, all distinct": {"loss": "batch all", "n": 20, "d": 16, "reduction": "none"},
    "batch all, one row": {"loss": "batch all", "n": 1, "d": 1, "classes": 1},
}
MARGIN = 1.5


def make(case: dict, dtype: torch.dtype, device: str = "cpu") -> tuple[Callable, Values]:
    """The loss as a function of (tensors by name, backend), and those tensors: unit rows and their labels.

    Away from the origin by ``offset``; every second row is near the one before it, at a distance of ``near``.
    """
    n, d = case["n"], case["d"]
    generator = torch.Generator().manual_seed(n + d)
    x = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    if case.get("near"):
        x[1::2] = x[: n - 1 : 2] + case["near"] * F.normalize(x[1::2], dim=1)
    x += case.get("offset", 0.0)
    classes = case.get("classes")
    labels = torch.arange(n) if classes is None else torch.randint(classes, (n,), generator=generator)
    inputs = {"x": x.to(device, dtype).requires_grad_(), "labels": ((labels - 2) * 2**33).to(device)}
    return partial(_call, case), inputs


def _call(case: dict, leaves: Values, backend: str) -> torch.Tensor:
    x, labels = leaves["x"], leaves["labels"]
    options = {"reduction": case.get("reduction", "mean"), "backend": backend, "memory_budget": 0}
    match case["loss"]:
        case "contrastive":
            return contrastive_loss(x, labels, margin=MARGIN, squared=case.get("squared", True), **options)
        case "lifted" | "hard lifted":
            return lifted_structure_loss(x, labels, margin=MARGIN, smooth=case["loss"] == "lifted", **options)
        case "semi hard" | "batch all":
            mining, distance = case["loss"].replace(" ", "_"), case.get("distance", "euclidean")
            return triplet_margin_loss(x, labels, margin=MARGIN, mining=mining, distance=distance, **options)
        case "batch hard":
            distance = TripletDistance(case.get("distance", "euclidean"))
            objective, inputs = BatchHard(MARGIN, distance), inputs_of(x, labels)
            return run(
                inputs, objective, Options.of(**options, features=x),
                lambda inputs: reference.reduce(reference.batch_hard_losses(inputs, objective), options["reduction"]),
            )  # fmt: skip


def inputs_of(x: torch.Tensor, labels: torch.Tensor) -> Inputs:
    scale = torch.ones((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    return Inputs(x, [], None, None, labels, None, scale, None)


def compare(case: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    loss_fn, inputs = make(case, dtype, device)
    check(loss_fn, inputs, dtype, scale=1.0, sizes_of=lambda truth: {})


def sweeps(backend: str, objective, x: torch.Tensor, labels: torch.Tensor, shape=(32, 16)) -> dict[str, torch.Tensor]:
    """The table of statistics, and the sum of the gradients."""
    problem = Problem.build(inputs_of(x, labels), [True, False], objective)
    plan, kept = Plan("two_sweeps", TileShape(*shape), TileShape(*shape), 0), KeptTiles(x.new_empty(0))
    runner, gradients = make_backend(backend, objective), Gradients.zeros(problem, with_query=True)
    table, _ = sweep_statistics(problem, plan, runner, kept)
    coefficients = objective.coefficients(problem, table, None, torch.ones(len(x)), gradients.query)
    if objective.sweeps_gradients:
        sweep_gradients(problem, plan, runner, kept, coefficients, gradients)
    return {"table": table, "gradient": gradients.query}


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_values_and_gradients(self, case, dtype):
        with use_config(blocks_for(case["d"])):
            compare(case, dtype)

    @pytest.mark.parametrize(
        "name",
        [
            "contrastive", "contrastive, none", "contrastive, hinge", "lifted", "hard lifted", "batch hard",
            "semi hard", "batch all", "batch all, none", "batch all, squared",
        ],
    )  # fmt: skip
    def test_several_tiles(self, name, small_tiles):
        with use_config(blocks_for(CASES[name]["d"])):
            compare(CASES[name], torch.float32)

    @pytest.mark.parametrize("name", ["contrastive", "lifted", "batch hard", "semi hard", "batch all"])
    def test_shipped_blocks(self, name):
        compare(CASES[name], torch.bfloat16)

    @pytest.mark.parametrize("name", ["contrastive", "lifted", "semi hard", "batch all"])
    def test_deterministic(self, name, small_tiles):
        loss_fn, inputs = make(CASES[name] | {"n": 40, "d": 16, "near": 0.01}, torch.float16)
        with use_config(SMALL_BLOCKS):
            first, second = (evaluate(loss_fn, inputs, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["contrastive", "contrastive, hinge", "lifted", "batch hard"])
    def test_near_duplicates_away_from_the_origin(self, name, dtype, small_tiles):
        """Distances have an error of eps / (2 NEAR) of themselves, near pairs', which come from differences, of eps. A
        near pair's gradient has one of eps |x| / D; the points are centred in fp32 alone, where the mean of 3 is gone.
        """
        case = CASES[name] | {"n": 24, "d": 16, "near": 0.01, "offset": 3.0}
        loss_fn, inputs = make(case, dtype)
        x = inputs["x"].detach().double()
        if dtype == torch.float32:
            x = x - x.mean(0)
        distances = torch.cdist(x, x).fill_diagonal_(torch.inf)
        slack = 2**-23 * (x.norm(dim=1).max() / distances[distances > 0].min()).item()
        with use_config(SMALL_BLOCKS):
            truth = evaluate(loss_fn, inputs, "eager", torch.float64)
            eager, fused = (evaluate(loss_fn, inputs, backend) for backend in ("eager", "triton"))
        errors = {k: [relative_error(values[k], truth[k]) for values in (fused, eager)] for k in truth}
        of_distances = 2**-24 / (2 * NEAR)
        assert errors["loss"][0] <= errors["loss"][1] + tolerance(torch.float32, 1.0) + of_distances
        assert errors["x"][0] <= errors["x"][1] + tolerance(dtype, 1.0) + of_distances + slack

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["contrastive", "contrastive, hinge", "lifted", "hard lifted", "batch hard"])
    def test_equal_rows_have_no_gradient(self, name, dtype):
        loss_fn, inputs = make(CASES[name] | {"n": 18, "d": 16}, dtype)
        with torch.no_grad():
            inputs["x"][:] = inputs["x"][0].clone() + 1
        truth = evaluate(loss_fn, inputs, "eager", torch.float64)
        result = evaluate(loss_fn, inputs, "triton")
        assert relative_error(result["loss"], truth["loss"]) <= tolerance(torch.float32, 1.0)
        assert result["x"].count_nonzero() == 0

    @pytest.mark.parametrize("name", ["contrastive", "lifted", "hard lifted", "batch hard", "semi hard", "batch all"])
    def test_nan_shows(self, name):
        loss_fn, inputs = make(CASES[name], torch.bfloat16)
        with torch.no_grad():
            inputs["x"][5, 2] = torch.nan
        assert loss_fn(inputs, "triton").isnan()

    def test_weights_beyond_fp16_are_its_largest(self):
        """1 / D is 2^19 here. With the sign that pushes the two apart, and finite."""
        x = torch.tensor([[0.0], [2.0**-19]], dtype=torch.float16, requires_grad=True)
        contrastive_loss(x, torch.arange(2), backend="triton").backward()
        assert x.grad.isfinite().all() and x.grad[0] > 0 > x.grad[1]

    def test_the_first_of_equals(self):
        """Points of small integers around 0: every distance is exact, and many are equal."""
        x = torch.randint(-2, 3, (20, 2)).float()
        x = torch.cat([x, -x])
        labels = torch.randint(4, (40,))
        with use_config(SMALL_BLOCKS):
            fused, plain = (sweeps(backend, HardLifted(), x, labels)["table"] for backend in ("triton", "torch"))
        assert torch.equal(fused, plain)
        squares = torch.cdist(x, x).square().round()
        other = labels[:, None] != labels
        nearest = squares.masked_fill(~other, torch.inf).argmin(1)
        assert torch.equal(fused[1].long(), nearest)

    def test_squares_of_distances(self):
        """No loss with a sweep of gradients is over squares yet: of such a one, the backends agree."""

        @dataclass(frozen=True)
        class Squares(Lifted):
            by_distance = "square"

        x, labels = torch.randn(40, 20), torch.randint(4, (40,))
        with use_config(SMALL_BLOCKS):
            fused, plain = (sweeps(backend, Squares(), x, labels) for backend in ("triton", "torch"))
        for name, value in plain.items():
            assert relative_error(fused[name], value.double()) <= 2 * tolerance(torch.float32, 1.0), name

    @pytest.mark.parametrize("reduction, first_sweeps", [("mean", 0), ("none", 1)])
    def test_work_of_one_sweep(self, reduction, first_sweeps, small_tiles):
        """A tile on the diagonal takes its product and one with W, others a product and two: 2.5 units of 64 rows in
        blocks of 32. With an upstream gradient of its own for every row, the losses come first."""
        loss_fn, inputs = make(CASES["contrastive"] | {"n": 64, "reduction": reduction}, torch.float32)
        with count_work() as work, use_config(SMALL_BLOCKS):
            evaluate(loss_fn, inputs, "triton")
        assert work.units(64, 64, CASES["contrastive"]["d"]) == 2 * 0.5 + 3 * 0.25 + first_sweeps * 0.75

    def test_work_of_the_hardest(self, small_tiles):
        """One sweep of statistics, and none of gradients."""
        loss_fn, inputs = make(CASES["batch hard"] | {"n": 64}, torch.float32)
        with count_work() as work, use_config(SMALL_BLOCKS):
            evaluate(loss_fn, inputs, "triton")
        assert work.units(64, 64, CASES["batch hard"]["d"]) == 0.75

    @pytest.mark.parametrize("name", ["lifted", "semi hard", "batch all"])
    def test_compiles(self, name):
        torch._dynamo.reset()
        loss_fn, inputs = make(CASES[name] | {"n": 12, "d": 16}, torch.float32)
        results = []
        for step in (loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
            loss = step(inputs, "triton")
            results.append([loss, *torch.autograd.grad(loss, inputs["x"])])
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("name, sweeps", [("semi hard", 0.75), ("batch all", 2 * 0.5 + 3 * 0.25)])
    def test_work_in_parts(self, name, sweeps, small_tiles):
        """A sweep for every four positives of the largest class."""
        for members, parts in ((5, 1), (8, 2), (10, 3)):
            inputs = {"x": torch.randn(64, 16).requires_grad_(), "labels": torch.arange(64) // members}
            with count_work() as work, use_config(SMALL_BLOCKS):
                evaluate(partial(_call, CASES[name]), inputs, "triton")
            assert work.units(64, 64, 16) == parts * sweeps


class TestGPU:
    pytestmark = gpu

    LARGE: ClassVar = {
        "contrastive, large": {"loss": "contrastive", "n": 3001, "d": 128, "classes": 50},
        "contrastive, large, near": {"loss": "contrastive", "n": 2100, "d": 512, "near": 0.05, "classes": 30},
        "lifted, large": {"loss": "lifted", "n": 3001, "d": 640, "classes": 500},
        "hard lifted, large": {"loss": "hard lifted", "n": 2500, "d": 128, "classes": 200},
        "batch hard, large": {"loss": "batch hard", "n": 5000, "d": 256, "classes": 100},
        "batch all, large": {"loss": "batch all", "n": 700, "d": 128, "classes": 70},
    }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", (CASES | LARGE).values(), ids=(CASES | LARGE).keys())
    def test_values_and_gradients(self, case, dtype):
        compare(case, dtype, "cuda")

    @pytest.mark.parametrize("name", ["contrastive, large, near", "lifted, large"])
    def test_deterministic(self, name):
        loss_fn, inputs = make(self.LARGE[name], torch.bfloat16, "cuda")
        first, second = (evaluate(loss_fn, inputs, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
