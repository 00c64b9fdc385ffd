"""The held buffer of kept similarities: one at a time has it, and nobody's numbers depend on it."""

import threading

import pytest
import torch
from accuracy import unit_rows

from replearn_kernels import clip_loss, empty_cache, nt_xent_loss
from replearn_kernels.engine import native, workspace

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
ELEMENTS = 2**23  # 32 MiB in fp32


@pytest.fixture(autouse=True)
def nothing_held():
    empty_cache()
    yield
    empty_cache()


def test_a_free_buffer_is_taken_again_and_one_in_use_is_not():
    first = workspace.kept.take(ELEMENTS, torch.float32)
    second = workspace.kept.take(ELEMENTS, torch.float32)
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    view = first[5:]
    del first
    assert workspace.kept.take(ELEMENTS, torch.float32).data_ptr() != place  # a view is a use
    del view
    smaller = workspace.kept.take(ELEMENTS // 2, torch.float64)
    assert smaller.data_ptr() == place and smaller.dtype == torch.float64 and smaller.shape == (ELEMENTS // 2,)
    del smaller
    assert workspace.kept.take(2 * ELEMENTS, torch.float32).shape == (2 * ELEMENTS,)  # replaced by a larger one
    assert workspace.kept.take(8, torch.float32).untyped_storage().nbytes() == 32  # small ones are nobody's


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("storage_of", [torch.Tensor.untyped_storage, torch.Tensor.storage])
def test_memory_of_which_somebody_has_the_storage_is_in_use(storage_of):
    taken = workspace.kept.take(ELEMENTS, torch.float32)
    place, storage = taken.data_ptr(), storage_of(taken)
    del taken
    assert workspace.kept.take(8 * 2**20, torch.float32).data_ptr() != place
    del storage
    assert workspace.kept.take(8 * 2**20, torch.float32).data_ptr() == place


def test_memory_that_was_made_under_a_mode_that_keeps_all_it_sees():
    class Keeps(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(function(*args, **(kwargs or {})))
            return self.seen[-1]

    with Keeps() as mode:
        place = workspace.kept.take(ELEMENTS, torch.float32).data_ptr()
        assert workspace.kept.take(ELEMENTS, torch.float32).data_ptr() != place
    mode.seen.clear()
    assert workspace.kept.take(ELEMENTS, torch.float32).data_ptr() == place


def test_another_default_device(rng):
    """Held memory is the CPU's, whatever torch.device() is at the time."""
    x, y = unit_rows(rng, 3072, 200), unit_rows(rng, 3072, 200)
    with torch.device("meta"):
        losses = [clip_loss(x, y, 10.0, backend="cpp"), nt_xent_loss(x, y), nt_xent_loss(x[:9], y[:9])]
    empty_cache()
    assert losses == [clip_loss(x, y, 10.0, backend="cpp"), nt_xent_loss(x, y), nt_xent_loss(x[:9], y[:9])]


def test_what_is_held_can_be_given_back():
    buffer = workspace.kept.take(ELEMENTS, torch.float32)
    buffer.fill_(3)
    empty_cache()
    assert not workspace.kept._buffers and (buffer == 3).all()


def test_tiles_lie_in_huge_pages():
    buffer = workspace.tile.take(2**20, torch.float32)
    assert buffer.data_ptr() % 2**21 == 0 and buffer.shape == (2**20,)
    place = buffer.data_ptr()
    del buffer
    assert workspace.tile.take(2**19, torch.float64).data_ptr() == place


def test_steps_that_overlap_do_not_disturb_each_other(rng):
    """Two losses wait for their backward passes at once, each with 36 MiB of kept similarities."""
    inputs = [unit_rows(rng, 3072, 8) for _ in range(3)]

    def loss(k):
        x = inputs[k].clone().requires_grad_()
        return x, clip_loss(x, inputs[k - 1], 10.0, backend="cpp")

    def gradient(x, value):
        return torch.autograd.grad(value, x)[0]

    alone = [gradient(*loss(k)) for k in range(3)]
    together = [loss(k) for k in range(3)]
    for expected, pair in zip(alone, together):
        assert torch.equal(gradient(*pair), expected)


def test_threads_never_share_a_buffer():
    places, barrier = [], threading.Barrier(8)

    def take():
        barrier.wait()
        buffer = workspace.kept.take(ELEMENTS, torch.float32)
        barrier.wait()
        places.append(buffer.data_ptr())

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places)) == 8
