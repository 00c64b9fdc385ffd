"""The distributed example: training on two ranks, and with a checkpoint on after one of them was killed."""

import sys
from pathlib import Path

import pytest
import torch
from processes import Ranks, needs_gloo

for library in ("sklearn", "rich", "typer"):
    pytest.importorskip(library)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

EPOCHS = 12


def train(rank, checkpoint, fail_in_epoch=-1, epochs=EPOCHS, **options):
    from train_clip_distributed import train

    try:
        return train(epochs, checkpoint, 0, torch.device("cpu"), fail_in_epoch, **options)
    except RuntimeError:
        return "the other rank is gone"


@needs_gloo
def test_training_resumes_after_a_rank_was_killed(tmp_path):
    """It ends with the weights, to the bit, of a training that nobody disturbed."""
    checkpoints = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    with Ranks(2, tmp_path) as ranks:
        accuracy, _ = ranks.run(train, checkpoints[0])
        assert accuracy > 0.6
        assert ranks.run(train, checkpoints[1], 3, dying=frozenset({1}))[0] == "the other rank is gone"
        assert torch.load(checkpoints[1])["epochs_done"] == 3
        again, _ = ranks.run(train, checkpoints[1])
    undisturbed, killed = (torch.load(checkpoint)["model"] for checkpoint in checkpoints)
    assert again == accuracy and all(torch.equal(undisturbed[name], killed[name]) for name in undisturbed)


def in_chunks(rank, checkpoint, chunk):
    return train(rank, checkpoint, epochs=1, chunk=chunk)


@needs_gloo
def test_chunks_of_the_batch_train_as_the_whole_does(tmp_path):
    """The gradients of the whole batch, while activations live for a chunk: the same weights, up to rounding."""
    with Ranks(2, tmp_path) as ranks:
        for chunk in (480, 50):
            ranks.run(in_chunks, tmp_path / f"{chunk}.pt", chunk)
    whole, chunks = (torch.load(tmp_path / f"{chunk}.pt")["model"] for chunk in (480, 50))
    for name in whole:
        torch.testing.assert_close(chunks[name], whole[name], rtol=1e-3, atol=1e-4)


def test_a_cached_gradient_is_the_gradient():
    from gradient_cache import cached_backward

    from replearn_kernels import clip_loss

    torch.manual_seed(0)
    image, text, scale = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4), torch.nn.Parameter(torch.tensor(0.7))
    model = torch.nn.Module()
    model.image, model.text, model.scale = image.double(), text.double(), scale
    model.forward = lambda x, y: (image(x), text(y), scale.exp(), None)
    x, y = torch.randn(23, 6).double(), torch.randn(23, 5).double()

    def loss(image_features, text_features, logit_scale, nothing):
        return clip_loss(image_features, text_features, logit_scale)

    results = []
    for size in (23, 5):
        model.zero_grad()
        value = cached_backward(model, loss, list(zip(x.split(size), y.split(size))))
        results.append([value, *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
