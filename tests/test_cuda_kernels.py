"""The CUDA kernels, without a GPU: their source run on the CPU (tests/cuda_shim), and compiled by nvcc."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from brute_force_mining import DISTANCES, MODES, distances, mine
from cuda_shim import build

from bench import cuda_resources
from replearn_kernels.engine import native

needs_shim = pytest.mark.skipif(build.why_missing() is not None, reason=str(build.why_missing()))
needs_sanitizers = pytest.mark.skipif(build.why_no_sanitizers() is not None, reason=str(build.why_no_sanitizers()))
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))

NVCC = cuda_resources.find_nvcc()

# The order of threads and blocks, and streaming multiprocessors: how finely the work is split.
RUNS = [("ascending", 1), ("descending", 40), ("random", 3)]
MARGIN = 0.3


@pytest.fixture
def shim():
    yield build.module()
    build.module().set_options()


def arrays(x, labels):
    """numpy knows no bfloat16: its bits go as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy(), labels.numpy()


def mined(shim, x, labels, mode, distance, processors=1, margin=MARGIN):
    return np.stack(shim.mine_triplets(*arrays(x, labels), mode, margin, distance, processors), axis=1)


def brute_force(x, labels):
    """(mode, distance) and the triplets expected, for all of them."""
    for distance in DISTANCES:
        d = distances(x, distance)
        for mode in MODES:
            yield mode, distance, np.array(mine(d, labels, mode, MARGIN), dtype=np.int64).reshape(-1, 3)


def check(shim, x, labels, expected, every_run=True):
    """In every run, or in each by turns."""
    for i, (mode, distance, triplets) in enumerate(expected):
        for seed, (order, processors) in enumerate(RUNS if every_run else [RUNS[i % len(RUNS)]]):
            shim.set_options(order, seed)
            result = mined(shim, x, labels, mode, distance, processors)
            assert np.array_equal(result, triplets), (mode, distance, order, processors)


