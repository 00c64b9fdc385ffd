"""The compiled libraries, C++ and CUDA: loaded once if they were built, their absence explained."""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]


def _libraries(name: str) -> list[Path]:
    return sorted(_PACKAGE.glob(f"{name}.*so"))


def _load(name: str, not_built: str) -> str | None:
    """Register a library's native operators; None on success, else why they are missing."""
    libraries = _libraries(name)
    if not libraries:
        return f"it was not built: no {name}.*so in {_PACKAGE}; {not_built}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # torch tells only which file it is; the linker, whose error it wraps, tells what is wrong
        return f"{libraries[0].name} could not be loaded: {error.__cause__ or error}"
    return None


def _why_not_built(root: Path) -> str:
    """Of the C++ library of the package in ``root``. Python starts with the checkout it is in, if any."""
    if not (root / "csrc" / "ops.cpp").is_file():
        return "no working C++ compiler was found at installation"
    return (
        f"{root} is a source checkout, and `pip install --no-build-isolation -e {root}` builds it there if a C++ "
        "compiler works; an installed package is found by a Python that starts in another folder"
    )


def _load_cpu() -> str | None:
    missing = _load("_native", _why_not_built(_PACKAGE.parent))
    if missing is None:
        _register_fakes()
    return missing


def _load_cuda() -> str | None:
    """The CUDA kernels implement operators of the C++ library, and are of no use without it."""
    if _missing is not None:
        return _missing
    return _load("_native_cuda", "torch was built without CUDA, or no working nvcc was found at installation")


def _register_fakes() -> None:
    """Shapes without data, for torch.compile: the tile passes return nothing and write in place."""
    families = ("softmax", "sigmoid", "margin_contrastive", "batch_all", "declared")
    passes = [f"{family}_{sweep}_" for family in families for sweep in ("statistics", "weights")]
    others = ("hardest_statistics_", "semi_hard_statistics_", "add_differences_", "mirror_", "advise_huge_pages_")
    for op in (*passes, *others):
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


def check_has_data(embeddings) -> None:
    """That triplets can be mined: meta tensors have no data to count them by, nor may their results' sizes be open."""
    from torch._subclasses.fake_tensor import FakeTensor

    if embeddings.is_meta and not isinstance(embeddings, FakeTensor):
        raise NotImplementedError(
            "embeddings are on the meta device: how many triplets are mined from them only their data tells. Mine from "
            "tensors that have data, or in a FakeTensorMode with a ShapeEnv, where a size may be unknown"
        )


def fake_triplets(embeddings, labels, *config):
    """How many triplets there are, only the data tells; but as many anchors as positives and negatives."""
    check_has_data(embeddings)
    count = torch.library.get_ctx().new_dynamic_size()
    return tuple(labels.new_empty(count, dtype=torch.int64) for _ in range(3))


# At import, so that torch.ops.replearn_kernels is complete once the package is imported.
_missing = _load_cpu()
_missing_cuda = _load_cuda()
_cuda_was_built = bool(_libraries("_native_cuda"))


def available() -> bool:
    """Whether the C++ kernels are loaded."""
    return _missing is None


def why_missing() -> str | None:
    """Why the C++ kernels are not loaded, if so."""
    return _missing


def mines_on_cuda() -> bool:
    """Whether the CUDA kernels are loaded too: the mining operator runs on a GPU."""
    return _missing_cuda is None


def why_not_on_cuda() -> str | None:
    """Why the CUDA kernels are not loaded, if so."""
    return _missing_cuda


def cuda_is_broken() -> bool:
    """Whether the CUDA kernels were built, and could not be loaded."""
    return _cuda_was_built and not mines_on_cuda()
