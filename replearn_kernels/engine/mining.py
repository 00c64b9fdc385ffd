"""Triplet mining below its argument checks: the choice of a backend, the plain PyTorch version, the operator.

The definition is that of :func:`replearn_kernels.mine_triplets`. ``cpp`` and ``cuda`` are the native operator of either
device (``csrc``), with the same rounding; ``torch`` runs anywhere, and rounds its distances as PyTorch does. ``triton``
serves the loss of semi_hard alone, whose distances are then those of products (:mod:`.distances`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..objectives import SemiHard
from ..objectives.semi_hard import triplets_of
from ..objectives.triplet_distance import TripletDistance
from . import native, validation
from .backends import warn_without_native
from .columns import blocks
from .operators import needs_dispatcher, refuse_transforms
from .problem import Inputs, statistics_dtype
from .schedules import Config, on_device_of, row_statistics

Triplets = tuple[Tensor, Tensor, Tensor]

MODES = ("batch_hard", "semi_hard", "batch_all", "batch_all_hard", "batch_all_semi_hard")
DISTANCES = ("euclidean", "squared_euclidean", "cosine")
BACKENDS = ("auto", "cpp", "cuda", "torch")

STRIP = 2**22  # numbers that the plain version holds at a time


def resolve_miner(name: str, device: torch.device) -> str:
    """The backend that ``name`` stands for on this device.

    Raises:
        ValueError: the name is unknown, or the backend does not run on this device.
        RuntimeError: the backend is not available in this installation.
    """
    validation.check_backend_name(name, BACKENDS)
    if name == "auto":
        if device.type == "cpu":
            return "cpp" if native.available() else warn_without_native()
        if device.type == "cuda":
            return "cuda" if native.mines_on_cuda() else _without_cuda_kernels()
        return "torch"
    if name in ("cpp", "cuda"):
        wanted = {"cpp": "cpu", "cuda": "cuda"}[name]
        if device.type != wanted:
            raise ValueError(f"backend={name!r} runs on {wanted.upper()} tensors, got tensors on {device}")
        missing = native.why_missing() if name == "cpp" else native.why_not_on_cuda()
        if missing is not None:
            raise RuntimeError(f"backend={name!r} is not available: {missing}")
    return name


@cache
def _without_cuda_kernels() -> str:
    """Plain PyTorch, where they were not built. That they were, and do not load, is told once."""
    if native.cuda_is_broken():
        warnings.warn(
            f"the CUDA kernels of replearn_kernels are not available ({native.why_not_on_cuda()}); "
            "mining on a GPU uses the slower 'torch' backend.",
            stacklevel=4,
        )
    return "torch"


def mine(
    embeddings: Tensor, labels: Tensor, mining: str, margin: float, distance: str, backend: str, check: bool = False
) -> Triplets:
    """The triplets of checked arguments, with a ``backend`` from :func:`resolve_miner`.

    ``check``: embeddings that are not finite raise ValueError. Without it their distances win nothing.
    """
    refuse_transforms()
    embeddings = embeddings.detach()
    run = torch.ops.replearn_kernels.mine if needs_dispatcher(embeddings, labels) else _mine
    return run(embeddings, labels, mining, margin, distance, backend, check)


def _mine(embeddings, labels, mining, margin, distance, backend, check) -> Triplets:
    if check and not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, got NaN or infinity")
    with on_device_of(embeddings), torch.no_grad():
        if backend == "triton":
            return _semi_hard_by_sweep(embeddings, labels, distance)
        if backend != "torch":
            return torch.ops.replearn_kernels.mine_triplets(embeddings, labels, mining, margin, distance)
        rows = embeddings.to(statistics_dtype(embeddings.dtype))
        if mining == "batch_hard":
            found = [batch_hard(*strip) for strip in strips(rows, labels, distance)]
        elif mining == "semi_hard":
            found = [semi_hard(*pairs) for strip in strips(rows, labels, distance) for pairs in positive_pairs(*strip)]
        else:
            limit = torch.tensor(margin, dtype=rows.dtype, device=rows.device)
            found = [
                batch_all(*pairs, mining, limit)
                for strip in strips(rows, labels, distance)
                for pairs in positive_pairs(*strip)
            ]
        return tuple(torch.cat(column) for column in zip(*found)) if found else _no_triplets(labels)


def _semi_hard_by_sweep(embeddings: Tensor, labels: Tensor, distance: str) -> Triplets:
    """By the engine's tiles of products, as batch_hard's are found; for cosines the rows are unit rows already."""
    objective = SemiHard(TripletDistance(distance))
    one = torch.ones((), dtype=statistics_dtype(embeddings.dtype), device=embeddings.device)
    inputs = Inputs(embeddings, [], None, None, labels, None, one, None)
    config = Config(objective.name, objective.parameters, "none", "triton", 0, [False, False])
    return triplets_of(*row_statistics(inputs, config))


def _no_triplets(labels: Tensor) -> Triplets:
    return tuple(labels.new_empty(0) for _ in range(3))


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, of any magnitude, and which rows are zero."""
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    zero = largest == 0
    scaled = rows / largest.masked_fill(zero, 1)
    length = (scaled * scaled).sum(dim=1, keepdim=True).sqrt()
    return scaled / length.masked_fill(zero, 1), zero.squeeze(1)