def sample(n, d, classes, dtype=torch.float32):
    """Rounded, so that there are ties; with duplicates and a row of zeros."""
    x = torch.randn(n, d).round(decimals=1)
    x[n // 2 :: 7] = x[: len(x[n // 2 :: 7])].clone()
    x[n // 3 : n // 3 + 1] = 0
    return x.to(dtype), torch.randint(classes, (n,))


@needs_shim
class TestAgainstBruteForce:
    @pytest.mark.parametrize("n, d, classes", [(1, 3, 1), (2, 3, 1), (2, 3, 2), (3, 1, 2), (63, 48, 5), (65, 3, 9)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_random(self, shim, n, d, classes, dtype):
        x, labels = sample(n, d, classes, dtype)
        check(shim, x, labels, brute_force(x, labels))

    LABELS = {
        "one class": torch.zeros(40, dtype=torch.int64),
        "all distinct": torch.arange(40).flip(0),
        "two classes": torch.arange(40) % 2,
        "singletons among pairs": torch.tensor([0, 1, 2, 3, 4, 3, 2, 5] * 5) + 10 * torch.arange(40).div(8).long(),
        "large": torch.randint(4, (40,)) * (2**62) - 2**63,
    }

    @pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
    def test_labels(self, shim, labels):
        x, _ = sample(40, 5, 1)
        check(shim, x, labels, brute_force(x, labels))

    @pytest.mark.parametrize(
        "x",
        [torch.zeros(70, 0), torch.ones(70, 3), torch.eye(70), torch.randint(2, (70, 2)).float()],
        ids=["no features", "one point", "all as far", "four points"],
    )
    def test_ties(self, shim, x):
        labels = torch.randint(6, (70,))
        check(shim, x, labels, brute_force(x, labels))

    @pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
    def test_magnitudes(self, shim, scale):
        """Squared distances that are subnormal, 0 or infinite; unit rows are formed at any."""
        x, labels = sample(40, 5, 4)
        check(shim, x * scale, labels, brute_force(x * scale, labels))

    def test_strides(self, shim):
        x, labels = sample(65, 6, 5)
        expected = list(brute_force(x, labels))
        wide = torch.full((130, 12), torch.nan)
        wide[1::2, ::2] = x
        for view in (x.t().contiguous().t(), wide[1::2, ::2]):
            check(shim, view, labels, expected)


SIZES = [
    (257, 100, 20, torch.float32),
    (257, 48, 9, torch.bfloat16),
    (130, 100, 5, torch.float64),
    (130, 1, 2, torch.float16),  # more pairs than a block has in flight
    (320, 17, 200, torch.float32),  # whole tiles; most classes are small
]


def by_operator(x, labels):
    """(mode, distance) and the operator's triplets, for all of them."""
    for distance in DISTANCES:
        for mode in MODES:
            triplets = torch.ops.replearn_kernels.mine_triplets(x, labels, mode, MARGIN, distance)
            yield mode, distance, torch.stack(triplets, dim=1)


@needs_shim
@needs_native
@pytest.mark.parametrize("n, d, classes, dtype", SIZES)
def test_same_triplets_as_on_the_cpu(shim, n, d, classes, dtype):
    x, labels = sample(n, d, classes, dtype)
    check(shim, x, labels, by_operator(x, labels), every_run=False)


@needs_native
@pytest.mark.gpu
@pytest.mark.parametrize("n, d, classes, dtype", [*SIZES, (1, 3, 1, torch.float32), (3000, 129, 700, torch.float32)])
def test_on_the_gpu(n, d, classes, dtype):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("replearn_kernels::mine_triplets", "CUDA"):
        pytest.skip("the operator was built without CUDA: see setup.py")
    x, labels = sample(n, d, classes, dtype)
    for (mode, distance, expected), (*_, result) in zip(by_operator(x, labels), by_operator(x.cuda(), labels.cuda())):
        assert torch.equal(result.cpu(), expected), (mode, distance)


@needs_shim
def test_half_precision_is_read_exactly(shim):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for values, dtype in ((shim.values_of_float16(), torch.float16), (shim.values_of_bfloat16(), torch.bfloat16)):
        np.testing.assert_array_equal(values, bits.view(dtype).float().numpy())


@needs_shim
class TestTheShimItself:
    """What a correct kernel never shows is seen when a kernel is wrong."""

    @pytest.mark.parametrize(
        "kernel, message",
        [
            ("one_thread_skips_the_barrier", "thread 0 waits in .* thread 5 has ended"),
            ("a_barrier_in_each_branch", "thread 0 waits in .* thread 32 waits in"),
            ("half_a_warp_shuffles", "thread 0 waits in .* thread 16 has ended"),
            ("a_part_of_the_mask", "only whole warps"),
        ],
    )
    @pytest.mark.parametrize("order", ["ascending", "descending", "random"])
    def test_threads_that_wait_for_others_in_vain(self, shim, kernel, message, order):
        shim.set_options(order)
        with pytest.raises(RuntimeError, match=message):
            shim.run_wrong_kernel(kernel)

    def test_shared_memory_is_not_zero_before_it_is_written(self, shim):
        assert shim.run_wrong_kernel("reads_what_nobody_wrote") == [-1] * 64

    def test_a_race_depends_on_the_order_of_threads(self, shim):
        results = []
        for order, _ in RUNS:
            shim.set_options(order)
            results.append(shim.run_wrong_kernel("reads_its_neighbour_without_a_barrier"))
        assert results[0] != results[1] != results[2] != results[0]

    def test_every_barrier_is_missed_when_left_out(self, tmp_path):
        """Without any one barrier, some order of threads crashes or gives another result."""
        barriers = [
            f"{path.name}:{number}"
            for path in build.SOURCES.glob("cuda/*.cuh")
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if "__syncthreads()" in line
        ]
        inputs = [sample(130, 40, 2), (torch.zeros(130, 0), torch.arange(130) % 2)]
        calls = [
            ("mine_triplets", (*arrays(*pair), mode, MARGIN, "euclidean", 1))
            for pair in inputs
            for mode in ("semi_hard", "batch_all_hard")
        ]
        _, *expected = build.run_apart("plain", [("set_options", ()), *calls], tmp_path).results
        assert barriers
        for barrier in barriers:
            options = (("set_options", (order, 0, barrier)) for order, _ in RUNS)
            runs = (build.run_apart("plain", [option, *calls], tmp_path) for option in options)
            assert any(not run.ok or not same(run.results[1:], expected) for run in runs), barrier


def same(results, others):
    return all(np.array_equal(a, b) for a, b in zip(results, others, strict=True))


def calls_of(x, labels, of=DISTANCES):
    arguments = arrays(x, labels)
    return [("mine_triplets", (*arguments, mode, MARGIN, distance, 3)) for distance in of for mode in MODES]


@needs_shim
@needs_sanitizers
class TestUnderSanitizers:
    def test_no_complaint_and_the_same_result(self, shim, tmp_path):
        """Ragged sizes, all dtypes, NaN and infinite features, for which any triplet may come, but a valid one."""
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        sizes = [(65, 17), (3, 0), (66, 3), (40, 1)]
        inputs = [sample(*size, 3, dtype) for size, dtype in zip(sizes, dtypes)]
        x, labels = sample(65, 3, 4)
        x[::3], x[1::3] = torch.nan, torch.inf
        inputs += [(x, labels), (torch.full((20, 3), torch.nan), labels[:20])]
        calls = calls_of(*inputs[0])  # every distance; then the one that has a kernel of its own
        calls += [call for pair in inputs[1:] for call in calls_of(*pair, of=["cosine"])]
        calls += [("values_of_float16", ()), ("values_of_bfloat16", ())]
        run = build.run_apart("sanitized", calls, tmp_path)
        assert run.ok, run.errors
        for (name, arguments), result in zip(calls, run.results, strict=True):
            np.testing.assert_array_equal(result, getattr(shim, name)(*arguments))
            if name == "mine_triplets":
                anchor, positive, negative = (arguments[1][indices] for indices in result)
                assert (anchor == positive).all() and (anchor != negative).all() and (result[0] != result[1]).all()

    @pytest.mark.parametrize(
        "variant, call, place",
        [
            ("out_of_bounds", calls_of(*sample(65, 17, 3))[0], "stage<float>"),
            ("sanitized", ("run_wrong_kernel", ("writes_past_shared_memory",)), "writes_past_shared_memory"),
        ],
        ids=["features behind the last row", "past the end of shared memory"],
    )
    def test_out_of_bounds_is_noticed(self, variant, call, place, tmp_path):
        run = build.run_apart(variant, [call], tmp_path)
        assert not run.ok and "heap-buffer-overflow" in run.errors and place in run.errors


@pytest.fixture(scope="module", autouse=True)
def compiled(request, tmp_path_factory):
    """The table's rows, in the future: nvcc takes a minute, beside the other tests."""
    if NVCC is None or not any(item.name.startswith("test_operator_compiles") for item in request.session.items):
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(cuda_resources.compile_for_all, NVCC, tmp_path_factory.mktemp("nvcc") / "mine_triplets.o")


class TestNvcc:
    @pytest.mark.skipif(NVCC is None, reason="no nvcc: set CUDA_HOME, or put it on the path")
    def test_operator_compiles_without_spills_as_the_table_says(self, compiled):
        rows = compiled.result()
        assert [problem for row in rows for problem in row.problems()] == []
        committed = cuda_resources.load()
        outdated = "the table is out of date: run python -m bench.cuda_resources"
        assert [row.case for row in rows] == [row.case for row in committed], outdated
        if rows[0].nvcc == committed[0].nvcc:
            assert [row.figures for row in rows] == [row.figures for row in committed], outdated

    def test_table_is_clean(self):
        rows = cuda_resources.load()
        assert {row.target for row in rows} == {f"sm_{number}" for number in cuda_resources.TARGETS}
        assert [problem for row in rows for problem in row.problems()] == []
