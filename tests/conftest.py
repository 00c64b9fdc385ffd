import pytest
import torch

from replearn_kernels.engine import native, schedules

BACKENDS = ["torch", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """The backends that run on this CPU."""
    if request.param == "cpp" and not native.available():
        pytest.skip(f"cpp backend: {native.why_missing()}")
    return request.param


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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU; say so instead of failing."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
