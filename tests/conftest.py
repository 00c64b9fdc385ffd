import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from replearn_kernels.engine import native, schedules
from replearn_kernels.retrieval import walk

BACKENDS = ["torch", "cpp"]
# What the tests compile stays in the checkout, and is there the next time.
os.environ.setdefault("REPLEARN_KERNELS_CACHE", str(Path(__file__).parents[1] / "build" / "declared_losses"))
# The files that take longest, of those without and with the interpreter. They run first: a worker that is given one of
# them last would keep all others waiting.
LONGEST = [
    "test_operators", "test_triton", "test_distributed", "test_cuda_kernels", "test_mining", "test_distributed_example",
    "test_native_sanitizers", "test_examples", "test_triton_distances", "test_triton_tma", "test_triton_ends",
    "test_fuzz", "test_metric_losses", "test_host_time", "test_distributed_rows", "test_batch_losses",
    "test_distributed_faults", "test_cpp_lanes", "test_pytest_outcomes", "test_typing", "test_triton_family",
    "test_distributed_work", "test_compile", "test_gluon",
]  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """The backends that run on this CPU."""
    if request.param == "cpp" and not native.available():
        pytest.skip(f"cpp backend: {native.why_missing()}")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For problems so small that threads gain nothing, and lose much where other files are tested beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """The triton backend with tiles of 32 x 16, that a small problem has several of: on a diagonal, and off it."""
    from replearn_kernels.engine.backends.triton import TritonBackend

    asked = []

    def tile_shape(*args):
        asked.append(args)
        return 32, 16

    monkeypatch.setattr(TritonBackend, "tile_shape", staticmethod(tile_shape))
    schedules._make_plan.cache_clear()  # plans made with other tiles
    yield
    schedules._make_plan.cache_clear()
    assert asked


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32 filter", "bf16 filter"])
def filter_dtype(request, monkeypatch):
    """Of retrieval. bf16 products are right on every processor, only not fast."""
    monkeypatch.setattr(walk, "_first_dtype", lambda scores: request.param)


@pytest.fixture
def small_walk(monkeypatch):
    """Retrieval by tiles that a small problem has several of."""
    monkeypatch.setattr(walk, "_CPU_TILE", (16, 48))


@pytest.fixture
def cut_products(monkeypatch):
    """Where torch is told of a lower precision of fp32 products, retrieval's are of operands that are cut as a GPU's
    units may cut them: tf32 for "high"."""

    @contextmanager
    def cut(precision):
        before, mm, bits = torch.get_float32_matmul_precision(), torch.mm, {"high": 13, "medium": 16}[precision]

        def rounded(x):
            return (x.view(torch.int32) >> bits << bits).view(torch.float32) if x.dtype == torch.float32 else x

        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", lambda a, b, out: mm(rounded(a), rounded(b.T.contiguous()).T, out=out))
            try:
                torch.set_float32_matmul_precision(precision)
                yield
            finally:
                torch.set_float32_matmul_precision(before)

    return cut


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Long files first. GPU tests need a GPU; say so instead of failing."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
