"""What a module was made with, as its repr shows it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

_MISSING = object()


class ShowsOptions:
    """For modules whose constructor's arguments are attributes, or in ``options``: repr shows those that are not the
    defaults, and a process group by its size."""

    def extra_repr(self) -> str:
        options = getattr(self, "options", {})
        shown = []
        for name, default in dict(_arguments(type(self))).items():
            value = options.get(name, getattr(self, name, _MISSING))
            if value is _MISSING or isinstance(value, nn.Module) or value is default or value == default:
                continue
            if name == "group":
                shown.append(f"group={dist.get_world_size(value)} ranks")
            else:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


def _arguments(cls: type) -> Iterator[tuple[str, object]]:
    """Names and defaults of the constructor's arguments; where it passes on all others, of its base's too."""
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from _arguments(cls.__mro__[1])
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            yield parameter.name, parameter.default
