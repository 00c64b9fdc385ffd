"""The configurations that `bench.gpu_configs` times: those that are meant, as the compiler gets them."""

from dataclasses import replace

import pytest
import torch
from triton_harness import aot

from bench.gpu_configs import KERNELS, described
from bench.triton_resources import TARGETS, _read_cubin, compiling
from replearn_kernels.triton_kernels.configs import Config, Ring, default, pick, ring_of, use_config


@pytest.mark.parametrize("name", KERNELS)
def test_choices(name):
    """The shipped one first, and none twice."""
    kernel = KERNELS[name]
    with compiling(TARGETS["sm_90"]):
        choices = kernel.choices(128)
        shipped = default(kernel.kernel, kernel.epilogue, "half", 90)
        if kernel.in_gluon:
            shipped = ring_of(kernel.kernel, kernel.epilogue, torch.bfloat16, 128)
    assert choices[0] == shipped
    assert len(set(map(described, choices))) == len(choices) >= 3


def test_kernels_that_a_gpu_has_not():
    with compiling(TARGETS["sm_80"]):
        assert KERNELS["sup_con sums"].choices(512) == [] != KERNELS["sup_con weights"].choices(512)
        assert KERNELS["sup_con weights in Gluon"].choices(512) == []
    with compiling(TARGETS["sm_90"]):
        assert KERNELS["sup_con weights in Gluon"].choices(528) == []
        assert KERNELS["sup_con gradient in Gluon"].choices(144) == []


class TestRings:
    """Which kernels in Gluon take the place of which others."""

    @staticmethod
    def ring(kernel="weights", epilogue="softmax", dtype=torch.bfloat16, d=512, target="sm_90"):
        with compiling(TARGETS[target]):
            return ring_of(kernel, epilogue, dtype, d)

    def test_where_there_are_any(self):
        assert self.ring() == Ring(128, 64, 8) == self.ring(epilogue="sup_con", dtype=torch.float16, d=1)
        assert self.ring("sums", d=128) != self.ring("sums", d=129) is not None
        assert self.ring("gradient", d=128) is not None

    @pytest.mark.parametrize("other", [
        {"epilogue": "sigmoid"}, {"epilogue": "margin_softmax"}, {"dtype": torch.float32}, {"d": 513},
        {"kernel": "gradient", "d": 129}, {"target": "sm_80"}, {"target": "sm_100"},
    ], ids=str)  # fmt: skip
    def test_where_there_are_none(self, other):
        assert self.ring(**other) is None

    def test_what_is_given(self):
        """A ring for a kernel; a config asks for the kernel without."""
        with use_config(Ring(64, 64, 2), "weights"):
            assert self.ring() == Ring(64, 64, 2) and self.ring("sums") != Ring(64, 64, 2)
        with use_config(Config(128, 128, 64, warps=8, stages=3, parts=2), "weights"):
            assert self.ring() is None and self.ring("sums") is not None


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
            shipped = kernel.choices(128)[0]
            for config in (shipped, replace(shipped, registers=most)):
                with use_config(config, kernel.kernel):
                    kernel.prepare(kernel, 256, 128, torch.bfloat16, "cpu")()
        products = [code for code, options in compiled if "BLOCK_M" in options]
        free, bound = (_read_cubin(code, "HGMMA")[0] for code in products)
        assert bound <= most < free
