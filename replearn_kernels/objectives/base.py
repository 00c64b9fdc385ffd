"""What the engine asks of a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..engine.problem import Pairs, Problem


class Objective(ABC):
    """The mathematics of a family of losses over logits ``l_ij = scale * s_ij + bias``; knows no tiles' order.

    Where the similarities are distances (:mod:`..engine.distances`), ``s_ij`` is v.

    A table holds one quantity per row of it and one value per row (or column) of the problem, so that a tile takes a
    slice of all quantities at once. Where rows are compared with each other (a batch), one table serves both sides.
    """

    name: str
    """By which the operator finds the class."""
    family: str
    """The native passes' and the Triton epilogue's: several objectives can share them."""
    needs_statistics = True
    """False: W of an entry depends on nothing but that entry, and one sweep yields losses and gradients."""
    needs_columns = False
    """W needs the statistics of whole columns."""
    uses_target = True
    """Every row has one positive, ``target[i]``; False: groups say which pairs are positive."""
    own_positives = False
    """Every row's positive is the first of its own columns, and no target says so."""
    target_name = "target"
    """What callers know it by."""
    by_temperature = False
    """Callers know the scale by its inverse, which is positive."""
    unit_features = False
    """Rows and keys are normalised on the fly."""
    by_distance: str = ""
    """"distance": similarities are ``-|x_i - x_j|``; "square": ``-|x_i - x_j|^2``; "": products."""
    unit_rows = False
    """The rows have length 1, or 0; where similarities are distances, such a row is isolated."""
    group_size = 0
    """How many rows every group has, if that is known; else 0."""
    has_offsets = False
    """Coefficients have offsets, which come off W of every entry."""
    sweeps_gradients = True
    """False: the gradient is one of few pairs, which :meth:`coefficients` adds."""
    roles: tuple[bool | float, ...] = ()
    """What the native passes and the epilogue want to know beyond the pairs."""
    prepares = False
    """Tables hold what only the data can tell, and are longer than the new ones: see :meth:`prepared`."""
    repeats = True
    """Calls of the same shapes take the same steps. False: it runs code of its author, who may do anything."""
    own_scale_gradient: Tensor | None = None
    """The losses' gradient in the scale beyond that through the logits, as :meth:`coefficients` found it: 0-d, fp64."""
    own_learned_gradient: Tensor | None = None
    """The losses' gradient in the parameters that are ``learned``, as :meth:`coefficients` found it: fp64."""
    learned: tuple[str, ...] = ()
    """What callers know those parameters by that calls give as tensors, and that get a gradient."""
    epilogue = None
    """The Triton epilogue of a loss whose kernels are printed; None: that of its name, or its family's."""
    one_tile_parameters: tuple | None = None
    """What the native call for a whole problem of one tile takes; None if there is none."""

    def native_roles(self, dtype: torch.dtype, pairs: Pairs) -> tuple:
        """The roles as the native passes over similarities of this dtype take them."""
        return self.roles

    @classmethod
    @abstractmethod
    def from_parameters(cls, parameters: list[float]) -> Objective:
        """The inverse of :attr:`parameters`."""

    @property
    @abstractmethod
    def parameters(self) -> list[float]:
        """The options as numbers, as the operator takes them."""

    @abstractmethod
    def new_statistics(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tables of an empty set: of the rows, and where whole columns are needed, of the first source's columns."""

    def prepared(self, problem, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New tables with what only the data can tell."""
        return row_table, column_table

    def saved(self, row_table: Tensor, column_table: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What :meth:`coefficients` needs of the statistics, in the shapes of the new tables."""
        return row_table, column_table

    def parts(self, *tables: Tensor | None, most: int) -> Iterator[Sequence[Tensor | None]]:
        """The tables for kernels that are compiled for a number of quantities: ``most`` positives of a row at a time,
        where they tell of each."""
        yield tables

    @abstractmethod
    def update_statistics(self, s: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """Fold a tile of products ``s[R, C]`` into the statistics of its rows and columns."""

    def number_rows(self, table: Tensor, first: int) -> None:
        """Say to a new table that its rows are the batch's from ``first`` on; for tables that hold numbers of rows."""
        return None

    def merge_statistics(self, table: Tensor, other: Tensor, scale: float | Tensor) -> None:
        """Fold the statistics ``other`` into ``table``, of the same columns, from other ranks' rows.

        Needed for a process group: the column table's, or in a batch the row table's, which stands for both.
        """
        raise NotImplementedError(f"{self.name} cannot merge statistics: it has no process group")

    def share_losses(self, table: Tensor, before: Tensor, own: int) -> None:
        """After a sweep of W over pairs of ``own`` rows with another rank's, in one table: each rank gets its part."""
        return None

    @abstractmethod
    def row_losses(self, problem: Problem, row_table: Tensor, column_table: Tensor | None) -> Tensor:
        """``L_i`` of every row, ``[N]``."""

    def rows_counted(self, problem: Problem, row_table: Tensor | None = None) -> int | Tensor:
        """How many rows the mean is over; ``row_table``: the statistics, or after the only sweep its table."""
        return problem.rows

    @abstractmethod
    def coefficients(self, problem, row_table, column_table, grad_rows, d_query=None) -> tuple[Tensor, Tensor | None]:
        """What a tile needs to know of its rows and columns to form W, for upstream gradients ``dL/dL_i``.

        ``d_query``: where the gradients of pairs that W leaves out are added.
        """

    @abstractmethod
    def weights(self, s: Tensor, out: Tensor, pairs: Pairs, row_table: Tensor, column_table: Tensor | None) -> None:
        """``out = W = dL/dl`` of a tile of products ``s``; the two may be the same tensor."""

    def add_target_gradients(
        self, problem: Problem, row_table: Tensor, d_query: Tensor | None, d_keys: Tensor | None
    ) -> None:
        """Add the gradients of the targets that W leaves out, of those of the rows and keys here, to what is due."""
        return None

    def add_pair_gradients(self, problem: Problem, row_table: Tensor, d_query: Tensor) -> None:
        """Add the gradients of pairs that W leaves out, and that are known once the sweep of W has ended: here none."""
        return None

    def learn(self, learned: Tensor) -> None:
        """Take the values of the parameters that are ``learned``, ``[parameters]``."""
        raise NotImplementedError(f"{self.name} has no parameters that are tensors")

    def learned_gradient(self, problem: Problem, row_table: Tensor | None) -> Tensor | None:
        """The gradient of what is ``learned``, fp64, once the last sweep has ended; ``row_table``: its coefficients."""
        return self.own_learned_gradient

    def bias_gradient(self, row_coefficients: Tensor) -> Tensor:
        """``sum_ij W_ij``, fp64; for losses with a bias."""
        raise NotImplementedError(f"{self.name} has no bias")


def empty_table(quantities: int, count: int, like: Tensor) -> Tensor:
    """(max, sum, ...) of nothing: the lowest max, zeros."""
    table = like.new_zeros((quantities, count))
    table[0].fill_(torch.finfo(like.dtype).min)
    return table


def sign(scale: float | Tensor) -> int | Tensor:
    """-1, 0 or 1; without reading the value of a tensor."""
    return scale.sign() if isinstance(scale, Tensor) else (scale > 0) - (scale < 0)


def steepness(scale: float | Tensor) -> float | Tensor:
    """``|scale|``; 1 where that is 0, which would make NaN of a masked similarity, -inf: others are 0 by their sign."""
    return torch.where(scale == 0, 1, abs(scale)) if isinstance(scale, Tensor) else abs(scale) or 1.0
