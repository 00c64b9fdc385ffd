"""What the GPU report measures with, as far as a CPU shows it: warm-ups, profiles, tables of configurations."""

import argparse
import csv
from unittest import mock

import pytest
import torch

from bench.cases import CASES
from bench.gpu_profile import STEPS, busy, kernels_of, measure, write
from bench.gpu_summary import configs_table, speed_table
from bench.gpu_warmup import MOST_ROWS, jobs, parse_arguments, side_by_side
from bench.harness import Point, implementations
from bench.results import append, make_row


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestWarmUp:
    POINTS = ["--case", "clip", "--n", "1024", "--n", "65536", "--n", "262144", "--d", "512", "--d", "128"]

    def test_ours_is_compiled_at_a_small_size(self):
        found = jobs(parse_arguments([*self.POINTS, "--implementation", "ours"]))
        assert [(job[0], job[1], job[-2], job[-1]) for job in found] == [
            ("clip", d, "ours", (1024, MOST_ROWS)) for d in (512, 128)
        ]

    def test_graphs_are_compiled_at_their_own_sizes(self):
        sizes = {job[-2]: job[-1] for job in jobs(parse_arguments([*self.POINTS, "--compiled"]))}
        assert sizes["compiled_one_product"] == (1024, 65536, 262144)
        assert "eager_one_product" not in sizes and sizes["ours"] == (1024, MOST_ROWS)

    def test_an_error_is_told_and_no_more(self, capfd):
        side_by_side(divmod, [(7, 2), (7, 0), (9, 3)], 2)
        told = capfd.readouterr().out
        assert told.count(": compiled") == 2 and "7 0: not compiled: ZeroDivisionError" in told

    @pytest.mark.parametrize("d", [64, 144])
    @pytest.mark.parametrize("case", ["clip", "siglip", "nt_xent"])
    def test_small_sizes_meet_every_variant_of_a_kernel(self, case, d):
        triton = pytest.importorskip("triton")
        if triton.knobs.runtime.interpret:
            pytest.skip("launches are compiled ones here")
        warmed = set().union(*(variants_at(case, n, d) for n in (1024, 8192, MOST_ROWS)))
        assert set() != variants_at(case, MOST_ROWS + 32768, d) <= warmed


def variants_at(case: str, n: int, d: int) -> set:
    """What the kernels of a step are compiled for, by launches that are recorded and not made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench.triton_resources import _Driver
    from replearn_kernels.engine import backends
    from replearn_kernels.engine.backends.triton import TritonBackend

    found = set()

    def record(self, *args, grid, warmup, **options):
        seen = [
            "int" if number in self.do_not_specialize or name in self.do_not_specialize else specialised(value)
            for number, (name, value) in enumerate(zip(self.arg_names, args))
        ]
        found.add((self.fn.__name__, *seen, *sorted((k, str(v)) for k, v in options.items())))

    [implementation] = implementations(CASES[case], ["triton"], ["ours[triton]"])
    with (
        mock.patch.object(driver, "_active", _Driver(GPUTarget("cuda", 90, 32))),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(backends, "why_no_triton", lambda *_: None),
        mock.patch.object(TritonBackend, "addmm_", staticmethod(lambda *_: None)),
    ):
        implementation.prepare(Point(n, d, "bf16", "cpu").make_inputs(CASES[case]))()
    return found


def specialised(value):
    """As Triton's compiler sees an argument."""
    if isinstance(value, tuple):
        return tuple(map(specialised, value))
    if hasattr(value, "block_shape"):  # a descriptor, of Triton or of Gluon
        return value.base.dtype, *value.block_shape
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % 16 == 0
    return str(value)


class TestProfile:
    def test_busy_time_counts_overlaps_once(self):
        assert busy([]) == 0
        assert busy([("b", 5.0, 9.0), ("a", 0.0, 4.0), ("c", 6.0, 7.0), ("d", 8.0, 12.0)]) == 4 + 7

    def test_kernels_by_time(self):
        events = [("short", 0.0, 300.0), ("long", 300.0, 3300.0), ("short", 4000.0, 4300.0)]
        shown = [(kernel.name, kernel.per_step * STEPS, kernel.ms_per_step * STEPS) for kernel in kernels_of(events)]
        assert shown == [("long", 1, pytest.approx(3.0)), ("short", 2, pytest.approx(0.6))]

    def test_a_step_on_a_cpu(self, tmp_path):
        point = Point(64, 16, "fp32", "cpu")
        step, kernels = measure("clip", point, "torch")
        assert step.wall_ms >= step.host_ms > 0 and step.launches == sum(kernel.per_step for kernel in kernels) > 1
        assert 0 < step.busy_ms <= sum(kernel.ms_per_step for kernel in kernels) * 1.001
        for _ in range(2):
            text = write(tmp_path, "clip", point, step, kernels)
        assert (tmp_path / "profile.md").read_text() == 2 * text and kernels[0].name in text
        rows = read(tmp_path / "kernels.csv")
        assert len(rows) == 2 * len(kernels) and rows[0]["case"] == "clip" and rows[-1]["name"] == kernels[-1].name
        assert float(read(tmp_path / "steps.csv")[1]["wall_ms"]) == step.wall_ms


class TestTables:
    def test_speeds_and_errors(self, tmp_path):
        clip, point = CASES["clip"], Point(16, 8, "bf16", "cuda")
        ours, *_ = implementations(clip)
        rows = [make_row("2026", clip, ours, point, m) for m in ({"round_ms": [1.0, 2.0, 4.0]}, {"error": "no room"})]
        append(rows, tmp_path / "loss_clip_cuda.csv")
        first, second = speed_table(tmp_path).splitlines()[2:]
        assert first.startswith("| clip | 8 | 16 | bf16 | ours | 2 | 1.2 to 3.6 |")
        assert second == "| clip | 8 | 16 | bf16 | ours |  |  |  | no room |"

    def test_configurations(self, tmp_path):
        gpu_configs = pytest.importorskip("bench.gpu_configs")
        table = gpu_configs.Table(tmp_path, argparse.Namespace(device="cpu", dtype="bf16"))
        times = iter([4.0, 2.0])
        with mock.patch.object(gpu_configs, "median_ms", lambda step, device: step()):
            for config, step in (("a", times.__next__), ("b", times.__next__), ("c", lambda: 1 / 0)):
                table.time(step, 8e9, kernel="k", config=config, shipped="yes" if config == "a" else "", n=1, d=1)
        errors = [row["error"] for row in read(tmp_path / "configs.csv")]
        assert errors == ["", "", "ZeroDivisionError: division by zero"]
        expected = "| k | 4 ms, 2 TFLOP/s: a | 2 ms, 4 TFLOP/s: b | 2 | 1 |"
        assert configs_table(tmp_path).splitlines()[2:] == [expected]
