"""Tables whose length depends on the data, in parts of a fixed length, for kernels that are compiled for one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def parts_of(tables: tuple[Tensor | None, ...], lead: int, groups: int, most: int) -> Iterator[list[Tensor | None]]:
    """Copies of tables ``[lead + groups p, N]`` with the quantities of ``most`` of the p positives at a time.

    ``[lead + groups most, N]`` each, the last filled with -inf, which is no threshold. What a pass does to a part is
    there in the table when the next one comes, and at the end.
    """
    count = (len(tables[0]) - lead) // groups
    for first in range(0, count, most):
        places = range(first, min(first + most, count))
        parts = [None if table is None else _part(table, lead, groups, most, places) for table in tables]
        yield parts
        for table, part in zip(tables, parts):
            if table is not None:
                table[:lead] = part[:lead]
                _positives(table, lead, groups)[:, places.start : places.stop] = (
                    _positives(part, lead, groups)[:, : len(places)]
                )  # fmt: skip


def _part(table: Tensor, lead: int, groups: int, most: int, places: range) -> Tensor:
    part = table.new_full((lead + groups * most, table.shape[1]), -torch.inf)
    part[:lead] = table[:lead]
    _positives(part, lead, groups)[:, : len(places)] = _positives(table, lead, groups)[:, places.start : places.stop]
    return part


def _positives(table: Tensor, lead: int, groups: int) -> Tensor:
    """``[groups, p, N]``."""
    return table[lead:].unflatten(0, (groups, -1))
