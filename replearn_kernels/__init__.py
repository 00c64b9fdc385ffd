"""Fused losses for representation learning: all pairs of a batch, tile by tile, never the N x N matrix."""

from .engine.counters import count_work
from .functional import clip_loss, info_nce_loss
from .losses import ClipLoss, InfoNCELoss

__all__ = ["ClipLoss", "InfoNCELoss", "clip_loss", "count_work", "info_nce_loss"]
