"""Calls that were made before are repeated, without the code that worked them out.

What a loss allocates, launches and multiplies follows from the shapes and options of its call: no number in a tensor
decides anything on the host. So the second call with the same of both is recorded, and from the third on a *program*
runs: the straight line of steps that the second took, as Python source, with a name for every tensor::

    def program(t1, t2, t3):
        stream = current_stream()
        t4 = allocate((3, 4096), (4096, 1), dtype=torch.float32, device=device)
        sums_kernel_9(t1, 512, t2, 512, t4, 4096, stream=stream)
        t4 = None
        return t5

It allocates the same in the same order, and lets go of every tensor after its last use. What waits for a number of a
tensor has no program, and works every call out.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ...triton_kernels.launching import current_stream, heard_by

_KEPT = 256
"""Calls that are remembered, forward and backward each one. Beyond, the oldest go."""
_LONGEST = 1024
"""Steps of a program, 100 KB of source. A call of more, some 200 tiles, takes the GPU longer than the host as it is."""

_programs: dict[Hashable, Callable | str] = {}
"""By the call: its program, why there is none, or "" of one that was made once."""
_changing = threading.RLock()  # a finalizer that runs inside may call a loss


def replay(key: Hashable, tensors: Sequence[Tensor | None], call: Callable[[], object]) -> object:
    """``call()``, or what it would do: by the program of an earlier call with an equal key.

    Args:
        key: all that the steps follow from, beyond the tensors' dtypes, devices, shapes, strides and alignments.
        tensors: all that ``call`` reads or writes.
        call: returns a tensor, None, a bool, or tuples and lists of such.
    """
    key = key, _same(tensors), *map(_form, tensors)
    known = _programs.get(key)
    if known is None:
        with _changing:
            while len(_programs) >= _KEPT:
                del _programs[_oldest()]
            _programs[key] = ""
    elif known == "":
        with Recorder(tensors) as recorder:
            result = call()
        program = recorder.program(result)
        with _changing:
            if key in _programs:
                _programs[key] = program
        return result
    elif not isinstance(known, str):
        return known(*tensors)
    return call()


def _oldest() -> Hashable:
    """Of the calls that have no program, if there are any: most batches of a loader may differ, and some not."""
    return next((key for key, known in _programs.items() if isinstance(known, str)), next(iter(_programs)))


def _form(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15


def _same(tensors: Sequence[Tensor | None]) -> Hashable:
    """Which of them are one tensor: a program names it once."""
    numbers = [id(tensor) for tensor in tensors if tensor is not None]
    return None if len(set(numbers)) == len(numbers) else tuple(map(numbers.index, numbers))


class _Step(NamedTuple):
    source: str
    new: frozenset[str]  # the names that it gives
    named: frozenset[str]  # those, and all others in it
    has_effects: bool  # beyond its results


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_SAME_TENSOR = {_aten.alias.default, _aten.detach.default}


class Recorder(TorchDispatchMode):
    """Writes down the operators and launches of a call that runs inside it."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self.why_not = ""
        """Why no program can do for other tensors what this call does for these."""
        # Of the tensors that are alive: the call holds no more memory than otherwise.
        self._names = WeakIdKeyDictionary()
        self._count = 0
        self._named: set[str] = set()  # by the expressions since the last step
        self._steps: list[_Step] = []
        self._device = next(tensor.device for tensor in tensors if tensor is not None)
        self._constants: dict[str, object] = {
            "torch": torch, "allocate": torch.empty_strided, "device": self._device, "current_stream": current_stream,
            "replaced": _replaced,
        }  # fmt: skip
        self._constant_names: dict[int, str] = {}
        self._arguments = [self._new_name(tensor) for tensor in tensors]
        self._hearing: list = []  # of as often as this was entered
        self._launches = False  # there are any
        self._launching = False  # an interpreted kernel calls operators, which are no steps

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # what PyTorch asks: else the first operator imports all of dynamo, in 1.3 s
        return False

    def __enter__(self) -> Recorder:
        self._hearing.append(heard_by(self._launch))
        self._hearing[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._hearing.pop().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._can_decompose():  # where autograd is not there to do it: in its parts are those that read a number
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not (self.why_not or self._launching):
            self._operator(func, args, kwargs, result)
        return result

    def program(self, result: object) -> Callable | str:
        """Of the call, which returned ``result``; or why there is none."""
        self._named = set()
        returned = "" if self.why_not else self._expression(result)
        if self.why_not:
            return self.why_not
        lines, needed = [f"    return {returned}"], {*self._arguments, *self._named}  # from the last line to the first
        for step in reversed(self._steps):
            if step.has_effects or not needed.isdisjoint(step.new):
                lines += [f"    {name} = None" for name in sorted(step.named - needed)]
                lines.append(f"    {step.source}")
                needed |= step.named
        lines += ["    stream = current_stream()"] * self._launches
        lines.append(f"def program({', '.join(self._arguments)}):")
        source = "\n".join(reversed(lines))
        exec(source, self._constants)
        program = self._constants["program"]
        program.source = source
        return program

    def _operator(self, func, args, kwargs, result) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        if _reads_back(func, args):
            self.why_not = f"{func} tells the host what a tensor holds"
        elif not all(each is None or isinstance(each, Tensor) for each in results):
            if any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
                self.why_not = f"{func} returns {result}"
        elif any(each is not None and each.device != self._device for each in results):
            self.why_not = f"{func} goes to another device"
        elif func in _SAME_TENSOR:
            self._names[result] = self._expression(args[0])
        elif func in _ALLOCATIONS:
            form = f"{tuple(result.shape)}, {result.stride()}, dtype={result.dtype}, device=device"
            self._step(f"allocate({form})", result, has_effects=False)
        else:
            keywords = (f"{name}={self._expression(value)}" for name, value in kwargs.items())
            call = self._call(func, func.overloadpacket.__name__, [*map(self._expression, args), *keywords])
            self._step(call, result, has_effects=func._schema.is_mutable or result is None)

    def _launch(self, launch: Callable[[], tuple[Callable, str, tuple]]) -> None:
        self._launches = self._launching = True
        again, name, arguments = launch()
        self._launching = False
        if not self.why_not:
            self._step(self._call(again, name, [*map(self._expression, arguments), "stream=stream"]))

    def _call(self, function: Callable, name: str, arguments: list[str]) -> str:
        return f"{self._constant(function, name)}({', '.join(arguments)})"

    def _step(self, call: str, result: object = None, has_effects: bool = True) -> None:
        """``result``: what the call returned; tensors that are new get names."""
        results, names = result if isinstance(result, (tuple, list)) else (result,), []
        if any(each is not None and each not in self._names for each in results):
            names = [self._new_name(each) for each in results]
            call = f"{names[0] if result is not results else ', '.join(names) + ','} = {call}"
        self._steps.append(_Step(call, frozenset(names), frozenset((*self._named, *names)), has_effects))
        self._named = set()
        if len(self._steps) > _LONGEST:
            self.why_not = f"it takes more than {_LONGEST} steps"

    def _new_name(self, tensor: Tensor | None) -> str:
        """For an argument or a result."""
        self._count += 1
        name = f"t{self._count}"
        if tensor is not None:
            self._names.setdefault(tensor, name)
        return name

    def _expression(self, value: object) -> str:
        """Source of the same value, in which tensors go by their names."""
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, (tuple, list)):
            inside = "".join(f"{self._expression(each)}, " for each in value)
            if hasattr(value, "_fields"):
                return f"{self._constant(type(value), 'tuple')}({inside})"
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or type(value) in (bool, int, str, torch.dtype):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, torch.device) and value == self._device:
            return "device"
        if dataclasses.is_dataclass(value):
            held = {name: each for name, each in vars(value).items() if isinstance(each, Tensor)}
            if held:  # a tensor's descriptor
                others = self._constant(_replaced(value, **dict.fromkeys(held)), type(value).__name__)
                return f"replaced({others}, {', '.join(f'{name}={self._name(each)}' for name, each in held.items())})"
        return self._constant(value, type(value).__name__)

    def _name(self, tensor: Tensor) -> str:
        name = self._names.get(tensor)
        if name is None:
            self.why_not, name = "it reads a tensor that it was not given", "None"
        self._named.add(name)
        return name

    def _constant(self, value: object, name: str) -> str:
        known = self._constant_names.get(id(value))  # the constants are kept: no other has this number
        if known is None:
            known = f"{name if name.isidentifier() else 'constant'}_{len(self._constants)}"
            self._constants[known], self._constant_names[id(value)] = value, known
        return known


def _reads_back(func, args) -> bool:
    """Whether the host waits for a number of a tensor, or for how many there are of a kind."""
    if func is _aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _replaced(instance: object, **fields: object) -> object:
    """A copy of a dataclass's instance with other values of these fields, without its checks."""
    copy = object.__new__(type(instance))
    copy.__dict__.update(instance.__dict__, **fields)
    return copy
