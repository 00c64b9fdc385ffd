"""The configurations that `bench.gpu_configs` times: those that are meant, as the compiler gets them."""

from dataclasses import replace

import pytest
import torch
from triton_harness import aot

from bench.gpu_configs import KERNELS, described
from bench.triton_resources import TARGETS, _read_cubin, compiling
from replearn_kernels.triton_kernels.configs import Config, default, pick, use_config


@pytest.mark.parametrize("name", KERNELS)
def test_choices(name):
    """The shipped one first, and none twice."""
    kernel = KERNELS[name]
    with compiling(TARGETS["sm_90"]):
        choices = kernel.choices()
    assert choices[0] == default(kernel.kernel, kernel.epilogue, "half", 90)
    assert len(set(map(described, choices))) == len(choices) >= 3


def test_a_gpu_without_tma_has_no_sums():
    with compiling(TARGETS["sm_80"]):
        assert KERNELS["sup_con sums"].choices() == [] != KERNELS["sup_con weights"].choices()


def test_a_config_for_one_kernel_leaves_the_others():
    config, features = Config(16, 16, 16, warps=4, stages=2), torch.empty(4, 16, dtype=torch.bfloat16)
    with compiling(TARGETS["sm_90"]):
        with use_config(config, "weights"):
            assert pick("weights", "softmax", features, None) == config != pick("statistics", "softmax", features, None)
        with use_config(config):
            assert pick("statistics", "softmax", features, None) == config
        assert pick("weights", "softmax", features, None) != config


class TestCompiled:
    pytestmark = aot

    @pytest.mark.parametrize("name, most", [("sup_con statistics", 128), ("softmax symmetric gradient", 128)])
    def test_the_most_registers(self, name, most):
        """``registers`` is an option of a launch, in this Triton too."""
        kernel = KERNELS[name]
        with compiling(TARGETS["sm_90"]) as compiled:
            shipped = kernel.choices()[0]
            for config in (shipped, replace(shipped, registers=most)):
                with use_config(config, kernel.kernel):
                    kernel.prepare(kernel, 256, 128, torch.bfloat16, "cpu")()
        products = [code for code, options in compiled if "BLOCK_M" in options]
        free, bound = (_read_cubin(code, "HGMMA")[0] for code in products)
        assert bound <= most < free
