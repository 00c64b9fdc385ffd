"""What reaches Triton's launcher from a step that works everything out, and from a program of it: the same.

Run by test_host_time.py, with a driver that does nothing in the place of CUDA's.
"""

from __future__ import annotations

import dataclasses

import torch
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import driver

from bench import host_time
from replearn_kernels.engine.backends import replay


class Seen:
    """Describes the arguments of a step, tensors by their forms and by which of them were met before."""

    def __init__(self):
        self._tensors, self._places = [], {}  # kept, so that no memory is given out twice

    def described(self, value):
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
            place = self._places.setdefault(value.data_ptr(), len(self._places))
            return place, value.dtype, tuple(value.shape), value.stride()
        if isinstance(value, (tuple, list)):
            return tuple(map(self.described, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return type(value).__name__, *((name, self.described(each)) for name, each in vars(value).items())
        return value


def main() -> None:
    launches, seen, stream = [], Seen(), 0
    plain = CudaLauncher.__call__

    def launch(self, *arguments):
        *where, of, function, metadata, _, enter, leave = arguments[:9]
        assert of == stream
        launches.append((where, function, metadata, enter, leave, seen.described(arguments[9:])))
        return plain(self, *arguments)

    CudaLauncher.__call__ = launch
    host_time.activate()
    driver.active.get_current_stream = lambda device: stream
    for name, step in host_time.steps().items():
        replay._programs.clear()
        made = []
        for number in range(3):
            launches, seen, stream = [], Seen(), number
            step()
            made.append(launches)
        assert all(callable(program) for program in replay._programs.values()), name
        first, recorded, repeated = made
        assert first == recorded == repeated, name
        assert len(first) >= 4, name


if __name__ == "__main__":
    main()
