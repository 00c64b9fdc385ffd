"""What this library's losses take, beside the arguments of another library's constructors."""

from __future__ import annotations

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


class TakesOptions:
    """Comes before another library's class among the bases of ours: its constructor's arguments, and three of ours.

    Args:
        backend, memory_budget, strategy: as :func:`~replearn_kernels.clip_loss` takes them; in ``self.options``.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
    """

    options = {"backend": "auto", "memory_budget": DEFAULT_MEMORY_BUDGET, "strategy": "auto"}

    def __init__(self, *args, backend="auto", memory_budget=DEFAULT_MEMORY_BUDGET, strategy="auto", **keywords):
        super().__init__(*args, **keywords)
        self.options = checked_options(backend, memory_budget, strategy)
