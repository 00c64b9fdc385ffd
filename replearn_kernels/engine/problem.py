"""A problem: the inputs of one loss, in the form in which the engine works on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .columns import BatchColumns, OwnColumns, SharedColumns, Source, Tile, blocks, part
from .distances import Points
from .listed_pairs import add_pairs_, positive_pairs, sorted_positives
from .plan import TileShape


class Inputs(NamedTuple):
    """The tensors that the operator is called with."""

    query: Tensor  # [N, d]
    keys: list[Tensor]  # [M, d] each; without keys and own, the rows are compared with each other
    own: Tensor | None  # [N, K, d]
    target: Tensor | None  # [N] int64; None: row i's positive is column i, or groups say
    row_group: Tensor | None  # [N] int64
    column_group: Tensor | None  # [M] int64, of the first keys
    logit_scale: Tensor  # 0-d
    logit_bias: Tensor | None  # 0-d
    row_values: Tensor | None = None  # [values, N] in the dtype of the statistics: what a declared loss reads of rows
    column_values: Tensor | None = None  # [values, M] of columns; where the rows are compared with each other None
    row_guide: Tensor | None = None  # [N, g]: of the rows, of whose products a declared loss reads too
    column_guide: Tensor | None = None  # [M, g] of columns; where the rows are compared with each other None
    learned: Tensor | None = None  # [parameters] fp64: of a declared loss, those that are tensors

    @property
    def features(self) -> list[Tensor]:
        """The rows, then the sources of columns that are not the rows."""
        return [self.query, *self.keys] if self.own is None else [self.query, *self.keys, self.own]

    @property
    def differentiable(self) -> list[Tensor]:
        """What may get a gradient, in the order of ``needs_grad``."""
        scalars = [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]
        return [*self.features, *scalars] if self.learned is None else [*self.features, *scalars, self.learned]

    @property
    def is_batch(self) -> bool:
        """Whether the rows are compared with each other."""
        return not self.keys and self.own is None

    @property
    def widths(self) -> tuple[int, ...]:
        """How many columns each source has."""
        if self.is_batch:
            return (self.query.shape[0],)
        widths = [key.shape[0] for key in self.keys]
        return tuple(widths if self.own is None else [*widths, self.own.shape[1]])


@dataclass(slots=True, eq=False)
class Problem:
    """``N`` rows compared with the columns of every source.

    ``scale`` multiplies the similarities, ``bias`` is added: floats on the CPU, 0-d tensors elsewhere, so that no
    kernel launch waits for the value. ``target[i]`` is row i's positive: a column of the source that has them.
    """

    query: Tensor  # [N, d]
    sources: tuple[Source, ...]
    given_target: Tensor | None  # [N] int64; None: row i's positive is column i
    row_group: Tensor | None
    column_group: Tensor | None
    scale: float | Tensor
    bias: float | Tensor
    given_rows: Tensor | None = None  # [N, d]: the queries before they were centred, where similarities are distances
    squares: Tensor | None = None  # [N]: |x_i|^2 of the centred rows
    isolated: Tensor | None = None  # [N]: what is added to the squared distances of row i
    inverse_norms: Tensor | None = None  # [N]: the rows are the queries times these
    row_values: Tensor | None = None  # [values, N]
    column_values: Tensor | None = None  # [values, M], of the first source
    row_guide: Tensor | None = None  # [N, g]: other features, of the same dtype for rows and columns
    column_guide: Tensor | None = None  # [M, g]
    group_size: int = 0  # of every group, whose numbers fit 32 bits then; 0: groups are any
    _numbers: Tensor | None = None
    _positive_counts: Tensor | None = None
    _group_numbers: Tensor | None = None
    _positives: tuple[Tensor, Tensor] | None = None

    @classmethod
    def build(cls, inputs: Inputs, needs_grad: list[bool], objective) -> Problem:
        """From the operator's arguments; ``needs_grad`` in the order of ``inputs.differentiable``."""
        query, given_rows, squares, isolated = _rows_contiguous(inputs.query), None, None, None
        if objective.by_distance:
            given_rows = query
            query, squares, isolated = centred(query, objective.unit_rows)
        sources: list[Source] = [
            SharedColumns(
                _rows_contiguous(key), needs, has_positives=i == 0 and not objective.own_positives,
                inverse_norms=_inverse_norms(key) if objective.unit_features else None,
            )
            for i, (key, needs) in enumerate(zip(inputs.keys, needs_grad[1:]))
        ]  # fmt: skip
        if inputs.own is not None:
            sources.append(OwnColumns(inputs.own, needs_grad[1 + len(inputs.keys)], objective.own_positives))
        if inputs.is_batch:
            sources.append(BatchColumns(query, needs_grad=False, has_positives=True))
        target, row_group, column_group = (
            None if t is None else t.contiguous() for t in (inputs.target, inputs.row_group, inputs.column_group)
        )
        column_group = row_group if inputs.is_batch else column_group
        guides = inputs.row_guide, inputs.row_guide if inputs.is_batch else inputs.column_guide
        if objective.own_positives:
            target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        bias = 0.0 if inputs.logit_bias is None else number_of(inputs.logit_bias)
        return cls(
            query, tuple(sources), target, row_group, column_group, number_of(inputs.logit_scale), bias,
            given_rows, squares, isolated, _inverse_norms(query) if objective.unit_features else None,
            inputs.row_values, inputs.row_values if inputs.is_batch else inputs.column_values,
            *(None if t is None else _rows_contiguous(t) for t in guides), objective.group_size,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        return self.query.shape[0]

    @property
    def target(self) -> Tensor:
        """``[N]`` int64."""
        if self.given_target is not None:
            return self.given_target
        if self._numbers is None:
            self._numbers = torch.arange(self.rows, device=self.query.device)
        return self._numbers

    @property
    def positive_counts(self) -> Tensor:
        """In a batch, how many other rows are in row i's group, ``[N]``; without reading back from a GPU."""
        if self.group_size:
            return self.row_group.new_full((), self.group_size - 1).expand(self.rows)
        if self._positive_counts is None:
            self._count_groups()
        return self._positive_counts

    @property
    def group_numbers(self) -> Tensor:
        """In a batch, ``[N]`` int32: the same for two rows if they are of one group."""
        if self._group_numbers is None:
            if self.group_size:
                self._group_numbers = self.row_group.int()
            else:
                self._count_groups()
        return self._group_numbers

    def know_group_numbers(self, numbers: Tensor) -> None:
        """What another call has found, so that this one need not sort."""
        self._group_numbers = numbers

    def _count_groups(self) -> None:
        ordered = self._all_groups().sort().values
        first, last = (torch.searchsorted(ordered, self.row_group, right=right) for right in (False, True))
        self._positive_counts, self._group_numbers = last - first - 1, first.int()

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        """The other rows of every row's group and their squared distances, ``[p, N]``, the nearest first.

        For p rows at most; a row with fewer has some with a square of -inf before them. Reads p back from a GPU.
        """
        if self._positives is None:
            self._positives = sorted_positives(self.given_rows, self.row_group, self.isolated)
        return self._positives

    def positive_pairs(self, *of_rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
        """Every unordered pair of rows of one group, some at a time: (i, j, rows, values of the rows).

        ``of_rows``: values of every row, ``[N]`` each. Pairs are places in the rows and values that come with them:
        the first N are the problem's own. What is said of others is left to those who have them.
        """
        for i, j in positive_pairs(self.row_group, self.query.shape[1]):
            yield i, j, self.given_rows, of_rows

    def add_pairs_(self, gradient: Tensor, numbers: Tensor, a: Tensor | Callable[[Tensor], Tensor]) -> None:
        """Of every row i and the row j = ``numbers[i]``: ``gradient[i] += a (x_i - x_j)``, and the opposite for j.

        ``a``: ``[N]``, or a function that takes the squared distances to it.
        """
        add_pairs_(gradient, self.given_rows, torch.arange(self.rows, device=numbers.device), numbers, a)

    def _all_groups(self) -> Tensor:
        """The groups of all rows that a row of the batch is compared with, and its own."""
        return self.row_group

    @property
    def total_rows(self) -> int:
        """Rows that a column sees."""
        return self.rows

    @property
    def width(self) -> int:
        """Columns that a row sees, over all sources."""
        return sum(source.width for source in self.sources)

    @property
    def is_batch(self) -> bool:
        return isinstance(self.sources[0], BatchColumns)

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.query.dtype)

    def of_rows(self, rows: slice) -> Problem:
        """The same problem for a chunk of its rows: all of them, where they are compared with each other."""
        if rows.stop - rows.start == self.rows:
            return self
        sources = tuple(source.of_rows(rows) for source in self.sources)
        row_group = None if self.row_group is None else self.row_group[rows]
        return replace(
            self, query=self.query[rows], sources=sources, given_target=self.target[rows], row_group=row_group,
            inverse_norms=None if self.inverse_norms is None else self.inverse_norms[rows],
            row_values=None if self.row_values is None else self.row_values[:, rows],
            row_guide=None if self.row_guide is None else self.row_guide[rows],
        )  # fmt: skip

    def unit_query(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The rows as they are compared, ``[R, d]``: of length 1 where the objective has it so."""
        if self.inverse_norms is None:
            return part(self.query, rows).to(dtype)
        return (self.query[rows] * self.inverse_norms[rows].unsqueeze(1)).to(dtype)  # rounded once, as keys are

    def tiles(self, shape: TileShape, compute_dtype: torch.dtype) -> Iterator[Tile]:
        """The walk over tiles: sources, then blocks of rows, then blocks of columns, always in this order.

        The order fixes the order of every accumulation, and with it the bits of the result.
        """
        for position, source in enumerate(self.sources):
            row_block, column_block = shape.fit(source)
            for rows in blocks(self.rows, row_block):
                query = self.unit_query(rows, compute_dtype)
                for columns in source.column_blocks(rows, column_block):
                    yield Tile(query, rows, source, position, columns)

    def pairs(self, tile: Tile, uses_target: bool) -> Pairs:
        """What a pass has to know of the tile's pairs."""
        if not tile.source.has_positives:
            return Pairs(self.scale, self.bias, None, None, None, tile.columns.start, False)
        target = self.target[tile.rows] if uses_target else None
        groups = (None, None)
        if self.row_group is not None:
            groups = self.row_group[tile.rows], self.column_group[tile.columns]
        row_values = None if self.row_values is None else part(self.row_values, tile.rows, 1)
        column_values = None if self.column_values is None else part(self.column_values, tile.columns, 1)
        return Pairs(
            self.scale, self.bias, target, *groups, tile.columns.start, tile.diagonal, row_values, column_values
        )

    def points(self, tile: Tile, squared: bool) -> Points:
        """What turns the tile's products into distances."""
        x, squares, dtype = self.given_rows, self.squares, self.statistics_dtype
        rows, row_squares = x[tile.rows].to(dtype), squares[tile.rows]
        if tile.diagonal:
            return Points(rows, rows, row_squares, row_squares, squared, True)
        return Points(rows, x[tile.columns].to(dtype), row_squares, squares[tile.columns], squared, False)

    def at_targets(self, column_values: Tensor) -> Tensor:
        """``[..., M]`` of the columns to ``[..., N]``: of every row's positive."""
        if self.given_target is None:
            return column_values[..., : self.rows]
        return column_values[..., self.target]

    def sum_at_targets(self, row_values: Tensor) -> Tensor:
        """``[N]`` to ``[M]``: the sum over the rows whose positive a column is, 0 where it is none's.

        In fp64: there alone PyTorch adds in a fixed order on the CPU too.
        """
        if self.given_target is None:  # on a GPU the sum takes a dozen launches
            return torch.nn.functional.pad(row_values, (0, self.sources[0].width - self.rows))
        return sum_at(self.target, row_values, self.sources[0].width).to(row_values.dtype)

    def total_logits(self) -> Tensor:
        """``sum_j l_ij`` over all columns of row i, ``[N]``, in O((N + M) d)."""
        dtype = self.statistics_dtype
        keys, *others = self.sources
        total = sum((source.total(dtype) for source in others), start=self._over_ranks(keys.total(dtype)))
        return (self.query.to(dtype) * total).sum(1) * self.scale

    def total_column_logits(self) -> Tensor:
        """``sum_i l_ij`` over all rows, for every column j of the first source, ``[M]``."""
        dtype = self.statistics_dtype
        total = self._over_ranks(self.query.sum(0, dtype=dtype))
        return (self.sources[0].features.to(dtype) @ total) * self.scale

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Their sum over the ranks of the batch: here one."""
        return values


class Pairs(NamedTuple):
    """What a pass over a tile ``s[R, C]`` of products has to know of its pairs."""

    scale: float | Tensor
    bias: float | Tensor
    target: Tensor | None  # [R] int64: the column of each row's positive, counted from the source's first
    row_group: Tensor | None  # [R]
    column_group: Tensor | None  # [C]
    first_column: int  # of the tile, counted like the targets
    diagonal: bool  # the columns are the rows: the entries (i, i) are no pairs
    row_values: Tensor | None = None  # [values, R], of a declared loss, the only one that reads them
    column_values: Tensor | None = None  # [values, C]
    guide: Tensor | None = None  # [R, C]: products of other features, which a backend has formed

    @property
    def of_any_loss(self) -> tuple:
        """What passes of all losses take."""
        return self[:7]

    def inside(self, width: int) -> tuple[Tensor, Tensor]:
        """Which rows have their target in this tile, ``[R]``, and its column there, ``[R, 1]`` (0 where not).

        A mask and not a list of rows: finding how many there are would make a GPU wait.
        """
        column = self.target - self.first_column
        inside = (column >= 0) & (column < width)
        return inside, torch.where(inside, column, 0).unsqueeze(1)

    def same_group(self) -> Tensor:
        """``[R, C]``: which entries are pairs of one group; never a row with itself."""
        same = self.row_group.unsqueeze(1) == self.column_group
        return same.fill_diagonal_(False) if self.diagonal else same


def number_of(scalar: Tensor) -> float | Tensor:
    """A 0-d tensor as :class:`Problem` wants it."""
    return scalar.item() if scalar.is_cpu else scalar


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, accumulators and losses: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_at(index: Tensor, values: Tensor, count: int) -> Tensor:
    """``[count]``, fp64: the sum of the values of each index."""
    return values.new_zeros(count, dtype=torch.float64).index_put_((index,), values.double(), accumulate=True)


def _inverse_norms(features: Tensor) -> Tensor:
    """``1 / |row|``, ``[M]``, as far as squares are in range; 0 for zeros, whose cosines and gradient are then 0."""
    dtype = statistics_dtype(features.dtype)
    norms = torch.linalg.vector_norm(features, dim=1, dtype=dtype)
    return torch.where(norms == 0, 0, norms.clamp(min=torch.finfo(dtype).tiny ** 0.5).reciprocal())


def is_whole(inverse_norms: Tensor) -> Tensor:
    """Which rows have a length of 1 once they are multiplied: no zeros, nor what is too short to be squared."""
    return (inverse_norms > 0) & (inverse_norms < torch.finfo(inverse_norms.dtype).tiny ** -0.5)


def centred(rows: Tensor, unit_rows: bool, centre: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows, centred where their dtype is that of the statistics (rounding the result would move half-precision
    points), their squares, and for unit rows 1 for those of zeros: their distance from every row is 1 - cos = 1.

    ``centre``: default the rows' mean. Where it is not finite, no square is: every row meets the one that is not.
    """
    dtype = statistics_dtype(rows.dtype)
    isolated = (rows == 0).all(1).to(dtype) if unit_rows else None
    if centre is None:
        centre = rows.sum(0, dtype=dtype) / max(len(rows), 1)
    if rows.dtype == dtype:
        rows = rows - centre
    squares = rows.to(dtype).square().sum(1) + centre.sum() * 0
    return rows, squares if isolated is None else squares + isolated, isolated


def _rows_contiguous(features: Tensor) -> Tensor:
    """BLAS reads rows of any stride, but not elements of any stride (nor stride 0 of an expanded batch)."""
    if features.is_contiguous():
        return features
    inner_ok = features.shape[1] <= 1 or features.stride(1) == 1
    outer_ok = features.shape[0] <= 1 or features.stride(0) >= features.shape[1]
    return features if inner_ok and outer_ok else features.contiguous()
