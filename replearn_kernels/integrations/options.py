"""What this library's losses take, beside the arguments of another library's constructors."""

from __future__ import annotations

import inspect

from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET


def checked_options(backend: str, memory_budget: int, strategy: str) -> dict:
    """The three as a loss function's keywords.

    Raises:
        TypeError, ValueError: one is not of its type or range.
    """
    validation.check_backend_name(backend)
    validation.check_strategy(strategy)
    memory_budget = validation.check_memory_budget(memory_budget)
    return {"backend": backend, "memory_budget": memory_budget, "strategy": strategy}


class TakesPlace:
    """Comes before another library's class among the bases of ours, which has another ``entry`` than theirs.

    The methods of theirs that the entry does not call are in ``not_called``: a subclass that replaces one of them, and
    not the entry, would be told nothing by the values. So it is a TypeError where it is defined.
    """

    entry = "forward"
    not_called: tuple[str, ...] = ()

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        base = next(one for one in cls.__mro__ if one.__module__.startswith(__package__))
        if base is cls or getattr(cls, cls.entry, None) is not getattr(base, cls.entry, None):
            return
        for name in cls.not_called:
            if getattr(cls, name, None) is not getattr(base, name, None):
                raise TypeError(
                    f"{cls.__name__} replaces {name}, which {base.__module__}.{base.__name__} does not call: let it be "
                    "a subclass of the other library's own class, as it is without apply()"
                )


def _signature(cls: type[TakesOptions]) -> inspect.Signature:
    """The other library's constructor's, or a subclass's own, with our options, for ``help`` and IDEs."""
    first = next(one for one in cls.__mro__ if not one.__module__.startswith(__package__) and "__init__" in vars(one))
    _, *parameters = inspect.signature(first.__init__).parameters.values()
    if issubclass(first, TakesOptions):
        return inspect.Signature(parameters)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=it) for name, it in cls.options.items()]
    others = [one for one in parameters if one.kind is one.VAR_KEYWORD]
    return inspect.Signature([*(one for one in parameters if one not in others), *ours, *others])


class TakesOptions(TakesPlace):
    """The same for a loss: the constructor takes its arguments as they are, and three of ours.

    Args:
        backend, memory_budget, strategy: as :func:`~replearn_kernels.clip_loss` takes them; in ``self.options``.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
    """

    options = {"backend": "auto", "memory_budget": DEFAULT_MEMORY_BUDGET, "strategy": "auto"}

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        cls.__signature__ = _signature(cls)

    def __init__(self, *args, backend="auto", memory_budget=DEFAULT_MEMORY_BUDGET, strategy="auto", **keywords):
        super().__init__(*args, **keywords)
        self.options = checked_options(backend, memory_budget, strategy)
