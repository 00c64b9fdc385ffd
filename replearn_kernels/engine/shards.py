"""One batch on many ranks: what each of them has of it, and the problem as one rank sees it.

Rows, columns and targets of the global batch are numbered through the shards in the order of the ranks: column j of
rank r is number ``columns[0] + ... + columns[r - 1] + j``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import Objective
from .columns import BatchColumns, SharedColumns, VisitingRows
from .listed_pairs import add_pairs_, pair_squares
from .problem import Inputs, Problem, centred, statistics_dtype, sum_at
from .remote_rows import Route
from .validation import check_inside, check_values
from .world import World, ranks_by

# Elements of the pairs' rows that are fetched at a time: 16 MiB in fp32, as listed_pairs.py forms them.
_FETCHED_ELEMENTS = 2**22
# Up to so many bytes of features and gradients of all ranks, "auto" gathers them: two exchanges, not one per rank.
_GATHERED_BYTES = 32 * 2**20


class Layout(NamedTuple):
    """The shards, and how they meet."""

    world: World
    rows: list[int]  # of every rank
    columns: list[int]  # of every rank's keys; its rows, where they are compared with each other
    is_batch: bool
    strategy: str  # "ring" or "gather"

    @property
    def hops(self) -> int:
        """The ranks that a block visits: of a batch half of the others, as (i, j) and (j, i) are one pair."""
        return self.world.size // 2 if self.is_batch else self.world.size - 1

    def first_column(self, rank: int) -> int:
        return sum(self.columns[:rank])

    def region(self, visitor: int) -> tuple[slice, slice]:
        """Own rows and the visitor's columns that are compared here.

        In a batch of an even number of ranks, two opposite ones visit each other: each takes half of the lower one's
        rows.
        """
        rank, size = self.world.rank, self.world.size
        rows, columns = slice(0, self.rows[rank]), slice(0, self.columns[visitor])
        if self.is_batch and 2 * abs(rank - visitor) == size:
            half = self.rows[min(rank, visitor)] // 2
            if rank < visitor:
                rows = slice(0, half)
            else:
                columns = slice(half, columns.stop)
        return rows, columns


@dataclass(slots=True, eq=False)
class Shard(Problem):
    """The rows of one rank: its walk is over the columns of its own rank, its formulas are about all ranks'."""

    layout: Layout | None = None
    global_target: Tensor | None = None  # given_target counts from the first column of the own rank
    groups: tuple[Tensor, ...] = ()  # of the columns of every rank
    values: tuple[Tensor, ...] = ()  # of the columns of every rank
    objective: Objective | None = None
    centre: Tensor | None = None  # of the rows of all ranks, where similarities are distances

    @classmethod
    def of(cls, inputs: Inputs, needs_grad: list[bool], objective, layout: Layout) -> Shard:
        shard = cls.build(inputs, needs_grad, objective)
        shard.layout, shard.objective, world = layout, objective, layout.world
        if objective.by_distance:
            total = world.sum(shard.given_rows.sum(0, dtype=shard.statistics_dtype))
            shard.centre = total / max(sum(layout.rows), 1)
            shard.query, shard.squares, shard.isolated = shard._centred(shard.given_rows)
            shard.sources = (BatchColumns(shard.query, needs_grad=False, has_positives=True),)
        if shard.given_target is not None:
            shard.global_target = shard.given_target
            shard.given_target = shard.global_target - layout.first_column(world.rank)
        if shard.column_group is not None:
            shard.groups = tuple(world.gather(shard.column_group, layout.columns))
        if shard.column_values is not None:
            shard.values = tuple(world.gather(shard.column_values, layout.columns))
        return shard

    def visit(self, rank: int, needs_grad: bool, features: Tensor, guide: Tensor | None = None) -> Problem:
        """The problem of the own rows and the columns of ``rank``: of the region that is compared here."""
        rows, columns = self.layout.region(rank)
        shift = self.layout.first_column(self.layout.world.rank) - self.layout.first_column(rank)
        return replace(
            self,
            query=self.query[rows],
            sources=(SharedColumns(features[columns], needs_grad, has_positives=True),),
            given_target=self.target[rows] + shift,
            row_group=None if self.row_group is None else self.row_group[rows],
            column_group=self.groups[rank][columns] if self.groups else None,
            row_values=None if self.row_values is None else self.row_values[:, rows],
            column_values=self.values[rank][:, columns] if self.values else None,
            row_guide=None if self.row_guide is None else self.row_guide[rows],
            column_guide=None if guide is None else guide[columns],
        )

    def meet_rows(self, rank: int, given_rows: Tensor, guide: Tensor | None = None) -> Problem:
        """The same where similarities are distances: both ranks' rows of the region as one batch, the own ones first.

        Only tiles of own rows and visiting columns are walked.
        """
        rows, columns = self.layout.region(rank)
        visiting = given_rows[columns]
        query, squares, isolated = self._centred(visiting)
        query = torch.cat([self.query[rows], query])
        groups = torch.cat([self.row_group[rows], self.groups[rank][columns]]) if self.groups else None
        guide = None if guide is None else torch.cat([self.row_guide[rows], guide[columns]])
        values = torch.cat([self.row_values[:, rows], self.values[rank][:, columns]], dim=1) if self.values else None
        return _Meeting(
            query=query,
            sources=(VisitingRows(query, False, has_positives=True, first=rows.stop - rows.start),),
            given_target=None,
            row_group=groups,
            column_group=groups,
            scale=self.scale,
            bias=self.bias,
            given_rows=torch.cat([self.given_rows[rows], visiting]),
            squares=torch.cat([self.squares[rows], squares]),
            isolated=None if isolated is None else torch.cat([self.isolated[rows], isolated]),
            row_values=values,
            column_values=values,
            row_guide=guide,
            column_guide=guide,
        )

    def _centred(self, given_rows: Tensor):
        return centred(given_rows, self.objective.unit_rows, self.centre)

    @property
    def travelling(self) -> list[Tensor]:
        """What the other ranks need of the columns: their features, and those of the guide if there is one."""
        features = self.sources[0].features if self.given_rows is None else self.given_rows
        return [t.contiguous() for t in (features, self.column_guide) if t is not None]

    @property
    def is_batch(self) -> bool:
        """Of a visited problem too, so that backends treat all tiles of a loss alike."""
        return self.layout.is_batch

    @property
    def total_rows(self) -> int:
        return sum(self.layout.rows)

    @property
    def width(self) -> int:
        return sum(self.layout.columns) + sum(source.width for source in self.sources[1:])

    def at_targets(self, column_values: Tensor) -> Tensor:
        if self.global_target is None:
            return Problem.at_targets(self, column_values)
        gathered = self.layout.world.gather(column_values, self.layout.columns)
        return torch.cat(gathered, dim=-1)[..., self.global_target]

    def sum_at_targets(self, row_values: Tensor) -> Tensor:
        if self.global_target is None:
            return Problem.sum_at_targets(self, row_values)
        world, columns = self.layout.world, self.layout.columns
        shares = sum_at(self.global_target, row_values, sum(columns)).split(columns)
        return sum(world.swap(shares, [columns[world.rank]] * world.size)).to(row_values.dtype)

    def positive_pairs(self, *of_rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
        """The own rows' pairs, then those of own rows with other ranks', whose rows and values are fetched.

        A pair across ranks comes on both, each of which takes what it says of its own row. All ranks fetch as often.
        """
        yield from Problem.positive_pairs(self, *of_rows)
        rank, width = self.layout.world.rank, self.query.shape[1]
        start, numbers = self.layout.first_column(rank), torch.arange(self.total_rows, device=self.query.device)
        elsewhere = (numbers < start) | (numbers >= start + self.rows)
        rows = self.given_rows.to(self.statistics_dtype)
        told = torch.cat([rows, *(values.unsqueeze(1) for values in of_rows)], dim=1)
        for i, _, place, found in self._fetched_pairs(numbers[elsewhere], told):
            values = tuple(torch.cat([v, f]) for v, f in zip(of_rows, found[:, width:].unbind(1)))
            yield i, self.rows + place, torch.cat([rows, found[:, :width]]), values

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        """Of the own rows, on any rank, numbered through the batch of all. All ranks fetch them at the first call."""
        if self._positives is None:
            self._positives = self._positives_on_any_rank()
        return self._positives

    def _positives_on_any_rank(self) -> tuple[Tensor, Tensor]:
        world, rows = self.layout.world, self.given_rows.to(self.statistics_dtype)
        everywhere = torch.arange(self.total_rows, device=rows.device)
        own_numbers = everywhere[self.layout.first_column(world.rank) :]
        numbers, squares = [], []
        for i, number, place, found in self._fetched_pairs(everywhere, rows):
            isolated = None
            if self.isolated is not None:
                isolated = torch.cat([self.isolated, (found == 0).all(1).to(rows.dtype)])
            square = pair_squares(torch.cat([rows, found]), i, self.rows + place, isolated)
            numbers.append(number)
            squares.append(square.masked_fill(number == own_numbers[i], -torch.inf))
        _, count, _ = self._members(everywhere)
        most = world.most(count.max() if len(count) else count.new_zeros(()))
        if most < 2:  # no row has another
            empty = rows.new_empty((0, self.rows))
            return empty.long(), empty
        there = torch.arange(most, device=rows.device) < count.unsqueeze(1)  # [N, most]
        of_rows = rows.new_full(there.shape, -torch.inf), everywhere.new_zeros(there.shape)
        for table, values in zip(of_rows, (squares, numbers)):
            table[there] = torch.cat(values)
        sorted_squares, order = of_rows[0].t().sort(dim=0)
        # Of each column one is the row itself, and it is the first, or among the first -inf.
        return of_rows[1].t().gather(0, order)[1:], sorted_squares[1:]

    def add_pairs_(self, gradient: Tensor, numbers: Tensor, a: Tensor | Callable[[Tensor], Tensor]) -> None:
        """Where j is another rank's, its share is sent there: all ranks call it."""
        route = Route(self.layout.world, self.layout.rows, numbers)
        rows = torch.cat([self.given_rows, route.fetch(self.given_rows)])
        i, j = torch.arange(len(rows), device=rows.device).chunk(2)
        shares = gradient.new_zeros(rows.shape)
        add_pairs_(shares, rows, i, j, a)
        gradient += shares[: self.rows] + route.send_back(shares[self.rows :])

    def _fetched_pairs(self, among: Tensor, told: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The own rows' pairs with the rows ``among`` those of all ranks, some own rows at a time.

        (own rows, numbers of their partners, the partners' places in what was fetched, fetched rows of ``told``).
        """
        world, own, width = self.layout.world, self.rows, self.query.shape[1]
        first, count, partners = self._members(among)
        start = count.cumsum(0) - count  # of each row's pairs, counted through all rows
        parts = min(-(-world.most(count.sum()) * max(width, 1) // _FETCHED_ELEMENTS), max(self.layout.rows))
        for part in range(parts):
            block = slice(own * part // parts, own * (part + 1) // parts)
            i = torch.repeat_interleave(torch.arange(own, device=told.device)[block], count[block])
            pair = torch.arange(len(i), device=told.device) + start[block][:1]
            number = partners[first[i] + pair - start[i]]
            wanted, place = number.unique(return_inverse=True)
            yield i, number, place, Route(world, self.layout.rows, wanted).fetch(told)

    def _members(self, among: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``among`` those of all ranks in the own rows' groups: of row i ``members[first[i]:][:count[i]]``."""
        groups = self._all_groups()[among]
        order = groups.argsort(stable=True)
        ordered = groups[order]
        first, last = (torch.searchsorted(ordered, self.row_group, right=right) for right in (False, True))
        return first, last - first, among[order]

    def _all_groups(self) -> Tensor:
        return torch.cat(self.groups)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.layout.world.sum(values)


class _Meeting(Problem):
    """Rows of two ranks as one batch, of which only the own rows are walked."""

    __slots__ = ()

    @property
    def rows(self) -> int:
        return self.sources[0].first


def meet(world: World, inputs: Inputs, objective, alike: dict, strategy: str) -> Layout:
    """The layout of a batch whose shards fit together.

    Args:
        alike: further options that must be the same on every rank.

    Raises:
        ValueError: they do not, on every rank; or the call failed on another rank, before it came here.
    """
    check_values(inputs._replace(target=None), objective)
    alike = {
        "loss": objective.name,
        "parameters": objective.parameters,
        "d": inputs.query.shape[1],
        "dtype": str(inputs.query.dtype),
        "device": inputs.query.device.type,
        "logit_scale": _value(inputs.logit_scale),
        "logit_bias": _value(inputs.logit_bias),
        "parameters that are tensors": _value(inputs.learned),
        "negatives": "own" if inputs.own is not None else "queue" if len(inputs.keys) > 1 else None,
        "target": "given" if inputs.target is not None else None,
        "guide": _described_guide(inputs.row_guide),
        "strategy": strategy,
        **alike,
    }
    told = {"rows": inputs.query.shape[0], "columns": inputs.widths[0], "target": _range(inputs.target)}
    descriptions = agree(world, alike, told)
    columns = [description["columns"] for description in descriptions]
    name = objective.target_name
    _check_targets(name, [description["target"] for description in descriptions], sum(columns))
    if inputs.target is not None and inputs.target.device.type != "cpu":
        check_inside(name, inputs.target, sum(columns))
    if strategy == "auto":
        itemsize = inputs.query.dtype.itemsize + statistics_dtype(inputs.query.dtype).itemsize
        small = sum(columns) * inputs.query.shape[1] * itemsize <= _GATHERED_BYTES
        strategy = "gather" if small else "ring"
    return Layout(world, [description["rows"] for description in descriptions], columns, inputs.is_batch, strategy)


def agree(world: World, alike: dict, told: dict) -> list[dict]:
    """What every rank has ``told``, once all have said that they are ``alike``, and the call's options with them.

    Raises:
        ValueError: they are not, on every rank; or the call failed on another rank, before it came here.
    """
    descriptions = world.meet({"alike": {**world.keywords, **alike}, **told})
    _check_alike([description["alike"] for description in descriptions])
    return descriptions


def _check_alike(descriptions: list[dict]) -> None:
    for name in descriptions[0]:
        values = ranks_by([str(description.get(name)) for description in descriptions])
        if len(values) > 1:
            values = " and ".join(f"{value} on {ranks}" for value, ranks in values)
            raise ValueError(f"{name} must be the same on every rank of the group, got {values}")


def _check_targets(name: str, ranges: list[tuple[int, int] | None], columns: int) -> None:
    for rank, bounds in enumerate(ranges):
        if bounds is not None and not 0 <= bounds[0] <= bounds[1] < columns:
            wrong = bounds[0] if bounds[0] < 0 else bounds[1]
            raise ValueError(f"{name} must be in [0, {columns}), over all ranks, got {wrong} on rank {rank}")


def _range(target: Tensor | None) -> tuple[int, int] | None:
    """The least and the largest, where reading them makes nobody wait."""
    if target is None or target.numel() == 0 or target.device.type != "cpu":
        return None
    low, high = target.aminmax()
    return int(low), int(high)


def _described_guide(guide: Tensor | None) -> str | None:
    return None if guide is None else f"{guide.shape[1]} features in {guide.dtype}"


def _value(scalars: Tensor | None) -> float | list[float] | None:
    return scalars.tolist() if scalars is not None and scalars.device.type == "cpu" else None
