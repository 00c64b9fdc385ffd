"""The encoder of the examples that learn from images alone."""

from torch import nn

FEATURES = 128
PROJECTION = 64


def encoder() -> nn.Sequential:
    """Images [N, 1, 8, 8] to features [N, FEATURES].

    Group norm, not batch norm: MoCo's queue would let statistics of the batch give the answer away.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.Conv2d(16, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, FEATURES),
    )


def projection_head(dim: int = PROJECTION) -> nn.Sequential:
    """Features [N, FEATURES] to what the loss compares, [N, dim]; thrown away after training."""
    return nn.Sequential(nn.GELU(), nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, dim))
