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


def train(rank, checkpoint, fail_in_epoch=-1):
    from train_clip_distributed import train

    try:
        return train(EPOCHS, checkpoint, 0, torch.device("cpu"), fail_in_epoch)
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
