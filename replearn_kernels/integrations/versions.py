"""Which versions of other libraries the integrations take."""

from __future__ import annotations

from importlib import metadata

from torch.torch_version import TorchVersion


def require(distribution: str, first: str, before: str) -> None:
    """Raise ImportError unless ``distribution`` is installed in a version from ``first`` on and below ``before``.

    Args:
        distribution: the name that pip knows it by.
        first: the oldest version with the same classes.
        before: the first version that may be another library.
    """
    wanted = f"this integration takes {distribution} >= {first}, < {before}"
    how = f"pip install '{distribution}>={first},<{before}'"
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}, which is not installed: {how}") from None
    if not first <= TorchVersion(found) < before:
        raise ImportError(f"{wanted}, and {found} is installed: {how}")
