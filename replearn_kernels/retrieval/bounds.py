r"""What a pair's score is, and how far a tile of approximate similarities can be off.

Neighbours and ranks are decided by *scores*, formed in fp64 from the rows as they are, in a fixed order of summation:

    product     x . y
    cosine      x . y / (|x| |y|), 0 of a row of zeros
    distance    -|x - y|^2, from the differences

Few pairs need one. A *filter*, a product of unit rows in fp32 or bf16, tells of all others that they cannot matter. Of
row x and column y, with unit rows u, their roundings u', and S the largest length of all columns (distances: and rows):

    s = u'_x . u'_y,  |s - u_x . u_y| <= residual_x + residual_y + the product's rounding,  residual = |u - u'|
    product     v = |y| / S s                            which is score / (|x| S)
    cosine      v = s                                    the score
    distance    v = 2 |x| / S |y| / S s - (|y| / S)^2    (score + |x|^2) / S^2

So v lies in [lower, upper] about what the filter sees (csrc/cpu/retrieval_kernels.h has the formula), and a column
whose upper bound is below the k-th largest of all lower bounds is none of the k nearest. Residuals are measured: with
bounds of them a filter in bf16 would leave twice as many columns in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..engine.columns import blocks

DISTANCES = ("distance", "squared_distance")
SIMILARITIES = ("cosine", "product", *DISTANCES)

_BLOCK = 2**20  # numbers of features that are converted at a time: 8 MB of fp64
_TINY = 2.0**-120  # what fp32 cannot tell from 0: products of parts of unit rows


def as_values(scores: Tensor, similarity: str) -> Tensor:
    """What a caller reads of scores: similarities as they are, distances as such, none of them a zero below zero."""
    if similarity not in DISTANCES:
        return scores
    squares = 0.0 - scores
    return squares.sqrt() if similarity == "distance" else squares


@dataclass(frozen=True)
class Rows:
    """Queries, or a gallery: fp32 or fp64 rows as they are given, and what is known of them in fp64."""

    features: Tensor  # [n, d]
    lengths: Tensor  # [n]

    @staticmethod
    def of(features: Tensor) -> Rows:
        """Half precision as fp32, which holds it exactly."""
        features = features.detach()
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        if features.stride(-1) != 1:
            features = features.contiguous()
        lengths = torch.empty(len(features), dtype=torch.float64, device=features.device)
        for block in _blocks_of(len(features), features):
            torch.linalg.vector_norm(features[block], dim=1, dtype=torch.float64, out=lengths[block])
        return Rows(features, lengths)

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.features[rows], self.lengths[rows])

    @cached_property
    def ones(self) -> Tensor:
        """fp64 ``[n]``"""
        return torch.ones_like(self.lengths)

    @cached_property
    def inverse_lengths(self) -> Tensor:
        """0 of a row of zeros."""
        return self.lengths.reciprocal().masked_fill_(self.lengths == 0, 0)


@dataclass(frozen=True)
class UnitRows:
    """Rows of length 1, or 0, rounded to the filter's dtype, and the length of what the rounding took away."""

    features: Tensor  # [n, d]
    residuals: Tensor  # [n], fp64

    @staticmethod
    def of(rows: Rows, dtype: torch.dtype) -> UnitRows:
        unit = torch.empty(rows.features.shape, dtype=dtype, device=rows.features.device)
        residuals = torch.empty_like(rows.lengths)
        for block in _blocks_of(len(rows), rows.features):
            exact = rows.features[block].double() * rows.inverse_lengths[block, None]
            unit[block] = exact
            torch.linalg.vector_norm(exact - unit[block].double(), dim=1, out=residuals[block])
        return UnitRows(unit, residuals)

    def __getitem__(self, rows: slice) -> UnitRows:
        return UnitRows(self.features[rows], self.residuals[rows])


