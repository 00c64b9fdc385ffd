"""How long the host takes for a training step of the triton backend, without a GPU: `python -m bench.host_time`.

Every launch goes all the way through Triton's own launcher, to a driver that does nothing (no_driver.c); the products
of matrices are left out, and PyTorch's operators run on a CPU, on so few rows that they take what calling them takes.
So a time here is the host's of a step of one tile, or of 16, whatever N, on this CPU. The third step of the same shapes
and all after it run a program (engine/backends/replay.py); ``us_first``: of one that works everything out.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "host_time.csv"
LIBRARY = "REPLEARN_BENCH_DRIVER"  # in the environment of the process that measures
ROWS, WIDTH = 64, 64


def build(folder: Path) -> Path:
    """The driver that does nothing, where Triton looks for one."""
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("no_driver.c")
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    return library


def activate() -> None:
    """Let Triton launch to that driver, and losses of CPU tensors run as on the GPU it names."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from replearn_kernels.engine import backends, problem, schedules
    from replearn_kernels.engine.backends.triton import TritonBackend
    from replearn_kernels.triton_kernels import tma

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=None: (9, 0)
    triton.runtime.driver._active = triton.runtime.driver._default = driver
    backends.why_no_triton = lambda device, dtype: None
    tma._multiprocessors = lambda device: 132
    TritonBackend.mm_ = TritonBackend.addmm_ = staticmethod(lambda out, a, b: None)
    TritonBackend.repeats = staticmethod(lambda query: True)
    problem.number_of = lambda scalar: scalar  # nobody waits for its value
    schedules.check_values = lambda *arguments: None


def steps() -> dict[str, Callable[[], object]]:
    """Forward and backward, in bf16; from here on W has tiles of ROWS x ROWS."""
    import torch

    import replearn_kernels as rk
    from replearn_kernels.engine.backends.triton import TritonBackend

    shape_of = TritonBackend.tile_shape
    TritonBackend.tile_shape = staticmethod(
        lambda sweep, *others: (ROWS, ROWS) if sweep == "gradients" else shape_of(sweep, *others)
    )

    def features(rows: int) -> torch.Tensor:
        return torch.zeros(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    x, y, longer_x, longer_y = features(ROWS), features(ROWS), features(4 * ROWS), features(4 * ROWS)
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    halves = [features(ROWS // 2), features(ROWS // 2)]
    losses = {
        "clip": (lambda: rk.clip_loss(x, y, scale, backend="triton"), [x, y, scale]),
        "siglip": (lambda: rk.siglip_loss(x, y, scale, bias, backend="triton"), [x, y, scale, bias]),
        "nt_xent": (lambda: rk.nt_xent_loss(halves[0], halves[1], normalize=False, backend="triton"), halves),
        "clip of 16 tiles": (
            lambda: rk.clip_loss(longer_x, longer_y, scale, backend="triton"), [longer_x, longer_y, scale]
        ),
    }

    def step_of(loss, leaves):
        def step():
            loss().backward()
            for leaf in leaves:
                leaf.grad = None

        return step

    return {name: step_of(*given) for name, given in losses.items()}


def microseconds(step: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(least, median)."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    return min(times), statistics.median(times)


def measure(rounds: int) -> list[dict[str, object]]:
    import torch
    import triton

    from bench.results import cpu_model
    from replearn_kernels.engine.backends.triton import TritonBackend

    torch.set_num_threads(1)
    activate()
    rows = []
    for name, step in steps().items():
        for _ in range(3):  # compiles, then records
            step()
        least, median = microseconds(step, rounds)
        TritonBackend.repeats = staticmethod(lambda query: False)
        first, _ = microseconds(step, rounds)
        TritonBackend.repeats = staticmethod(lambda query: True)
        rows.append({
            "loss": name, "us_least": f"{least:.0f}", "us_median": f"{median:.0f}", "us_first": f"{first:.0f}",
            "cpu": cpu_model(), "python": platform.python_version(), "torch": torch.__version__,
            "triton": triton.__version__, "date": datetime.now(timezone.utc).date().isoformat(),
        })  # fmt: skip
    return rows


def main(output: Path = RESULTS, rounds: int = 400) -> None:
    """Writes a table of every loss to OUTPUT."""
    if LIBRARY in os.environ:
        rows = measure(rounds)
        csv.DictWriter(sys.stdout, rows[0], lineterminator="\n").writerows([{name: name for name in rows[0]}, *rows])
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, LIBRARY: str(build(Path(folder)))}
        command = [sys.executable, "-m", "bench.host_time", "--rounds", str(rounds)]
        told = subprocess.run(command, env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True).stdout
    output.write_text(told)
    print(told)


if __name__ == "__main__":
    import typer

    typer.run(main)
