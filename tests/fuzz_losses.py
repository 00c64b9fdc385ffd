"""Random calls of the losses on a CPU, values and gradients held against the plain formula in fp64.

    python tests/fuzz_losses.py --seconds 600 [--seed 0] [--loss clip]

Every call is made from its number alone; a wrong one is printed with it. ``--seed N --calls 1`` makes it again.
REPLEARN_KERNELS_INSTRUCTION_SET chooses the passes of the cpp backend.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accuracy import TOLERANCE
from loss_cases import CASES, DECLARED, value_and_gradients
from metric_cases import small_batch_tiles
from torch import Tensor

from replearn_kernels.engine import native
from replearn_kernels.engine.problem import statistics_dtype

ROWS = (1, 2, 3, 7, 15, 17, 31, 32, 33, 40, 47, 48, 63, 64, 65, 79, 95, 97, 130)
WIDTHS = (1, 2, 3, 16, 17, 48, 64)
SCALES = (0.0, 1e-3, 1.0, 14.3, 100.0, 357.0, 1000.0)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Two matrices of different length are nothing to these.
PAIRED = {"clip", "symmetric", "n_pair", "siglip", "siglip_groups", "nt_xent", "decoupled", "multi_positive"}
NORMALISED = ("cosine", "arcface", "cosface", "circle", "multi_similarity", "decoupled")
# What is added to the error of the formula in the same dtype, beside accuracy.TOLERANCE: by how much the result moves
# if every feature moves by so many units in its last place.
MOVED = 16
# Distances are formed from products down to 1 / 256 of the squares of the rows' lengths (engine/distances.py).
BY_DISTANCE, FROM_PRODUCTS = ("lifted", "contrastive", "batch_", "semi_hard"), 256
# W is a difference of softmaxes, of up to 2 scale s: a unit in the last place of a product moves either by so much.
TWO_EXPONENTS = ("hard_negative", "debiased")
# Where a hinge bends or another pair is chosen within this many units, a result jumps: by more than in proportion.
NEAR_A_KINK = 64


def random_matrix(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """``[n, d]``: unit rows, some of them outliers, duplicates or zeros, of random strides."""
    x = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
    if random.random() < 0.5:  # near each other, as in a batch of one class
        x = F.normalize(x + 3 * x[:1], dim=1)
    for _ in range(random.choice((0, 0, 1, 3))):
        x[random.randrange(n)] *= random.choice((0.0, 0.05, 0.3, 3.0))
    if random.random() < 0.2:
        x[:: random.choice((2, 16))] = x[random.randrange(n)].clone() * random.choice((1.0, 0.05))
    x = x.to(dtype)
    layout = random.choice(("plain", "plain", "transposed", "sliced"))
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        whole = torch.zeros(2 * n, d + 3, dtype=dtype)
        whole[::2, 1 : d + 1] = x
        return whole[::2, 1 : d + 1]
    return x


def random_labels(n: int) -> Tensor:
    return random.choice(
        (
            lambda: torch.zeros(n, dtype=torch.int64),
            lambda: torch.randperm(n),
            lambda: torch.arange(n) // 2,
            lambda: torch.randint(max(n // 4, 1), (n,)),
            lambda: torch.randint(-3, 3, (n,)).abs() * 2**40,
        )
    )()


def moved(x: Tensor, eps: float) -> Tensor:
    """Every element by up to ``eps`` of itself, and of the row's length, which a product rounds to."""
    lengths = x.norm(dim=1, keepdim=True) / max(x.shape[1], 1) ** 0.5
    return x + eps * (2 * torch.rand_like(x) - 1) * torch.maximum(x.abs(), lengths)


def distances_from(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(a - b).abs().amax().item() if a.numel() else 0.0 for a, b in zip(results, exact)]


