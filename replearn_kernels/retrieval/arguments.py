"""What every retrieval function takes, checked, and the gallery of all ranks where they share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import native, validation
from ..engine.backends import warn_without_native
from ..engine.operators import refuse_transforms
from ..engine.shards import agree
from ..engine.world import World
from .bounds import SIMILARITIES, Rows, Scores
from .walk import Ids, renumbered

BACKENDS = ("auto", "cpp", "torch")

_LONGEST = 2.0**500


@dataclass(frozen=True)
class Galleries:
    """Those of all ranks, one after the other, or that of this process."""

    world: World | None
    counts: list[int]

    @property
    def first(self) -> int:
        """Where this rank's begins."""
        return 0 if self.world is None else sum(self.counts[: self.world.rank])

    def of_all(self, own: Tensor) -> Tensor:
        """What each row of this rank's gallery has, of the rows of all ranks."""
        if self.world is None:
            return own
        return torch.cat(self.world.swap([own.contiguous()] * self.world.size, self.counts))

    def sum(self, of_rank: Tensor) -> Tensor:
        return of_rank if self.world is None else self.world.sum(of_rank)

    def sum_(self, of_rank: Tensor) -> None:
        """In place: a large tensor of integers, whose sum has no order."""
        if self.world is not None:
            self.world.sum_(of_rank)

    def most(self, of_rank: int) -> int:
        return of_rank if self.world is None else self.world.most(torch.tensor(of_rank, device=self.world.device))

    def of_all_queries(self, own: Tensor, counts: list[int]) -> Tensor:
        """Values of this rank's queries, along the last dimension, as those of all ranks, which have ``counts``."""
        return own if self.world is None else torch.cat(self.world.gather(own, counts), -1)


@dataclass(frozen=True)
class Search:
    """Queries against a gallery, which is that of all ranks."""

    scores: Scores
    excluded: list[Ids]  # at most one: a column of a row's id is no candidate
    backend: str
    galleries: Galleries


@dataclass(frozen=True)
class Arguments:
    """Those of :func:`topk` and of every metric, checked as far as one rank can."""

    query: Rows
    gallery: Rows  # of this rank; the queries themselves where none was given
    similarity: str
    exclude_self: bool
    ids: Ids | None  # int64, [N, C] and [M, C]
    backend: str
    world: World | None

    @staticmethod
    def of(
        query: Tensor,
        gallery: Tensor | None,
        *,
        similarity: str,
        exclude_self: bool,
        query_ids: Tensor | None,
        gallery_ids: Tensor | None,
        backend: str,
        world: World | None,
    ) -> Arguments:
        validation.check_features("query", query)
        if gallery is not None:
            validation.check_features("gallery", gallery, shape="2 dimensions [M, d] (labels are given by their names)")
            validation.check_alike("gallery", gallery, "query", query)
        validation.check_choice("similarity", similarity, SIMILARITIES)
        validation.check_flag("exclude_self", exclude_self)
        refuse_transforms()
        backend = resolve_backend(backend, query.device)
        if gallery is None:
            if gallery_ids is not None:
                raise ValueError("gallery_ids must not be given without a gallery: query_ids are those of its rows")
            gallery_ids = query_ids
        elif exclude_self:
            if query_ids is not None or gallery_ids is not None:
                raise ValueError("exclude_self must not be given with ids, which say by themselves what is left out")
            validation.check_same_rows("gallery", gallery, "query", query)
        rows = finite_rows("query", query)
        return Arguments(
            rows,
            rows if gallery is None or gallery is query else finite_rows("gallery", gallery),
            similarity,
            exclude_self or gallery is None,
            _check_ids(query_ids, gallery_ids, query, query if gallery is None else gallery),
            backend,
            world,
        )

    def meet(self, told: dict, **alike: str) -> tuple[Galleries, list[dict]]:
        """The galleries, and what every rank tells; ``alike`` must be the same on all. Nothing fails after that on one
        rank alone."""
        if self.world is None:
            return Galleries(None, [len(self.gallery)]), [told]
        features = self.query.features
        ids = None if self.ids is None else self.ids[0].shape[1]
        alike |= {"d": features.shape[1], "dtype": str(features.dtype), "columns of ids": ids}
        descriptions = agree(self.world, alike, {"gallery": len(self.gallery), **told})
        return Galleries(self.world, [description["gallery"] for description in descriptions]), descriptions

    def most_neighbours(self, galleries: Galleries) -> int:
        """Rows that every query is compared with, but for those that its ids leave out."""
        return sum(galleries.counts) - (self.exclude_self and self.ids is None)

    def search(self, galleries: Galleries) -> Search:
        gallery = self.gallery
        if galleries.world is not None:
            gallery = Rows.of(galleries.of_all(gallery.features))
        excluded = []
        if self.ids is not None:
            excluded.append(renumbered(self.ids[0], galleries.of_all(self.ids[1])))
        elif self.exclude_self:
            columns = torch.arange(len(gallery), dtype=torch.int32, device=gallery.features.device)
            excluded.append((columns[galleries.first :][: len(self.query)], columns))
        scores = Scores.of(self.query, gallery, self.similarity)
        return Search(scores, excluded, self.backend, galleries)


