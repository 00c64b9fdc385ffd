"""Pairs that are listed: their squared distances and gradients, each from the difference of its rows.

Near points lose nothing to cancellation here. On a CPU native code gathers row by row (csrc/cpu/listed_pairs.h);
elsewhere, without it and for half precision, PyTorch forms the differences of some pairs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import native
from .columns import blocks

# Elements of the differences formed at a time: 16 MiB in fp32, so that they stay small beside a tile.
BLOCK_ELEMENTS = 2**22


def pair_squares(x: Tensor, i: Tensor, j: Tensor, isolated: Tensor | None = None, plain: bool = False) -> Tensor:
    """``|x_i - x_j|^2`` of listed pairs, ``[P]``; an isolated row is 1 further from every other.

    ``plain``: by PyTorch, whatever there is. In the dtype of the statistics.
    """
    if _native(x, plain):
        total = torch.ops.replearn_kernels.pair_squares.default(x, i.contiguous(), j.contiguous())
    else:
        total = x.new_empty(len(i), dtype=_dtype(x))
        for block in _blocks(x, i):
            total[block] = _differences(x, i[block], j[block]).square().sum(1)
    return total if isolated is None else total + isolated[i] + isolated[j]


def add_differences_(gradient: Tensor, x: Tensor, i: Tensor, j: Tensor, a: Tensor, plain: bool = False) -> None:
    """``gradient[i] += a (x_i - x_j)`` and ``gradient[j] -= a (x_i - x_j)`` for listed pairs, in their order."""
    if _native(x, plain):
        return torch.ops.replearn_kernels.add_differences_.default(
            gradient, x, i.contiguous(), j.contiguous(), a.contiguous()
        )
    for block in _blocks(x, i):
        difference = (_differences(x, i[block], j[block]) * a[block].unsqueeze(1)).to(gradient.dtype)
        add_rows_(gradient, i[block], difference)
        add_rows_(gradient, j[block], difference.neg_())


def add_pairs_(gradient: Tensor, x: Tensor, i: Tensor, j: Tensor, a: Tensor | Callable[[Tensor], Tensor]) -> None:
    """The same, where ``a`` may be a function of the squared distances."""
    add_differences_(gradient, x, i, j, a if isinstance(a, Tensor) else a(pair_squares(x, i, j)))


def positive_pairs(group: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every unordered pair of rows of one group, once, as indices ``(i, j)``: some at a time, for rows of ``width``.

    Those of a few rows at a time. Reads numbers of pairs back, for which a GPU waits.
    """
    order = group.argsort(stable=True)
    ordered = group[order]
    position = torch.arange(len(group), device=group.device)
    partners = torch.searchsorted(ordered, ordered, right=True) - position - 1  # later rows of the row's group
    last = partners.cumsum(0)
    before = last - partners
    total = int(last[-1]) if len(group) else 0
    cuts = torch.arange(0, total, max(BLOCK_ELEMENTS // max(width, 1), 1), device=group.device)
    rows = [*torch.searchsorted(last, cuts, right=True).tolist(), len(group)]
    for begin, end in zip(rows, rows[1:]):
        first = torch.repeat_interleave(position[begin:end], partners[begin:end])
        pair = torch.arange(len(first), device=group.device) + before[begin:end][:1]
        yield order[first], order[first + 1 + pair - before[first]]


def sorted_positives(x: Tensor, group: Tensor, isolated: Tensor | None) -> tuple[Tensor, Tensor]:
    """The other rows of every row's group, and their squared distances, ``[p, N]``: see ``Problem.positives``."""
    order = group.argsort(stable=True)
    ordered = group[order]
    first, last = (torch.searchsorted(ordered, group, right=right) for right in (False, True))
    row = torch.arange(len(group), device=group.device)
    most = int((last - first).max()) if len(group) else 0
    numbers, squares = [], []
    for k in range(most):
        number = order[(first + k).clamp(max=max(len(group) - 1, 0))]
        square = pair_squares(x, row, number, isolated)
        numbers.append(number)
        squares.append(torch.where((first + k < last) & (number != row), square, -torch.inf))
    if most < 2:  # no row has another
        empty = x.new_empty((0, len(group)), dtype=_dtype(x))
        return empty.long(), empty
    sorted_squares, place = torch.stack(squares).sort(dim=0)
    # Of each column one is the row itself, and it is the first, or among the first -inf.
    return torch.stack(numbers).gather(0, place)[1:], sorted_squares[1:]


def _native(x: Tensor, plain: bool) -> bool:
    return not plain and x.device.type == "cpu" and x.dtype == _dtype(x) and native.available()


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _differences(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return x[i].to(_dtype(x)) - x[j].to(_dtype(x))


def _blocks(x: Tensor, index: Tensor) -> Iterator[slice]:
    return blocks(len(index), max(BLOCK_ELEMENTS // max(x.shape[1], 1), 1))


def add_rows_(gradient: Tensor, index: Tensor, values: Tensor) -> None:
    """In a fixed order: PyTorch adds to repeated rows in turn on a CPU, and on a GPU where it sorts the indices."""
    if gradient.is_cuda:
        gradient.index_put_((index,), values, accumulate=True)
    else:
        gradient.index_add_(0, index, values)
