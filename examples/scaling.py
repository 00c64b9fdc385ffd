"""Time and peak memory of one CLIP loss step, eager against fused, for growing batches.

Run as a script, it measures one figure and prints it as JSON: ``python scaling.py fused 8192``.
A peak belongs to the whole life of a process, so every figure gets a fresh one.
"""

import contextlib
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from replearn_kernels import clip_loss

DIM = 128
SIZES = (1024, 2048, 4096, 8192, 16384)
LARGEST_EAGER = 8192  # 1 GB; twice the pairs would take 4 GB and half a minute
TIMED_SECONDS = 1.5

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's formula on [N, d] and [N, d]: two products and two cross-entropies over [N, N]."""
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(image_features))
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


LOSSES: dict[str, LossFunction] = {"eager": eager_clip_loss, "fused": clip_loss}


def random_inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of unit vectors [n, DIM] and CLIP's initial logit scale, all with gradients."""
    image_features, text_features = (F.normalize(torch.randn(n, DIM), dim=-1) for _ in range(2))
    inputs = image_features, text_features, torch.tensor(1 / 0.07)
    return tuple(tensor.requires_grad_() for tensor in inputs)


def step(loss: LossFunction, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward, gradients made anew."""
    for tensor in inputs:
        tensor.grad = None
    loss(*inputs).backward()


def time_step(loss: LossFunction, n: int) -> float:
    """Seconds of a step: the least of several, since whatever else runs can only add to it."""
    inputs = random_inputs(n)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < TIMED_SECONDS:
        start = time.perf_counter()
        step(loss, inputs)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory_step(loss: LossFunction, n: int) -> int:
    """Bytes that a step adds to the process at its peak, gradients included, features not.

    A tiny step first pays for what is paid once: threads, and buffers of the matrix library.
    """
    inputs = random_inputs(n)
    step(loss, random_inputs(64))
    reset_peak_resident()
    before = peak_resident()
    step(loss, inputs)
    return peak_resident() - before


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes.

    On Linux VmHWM, because there a child's ru_maxrss starts at its parent's peak; elsewhere (macOS) ru_maxrss.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_resident() -> None:
    """Sets the peak back to what is resident now, so that imports do not hide a small step."""
    with contextlib.suppress(OSError):  # only Linux offers it
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Figure:
    """Cost of one step of ``implementation`` on ``n`` pairs."""

    implementation: str
    n: int
    seconds: float
    peak_bytes: float
    estimated: bool = False


def measure(implementation: str, n: int) -> Figure:
    """Measures one figure in a fresh process."""
    command = [sys.executable, __file__, implementation, str(n)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Figure(implementation, n, **json.loads(output))


def extrapolate(figure: Figure, n: int) -> Figure:
    """Eager time and memory grow with the N x N logits."""
    growth = (n / figure.n) ** 2
    return Figure(figure.implementation, n, figure.seconds * growth, figure.peak_bytes * growth, estimated=True)


def scaling(sizes: tuple[int, ...] = SIZES) -> Iterator[Figure]:
    """Eager and fused figures, size by size; eager beyond ``LARGEST_EAGER`` is estimated."""
    for n in sizes:
        if n <= LARGEST_EAGER:
            eager = measure("eager", n)
            yield eager
        else:
            yield extrapolate(eager, n)
        yield measure("fused", n)


def main() -> None:
    torch.manual_seed(0)
    implementation, n = sys.argv[1], int(sys.argv[2])
    loss = LOSSES[implementation]
    peak_bytes = peak_memory_step(loss, n)  # first: time_step would leave a warm allocator
    print(json.dumps({"seconds": time_step(loss, n), "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
