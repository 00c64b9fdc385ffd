"""Block sizes: a default per kernel, kind of product and architecture, and an opt-in search for better ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import ClassVar

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # read when kernels are defined: later it has no effect
_SEARCHES = os.environ.get("REPLEARN_KERNELS_TUNE") == "1" and not INTERPRETED  # read once: it takes 2 us


@dataclass(frozen=True)
class Config:
    """A program's tile of ``block_m x block_n`` similarities, formed ``block_k`` features at a time (0: all of d).

    ``column_blocks``: how many blocks of columns a program of the statistics kernel visits in turn.
    ``parts``: 0: features are read through pointers. Otherwise by TMA, by programs that stay for many blocks, and an
    epilogue takes a block's columns in this many parts, a power of 2: half of the columns take half of the registers.
    ``programs``: how many of these programs share a multiprocessor. ``registers``: of a thread, at most, for that.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    column_blocks: int = 8
    parts: int = 0
    programs: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Ring:
    """Blocks of a program in Gluon (hopper/): ``own`` rows of one matrix that it keeps in shared memory, and ``other``
    rows of the other that pass through ``stages``. Its consumers take all registers of a multiprocessor."""

    own: int
    other: int
    stages: int
    programs: ClassVar[int] = 1


# The largest sizes that no variant spills at, ragged ones too: `python -m bench.triton_resources` compiles them and
# writes the figures to bench/results/triton_resources.md. That is under the pinned Triton, 3.9, and but for kernels by
# TMA; 3.6 spills in some more (triton_3_6_resources.md). What decides:
# - By TMA (sm_90, half precision) a program forms block after block, and another on the same multiprocessor hides its
#   epilogue: 128 x 128 entries in 8 warps at 128 registers a thread, two programs of 96 to 112 KiB. Two programs that
#   spill beat one that does not. On an H200 under Triton 3.6 (2026-11-26, bench/results/gpu), TFLOP/s at d = 512 of
#   CLIP's W: 415 in 2 parts, 390 in 4, 348 in 8, where no instruction spills; one program of 4 stages 274; 128 x 256
#   321; by pointers 181, with 128 registers 252. In 2, 4 and 8 parts SupCon's 289, 303, 301; SigLIP's 408, 359, 289
#   (a day later, without spills); one direction's 474, 483, 457; the margin's 455, 449, 404. CLIP's sums: 583, one
#   program 430, 128 x 256 534; statistics by pointers 210.
#   What finishes the sums runs once a row, and has all registers. Under 3.9 nothing was timed; up to 197 instructions
#   spill there, and 461 under 3.6.
# - Registers, 255 a thread at most. 128 x 128 entries in 8 warps are 64 a thread, over 32 columns, each with a partial
#   max and sum (statistics) or three coefficients (weights): 220 to 255 registers. 128 x 256 spills on every GPU, and
#   so do 128 x 128 in 4 warps.
# - Through pointers the weights kernel forms one block and ends, with the same need of another program. 128 x 64 takes
#   128 registers or less on sm_90: two programs of 96 KiB fit (those over distances take more: one). On sm_100 a thread
#   holds one row and twice the columns: 128 x 128 spills.
# - Shared memory, (block_m + block_n) * block_k * bytes * stages, a stage less on sm_80: 48 and 64 KiB there, 96 and
#   128 KiB of 227 on sm_90 and sm_100. The gradient kernel holds whole rows: 64 to 84 KiB at d = 128. sm_80's defaults
#   stay below the 99 KiB of the small GPUs that take them too.
# - "ieee" products have no matrix instruction: every thread multiplies its own entries, in small blocks.
# - An epilogue that holds more than its statistics has its own: 128 x 128 spills where the sigmoids' losses and slopes
#   share an exponential, where near pairs' distances are formed again beside the others (_NARROWER), and on sm_100
#   where SupCon's 64 columns a thread each have a group of two registers. There the margin's transposed gradients,
#   whose 64 rows a thread each have a class and four coefficients, spill at 128 x 64. The "ieee" weights over
#   distances and of sigmoids spill on sm_90, where the assembler stops at 128 registers, and on sm_100 the hardest
#   pairs' statistics, four of each column. Of declared losses, whose epilogues are printed, "declared" have up to six
#   quantities of rows and columns and one log-sum-exp, "declared_large" up to twelve, "declared_many" more, as where
#   parameters learn; "declared_guided" have a second product.
DEFAULTS: dict[tuple, Config] = {
    ("statistics", "half", 80): Config(128, 128, 32, warps=8, stages=4),
    ("statistics", "half", 90): Config(128, 128, 64, warps=8, stages=4),
    ("statistics", "half", 100): Config(128, 128, 64, warps=8, stages=4),
    ("statistics", "tf32", 80): Config(128, 128, 32, warps=8, stages=3),
    ("statistics", "tf32", 90): Config(128, 128, 32, warps=8, stages=4),
    ("statistics", "tf32", 100): Config(128, 128, 32, warps=8, stages=4),
    ("statistics", "ieee", 80): Config(128, 64, 16, warps=8, stages=3),
    ("weights", "half", 80): Config(128, 128, 32, warps=8, stages=4),
    ("weights", "half", 90): Config(128, 64, 64, warps=8, stages=4),
    ("weights", "half", 100): Config(128, 64, 64, warps=8, stages=4),
    ("weights", "tf32", 80): Config(128, 128, 32, warps=8, stages=3),
    ("weights", "tf32", 90): Config(128, 64, 32, warps=8, stages=4),
    ("weights", "tf32", 100): Config(128, 64, 32, warps=8, stages=4),
    ("weights", "ieee", 80): Config(128, 64, 16, warps=8, stages=3),
    ("sums", "half", 90): Config(128, 128, 64, warps=8, stages=3, parts=1, programs=2, registers=128),
    ("finish", "half", 90): Config(128, 128, 64, warps=8, stages=4, parts=1),
    **{
        (epilogue, "weights", "half", 90): Config(128, 128, 64, 8, 3, parts=parts, programs=2, registers=128)
        for epilogue, parts in {"softmax": 2, "sup_con": 4, "margin_softmax": 2, "sigmoid": 2}.items()
    },
    ("gradient", "half", 80): Config(128, 64, 0, warps=8, stages=2),
    ("gradient", "tf32", 80): Config(64, 32, 0, warps=4, stages=2),
    ("gradient", "ieee", 80): Config(32, 32, 0, warps=8, stages=1),
    ("margin_softmax", "gradient", "half", 100): Config(128, 32, 0, warps=8, stages=2),
    ("declared", "statistics", "tf32", 80): Config(64, 64, 32, warps=8, stages=3),
    ("declared_large", "statistics", "ieee", 80): Config(64, 32, 16, warps=8, stages=3),
    ("declared_large", "statistics", "ieee", 90): Config(32, 32, 16, warps=8, stages=3),
    ("declared_large", "statistics", "ieee", 100): Config(64, 32, 16, warps=8, stages=3),
    **{
        (epilogue, "gradient", "ieee", arch): Config(32, 16, 0, warps=4, stages=1)
        for epilogue in ("declared_large", "declared_many")
        for arch in (80, 90, 100)
    },
    **{
        (epilogue, "gradient", "half", arch): Config(64, 32, 0, warps=8, stages=2)
        for epilogue in ("declared_large", "declared_many")
        for arch in (80, 90)
    },
    ("declared_large", "gradient", "half", 100): Config(128, 32, 0, warps=8, stages=2),
    ("declared_many", "gradient", "half", 100): Config(64, 32, 0, warps=8, stages=2),
    ("declared_guided", "statistics", "ieee", 80): Config(32, 32, 16, warps=4, stages=3),
    ("declared_guided", "statistics", "tf32", 100): Config(64, 16, 32, warps=8, stages=3),
    ("declared_guided", "weights", "ieee", 100): Config(32, 32, 16, warps=8, stages=3),
    ("sup_con", "statistics", "half", 100): Config(128, 64, 64, warps=8, stages=4),
    ("sup_con", "statistics", "tf32", 100): Config(128, 64, 32, warps=8, stages=4),
    ("hardest", "statistics", "half", 100): Config(64, 64, 64, warps=8, stages=4),
    ("hardest", "statistics", "tf32", 100): Config(64, 32, 32, warps=8, stages=3),
    **{
        (epilogue, "weights", "ieee", 90): Config(64, 64, 16, warps=8, stages=3)
        for epilogue in ("lifted", "margin_contrastive", "sigmoid")
    },
}
"""An architecture without an entry takes sm_80's; an epilogue without one of its own takes all epilogues'."""