def check(name: str) -> str | None:
    """One random call; None if it is right, else what is wrong."""
    n, d, dtype = random.choice(ROWS), random.choice(WIDTHS), random.choice(DTYPES)
    if name.endswith(NORMALISED):
        d = max(d, 2)  # a direction's gradient in one dimension is 0, and what is computed all rounding
    if name.startswith("batch_all"):
        n = min(n, 65)  # its formula has N^3 triplets
    m = n if name in PAIRED else n + random.choice((0, 0, 1, 16, 40))
    x, y = random_matrix(n, d, dtype), random_matrix(m, d, dtype)
    labels, scale = random_labels(n), random.choice(SCALES)
    backend = random.choice(("cpp", "cpp", "torch") if native.available() and name not in DECLARED else ("torch",))
    # Some of the tiles are kept at 3,000 bytes, and of a chunk of rows.
    options = {"memory_budget": random.choice((0, 3000, 2**28)), "reduction": random.choice(("mean", "sum", "none"))}
    tile = random.choice((16, 32, 48, None, None))  # rows and columns at most; None: as the backend has it
    what = f"{name} {backend} N={n} M={m} d={d} {dtype} scale={scale} tile={tile} {options}"

    def formula(of: Tensor, other: Tensor) -> list[Tensor]:
        return value_and_gradients(name, of, other, labels, scale, backend="eager", **options)

    wide = x.double(), y.double()
    exact = formula(*wide)
    eps = torch.finfo(dtype).eps
    nearby = [distances_from(formula(*(moved(t, eps) for t in wide)), exact) for _ in range(3)]
    far = [distances_from(formula(*(moved(t, NEAR_A_KINK * eps) for t in wide)), exact) for _ in range(3)]
    with small_batch_tiles(tile) if tile else nullcontext():
        ours = value_and_gradients(name, x, y, labels, scale, backend=backend, **options)
    eager = distances_from(formula(x, y), exact)
    for i, (result, truth) in enumerate(zip(ours, exact)):
        size = truth.abs().amax().item() if truth.numel() else 0.0
        if not truth.isfinite().all() or size > torch.finfo(dtype).max:
            continue
        error = (result - truth).abs().amax().item() if truth.numel() else 0.0
        sensitivity, jump = max(row[i] for row in nearby), max(row[i] for row in far)
        # A loss near 0 is a difference of logits of the scale's size.
        slack = TOLERANCE[dtype] * max(size, 1e-2 * max(scale, 0.1)) + MOVED * sensitivity
        if name.startswith(BY_DISTANCE):
            slack += FROM_PRODUCTS * torch.finfo(statistics_dtype(dtype)).eps * size
        if name in TWO_EXPONENTS:
            slack += 4 * scale * torch.finfo(statistics_dtype(dtype)).eps * size
        allowed = (eager[i] if eager[i] == eager[i] else 0.0) + slack
        at_kink = jump > max(4 * NEAR_A_KINK * sensitivity, allowed)
        if not (error <= allowed or at_kink):  # NaN is no error that is allowed
            off = f"result {i} is off by {error:.3g} of {size:.3g}, allowed {allowed:.3g}, formula by {eager[i]:.3g}"
            return f"{what}: {off}"
    return None


def fuzz(seconds: float, seed: int, calls: int | None = None, losses: tuple[str, ...] = tuple(CASES)) -> list[str]:
    """What was wrong, of as many calls as there is time for, or of ``calls``."""
    torch.set_num_threads(1)
    end, wrong, number = time.monotonic() + seconds, [], seed
    while time.monotonic() < end if calls is None else number < seed + calls:
        random.seed(number)
        torch.manual_seed(number)
        if (found := check(random.choice(losses))) is not None:
            wrong.append(f"call {number}: {found}")
            print(wrong[-1], flush=True)
        number += 1
    print(f"{number - seed} random calls from {seed} on, {len(wrong)} wrong")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int)
    parser.add_argument("--loss", choices=CASES, action="append")
    given = parser.parse_args()
    sys.exit(bool(fuzz(given.seconds, given.seed, given.calls, tuple(given.loss or CASES))))


if __name__ == "__main__":
    main()