def _blocks_of(count: int, features: Tensor):
    """So many rows like these in blocks that are converted at a time."""
    return blocks(count, max(_BLOCK // max(features.shape[1], 1), 1))


@dataclass(frozen=True)
class Scores:
    """The scores of queries against a gallery, and the units in which the filter counts them."""

    query: Rows
    gallery: Rows
    similarity: str
    scale: float  # S

    @staticmethod
    def of(query: Rows, gallery: Rows, similarity: str) -> Scores:
        scores = Scores(query, gallery, similarity, 1.0)
        sides = (query, gallery) if scores.is_distance else (gallery,)
        longest = max((float(side.lengths.max()) for side in sides if len(side)), default=0.0)
        return replace(scores, scale=longest or 1.0)

    @property
    def is_distance(self) -> bool:
        return self.similarity in DISTANCES

    def __getitem__(self, rows: slice) -> Scores:
        """Of some queries."""
        return replace(self, query=self.query[rows])

    @cached_property
    def arguments(self) -> tuple:
        """As the native operators take them (csrc/cpu/retrieval.h)."""
        query, gallery = self.query, self.gallery
        return query.features, gallery.features, self.is_distance, *self._factors, self.to_filter, self.shift

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """What products of queries and of columns are multiplied with."""
        if self.similarity == "cosine":
            return self.query.inverse_lengths, self.gallery.inverse_lengths
        return self.query.ones, self.gallery.ones

    @cached_property
    def to_filter(self) -> Tensor:
        """``[N]``: v is the score times this, plus :attr:`shift`."""
        lengths = self.query.lengths
        if self.similarity == "cosine":
            return torch.ones_like(lengths)
        if self.is_distance:
            return torch.full_like(lengths, 1 / self.scale / self.scale)
        return self.query.inverse_lengths / self.scale

    @cached_property
    def shift(self) -> Tensor:
        """``[N]``"""
        lengths = self.query.lengths
        return (lengths / self.scale).square() if self.is_distance else torch.zeros_like(lengths)

    def listed(self, row: Tensor, column: Tensor) -> Tensor:
        """The scores of pairs, fp64 [P]."""
        scores = torch.empty(len(row), dtype=torch.float64, device=row.device)
        of_query, of_gallery = self._factors
        for pairs in _blocks_of(len(row), self.query.features):
            i, j = row[pairs], column[pairs]
            x, y = self.query.features[i].double(), self.gallery.features[j].double()
            if self.is_distance:
                scores[pairs] = -(x - y).square_().sum(1)
            else:
                scores[pairs] = (x * y).sum(1) * of_query[i] * of_gallery[j]
        return scores

    def bounds(self, row: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of scores of these rows: fp32 numbers that v lies between."""
        v, shift = scores * self.to_filter[row], self.shift[row]
        error = (v.abs() + shift) * (self.query.features.shape[1] + 8) * torch.finfo(torch.float64).eps
        infinity = torch.full((), torch.inf, dtype=torch.float32, device=v.device)
        low, high = (v + shift - error).float(), (v + shift + error).float()
        return low.nextafter(-infinity), high.nextafter(infinity)


class Filter:
    """Products of unit rows in ``dtype``, fp32 or bf16, and how far they can be off."""

    def __init__(self, scores: Scores, dtype: torch.dtype):
        query, gallery = scores.query, scores.gallery
        self.gallery = UnitRows.of(gallery, dtype)
        self.query = self.gallery if query is gallery else UnitRows.of(query, dtype)
        self.dtype = dtype
        self.relative = 2.0**-21  # of v: its own roundings in fp32, and that of the product to bf16
        if dtype == torch.bfloat16:
            self.relative += 1.01 * 2**-8
        lengths = gallery.lengths / scores.scale
        far = self.query.residuals.max() if len(query) else 0.0
        device, d = query.features.device, query.features.shape[1]
        product = 1.1 * (d + 8) * 2.0**-23 + (operand_rounding(device) if dtype == torch.float32 else 0.0)
        slack = 1.001 * (far + self.gallery.residuals * (1 + far)) + product + _TINY
        if scores.similarity == "cosine":
            lengths = torch.ones_like(lengths)
        squares = lengths.square() if scores.is_distance else torch.zeros_like(lengths)
        error = 2.0**-21 * squares + _TINY
        # v leaves |x|^2 out, and so resolves what fp64 rounds off a distance from far away: bounds are of the score.
        of_scores = 2.0**-51 * (d + 8) if scores.is_distance else 0.0
        self.columns = torch.stack((lengths, slack * lengths + of_scores, error - squares, -error - squares)).float()
        """``[4, M]``: factor, slack, above, below."""
        self.scales_columns, self.scales_rows = scores.similarity != "cosine", scores.is_distance  # else by 1
        self.row_factor = torch.ones(len(query), dtype=torch.float32, device=lengths.device)
        if scores.is_distance:
            self.row_factor = (2 / scores.scale * query.lengths).float()

    @property
    def largest_errors(self) -> Tensor:
        """The most by which ``v + above``, as the filter sees a row's pairs, can be off their v, fp64 ``[N]``."""
        if not self.columns.shape[1]:
            return torch.zeros_like(self.row_factor, dtype=torch.float64)
        factor, slack, above, below = self.columns.double()
        return self.row_factor.double() * (1.01 * self.relative * factor.max() + slack.max()) + (above - below).max()


def operand_rounding(device: torch.device) -> float:
    """What torch may be told to add to the error of fp32 products, relative to the rows' lengths."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    levels = backend.matmul, backend, torch.backends
    told = [level for level in (getattr(of, "fp32_precision", "none") for of in levels) if level != "none"]
    return {"ieee": 0.0, "tf32": 2.0**-9, "bf16": 2.0**-7}[told[0] if told else "ieee"]
