"""What an author writes: a loss, and what its terms are made of beside expressions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .expressions import Expr, mask, number


class PairLoss:
    """A loss over the pairs of rows and columns, by functions of one pair.

    Subclass it as a frozen dataclass. Float fields are the loss's parameters: what they are changes nothing but
    numbers, and a tensor of one element, 0-d or [1], in place of a number learns: it gets a gradient if it requires
    one. Bool, int and str fields are options, which may steer the Python of :meth:`terms`. Then give it to
    :func:`~replearn_kernels.declare.fuse`, which derives the rest: gradients, kernels, and the batch of many ranks.

    Class attributes, with their defaults, say what is compared; all but the names of values can be fields as well, and
    are options then:

    ``batch = False``: rows are compared with the rows of other features, and row i's target is column i unless another
        is given. True: the rows of one batch are compared with each other, by labels; no row with itself.
    ``scaled = False``: True: calls take ``logit_scale``, which gets a gradient, and ``terms`` sees the logits
        ``logit_scale * similarity`` in place of similarities.
    ``symmetric = False``: True: ``loss(row, column)`` gets the terms of every row and those of its target's column.
        Not with ``batch``, whose rows are the columns.
    ``similarity = "product"``: or "cosine" (rows are L2-normalised first), and for a batch "distance" (Euclidean) and
        "squared_distance".
    ``row_values = ()``, ``column_values = ()``: names of numbers that calls give for every row, and for every column
        (of a batch for its rows, which are the columns). ``terms`` finds them in ``pair.row.name`` and
        ``pair.column.name``, ``loss`` in ``row.name`` (and ``column.name``). They get no gradient.
    ``guide = ""``: or "product" or "cosine": of other features, which calls give for rows and columns: those of a
        teacher, say. ``terms`` finds this second similarity in ``pair.guide``. It gets no gradient.

    Example, the circle loss of Sun et al. 2020::

        @dataclass(frozen=True)
        class Circle(PairLoss):
            margin: float = 0.4
            gamma: float = 80.0
            batch, similarity = True, "cosine"

            def terms(self, s, pair):
                m = self.margin
                near, far = relu(1 + m - s).detach() * (1 - m - s), relu(s + m).detach() * (s - m)
                return {
                    "positives": logsumexp(self.gamma * near, where=pair.same),
                    "negatives": logsumexp(self.gamma * far, where=pair.other),
                }

            def loss(self, row):
                return softplus(row.positives + row.negatives)
    """

    batch = False
    scaled = False
    symmetric = False
    similarity = "product"
    row_values: tuple[str, ...] = ()
    column_values: tuple[str, ...] = ()
    guide = ""

    def terms(self, s: Expr, pair: Facts) -> dict[str, Reduction]:
        """What is taken over the pairs of every row, by name: :func:`total`, :func:`logsumexp`, :func:`largest` and
        :func:`smallest` of expressions of the similarity ``s``, of ``pair.target``, ``pair.same``, ``pair.other`` and
        ``pair.every``, of the values ``pair.row.name`` and ``pair.column.name``, and of the second similarity
        ``pair.guide``."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(self, s, pair)")

    def loss(self, row, column=None) -> Tensor:
        """The loss of every row, ``[N]``, of the terms of its own pairs: ``row.name``, ``[N]`` in fp64. Plain torch.

        A scaled loss finds the scale in ``row.logit_scale``, one with values those of the row by their names.

        Default: the sum of the terms. Then, and if all are totals, one sweep over the pairs yields loss and gradients.
        """
        raise AssertionError("a loss that is the sum of its terms has no formula of its own")

    def counted(self, row) -> Tensor:
        """What the mean divides by, ``[N]``, true or false or a number: it is ``sum(loss) / sum(counted)``, and
        ``sum(loss)`` where nothing is counted. A row that is not counted should have the loss 0; the count has no
        gradient. Default: the number of rows."""
        raise AssertionError("a mean over all rows has no formula of its own")