# Kernels in Gluon, on an H200 under Triton 3.6 (2026-11-27, bench/results/gpu), TFLOP/s at 32,768 rows. Sums of CLIP,
# at d = 512: 782 with 8 stages of 64 other rows, 718 with 6, 707 with 4 of 128, by TMA (16,384 rows) 573; at d = 128:
# 485 with 4 of 128, 469 with 3, 431 to 436 with 64. Of half of SupCon's, at d = 512: 513 with 4 of 128, 449 with 8 of
# 64; at d = 128: 264 with 64, 254 to 258 with 128. W at d = 512: CLIP's 673 with 8 stages, 589 with 6; SupCon's 692,
# 532; by TMA, at 16,384, 420 and 303. Gradients at d = 128, before they took 723 (CLIP) and 713 (SupCon): 595 and 564
# with 3 stages of 128 rows, 559 and 552 with 4, 585 and 520 with 8 of 64.
RINGS: dict[tuple, dict[int, Ring]] = {
    ("sums",): {128: Ring(128, 128, 4), 512: Ring(128, 64, 8)},
    ("sup_con", "sums"): {128: Ring(128, 64, 6), 512: Ring(128, 128, 4)},
    ("weights",): {512: Ring(128, 64, 8)},
    ("gradient",): {128: Ring(128, 128, 3)},
}
"""By the widest features that they serve. An epilogue without an entry of its own takes all epilogues'."""

