"""What a compiled kernel is made from, as a digest: by it a table knows which of its rows are of kernels as they are.

The source of the kernel and of all that it calls or reads, without comments and documentation; its constants; and the
types of its arguments. Not Triton itself, whose version stands beside it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import triton
from triton.runtime.jit import JITFunction


def digest_of(kernel: JITFunction, arguments: tuple, options: dict) -> str:
    """12 hexadecimal digits, of the launch ``kernel[grid](*arguments, **options)``."""
    named = (f"{name}: {_described(option)}" for name, option in options.items())
    text = "\n".join([_source(kernel), *map(_described, arguments), *named])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _described(argument) -> str:
    """What of an argument a kernel is compiled for: numbers by their value, tensors by their dtype."""
    if isinstance(argument, JITFunction):
        return _source(argument)
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    if isinstance(argument, tuple):
        return f"{getattr(argument, '_fields', '')}({', '.join(map(_described, argument))})"
    if hasattr(argument, "block_shape"):  # a tensor's descriptor, for copies by TMA
        layout = getattr(argument, "layout", None)
        return f"{_described(argument.base)} in blocks of {list(argument.block_shape)}, {layout!r}"
    return repr(argument)


@cache
def _source(function: JITFunction) -> str:
    """The text of the function and of all that it names, each once."""
    return "\n".join(_texts(function, set()))


def _texts(value, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, JITFunction):
        tree, names = _tree(value.src), value.fn.__globals__
    elif isinstance(value, type) and value.__module__.partition(".")[0] != "triton":
        try:
            tree, names = _tree(inspect.getsource(value)), vars(inspect.getmodule(value))
        except (OSError, TypeError):  # made without a text: a tuple with names
            yield f"{value.__name__} {getattr(value, '_fields', ())}"
            return
    elif isinstance(value, (triton.language.constexpr, int, float, str)):
        yield repr(value)
        return
    else:
        return
    yield _text(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and not isinstance(names[node.id], ModuleType):
            yield from _texts(names[node.id], seen)


def _text(tree: ast.Module) -> str:
    """As Python writes it: a dump would tell versions of Python apart."""
    return ast.unparse(tree)


def _tree(text: str) -> ast.Module:
    """The syntax tree without documentation."""
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
