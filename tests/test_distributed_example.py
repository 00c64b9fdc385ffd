"""The distributed examples: CLIP with a checkpoint after a rank was killed, and classes spread over the ranks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Ranks, needs_gloo

for library in ("sklearn", "rich", "typer"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

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


@needs_gloo
def test_torchrun_starts_killed_ranks_again(tmp_path):
    """The command of the example's first lines, one of whose ranks dies in its second epoch."""
    example, checkpoint = EXAMPLES / "train_clip_distributed.py", tmp_path / "clip.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--epochs", "2", "--fail-in-epoch", "1", "--checkpoint", str(checkpoint)]
    done = subprocess.run([*torchrun, "--max-restarts", "1", str(example), *options], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert b"epochs done: 1" in done.stdout and torch.load(checkpoint)["epochs_done"] == 2


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


def from_one_weight(rank, classes):
    """One epoch from the same encoder and centres, whatever the number of ranks: the encoder after it."""
    import train_arcface_distributed as example
    from augment import turned
    from digits import load_images

    torch.manual_seed(0)
    data, f = turned(load_images()[:512]), example.encoder()
    whole = torch.randn(classes, example.FEATURES)
    loss = example.ArcFaceLoss(example.FEATURES, classes, scale=example.SCALE, group=torch.distributed.group.WORLD)
    with torch.no_grad():
        loss.weight.copy_(whole[loss.first_class :][: len(loss.weight)])
    torch.manual_seed(1)
    example.train(f, loss, data, 1)
    return torch.cat([parameter.detach().flatten() for parameter in f.parameters()]).numpy()


@needs_gloo
def test_spread_classes_train_as_those_of_one_rank_do(tmp_path):
    """Clipping included, whose norm is over the classes of all ranks: the same weights, up to rounding."""
    of_world = []
    for world in (1, 3):
        directory = tmp_path / str(world)
        directory.mkdir()
        with Ranks(world, directory) as ranks:
            of_ranks = ranks.run(from_one_weight, 40)
        assert all((weights == of_ranks[0]).all() for weights in of_ranks)
        of_world.append(of_ranks[0])
    np.testing.assert_allclose(*of_world, rtol=1e-3, atol=1e-4)


def clipped(rank):
    import train_arcface_distributed as example

    torch.manual_seed(0)
    common, classes = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(rank + 1, 3))
    of_common, of_classes = torch.randn(4), torch.randn(3, 3)
    own, expected = of_classes[rank : 2 * rank + 1], torch.cat([of_common, of_classes.flatten()]).norm()
    common.grad, classes.grad = of_common.clone(), own.clone()
    torch.testing.assert_close(example.clip_over_ranks([common], [classes], 0.5), expected)
    torch.testing.assert_close(common.grad, of_common * 0.5 / expected)
    torch.testing.assert_close(classes.grad, own * 0.5 / expected)


@needs_gloo
def test_classes_spread_over_two_ranks(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        ranks.run(clipped)
        (of_unseen, accuracy), _ = ranks.run(train_arcface, 10)
    assert accuracy > 20 / 28  # 28 classes
    assert of_unseen["recall@1, unseen digits"] > 0.9 and of_unseen["verification AUC, unseen digits"] > 0.8


def train_arcface(rank, epochs):
    import train_arcface_distributed as example

    example.console.quiet = True
    return example.run(epochs, 0, torch.device("cpu"))