class Facts:
    """What is known of a pair, as conditions.

    ``every``: all pairs. ``target``: the row's own column. ``same``: of one group (label, or id); where there are no
    groups, the target. ``other``: those that are not ``same``. In a batch no row is in a pair with itself.

    ``row``, ``column``: the values that calls give for them, by name. ``guide``: their other features' similarity.
    """

    every, target, same, other = (Expr("fact", name) for name in ("every", "target", "same", "other"))

    def __init__(self, row_values: tuple[str, ...] = (), column_values: tuple[str, ...] = (), has_guide: bool = False):
        self.row, self.column = _Given("row", row_values), _Given("column", column_values)
        if has_guide:
            self.guide = Expr("guide")

    def __getattr__(self, name: str):
        if name == "guide":
            raise AttributeError('there is no pair.guide: the class says of what, guide = "cosine" or "product"')
        raise AttributeError(
            f"pair has no {name!r}: there are pair.every, pair.target, pair.same, pair.other, pair.row and pair.column"
        )


class _Given:
    """The values that calls give for the row, or for the column, of a pair."""

    def __init__(self, side: str, names: tuple[str, ...]):
        self._side, self._names = side, names
        for name in names:
            setattr(self, name, Expr(side, name))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        there = ", ".join(self._names) or "none"
        raise AttributeError(
            f"pair.{self._side} has no value {name!r}: there are {there}. The class names what calls give, "
            f'{self._side}_values = ("{name}",); in a batch the columns have the row_values'
        )


@dataclass(frozen=True)
class Reduction:
    """A sum over a row's pairs, the logarithm of a sum of exponentials, or the value of a single pair."""

    kind: str  # "total", "logsumexp", "largest" or "smallest"
    of: Expr
    over: Expr  # a condition

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    def _refuse(self, *others):
        raise TypeError(
            f"a {self.kind} is taken over a row's pairs, and terms() cannot compute with it: return it as a term, and "
            "compute with its value, row.name, in loss()"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __neg__ = __abs__ = __gt__ = __ge__ = __lt__ = __le__ = __bool__ = __float__ = _refuse

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        next(a for a in args if isinstance(a, Reduction))._refuse()


def total(of, where: Expr | None = None) -> Reduction:
    """The sum of ``of`` over the row's pairs for which the condition ``where`` holds; 0 over none. Default: all."""
    return _reduction("total", of, where)


def logsumexp(of, where: Expr | None = None) -> Reduction:
    """``log(sum(exp(of)))`` over the row's pairs for which the condition ``where`` holds; -inf over none. Default: all.

    Nothing overflows, and numbers that all pairs share are taken out of ``of``, so that no logit is rounded before the
    largest is subtracted from it.
    """
    return _reduction("logsumexp", of, where)


def largest(of, where: Expr | None = None) -> Reduction:
    """The largest ``of`` over the row's pairs for which the condition ``where`` holds; -inf over none. Default: all.

    That pair alone has a gradient; of equal ones the first.
    """
    return _reduction("largest", of, where)


def smallest(of, where: Expr | None = None) -> Reduction:
    """The smallest ``of`` over the row's pairs for which the condition ``where`` holds; inf over none. Default: all.

    That pair alone has a gradient; of equal ones the first.
    """
    return _reduction("smallest", of, where)


def _reduction(kind: str, of, where) -> Reduction:
    over = Facts.every if where is None else mask(where, f"{kind}(where=...)")
    if over.op == "always" and not over.args[0]:
        raise ValueError(f"{kind}(where=...): the condition holds for no pair")
    return Reduction(kind, number(of, kind), _of_pairs(over))


def _of_pairs(condition: Expr) -> Expr:
    """The condition, restricted to what is a pair: no row with itself, nothing beyond a tile's edge."""
    return condition if _is_of_pairs(condition) else Facts.every & condition


def _is_of_pairs(condition: Expr) -> bool:
    if condition.op == "and":
        return any(map(_is_of_pairs, condition.args))
    return condition.op == "fact" or (condition.op == "or" and all(map(_is_of_pairs, condition.args)))
