"""What a module was made with, as its repr shows it."""

from __future__ import annotations

import inspect

import torch.distributed as dist
from torch import Tensor, nn

_MISSING = object()


class ShowsOptions:
    """For modules whose constructor's arguments are attributes, or in ``options``: repr shows those that are not the
    defaults, and a process group by its size."""

    def extra_repr(self) -> str:
        options = getattr(self, "options", {})
        shown = []
        for name, default in _arguments(type(self)).items():
            value = options.get(name, getattr(self, name, _MISSING))
            if value is _MISSING or isinstance(value, (nn.Module, Tensor)) or value is default or value == default:
                continue
            if name == "group":
                shown.append(f"group={dist.get_world_size(value)} ranks")
            else:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


def _arguments(cls: type) -> dict[str, object]:
    """Names and defaults of the constructor's arguments; where it passes on all others, of the next class's too."""
    found: dict[str, object] = {}
    for part in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if "__init__" not in vars(part):
            continue
        _, *parameters = inspect.signature(part.__init__).parameters.values()
        for one in parameters:
            if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                found.setdefault(one.name, one.default)
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found