def finite_rows(name: str, features: Tensor) -> Rows:
    """Rows of lengths whose squares, and the inverses of these, fp64 holds."""
    rows = Rows.of(features)
    wrong = ~(rows.lengths <= _LONGEST)
    if features.dtype == torch.float64:
        short = (rows.lengths < 1 / _LONGEST).nonzero().squeeze(1)
        wrong[short] = rows.features[short].any(1)
    wrong = wrong.nonzero().squeeze(1)
    if len(wrong):
        row = int(wrong[0])
        finite = rows.features[row].isfinite().all()
        found = f"a length outside of [{1 / _LONGEST:.0e}, {_LONGEST:.0e}]" if finite else "NaN or infinity"
        raise ValueError(f"{name} must be finite, got {found} in row {row}, and {len(wrong)} such rows in all")
    return rows


def _check_ids(query_ids: Tensor | None, gallery_ids: Tensor | None, query: Tensor, gallery: Tensor) -> Ids | None:
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("query_ids and gallery_ids must be given together, got only one of them")
    if query_ids is None:
        return None
    checked = as_columns("query_ids", query_ids, query), as_columns("gallery_ids", gallery_ids, gallery)
    widths = [ids.shape[1] for ids in checked]
    if widths[0] != widths[1]:
        raise ValueError(f"query_ids and gallery_ids must have as many columns, got {widths[0]} and {widths[1]}")
    return checked


def check_labels(
    query: Tensor, gallery: Tensor | None, query_labels: Tensor, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the queries and of the gallery, which may be the queries, int64 ``[N]`` and ``[M]``."""
    query_labels = validation.check_labels("query_labels", query_labels, query.shape[0], query)
    if gallery is None:
        if gallery_labels is not None:
            raise ValueError("gallery_labels must not be given without a gallery: query_labels are those of its rows")
        return query_labels, query_labels
    if gallery_labels is None:
        raise ValueError("gallery_labels must be given with a gallery and query_labels")
    return query_labels, validation.check_labels("gallery_labels", gallery_labels, gallery.shape[0], query)


def as_columns(name: str, values: Tensor, features: Tensor) -> Tensor:
    """Integers ``[N]`` or ``[N, C]``, one row of them for each of ``features``, as int64 ``[N, C]``."""
    columns = values.unbind(1) if isinstance(values, Tensor) and values.ndim == 2 and values.shape[1] else (values,)
    return torch.stack([validation.check_labels(name, column, features.shape[0], features) for column in columns], 1)


def resolve_backend(backend: str, device: torch.device) -> str:
    validation.check_backend_name(backend, BACKENDS)
    if backend == "auto":
        if device.type != "cpu":
            return "torch"
        return "cpp" if native.available() else warn_without_native()
    if backend == "cpp" and device.type != "cpu":
        raise ValueError(f"backend='cpp' runs on CPU tensors, got tensors on {device}")
    if backend == "cpp" and not native.available():
        raise RuntimeError(f"backend='cpp' is not available: {native.why_missing()}")
    return backend


@contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Callable[[int], object]]:
    """What is told of finished queries: a bar of rich, or nobody."""
    if not shown:
        yield lambda rows: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install rich") from error
    with Progress(TextColumn("queries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("queries", total=total)
        yield lambda rows: progress.update(task, advance=rows)
