"""Which versions of other libraries the integrations were tested with."""

from __future__ import annotations

from importlib import metadata

from torch.torch_version import TorchVersion


def require(distribution: str, first: str, before: str) -> None:
    """Raise ImportError unless ``distribution`` is installed in a version from ``first`` on and below ``before``.

    Args:
        distribution: the name that pip knows it by.
        first: the oldest version that was tested.
        before: the first version that is held to be another library.
    """
    wanted = f"replearn_kernels.integrations was tested with {distribution} >= {first}, < {before}"
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}, and it is not installed") from None
    if not first <= TorchVersion(found) < before:
        raise ImportError(f"{wanted}, and {found} is installed")
