"""What every kernel shares: the tile of similarities, and the view that an epilogue has of a tile."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv

ALIGNMENT = 16  # elements: what the compiler takes to be divisible, it has to be by 16
_FOLDED = tl.constexpr(32)  # partial sums that are loaded at once
HIGHEST = tl.constexpr(torch.finfo(torch.float32).max)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""The maximum of nothing. Finite, so that -inf (a masked entry) minus it is -inf, and its exp 0, never NaN."""


@dataclass(frozen=True)
class Epilogue:
    """What a loss plugs into the skeletons: ``@triton.jit`` functions of a tile.

    A statistic is a tuple of fp32 vectors, one value a row (AXIS = 1: reduced along the columns) or one a column
    (AXIS = 0); the tuple's length is that of the loss's table. ``row`` and ``column`` are the tile's indices, shaped
    to broadcast over ``s`` (which may be transposed: an epilogue need not know). At the ragged edge they pass
    ``inputs.rows`` and ``inputs.columns``: :func:`load_vector` masks them, and the skeleton drops W there.

    empty(BLOCK, AXIS) -> statistic                     of no entries
    reduce(s, row, column, inputs, AXIS) -> statistic   of the entries of a tile
    merge(a, b, inputs) -> statistic                    of two disjoint sets of entries, ``a`` of the earlier ones;
                                                        of ``inputs`` it reads the scale alone
    weights(s, row, column, inputs) -> W                dL/dl of every entry; None: the loss needs no W

    Where the similarities are distances, ``s`` is v (``engine/distances.py``).
    """

    name: str  # by which block sizes are found
    empty: Callable
    reduce: Callable
    merge: Callable
    weights: Callable | None = None
    takes_roles: bool = False  # of the objective, as ``inputs.role_0``, ...
    takes_given: bool = False  # what the call gives for rows and columns: :func:`value_of_rows`, :func:`guide_tile`
    reads_tables: bool = False  # ``reduce`` reads the tables that its statistics go to, as ``inputs.row_table``, ...
    folds_columns: bool = False  # where one sweep does all, statistics of the columns come with W too
    per_part: int = 0  # positives of a row, if the tables tell of each, that one launch sees
    by_sums: bool = False  # statistics are (max, sum of exp, positives' v): sums.py has a shorter way to them
    off_diagonal: Callable | None = None  # ``weights`` of a block that holds no entry of a row's own number
    off_diagonal_reduce: Callable | None = None  # its ``reduce``, where one sweep does all
    additive: bool = False  # ``merge`` adds
    by_reference: bool = False  # those read ``inputs.reference``, and hold only where it says so
    combine: Callable | None = None  # from the finished statistics to losses and coefficients (combine.py)


# No tuple that a kernel takes holds another, or a bool. Triton 3.6 copies tuples by their types where a loop begins,
# and an outer one's type may be from before the inner one was filled: then the inner one's constants (1, a constexpr)
# are None in the loop and after it, without a word. Its interpreter refuses bools in a tuple.


class Points(NamedTuple):
    """What turns a tile of products into distances, as in ``engine/distances.py``."""

    rows: Tensor  # [rows, width], as given
    row_stride: int
    columns: Tensor  # [columns, width]
    column_stride: int
    width: int
    row_squares: Tensor  # [rows]: |x|^2 of the centred rows, whose products the tile holds
    column_squares: Tensor  # [columns]

    @classmethod
    def of(cls, rows, columns, row_squares, column_squares) -> Points:
        return cls(rows, rows.stride(0), columns, columns.stride(0), rows.shape[1], row_squares, column_squares)


