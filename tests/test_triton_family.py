"""The Triton kernels of the losses over batches, groups, classes and sigmoids, in the interpreter and on a GPU.

How values are compared, and the rule of tolerances, is in triton_harness.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from triton_harness import DTYPES, SMALL_BLOCKS, blocks_for, check, evaluate, gpu, interpreter

from replearn_kernels import (
    arcface_loss,
    cosface_loss,
    count_work,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
)
from replearn_kernels.triton_kernels.configs import by_tma, ring_of, use_config

SIGLIP = {"scale": 10.0, "bias": -10.0}
CASES = {
    "nt_xent": {"loss": "nt_xent", "n": 21, "d": 48},
    "nt_xent, wide": {"loss": "nt_xent", "n": 18, "d": 144, "reduction": "none"},
    "nt_xent, one pair": {"loss": "nt_xent", "n": 1, "d": 1},
    "sup_con": {"loss": "sup_con", "n": 45, "d": 100, "classes": 5},
    "sup_con, scale 1000": {"loss": "sup_con", "n": 37, "d": 144, "classes": 9, "scale": 1000.0, "reduction": "sum"},
    "sup_con, one row": {"loss": "sup_con", "n": 1, "d": 3, "classes": 1},
    "sup_con, one class": {"loss": "sup_con", "n": 33, "d": 16, "classes": 1, "reduction": "none"},
    "sup_con, all distinct": {"loss": "sup_con", "n": 20, "d": 3},
    "siglip": {"loss": "siglip", "n": 37, "d": 48, **SIGLIP},
    "siglip, one row": {"loss": "siglip", "n": 1, "d": 1, **SIGLIP},
    "siglip, scale 1000": {"loss": "siglip", "n": 35, "d": 144, "scale": 1000.0, "bias": -10.0, "reduction": "sum"},
    "siglip, no bias": {"loss": "siglip", "n": 20, "d": 3, "scale": -5.0, "bias": None},
    "siglip, groups": {"loss": "siglip", "n": 37, "m": 53, "d": 100, "classes": 7, **SIGLIP},
    "siglip, groups, none": {"loss": "siglip", "n": 33, "m": 20, "d": 16, "classes": 5, "reduction": "none", **SIGLIP},
    "siglip, one class": {"loss": "siglip", "n": 18, "m": 33, "d": 1, "classes": 1, **SIGLIP},
    "n_pair": {"loss": "n_pair", "n": 40, "d": 48, "classes": 8},
    "n_pair, wide": {"loss": "n_pair", "n": 35, "d": 144, "classes": 8, "reduction": "none"},
    "n_pair, one class": {"loss": "n_pair", "n": 20, "d": 3, "classes": 1, "reduction": "sum"},
    "n_pair, all distinct": {"loss": "n_pair", "n": 17, "d": 1},
    "arcface": {"loss": "arcface", "n": 33, "m": 41, "d": 48},
    "arcface, wide": {"loss": "arcface", "n": 33, "m": 50, "d": 144, "reduction": "none"},
    "arcface, one class": {"loss": "arcface", "n": 5, "m": 1, "d": 3},
    "cosface": {"loss": "cosface", "n": 40, "m": 70, "d": 100, "reduction": "sum"},
    "cosface, one row": {"loss": "cosface", "n": 1, "m": 20, "d": 16},
}
SCALES = {"nt_xent": 2.0, "sup_con": 10.0, "n_pair": 9.0, "arcface": 64.0, "cosface": 64.0}
"""The largest logits: inverse temperatures, and for N-pair the products of features of length 3."""


def make(case: dict, dtype: torch.dtype, device: str = "cpu") -> tuple[Callable, dict[str, torch.Tensor]]:
    """The loss as a function of (tensors by name, backend), and those tensors: features, groups, scalars."""
    loss, n, d = case["loss"], case["n"], case["d"]
    m, scale = case.get("m", n), case.get("scale", SCALES.get(loss))
    generator = torch.Generator().manual_seed(n + m + d)
    x, y = (torch.randn(count, d, generator=generator, dtype=torch.float64) for count in (n, m))
    y[: min(n, m)] += 0.5 * x[: min(n, m)]
    x, y = (F.normalize(t, dim=1) * (3 if loss == "n_pair" else 1) for t in (x, y))
    inputs = {"x": x.to(device, dtype).requires_grad_()}
    if loss != "sup_con":
        inputs["y"] = y.to(device, dtype).requires_grad_()
    for name, count in (("groups", n), ("other_groups", m)):
        inputs[name] = _groups(case.get("classes"), count, generator).to(device)
    if loss in ("nt_xent", "sup_con"):
        inputs["temperature"] = torch.tensor(1 / scale, device=device, requires_grad=True)
    if loss == "siglip":
        inputs["scale"] = torch.tensor(scale, device=device, requires_grad=True)
        if case["bias"] is not None:
            inputs["bias"] = torch.tensor(case["bias"], device=device, requires_grad=True)
    if loss in ("arcface", "cosface"):
        inputs["groups"] = torch.randint(m, (n,), generator=generator).to(device)
    return lambda leaves, backend: _call(case, leaves, backend), inputs


def _groups(classes: int | None, count: int, generator: torch.Generator) -> torch.Tensor:
    """Labels of any value, far apart and negative; all distinct without ``classes``."""
    ids = torch.arange(count) if classes is None else torch.randint(classes, (count,), generator=generator)
    return (ids - 2) * 2**33


def _call(case: dict, leaves: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    options = {"backend": backend, "memory_budget": 0, "reduction": case.get("reduction", "mean")}
    x, groups = leaves["x"], leaves["groups"]
    match case["loss"]:
        case "nt_xent":
            return nt_xent_loss(x, leaves["y"], temperature=leaves["temperature"], normalize=False, **options)
        case "sup_con":
            return sup_con_loss(x, groups, temperature=leaves["temperature"], normalize=False, **options)
        case "n_pair":
            return n_pair_loss(x, leaves["y"], labels=groups, **options)
        case "siglip":
            if case.get("classes"):
                options |= {"query_group": groups, "key_group": leaves["other_groups"]}
            return siglip_loss(x, leaves["y"], leaves["scale"], leaves.get("bias"), **options)
        case "arcface":
            return arcface_loss(x, leaves["y"], groups, **options)
        case "cosface":
            return cosface_loss(x, leaves["y"], groups, **options)


def compare(case: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    """Gradients of the scalars are sums of both signs: their error is relative to the sum of what cancels.

    ``sum_i <x_i, dL/dx_i>`` over unit rows is scale * dL/dscale, and -temperature * dL/dtemperature.
    """
    loss_fn, inputs = make(case, dtype, device)
    scale = case.get("scale", SCALES.get(case["loss"]))

    def sizes_of(truth):
        size = truth["x"].norm(dim=1).sum().item()
        return {"scale": size / abs(scale), "temperature": size * abs(scale)}

    check(loss_fn, inputs, dtype, scale, sizes_of)


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_values_and_gradients(self, case, dtype):
        with use_config(blocks_for(case["d"])):
            compare(case, dtype)

    @pytest.mark.parametrize(
        "name", ["nt_xent", "sup_con", "siglip", "siglip, groups", "siglip, groups, none", "n_pair", "arcface"]
    )
    def test_several_tiles(self, name, small_tiles):
        with use_config(blocks_for(CASES[name]["d"])):
            compare(CASES[name], torch.float32)

    @pytest.mark.parametrize("name", ["sup_con", "siglip, groups", "cosface"])
    def test_shipped_blocks(self, name):
        compare(CASES[name], torch.bfloat16)

    @pytest.mark.parametrize("name", ["sup_con", "siglip"])
    def test_deterministic(self, name, small_tiles):
        loss_fn, inputs = make(CASES[name], torch.float16)
        with use_config(SMALL_BLOCKS):
            first, second = (evaluate(loss_fn, inputs, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("reduction, units", [("mean", 3), ("none", 4)])
    def test_work_of_sigmoids(self, reduction, units):
        """One sweep; with an upstream gradient of its own for every row, the losses come first."""
        case = {"loss": "siglip", "n": 32, "d": 32, "reduction": reduction, **SIGLIP}
        assert self.units(case) == units

    def test_work_of_a_batch(self, small_tiles):
        """Each sweep forms the tiles on and above the diagonal; their two products cost a unit each in all, but that
        a tile on the diagonal is its own mirror image, and takes one."""
        n, rows = 64, 32
        visited = (1 + rows / n) / 2
        on_diagonal = rows / n
        products = on_diagonal + 2 * (visited - on_diagonal)
        assert self.units({"loss": "sup_con", "n": n, "d": 32, "classes": 4}) == 2 * visited + products

    @staticmethod
    def units(case: dict) -> float:
        loss_fn, inputs = make(case, torch.float32)
        with count_work() as work, use_config(SMALL_BLOCKS):
            evaluate(loss_fn, inputs, "triton")
        return work.units(case["n"], case["n"], case["d"])


class TestGPU:
    pytestmark = gpu

    LARGE: ClassVar = {
        "nt_xent, large": {"loss": "nt_xent", "n": 3001, "d": 128},
        "sup_con, large": {"loss": "sup_con", "n": 5000, "d": 640, "classes": 100},
        "siglip, large": {"loss": "siglip", "n": 1111, "d": 640, "scale": 100.0, "bias": -10.0},
        "siglip, groups, large": {"loss": "siglip", "n": 1000, "m": 3003, "d": 128, "classes": 50, **SIGLIP},
        "n_pair, large": {"loss": "n_pair", "n": 1000, "d": 128, "classes": 30},
        "n_pair, large, wide": {"loss": "n_pair", "n": 1111, "d": 512, "classes": 30, "reduction": "none"},
        "arcface, large": {"loss": "arcface", "n": 257, "m": 20011, "d": 512},
        "cosface, large": {"loss": "cosface", "n": 257, "m": 5000, "d": 128},
    }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", (CASES | LARGE).values(), ids=(CASES | LARGE).keys())
    def test_values_and_gradients(self, case, dtype):
        compare(case, dtype, "cuda")

    @pytest.mark.parametrize("name", ["nt_xent, large", "siglip, large"])
    def test_deterministic(self, name):
        loss_fn, inputs = make(self.LARGE[name], torch.bfloat16, "cuda")
        first, second = (evaluate(loss_fn, inputs, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_work_of_a_batch(self):
        """W of 40,000 rows in tiles of 8,000 takes half of the square and of the five tiles on its diagonal; its
        products take 1. In registers both take the whole square. Statistics by sums take half of it in Gluon and else
        the whole, others half of it and of ten smaller tiles."""
        n, d = 40_000, 64
        loss_fn, inputs = make({"loss": "sup_con", "n": n, "d": d, "classes": 100}, torch.bfloat16, "cuda")
        with count_work() as work:
            evaluate(loss_fn, inputs, "triton")
        statistics = 1 if by_tma("sums", "sup_con", torch.bfloat16) else 0.55
        if ring_of("sums", "sup_con", torch.bfloat16, d):
            statistics = 0.5
        gradients = 2 if ring_of("gradient", "sup_con", torch.bfloat16, d) else 0.6 + 1
        assert work.units(n, n, d) == pytest.approx(statistics + gradients, abs=0.01)
