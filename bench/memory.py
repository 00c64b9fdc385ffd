"""Peak extra memory of one training step, in a process of its own.

Run by `harness.measure_memory` as `python -m bench.memory REQUEST`; REQUEST and the answer are JSON.
"""

import ctypes
import gc
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases import CASES
from bench.harness import Case, Implementation, Point, Step, implementations

MB = 1e6
WARM_UP_N = 64


def measure(case: Case, implementation: Implementation, point: Point) -> dict:
    """Inputs exist before the measurement. All that the step adds counts, gradients too; a call's result does not."""
    # The warm-up loads libraries and starts threads. It is tiny, so that a workspace which grows with N still counts;
    # only a compiled graph needs its true shape.
    warm_up_n = point.n if implementation.kind == "compiled" else WARM_UP_N
    implementation.prepare(replace(point, n=warm_up_n).make_inputs(case))()
    step = implementation.prepare(point.make_inputs(case))
    gc.collect()
    peak_of = cuda_peak if torch.device(point.device).type == "cuda" else host_peak
    peak_bytes, method = peak_of(step)
    if not case.training:
        peak_bytes -= step()[0].nbytes
    return {"peak_mb": peak_bytes / MB, "memory_method": method}


def cuda_peak(step: Step) -> tuple[int, str]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, "cuda allocator"


def host_peak(step: Step) -> tuple[int, str]:
    """Peak resident memory during `step` minus resident memory right before it."""
    return_free_memory()
    read_peak, method = peak_reader()
    before = read_peak()
    result = step()
    extra = read_peak() - before
    del result
    return extra, method


def peak_reader() -> tuple[Callable[[], int], str]:
    """The kernel's own record of the peak, reset to the present where the kernel lets us (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return read_vm_hwm, "VmHWM"
    except OSError:  # ru_maxrss never falls: an earlier, higher peak would hide a part of the step
        unit = 1 if sys.platform == "darwin" else 1024
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"


def read_vm_hwm() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def return_free_memory() -> None:
    """Hand free heap pages back, else the step would reuse them unseen."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def main(request: str) -> None:
    fields = json.loads(request)
    case = CASES[fields.pop("case")]
    name, backend = fields.pop("implementation"), fields.pop("backend")
    (implementation,) = implementations(case, [backend], [name])
    print(json.dumps(measure(case, implementation, Point(**fields))))


if __name__ == "__main__":
    main(sys.argv[1])