class TileInputs(NamedTuple):
    """What there is to know of one tile ``[rows, columns]`` besides its features."""

    rows: int
    columns: int
    scale: Tensor  # 0-d: the kernel reads it, so that no launch waits for its value
    bias: Tensor | None  # 0-d; None: 0
    target: Tensor | None  # [rows] int64, the positives' columns
    own: int | None  # in place of ``target``: row i's positive is column i + own of the tile, which may lie outside
    row_group: Tensor | None  # [rows] int64
    column_group: Tensor | None  # [columns] int64
    first_column: int  # of the tile; target counts from column 0
    diagonal: int  # 1: the columns are the rows, and the entries (i, i) are no pairs
    row_table: Tensor | None  # coefficients [quantities, rows]
    row_stride: int
    column_table: Tensor | None  # coefficients [quantities, columns]
    column_stride: int
    reference: Tensor | None  # [2]: an exponent, and 1 if every row and column can share it (sums.py)

    @classmethod
    def of(
        cls, shape, scale, bias=0.0, target=None, row_group=None, column_group=None, first_column=0, diagonal=False,
        row_table=None, column_table=None, roles=(), reference=None, own=None, given=None,
    ) -> TileInputs:  # fmt: skip
        """Scalars are numbers (on a GPU only a bias of 0) or 0-d tensors; tables may have any row stride.

        ``given``: of an epilogue that takes it, each a tensor or None: fp32 values of rows ``[values, rows]``, of
        columns ``[values, columns]``, and the guide's features of either, ``[rows, g]`` and ``[columns, g]``.
        """
        if not isinstance(bias, Tensor):
            bias = scalar(bias) if bias else None
        row_stride, column_stride = (0 if table is None else table.stride(0) for table in (row_table, column_table))
        fields = (
            *shape, scalar(scale), bias, target, own, row_group, column_group, first_column, int(diagonal),
            row_table, row_stride, column_table, column_stride, reference,
        )  # fmt: skip
        if not roles and given is None:
            return cls._make(fields)
        if given is not None:
            strides = (0 if t is None else t.stride(0) for t in given)
            fields = *fields, *given, *strides, 0 if given[2] is None else given[2].shape[1]
        numbers = (role if isinstance(role, Tensor) else float(role) for role in roles)
        return _with_more(len(roles), given is not None)._make((*fields, *numbers))

    @property
    def roles(self) -> tuple[float | Tensor, ...]:
        """The objective's, ``role_0``, ``role_1``, ...: of an epilogue that takes them; a bool is 0 or 1, a parameter
        that is learned a 0-d tensor."""
        return tuple(value for name, value in zip(self._fields, self) if name.startswith("role_"))


@cache
def _with_more(roles: int, with_given: bool) -> type[TileInputs]:
    """The inputs of an epilogue that takes more: in fields of their own, as no tuple may hold another."""
    tensors = ("row_values", "column_values", "row_guide", "column_guide") if with_given else ()
    given = (*tensors, *(f"{name}_stride" for name in tensors), *["guide_width"] * with_given)
    inputs = namedtuple("TileInputs", (*TileInputs._fields, *given, *(f"role_{k}" for k in range(roles))))
    inputs.roles = TileInputs.roles  # no class derived from it: Triton reads the fields off the class itself
    return inputs


def mirrored(inputs: TileInputs) -> TileInputs:
    """Of the tile's mirror image, in a batch; without coefficients."""
    groups = {"row_group": inputs.column_group, "column_group": inputs.row_group}
    return inputs._replace(rows=inputs.columns, columns=inputs.rows, **groups)


def scalar(number: float | Tensor) -> Tensor:
    """A 0-d tensor of it, as a kernel reads it."""
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float32)


def aligned(features: Tensor) -> Tensor:
    """``features`` with rows that vector loads can read: padded with zeros where d, stride or address do not fit.

    A copy of one tile's features, where the unaligned kernel would load element by element, and spill.
    """
    rows, d = features.shape
    if d and d % ALIGNMENT == 0 and features.stride(0) % ALIGNMENT == 0 and features.data_ptr() % 16 == 0:
        return features
    padded = features.new_zeros(rows, max(cdiv(d, ALIGNMENT), 1) * ALIGNMENT)
    padded[:, :d] = features
    return padded


@triton.jit
def load_vector(vector, index, size, OTHER: tl.constexpr = 0.0):
    """``vector[index]``, OTHER from ``size`` on.

    Masked and not clamped: a clamped index is not known to be contiguous, and would take an address of two registers
    for every column (128 x 128 entries in 8 warps are 32 columns a thread).
    """
    return tl.load(vector + index, mask=index < size, other=OTHER)


