"""How many kernels a training step launches on a GPU, counted without one: `python -m bench.launches`.

A loss is called with tensors that have no data (PyTorch's "meta" device), as on a Hopper GPU of 132 multiprocessors.
Every kernel of Triton and every operator of PyTorch that would launch something is counted instead, forward and
backward. What would make the host wait for the GPU's data raises: there is none.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import replearn_kernels as rk
from bench.report import markdown
from replearn_kernels.engine import backends, operators
from replearn_kernels.engine.backends.triton import TritonBackend
from replearn_kernels.triton_kernels import configs, tma

RESULTS = Path(__file__).parent / "results" / "launches.csv"
MULTIPROCESSORS = 132

# Operators that launch nothing: they allocate, or look at the same memory in another way.
_NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "permute", "reshape", "scalar_tensor", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view", "is_same_size",
}  # fmt: skip

Step = Callable[[], Tensor]


class _Operators(TorchDispatchMode):
    def __init__(self, counted: Counter):
        self._counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _NO_LAUNCH:
            self._counted[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def on_a_gpu_without_data() -> Iterator[Counter]:
    """Inside, losses of meta tensors run the triton backend; the counter receives what they would launch."""
    counted: Counter = Counter()

    def launch(self, *args, **options) -> None:
        counted[self.fn.__name__] += 1

    def product(out: Tensor, a: Tensor, b: Tensor) -> None:
        counted["product by cuBLAS"] += 1

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(TritonBackend, "mm_", staticmethod(product)),
        mock.patch.object(TritonBackend, "addmm_", staticmethod(product)),
        mock.patch.object(backends, "why_no_triton", lambda device, dtype: None),
        mock.patch.object(operators, "needs_dispatcher", lambda *tensors: False),
        mock.patch.object(configs, "architecture", lambda: 90),
        mock.patch.object(tma, "_multiprocessors", lambda device: MULTIPROCESSORS),
        _Operators(counted),
    ):
        yield counted


def count(step: Step) -> tuple[Counter, Counter]:
    """What the forward call launches, and what the backward call does; without the upstream gradient of 1."""
    with on_a_gpu_without_data() as counted:
        loss = step()
        forward = Counter(counted)
        upstream = torch.empty_like(loss)
        counted.clear()
        loss.backward(upstream)
        return forward, Counter(counted)


# -- steps ----------------------------------------------------------------------------------------------------------


def features(*shape: int, dtype: torch.dtype = torch.bfloat16, needs_grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=needs_grad)


def scalar() -> Tensor:
    return torch.empty((), device="meta", requires_grad=True)


def labels(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device="meta")


def clip(n: int, d: int) -> Tensor:
    return rk.clip_loss(features(n, d), features(n, d), scalar(), backend="triton")


def info_nce(n: int, d: int) -> Tensor:
    return rk.info_nce_loss(features(n, d), features(n, d), logit_scale=scalar(), backend="triton")


def siglip(n: int, d: int) -> Tensor:
    return rk.siglip_loss(features(n, d), features(n, d), scalar(), scalar(), backend="triton")


def nt_xent(n: int, d: int) -> Tensor:
    """``n`` rows, of unit length; the two views are stacked first."""
    return rk.nt_xent_loss(features(n // 2, d), features(n // 2, d), normalize=False, backend="triton")


def sup_con(n: int, d: int) -> Tensor:
    """Of unit length. Groups are numbered by sorting the labels, once."""
    return rk.sup_con_loss(features(n, d), labels(n), normalize=False, backend="triton")


def moco(n: int, d: int) -> Tensor:
    """A queue of 65,536."""
    query, key, queue = features(n, d), features(n, d, needs_grad=False), features(65536, d, needs_grad=False)
    return rk.info_nce_loss(query, key, negatives=queue, batch_negatives=False, logit_scale=1 / 0.07, backend="triton")


def arcface(n: int, d: int) -> Tensor:
    """1,000,000 classes."""
    return rk.arcface_loss(features(n, d), features(1_000_000, d), labels(n), backend="triton")


POINTS: list[tuple[Callable[[int, int], Tensor], int, int]] = [
    *((loss, n, 512) for loss in (clip, info_nce, nt_xent, sup_con, siglip) for n in (1024, 8192, 65536)),
    (nt_xent, 65536, 128),
    (moco, 256, 128),
    (arcface, 256, 512),
]


# -- the table ------------------------------------------------------------------------------------------------------


def table() -> list[dict[str, object]]:
    rows = []
    for loss, n, d in POINTS:
        forward, backward = count(lambda loss=loss, n=n, d=d: loss(n, d))
        by_triton = sum(number for name, number in (forward + backward).items() if name.endswith("_kernel"))
        products = backward["product by cuBLAS"] + forward["product by cuBLAS"]
        total = forward.total() + backward.total()
        rows.append({
            "loss": loss.__name__, "n": n, "d": d, "forward": forward.total(), "backward": backward.total(),
            "triton": by_triton, "products": products, "pytorch": total - by_triton - products,
        })  # fmt: skip
    return rows


def main() -> None:
    rows = table()
    names = list(rows[0])
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *(row.values() for row in rows)])
    text = markdown(names, [[str(value) for value in row.values()] for row in rows])
    heading = "# Launches of a training step, counted without a GPU\n\nbf16, as on sm_90; `python -m bench.launches`."
    RESULTS.with_suffix(".md").write_text(f"{heading}\n\n{text}\n")
    print(f"Triton {triton.__version__}\n\n{text}")


if __name__ == "__main__":
    main()