_NARROWER: dict[tuple, Config] = {
    ("statistics", "half", 80): Config(128, 64, 32, warps=8, stages=4),
    ("statistics", "half", 90): Config(128, 64, 64, warps=8, stages=4),
    ("statistics", "half", 100): Config(128, 64, 64, warps=8, stages=4),
    ("statistics", "tf32", 80): Config(128, 64, 32, warps=8, stages=3),
    ("statistics", "tf32", 90): Config(128, 64, 32, warps=8, stages=4),
    ("statistics", "tf32", 100): Config(128, 64, 32, warps=8, stages=4),
    ("weights", "half", 80): Config(128, 64, 32, warps=8, stages=4),
    ("weights", "tf32", 80): Config(128, 64, 32, warps=8, stages=3),
}
# Statistics of every positive: a thread holds those of all its columns, a dozen each, until they are stored.
_SMALL: dict[tuple, Config] = {
    (kernel, kind, arch): Config(64, 64, block_k, warps=8, stages=3)
    for kernel in ("statistics", "weights")
    for kind, block_k in (("half", 64), ("tf32", 32), ("ieee", 16))
    for arch in (80, 90, 100)
}
_SMALLEST: dict[tuple, Config] = {key: replace(config, block_n=32) for key, config in _SMALL.items()}
_GUIDED = {key: config if key[1] == "half" else _SMALLEST[key] for key, config in _SMALL.items()}
DEFAULTS = {
    (epilogue, *key): config
    for configs, epilogues in (
        (_NARROWER, ("sigmoid", "margin_contrastive", "lifted", "hardest", "declared")),
        (_SMALL, ("batch_all", "declared_large")),
        (_SMALLEST, ("semi_hard", "declared_many")),
        (_GUIDED, ("declared_guided",)),
    )
    for epilogue in epilogues
    for key, config in configs.items()
} | DEFAULTS

CANDIDATES = [
    Config(block_m, block_n, block_k, warps, stages)
    for block_m, block_n in ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
    for block_k in (32, 64)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]

_IN_GLUON = ("softmax", "sup_con")  # epilogues that the kernels of hopper/ form

_found: dict[tuple, Config] = {}  # by the search, in this process
_override: dict[str, Config | Ring] = {}  # by the kernel's name; "": every kernel


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own for the host takes 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@contextmanager
def use_config(config: Config | Ring, kernel: str = "") -> Iterator[None]:
    """Run every kernel, or the one of this name, with ``config``: for tests and measurements.

    A ring is for the kernel in Gluon that takes this one's place, if there is one; a config for the kernel itself.
    """
    global _override
    previous, _override = _override, {kernel: config}
    try:
        yield
    finally:
        _override = previous


def pick(kernel: str, epilogue: str, features: Tensor, trial: Callable[[Config], object]) -> Config:
    """The config for ``kernel`` with this epilogue: the default, or the fastest under REPLEARN_KERNELS_TUNE=1.

    ``trial`` launches the kernel, and may be called any number of times.
    """
    if (given := _given(kernel)) is not None:
        return given
    if _SEARCHES:
        return _fastest(kernel, epilogue, features, trial)
    return default(kernel, epilogue, product_kind(features.dtype), architecture())


def kernel_settings(dtype: torch.dtype) -> Hashable | None:
    """All that chooses kernels for features of this dtype beyond a call's arguments; None while they are searched."""
    if _override or _SEARCHES:
        return None
    knobs = triton.knobs  # what an option of Triton's changes about a kernel, beyond them
    return product_kind(dtype), knobs.runtime.debug, knobs.compilation.instrumentation_mode


