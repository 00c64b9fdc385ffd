"""What calls of a declared loss give beside features, labels and scale: values of rows and columns, and a guide's
features; checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import validation
from ..engine.operators import refuse_forward_mode, refuse_wrapped
from ..engine.problem import statistics_dtype
from ..engine.world import World
from ..functional.call import autocast
from ..functional.rows import unit_rows
from .pair_loss import PairLoss


def values_of(
    loss: PairLoss, name: str, given: Mapping[str, Tensor] | None, rows: Tensor, query: Tensor, group: World | None,
    numbered: bool,
) -> Tensor | None:  # fmt: skip
    """The values that a call gives for the rows, or for the columns (``rows``), in the order of their names:
    ``[values, N]``; None where the loss has none. ``name``: the argument's. ``numbered``: the last value is a number
    that no other of them has."""
    wanted, of_loss = getattr(loss, name), type(loss).__name__
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict of tensors by name, got {type(given).__name__}")
    if set(given) != set(wanted):
        names, told = (", ".join(map(str, each)) or "none" for each in (wanted, given))
        raise ValueError(f"{name} must give the values that {of_loss} names ({names}), got {told}")
    if not wanted and not numbered:
        return None
    values = [check_value(f"{name}[{each!r}]", given[each], rows.shape[0], query) for each in wanted]
    if group is not None:
        refuse_wrapped(*values)
    dtype = statistics_dtype(query.dtype)
    numbers = [_numbers(rows.shape[0], dtype, query.device, group)] if numbered else []
    return torch.stack([*(value.to(dtype) for value in values), *numbers])


def _numbers(count: int, dtype: torch.dtype, device: torch.device, group: World | None) -> Tensor:
    """Numbers of so many rows or columns, which rise through the shards in the order of the ranks.

    They are the same for all ranks, and known without a message: every rank has an even share of what the dtype tells
    apart.
    """
    rank, ranks = (0, 1) if group is None else (group.rank, group.size)
    share = int(2 / torch.finfo(dtype).eps) // ranks
    if count > share:
        raise ValueError(
            f"the largest of a row's pairs is told from at most {share:,} others on each rank in {dtype}, got {count:,}"
        )
    return torch.arange(count, dtype=dtype, device=device) + rank * share


def check_value(name: str, value: Tensor, count: int, query: Tensor) -> Tensor:
    """Numbers of ``count`` rows or columns, as a call gives them."""
    validation.check_tensor(name, value)
    if value.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(value.shape)}")
    if not (value.dtype.is_floating_point or value.dtype == torch.bool):
        raise TypeError(
            f"{name} must be floating-point or bool, got {value.dtype}: .float() of it holds whole numbers up to "
            "2**24; rows that share a number are a matter of labels or groups"
        )
    if value.device != query.device:
        raise ValueError(f"{name} must be on the features' device {query.device}, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which values do not get: pass {name}.detach()")
    refuse_forward_mode(value)
    return value


def guides_of(
    loss: PairLoss, guides: dict[str, Tensor | None], query: Tensor, key: Tensor, group: World | None
) -> tuple[Tensor | None, ...]:
    """The features of the guide, of rows and columns, by the caller's names."""
    if not loss.guide:
        if given := [name for name, guide in guides.items() if guide is not None]:
            raise ValueError(f"{given[0]}: {type(loss).__name__} has no guide, whose features these would be")
        return (None,) * len(guides)
    for name, guide in guides.items():
        if guide is None:
            raise ValueError(f"{name} is needed: {type(loss).__name__} has a guide")
    checked = [check_guide(name, guide, features) for (name, guide), features in zip(guides.items(), (query, key))]
    if group is not None:
        refuse_wrapped(*checked)
    rows, *columns = autocast(*checked)
    for of_columns in columns:
        validation.check_alike("column_guide", of_columns, "row_guide", rows)
    return tuple(map(unit_rows, (rows, *columns))) if loss.guide == "cosine" else (rows, *columns)


def check_guide(name: str, guide: Tensor, features: Tensor) -> Tensor:
    """The features that a guide has for the same rows, in any dtype; in that of the statistics if either is fp64."""
    validation.check_features(name, guide)
    if guide.shape[0] != features.shape[0]:
        raise ValueError(f"{name} must have {features.shape[0]} rows, as the features, got {guide.shape[0]}")
    if guide.device != features.device:
        raise ValueError(f"{name} must be on the features' device {features.device}, got {guide.device}")
    if guide.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which a guide does not get: pass {name}.detach()")
    refuse_forward_mode(guide)
    is_wide = torch.float64 in (guide.dtype, features.dtype)
    return guide.to(statistics_dtype(features.dtype)) if is_wide else guide
