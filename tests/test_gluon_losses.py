"""Losses by the kernels in Gluon, forward and backward, against the plain formula in fp64: on a Hopper GPU; and in
Triton's interpreter, where gluon_interpreter.py runs those kernels.

Few rows, as for any other kernel, though with so few the engine does without some of them (``FEW_ROWS``).
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from gluon_harness import LAUNCHERS, interpreted_launchers
from gluon_interpreter import schedule
from loss_cases import value_and_gradients
from test_gpu_losses import check_against_fp64, compare_with_fp64, sample
from triton_harness import few_programs, gpu, interpreter

from replearn_kernels import clip_loss
from replearn_kernels.engine import schedules
from replearn_kernels.engine.backends import kernel_choice
from replearn_kernels.engine.backends import triton as backend
from replearn_kernels.triton_kernels import configs, group_ranges, sums

CASES = {
    "clip": {}, "info_nce": {}, "info_nce each": {"reduction": "none"}, "queue": {}, "nt_xent": {}, "sup_con": {},
    "sup_con each": {"reduction": "none"},
}  # fmt: skip
"""A loss of loss_cases.py, and its options."""


def check(case: str, n: int, d: int, dtype: torch.dtype, device: str, scale: float | None = None) -> None:
    name, options = case.split()[0], CASES[case]
    if scale is None:
        check_against_fp64(name, n, d, dtype, device, **options)
    else:
        compare_with_fp64(name, *sample(n, d, dtype, device), scale, **options)


@pytest.fixture
def launched(monkeypatch):
    """How often each launcher has run. On a CPU the interpreter's take their place."""
    counts: Counter[str] = Counter()
    launchers = LAUNCHERS if torch.cuda.is_available() else interpreted_launchers()

    def counting(name: str):
        def launch(*arguments, **options):
            counts[name] += 1
            return launchers[name](*arguments, **options)

        return launch

    for name in launchers:
        monkeypatch.setattr(sums if name == "launch_sums" else backend, name, counting(name))
    monkeypatch.setattr(kernel_choice, "FEW_ROWS", 0)
    schedules._make_plan.cache_clear()
    yield counts
    schedules._make_plan.cache_clear()


def expected(case: str, d: int) -> dict[str, int]:
    """A queue is a second source, and the keys beside it get no gradient."""
    sources = 2 if case == "queue" else 1
    if d > 128:
        return {"launch_sums": sources, "launch_weights": sources}
    gradients = 1 if case.startswith(("nt_xent", "sup_con")) else sources + 1
    return {"launch_sums": sources, "launch_gradient": gradients}


@pytest.fixture
def hopper(monkeypatch):
    """A CPU as if it were one."""
    few_programs(monkeypatch)
    monkeypatch.setattr(configs, "architecture", lambda: 90)


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("n, d", [(70, 48), (150, 128), (70, 200)])
    def test_values_and_gradients(self, case, n, d, launched, hopper):
        with schedule(n + d):
            check(case, n, d, torch.bfloat16, "cpu")
        assert launched == expected(case, d)


    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("d", [48, 160])
    def test_several_tiles(self, case, d, launched, hopper, small_tiles):
        """Of a batch some are their own mirror images, and some stand for another tile too."""
        with schedule(d):
            check(case, 70, d, torch.bfloat16, "cpu")
        assert launched.keys() == expected(case, d).keys() and min(launched.values()) >= 7

    @pytest.mark.parametrize("case", ["nt_xent", "sup_con"])
    def test_tiles_of_a_batch_against_their_maxima(self, case, launched, hopper, small_tiles):
        """At this scale no sum is tried, and the kernel that finishes them forms them anew."""
        with schedule(1):
            check(case, 70, 48, torch.bfloat16, "cpu", 1000.0)
        assert launched

    def test_tiles_of_a_batch_in_order(self, launched, hopper, monkeypatch):
        """Most blocks have no group in common, as their ranges tell; some groups lie on both sides of a tile's edge."""
        monkeypatch.setattr(backend.TritonBackend, "tile_shape", staticmethod(lambda *args: (112, 112)))
        x, y, _ = sample(300, 64, torch.bfloat16, "cpu")
        labels = torch.arange(300) // 5
        near = torch.nn.functional.normalize(x[labels] + x / 4, dim=1)
        with schedule(2):
            compare_with_fp64("sup_con", near, y, labels, 10.0)
        assert launched["launch_sums"] == 6

    @pytest.mark.parametrize("piece", [16, 4096])
    def test_given_targets_take_other_kernels(self, piece, launched, hopper, monkeypatch):
        """Positives are anywhere: W goes through memory, by pieces of a tile that was planned without any."""
        monkeypatch.setattr(kernel_choice, "PIECE", piece)
        check_against_fp64("target", 70, 48, torch.bfloat16, "cpu")
        assert not launched

    @pytest.mark.parametrize("n", [1, 16, 33, 1100])
    def test_ranges_of_groups(self, n):
        groups = torch.randint(-5, 1000, (n,), dtype=torch.int32)
        spans = [groups[start : start + 128].tolist() for start in range(0, n, 16)]
        assert group_ranges(groups).tolist() == [[min(span), max(span)] for span in spans]


class TestGPU:
    pytestmark = [
        *gpu,
        pytest.mark.skipif(
            torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
        ),
    ]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("n, d", [(33, 16), (257, 48), (700, 100), (1030, 128), (600, 130), (1111, 512)])
    def test_values_and_gradients(self, case, n, d, dtype, launched):
        check(case, n, d, dtype, "cuda")
        assert launched == expected(case, d)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("d", [128, 512])
    @pytest.mark.parametrize("scale", [100.0, 1000.0])
    def test_scales(self, case, d, scale, launched):
        """At 1000 rows and columns do not share an exponential."""
        check(case, 400, d, torch.bfloat16, "cuda", scale)
        assert launched == expected(case, d)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("d", [128, 512])
    def test_the_same_bits_again(self, case, d, launched):
        inputs = *sample(2500, d, torch.bfloat16, "cuda"), 14.3
        first, *others = (value_and_gradients(case.split()[0], *inputs, **CASES[case]) for _ in range(20))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
        assert launched

    @pytest.mark.parametrize("d", [128, 512])
    def test_positives_that_take_all_have_no_gradient(self, d, launched):
        """1 - p is exact: a block on the diagonal is not formed by an exponential that others share."""
        x, _, _ = sample(300, d, torch.bfloat16, "cuda")
        leaf, scale = x.clone().requires_grad_(), torch.tensor(1000.0, device="cuda")
        loss = clip_loss(leaf, x, scale)
        loss.backward()
        assert loss == 0 and not leaf.grad.any()
