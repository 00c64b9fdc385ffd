"""The compiled C++ library: loaded once if it was built, its absence explained if not."""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]


def _load() -> str | None:
    """Register the native operators; None on success, else why they are missing."""
    libraries = sorted(_PACKAGE.glob("_native*.so"))
    if not libraries:
        return "it was not built: no working C++ compiler was found at installation"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} could not be loaded: {error}"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Shapes without data, for torch.compile: the tile passes return nothing and write in place."""
    families = ("softmax", "sigmoid", "margin_contrastive", "batch_all")
    passes = [f"{family}_{sweep}_" for family in families for sweep in ("statistics", "weights")]
    for op in (*passes, "hardest_statistics_", "semi_hard_statistics_", "add_differences_", "advise_huge_pages_"):
        torch.library.register_fake(f"replearn_kernels::{op}", lambda *args, **options: None)
    torch.library.register_fake("replearn_kernels::softmax_one_tile", _fake_one_tile)
    torch.library.register_fake("replearn_kernels::mine_triplets", fake_triplets)
    torch.library.register_fake("replearn_kernels::pair_squares", lambda x, i, j: x.new_empty(i.shape[0]))
    for op in ("vector_exp", "vector_log1p"):
        torch.library.register_fake(f"replearn_kernels::{op}", torch.empty_like)


def _fake_one_tile(query, key, target, scale, share, symmetric, needs_query, needs_key):
    return (
        query.new_empty(()),
        query.new_empty(query.shape if needs_query else 0),
        key.new_empty(key.shape if needs_key else 0),
        query.new_empty((), dtype=torch.float64),
    )


def fake_triplets(embeddings, labels, *config):
    """How many triplets there are, only the data tells; but as many anchors as positives and negatives."""
    count = torch.library.get_ctx().new_dynamic_size()
    return tuple(labels.new_empty(count, dtype=torch.int64) for _ in range(3))


_missing = _load()  # at import, so that torch.ops.replearn_kernels is complete once the package is imported


def available() -> bool:
    """Whether the C++ kernels are loaded."""
    return _missing is None


def mines_on_cuda() -> bool:
    """Whether the library was built with CUDA, and its operators run on a GPU too."""
    return available() and torch._C._dispatch_has_kernel_for_dispatch_key("replearn_kernels::mine_triplets", "CUDA")


def why_missing() -> str | None:
    return _missing