@triton.jit
def table_quantity(row, column, inputs, QUANTITY: tl.constexpr, AXIS: tl.constexpr):
    """One quantity of every row's table (AXIS = 1), or of every column's (AXIS = 0)."""
    if AXIS == 1:
        return load_vector(inputs.row_table + QUANTITY * inputs.row_stride, row, inputs.rows)
    else:
        return load_vector(inputs.column_table + QUANTITY * inputs.column_stride, column, inputs.columns)


@triton.jit
def value_of_rows(row, inputs, VALUE: tl.constexpr):
    """A value that the call gives for every row, which the epilogue takes."""
    return load_vector(inputs.row_values + VALUE * inputs.row_values_stride, row, inputs.rows)


@triton.jit
def value_of_columns(column, inputs, VALUE: tl.constexpr):
    """A value that the call gives for every column."""
    return load_vector(inputs.column_values + VALUE * inputs.column_values_stride, column, inputs.columns)


@triton.jit
def inside_tile(row, column, inputs):
    """Which entries are pairs: not past the edge, and no row with itself."""
    return (row < inputs.rows) & (column < inputs.columns) & ((row != column) | (inputs.diagonal == 0))


@triton.jit
def is_target(row, column, inputs):
    """Which entries are a row's positive. In int32: 64-bit columns would take two registers each."""
    if inputs.own is not None:
        return column == row + inputs.own
    else:
        target = load_vector(inputs.target, row, inputs.rows)
        return column == (target - inputs.first_column).to(tl.int32)


@triton.jit
def same_group(row, column, inputs):
    """Which entries are pairs of one group, a row with itself included."""
    of_row = load_vector(inputs.row_group, row, inputs.rows)
    return of_row == load_vector(inputs.column_group, column, inputs.columns)


@triton.jit
def similarity_tile(
    x, x_stride, x_index, y, y_stride, y_index, d,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``S[M, N] = x[x_index] @ y[y_index].T`` in fp32, over ``d`` in steps of BLOCK_K. Indices must be in range."""
    k = tl.arange(0, BLOCK_K)
    x_block = x + x_index.to(tl.int64)[:, None] * x_stride + k[None, :]  # [M, K]
    y_block = y + y_index.to(tl.int64)[None, :] * y_stride + k[:, None]  # [K, N]
    s = tl.zeros([x_index.shape[0], y_index.shape[0]], tl.float32)
    for start in range(0, d, BLOCK_K):
        inside = k < d - start
        a = tl.load(x_block, mask=inside[None, :], other=0.0)  # [M, K]
        b = tl.load(y_block, mask=inside[:, None], other=0.0)  # [K, N]
        s = product(a, b, s, PRECISION, UPCAST)
        x_block += BLOCK_K
        y_block += BLOCK_K
    return s


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``accumulator + a @ b``. UPCAST is set in the interpreter, whose dot takes the bits of bf16 for integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_quantities(table, stride, index, inside, COUNT: tl.constexpr):
    """``table[:, index]`` as a tuple of COUNT vectors."""
    quantities = ()
    for q in tl.static_range(COUNT):
        quantities = quantities + (tl.load(table + q * stride + index, mask=inside, other=0.0),)
    return quantities


@triton.jit
def store_quantities(table, stride, index, inside, quantities):
    """``table[:, index] = quantities``."""
    for q in tl.static_range(len(quantities)):
        tl.store(table + q * stride + index, quantities[q], mask=inside)


@triton.jit
def partial_sums(partials, stride, count, index, inside):
    """``sum(partials[:count, index])``, of rows that are ``stride`` elements apart, always in this order."""
    total = tl.zeros(index.shape, tl.float32)
    for first in range(0, count, _FOLDED):
        part = first + tl.arange(0, _FOLDED)
        place = partials + part.to(tl.int64)[:, None] * stride + index[None, :]
        total += tl.sum(tl.load(place, mask=(part < count)[:, None] & inside[None, :], other=0.0), 0)
    return total
