"""The k nearest columns of every row: what a block of rows keeps of its tiles, natively and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.columns import blocks
from .bounds import Scores
from .walk import Ids, Tile, first_filter, tile_shape, walk

Nearest = tuple[Tensor, Tensor]
"""Scores, fp64, and columns, int64, ``[R, k]`` each: the best first, of equal scores the lower column. Where there are
fewer, -inf and -1."""


def nearest(scores: Scores, k: int, excluded: list[Ids], backend: str, on_rows: Callable[[int], object]) -> Nearest:
    """Of all queries; columns of a row's id are no candidates."""
    fold = {"cpp": NativeNearest, "torch": NearestOnTensors}[backend]
    device = scores.query.features.device
    shape = len(scores.query), k
    best = torch.empty(shape, dtype=torch.float64, device=device)
    columns = torch.empty(shape, dtype=torch.int64, device=device)
    row_blocks = blocks(shape[0], tile_shape(device)[0])
    filter = first_filter(scores)
    for rows, found in walk(scores, filter, excluded, row_blocks, lambda rows: fold(scores[rows], k), on_rows):
        best[rows], columns[rows] = found.result()
    return best, columns


class NativeNearest:
    """Candidates as csrc/cpu/retrieval_nearest.cpp keeps them: bounds and columns of those that may be among the k."""

    def __init__(self, scores: Scores, k: int):
        self.scores, self.k = scores, k
        rows, room = len(scores.query), 2 * k + 64
        self.lower, self.upper = torch.empty(2, rows, room, dtype=torch.float32)
        self.columns = torch.empty(rows, room, dtype=torch.int64)
        self.held = torch.zeros(rows, dtype=torch.int64)
        self.threshold = torch.full((rows,), -torch.inf, dtype=torch.float32)

    @property
    def _candidates(self) -> tuple[Tensor, ...]:
        return self.lower, self.upper, self.columns, self.held

    def add(self, tile: Tile) -> int:
        return torch.ops.replearn_kernels.nearest_(
            tile.s, *self.scores.arguments, *tile.arguments, self.k, *self._candidates, self.threshold
        )

    def result(self) -> Nearest:
        best = torch.empty(len(self.held), self.k, dtype=torch.float64)
        columns = torch.empty(len(self.held), self.k, dtype=torch.int64)
        torch.ops.replearn_kernels.nearest_result_(*self.scores.arguments, *self._candidates, best, columns)
        return best, columns


class NearestOnTensors:
    """The same, on any device. A place without a candidate has the bounds -inf."""

    def __init__(self, scores: Scores, k: int):
        self.scores, self.k = scores, k
        none = torch.empty(len(scores.query), 0, dtype=torch.float32, device=scores.query.features.device)
        self.lower, self.upper, self.columns = none, none, none.long()
        self.threshold = none.new_full((len(none), 1), -torch.inf)

    def add(self, tile: Tile) -> int:
        if self.columns.shape[1] == 0 and tile.s.shape[1] > self.k:
            self.threshold = tile.lower.topk(self.k).values[:, -1:]
        least = torch.finfo(torch.float32).min  # what is left out has the bound -inf
        self._append(tile, tile.upper >= self.threshold.clamp(min=least))
        if self.columns.shape[1] > self.k:
            self.threshold = self.lower.topk(self.k).values[:, -1:]
        if self.columns.shape[1] <= 2 * self.k + 64:
            return 0
        worse = self.upper < self.threshold
        self.lower.masked_fill_(worse, -torch.inf)
        self.upper.masked_fill_(worse, -torch.inf)
        width = int((self.upper > -torch.inf).sum(1).max())
        self.upper, kept = self.upper.topk(width)
        self.lower, self.columns = self.lower.gather(1, kept), self.columns.gather(1, kept)
        return self._score() if width > self.k + (self.k + 64) // 2 else 0

    def _append(self, tile: Tile, kept: Tensor) -> None:
        """The columns of a tile that are kept, ``[R, C]``, moved to the left."""
        row, column = kept.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(kept))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        width = int(counts.max())
        lower, upper = (self.lower.new_full((len(kept), width), -torch.inf) for _ in range(2))
        columns = self.columns.new_zeros(len(kept), width)
        lower[row, place], upper[row, place] = tile.lower_at(row, column), tile.upper[row, column]
        columns[row, place] = column + tile.columns.start
        self.lower = torch.cat((self.lower, lower), 1)
        self.upper = torch.cat((self.upper, upper), 1)
        self.columns = torch.cat((self.columns, columns), 1)

    def _score(self) -> int:
        """Of more candidates than there is room for, by their scores the k that stay. Returns how many were scored."""
        in_doubt = int((self.upper > -torch.inf).sum())
        scores, self.columns = self.result()
        rows = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
        self.lower, self.upper = self.scores.bounds(rows, scores)
        none = self.columns < 0
        self.lower.masked_fill_(none, -torch.inf)
        self.upper.masked_fill_(none, -torch.inf)
        self.threshold = self.lower[:, -1:]
        return in_doubt

    def result(self) -> Nearest:
        row, place = (self.upper > -torch.inf).nonzero(as_tuple=True)
        scores = torch.full(self.columns.shape, -torch.inf, dtype=torch.float64, device=self.columns.device)
        scores[row, place] = self.scores.listed(row, self.columns[row, place])
        columns, by_column = self.columns.masked_fill(self.upper == -torch.inf, -1).sort(dim=1)
        scores, order = scores.gather(1, by_column).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        scores, columns = scores[:, : self.k], columns[:, : self.k]
        missing = 0, self.k - columns.shape[1]
        pad = torch.nn.functional.pad
        return pad(scores, missing, value=-torch.inf), pad(columns, missing, value=-1)