def strips(rows: Tensor, labels: Tensor, distance: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(anchors, their distances from all rows, which are positives, which are negatives), some anchors at a time."""
    zero = None
    if distance == "cosine":
        rows, zero = unit_rows(rows)
    count, width = rows.shape
    for block in blocks(count, max(STRIP // max(count * (1 if distance == "euclidean" else max(width, 1)), 1), 1)):
        if distance == "euclidean":
            d = torch.cdist(rows[block], rows, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            difference = rows[block, None] - rows
            d = (difference * difference).sum(dim=2)
        if zero is not None:
            d = (0.5 * d).masked_fill_(zero[block, None] | zero, 1)
        same = labels[block, None] == labels
        anchors = torch.arange(count, device=rows.device)[block]
        positive = same & (anchors[:, None] != torch.arange(count, device=rows.device))
        usable = positive.any(dim=1) & ~same.all(dim=1)
        if usable.any():
            yield anchors[usable], d[usable], positive[usable], ~same[usable]


def positive_pairs(anchors: Tensor, d: Tensor, positive: Tensor, negative: Tensor):
    """The strip by its positive pairs: (anchors, positives, D_ap [P, 1], D_an [P, N], negatives [P, N])."""
    for pairs in positive.nonzero().split(max(STRIP // max(d.shape[1], 1), 1)):
        a, p = pairs.unbind(1)
        yield anchors[a], p, d[a, p, None], d[a], negative[a]


def farthest(d: Tensor, among: Tensor) -> Tensor:
    """The column of each row's largest distance, the lowest of several; NaN is taken where there is nothing else."""
    return d.nan_to_num(nan=-1.0).masked_fill(~among, float("-inf")).argmax(dim=1)


def nearest(d: Tensor, among: Tensor) -> Tensor:
    """The same for the smallest distance."""
    return (-d).nan_to_num(nan=torch.finfo(d.dtype).min).masked_fill(~among, float("-inf")).argmax(dim=1)


def batch_hard(anchors: Tensor, d: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
    return anchors, farthest(d, positive), nearest(d, negative)


def semi_hard(anchors: Tensor, positives: Tensor, d_ap: Tensor, d_an: Tensor, negative: Tensor) -> Triplets:
    beyond = negative & (d_an > d_ap)
    return anchors, positives, torch.where(beyond.any(dim=1), nearest(d_an, beyond), farthest(d_an, negative))


def batch_all(
    anchors: Tensor, positives: Tensor, d_ap: Tensor, d_an: Tensor, negative: Tensor, mining: str, margin: Tensor
) -> Triplets:
    difference = d_an - d_ap
    chosen = difference <= 0 if mining == "batch_all_hard" else difference < margin
    if mining == "batch_all_semi_hard":
        chosen &= difference > 0
    pair, negatives = (chosen & negative).nonzero(as_tuple=True)
    return anchors[pair], positives[pair], negatives


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(
    "mine(Tensor embeddings, Tensor labels, str mining, float margin, str distance, str backend, bool check) "
    "-> (Tensor anchor, Tensor positive, Tensor negative)"
)
_library.impl("mine", _mine, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::mine", native.fake_triplets, lib=_library)