def _given(kernel: str, kind: type = Config) -> Config | Ring | None:
    given = _override.get(kernel, _override.get(""))
    return given if isinstance(given, kind) else None


@cache
def default(kernel: str, epilogue: str, kind: str, arch: int) -> Config | None:
    """The shipped config: the epilogue's own where it has one. None: there is no such kernel on this GPU."""
    keys = (epilogue, kernel, kind, arch), (kernel, kind, arch), (kernel, kind, 80)
    return next((DEFAULTS[key] for key in keys if key in DEFAULTS), None)


def by_tma(kernel: str, epilogue: str, dtype: torch.dtype) -> bool:
    """Whether TMA moves what the kernel reads, of features of this dtype, on the current GPU."""
    config = _given(kernel) or default(kernel, epilogue, product_kind(dtype), architecture())
    return config is not None and config.parts > 0


def ring_of(kernel: str, epilogue: str, dtype: torch.dtype, d: int) -> Ring | None:
    """Of the kernel in Gluon that takes this one's place on the current GPU. None: there is none, or a config is given.
    """
    if epilogue not in _IN_GLUON or dtype.itemsize != 2 or architecture() != 90 or _given(kernel) is not None:
        return None
    rings = RINGS.get((epilogue, kernel), RINGS[kernel,])
    return _given(kernel, Ring) or next((ring for width, ring in rings.items() if d <= width), None)


def product_kind(dtype: torch.dtype) -> str:
    """"half", or for fp32 what PyTorch's own products do: "ieee", or "tf32" if the user allowed it.

    Read where torch.set_float32_matmul_precision too writes it; torch.get_float32_matmul_precision raises if the
    setting was made through torch.backends.
    """
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def architecture() -> int:
    """80, 90 or 100: whose defaults this GPU takes.

    What is neither Hopper nor datacentre Blackwell takes sm_80's, which stay below the 99 KiB of shared memory of
    sm_86, sm_89 and sm_120.
    """
    if INTERPRETED:
        return 80
    driver = triton.runtime.driver.active
    return _architecture(driver, driver.get_current_device())


@cache
def _architecture(driver, device) -> int:
    """Of the current device, which ``device`` names. Triton asks it for the name each time, in 3 us."""
    arch = driver.get_current_target().arch
    return {90: 90, 100: 100, 103: 100}.get(arch, 80)


def launch_options(config: Config, features: Tensor) -> dict:
    """The keyword arguments that all kernels over features share."""
    return _launch_options(config, features.shape[1], product_kind(features.dtype))


@lru_cache(maxsize=1024)
def _launch_options(config: Config, d: int, kind: str) -> dict:
    options = {} if config.registers is None else {"maxnreg": config.registers}
    return options | {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k or max(next_power_of_2(d), 16),
        "PRECISION": "ieee" if kind == "ieee" else "tf32",
        "UPCAST": INTERPRETED,
        "num_warps": config.warps,
        "num_stages": config.stages,
        # The default up to Triton 3.9. It cannot round a similarity in two ways: v - max has no product before it.
        "enable_fp_fusion": True,
    }


def _fastest(kernel: str, epilogue: str, features: Tensor, trial: Callable[[Config], object]) -> Config:
    """The fastest candidate on this GPU, timed once per kernel, epilogue, kind of product and width."""
    kind = product_kind(features.dtype)
    key = kernel, epilogue, kind, features.device, features.shape[1]
    if key not in _found:
        shipped = default(kernel, epilogue, kind, architecture())
        others = CANDIDATES if shipped.block_k else [replace(config, block_k=0) for config in CANDIDATES]
        candidates = dict.fromkeys([shipped, *others])
        times = {config: _milliseconds(partial(trial, config)) for config in candidates}
        _found[key] = min(times, key=times.get)
    return _found[key]


def _milliseconds(launch: Callable[[], object]) -> float:
    """The median time of a launch; infinite where the GPU lacks the shared memory or registers for it."""
    try:
        return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


@lru_cache(maxsize=1024)
def even_regions(column_blocks: int, row_blocks: int, programs: int) -> int:
    """The fewest regions with which the GPU, that holds ``programs``, idles for 5 % of the time at most.

    If there are none, those of the first 64 with which it idles least.
    """
    best, least = 1, float("inf")
    for regions in range(1, min(row_blocks, 64) + 1):
        waves = cdiv(column_blocks * regions, programs)
        time = waves * cdiv(row_blocks, regions) * programs / (column_blocks * row_blocks)
        if time < least:
            best, least = regions, time
        if time <= 1.05:
            break
    return best
