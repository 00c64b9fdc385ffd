"""By which digest a table of compiled kernels knows that they have changed since."""

import linecache
import sys
from types import ModuleType

import pytest
import torch
from triton_harness import aot

from bench.triton_sources import digest_of

pytestmark = aot
KERNELS = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)
UNUSED = tl.constexpr(1.0)

@triton.jit
def scaled(x):
    """Scaled."""
    return x * FACTOR  # by a constant

@triton.jit
def given(x, function):
    return function(x)

@triton.jit
def kernel(x, size, numbers, BLOCK: tl.constexpr, FUNCTION: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(x + index, scaled(given(tl.load(x + index, mask=index < size), FUNCTION)))
'''


def digest(replaced: str = "", by: str = "", **changed) -> str:
    """Of a launch of the kernel above, with some of its text or of its arguments changed."""
    assert replaced in KERNELS
    text, file = KERNELS.replace(replaced, by) if replaced else KERNELS, f"<kernels {len(linecache.cache)}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    module = sys.modules["kernels_of_a_test"] = ModuleType("kernels_of_a_test")
    exec(compile(text, file, "exec"), vars(module))
    options = {"BLOCK": 16, "num_warps": 4, "FUNCTION": module.scaled} | changed.pop("options", {})
    arguments = {"x": torch.empty(16), "size": 16, "numbers": (0.5, None)} | changed
    return digest_of(module.kernel, tuple(arguments.values()), options)


def test_the_same_text():
    assert digest() == digest("# by a constant", "# by another comment") == digest("Scaled.", "Documented.")
    assert digest() == digest("UNUSED = tl.constexpr(1.0)", "UNUSED = tl.constexpr(3.0)")
    assert len(digest()) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"replaced": "index < size", "by": "index <= size"},
        {"replaced": "x * FACTOR", "by": "x / FACTOR"},
        {"replaced": "return function(x)", "by": "return function(x) + 0.0"},
        {"replaced": "FACTOR = tl.constexpr(2.0)", "by": "FACTOR = tl.constexpr(3.0)"},
        {"size": 17},
        {"options": {"num_warps": 8}},
        {"options": {"FUNCTION": None}},
    ],
    ids=str,
)
def test_other_texts_or_arguments(changes):
    changes = dict(changes)
    assert digest(changes.pop("replaced", ""), changes.pop("by", ""), **changes) != digest()


def test_other_dtypes_and_constants():
    others = digest(x=torch.empty(16).half()), digest(numbers=(0.5, 1)), digest(numbers=(0.25, None))
    assert len({digest(), *others}) == 4
