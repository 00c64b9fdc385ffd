"""What the GPU report needs to know of a machine, as JSON on the last line; the reason, where it cannot run there."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch

TORCH, TRITON = (2, 10), (3, 6)


def at_least(version: str, needed: tuple[int, int]) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= needed


def why_not() -> str | None:
    """Why this machine cannot run the report, or None."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; the GPU kernels need triton >= 3.6"
    if not at_least(torch.__version__, TORCH):
        return f"torch >= 2.10 is needed, found {torch.__version__}"
    if not at_least(triton.__version__, TRITON):
        return f"triton >= 3.6 is needed, found {triton.__version__}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; use --dry to rehearse without one"
    return None


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown: nvidia-smi does not tell"


def compiled_libraries() -> str:
    """Which there are beside the package, and what is left out without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are missing is said here
        import replearn_kernels
        from replearn_kernels.engine import native

    there = sorted(path.name for path in Path(replearn_kernels.__file__).parent.glob("_native*.so"))
    left_out = {
        "no C++ kernels, so no CPU backend cpp": native.why_missing(),
        "no CUDA kernels of mine_triplets, which is then not timed on a GPU": native.why_not_on_cuda(),
    }
    missing = [what for what, reason in left_out.items() if reason is not None]
    return "; ".join([", ".join(there) or "none", *missing])


def facts(dry: bool) -> dict[str, str]:
    from bench.results import cpu_model, version

    found = {"GPU": "none: a rehearsal on a CPU, whose figures are no results"}
    if not dry:
        gpu = torch.cuda.get_device_properties(0)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        found = {"GPU": f"{gpu.name} (sm_{gpu.major}{gpu.minor}), {memory}", "driver": driver()}
    return found | {
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Triton": version("triton") or "none",
        "Python": platform.python_version(),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "compiled libraries": compiled_libraries(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="a rehearsal, for which any machine will do")
    dry = parser.parse_args().dry
    if not dry and (reason := why_not()):
        sys.exit(reason)
    print(json.dumps(facts(dry)))


if __name__ == "__main__":
    main()
