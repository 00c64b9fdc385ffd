"""The one place from which kernels are launched, and where launches can be listened to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import triton
from triton.runtime.jit import JITFunction

from .configs import INTERPRETED

_listening = threading.local()


def run_kernel(kernel: JITFunction, grid: tuple[int, ...], *arguments, **options) -> None:
    """``kernel[grid](*arguments, **options)``."""
    if (listener := getattr(_listening, "listener", None)) is None:
        kernel[grid](*arguments, **options)
    else:
        listener(partial(_launch, kernel, grid, arguments, options))


@contextmanager
def heard_by(listener: Callable[[Callable], None]) -> Iterator[None]:
    """Inside, every launch of this thread is a call of ``listener(launch)``, which has to make it.

    ``launch()`` returns ``again``, the kernel's name and its arguments. ``again(*arguments, stream=current_stream())``
    launches the same kernel once more, on these or others of the same dtypes and alignments. It does not ask which of
    those that were compiled this one is: 20 us of every launch.
    """
    previous, _listening.listener = getattr(_listening, "listener", None), listener
    try:
        yield
    finally:
        _listening.listener = previous


def current_stream() -> int | None:
    """Of the current GPU, as ``again`` takes it; None in the interpreter."""
    if INTERPRETED:
        return None
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


def _launch(kernel: JITFunction, grid: tuple, arguments: tuple, options: dict) -> tuple[Callable, str, tuple]:
    compiled = kernel[grid](*arguments, **options)
    if compiled is None:  # the interpreter compiles nothing
        return lambda *arguments, stream: kernel[grid](*arguments, **options), kernel.__name__, arguments
    own = {name: value for name, value in options.items() if name in kernel.signature.parameters}
    bound = kernel.signature.bind(*arguments, **own)
    bound.apply_defaults()
    return compiled[(*grid, 1, 1)[:3]], kernel.__name__, tuple(map(_plain, bound.args))


def _plain(argument):
    """Tuples without the names of their fields, which a compiled kernel does not ask for."""
    return tuple(map(_plain, argument)) if isinstance(argument, tuple) else argument
