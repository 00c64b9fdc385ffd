"""mine_triplets straight from its definition, in O(N^3): the oracle of every implementation, index for index.

Needs numpy and torch only, and nothing of the package.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import torch
from torch import Tensor

MODES = ("batch_hard", "semi_hard", "batch_all", "batch_all_hard", "batch_all_semi_hard")
DISTANCES = ("euclidean", "squared_euclidean", "cosine")

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once."""
    if a.dtype == np.float64:
        return np.asarray(_fma64(a, b, c), dtype=np.float64)
    product, c = a.astype(np.float64) * b, c.astype(np.float64)  # exact: 24 + 24 bits
    total = product + c
    # Rounding twice, to 53 bits and to 24, may differ from rounding once. Not if the first rounds to odd: where the sum
    # is not exact, its last bit is set, so that the second never sees a false tie.
    virtual = total - product
    lost = (product - (total - virtual)) + (c - virtual)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits % 2 == 0)
    away_from_zero = (lost > 0) == (total > 0)
    bits = bits + np.where(inexact, np.where(away_from_zero, 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def unit_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1, and which rows are zero."""
    largest = np.abs(x).max(axis=1, initial=0)
    zero = largest == 0
    y = x / np.where(zero, 1, largest).astype(x.dtype)[:, None]
    total = np.zeros(len(x), x.dtype)
    for k in range(x.shape[1]):
        total = fma(y[:, k], y[:, k], total)
    return y / np.sqrt(np.where(zero, 1, total).astype(x.dtype))[:, None], zero


def distances(embeddings: Tensor, distance: str) -> np.ndarray:
    """All distances [N, N], with the rounding that is promised: one of each difference, one of each fma."""
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    x = embeddings.detach().cpu().to(dtype).numpy()
    with np.errstate(all="ignore"):
        zero = np.zeros(len(x), bool)
        if distance == "cosine":
            x, zero = unit_rows(x)
        i, j = np.triu_indices(len(x), 1)  # (i, j) and (j, i) have the same bits
        upper = np.zeros(len(i), x.dtype)
        for k in range(x.shape[1]):
            t = x[i, k] - x[j, k]
            upper = fma(t, t, upper)
        result = np.zeros((len(x), len(x)), x.dtype)
        result[i, j] = result[j, i] = upper
        if distance == "euclidean":
            result = np.sqrt(result)
        if distance == "cosine":
            result = result * x.dtype.type(0.5)
            result[zero] = result[:, zero] = 1
    return result


def mine(d: np.ndarray, labels: Tensor, mining: str, margin: float) -> list[tuple[int, int, int]]:
    """The triplets (anchor, positive, negative) of the distances ``d``, in order."""
    labels = np.asarray(labels.cpu())
    triplets = []
    for a in range(len(labels)):
        same = labels == labels[a]
        positives = [p for p in np.flatnonzero(same) if p != a]
        negatives = np.flatnonzero(~same)
        if len(positives) and len(negatives):
            triplets += ((a, int(p), int(n)) for p, n in MINERS[mining](d[a], positives, negatives, margin))
    return triplets


def farthest(row, candidates):
    return max(candidates, key=lambda j: (row[j], -j))


def nearest(row, candidates):
    return min(candidates, key=lambda j: (row[j], j))


def batch_hard(row, positives, negatives, margin):
    yield farthest(row, positives), nearest(row, negatives)


def semi_hard(row, positives, negatives, margin):
    for p in positives:
        beyond = negatives[row[negatives] > row[p]]
        yield p, nearest(row, beyond) if len(beyond) else farthest(row, negatives)


def batch_all(chosen):
    def mine_all(row, positives, negatives, margin):
        margin = row.dtype.type(margin)
        for p in positives:
            with np.errstate(all="ignore"):
                difference = row[negatives] - row[p]  # rounded once, in the distances' dtype
                hits = negatives[chosen(difference, margin)]
            yield from ((p, n) for n in hits)

    return mine_all


MINERS = {
    "batch_hard": batch_hard,
    "semi_hard": semi_hard,
    "batch_all": batch_all(lambda difference, margin: difference < margin),
    "batch_all_hard": batch_all(lambda difference, margin: difference <= 0),
    "batch_all_semi_hard": batch_all(lambda difference, margin: (difference > 0) & (difference < margin)),
}


def brute_force_triplets(
    embeddings: Tensor, labels: Tensor, mining: str, margin: float, distance: str
) -> list[tuple[int, int, int]]:
    """The rows (anchor, positive, negative) that ``mine_triplets`` of the same arguments must return, in order."""
    return mine(distances(embeddings, distance), labels, mining, margin)
