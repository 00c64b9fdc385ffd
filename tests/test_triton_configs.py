"""The configurations that `bench.gpu_configs` times: those that are meant, as the compiler gets them."""

from dataclasses import replace

import pytest
import torch
from triton_harness import aot

from bench.gpu_configs import KERNELS, Choice, chosen
from bench.triton_resources import TARGETS, _read_cubin, compiling


@pytest.mark.parametrize("name", KERNELS)
def test_choices(name):
    """The shipped one first, and none twice."""
    kernel = KERNELS[name]
    with compiling(TARGETS["sm_90"]):
        choices = kernel.choices()
    assert len(set(choices)) == len(choices) >= 6
    assert choices[:2] == [Choice(choices[0].config), Choice(choices[0].config, 128)]
    assert len(set(map(str, choices))) == len(choices)


class TestCompiled:
    pytestmark = aot

    @pytest.mark.parametrize("name, most", [("softmax weights", 96), ("softmax gradient", 128)])
    def test_the_most_registers(self, name, most):
        """`maxnreg` is an option of a launch, in this Triton too."""
        kernel = KERNELS[name]
        with compiling(TARGETS["sm_90"]) as compiled:
            shipped = kernel.choices()[0]
            for choice in (shipped, replace(shipped, maxnreg=most)):
                with chosen(choice):
                    kernel.prepare(kernel.epilogue, 256, 128, torch.bfloat16, "cpu")()
        free, bound = (_read_cubin(code, "HGMMA")[0] for code, _ in compiled)
        assert bound <= most < free
        assert {options["num_warps"] for _, options in compiled} == {shipped.config.warps}
