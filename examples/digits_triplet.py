"""Triplets of handwritten digits, as FaceNet mines them in the batch: it tells apart digits that it never saw.

Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", 2015 (arXiv:1503.03832).

    python examples/digits_triplet.py --output-dir demo_output
"""

from pathlib import Path

import typer
from augment import Views
from digits import Digits
from evaluate import Scores
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare
from unseen import cross_validate, report

from replearn_kernels import TripletMarginLoss

MARGIN = 0.2  # the paper's


def train(f: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains encoder ``f``; returns the loss of every step."""
    triplet_margin_loss = TripletMarginLoss(margin=MARGIN, mining="semi_hard", normalize=True)
    view = Views()
    training = Training(f.parameters(), data, epochs)
    for images, labels in training:
        training.step(triplet_margin_loss(f(view(images)), labels))
    return training.losses


def main(
    epochs: Epochs = 10,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> dict[str, Scores]:
    """Train with FaceNet's triplets on some digits, three times, and retrieve and verify the others."""
    prepare(seed, output_dir)
    folds = cross_validate(train, epochs, device)
    return report("Triplet margin", folds, output_dir / "digits_triplet.png")


if __name__ == "__main__":
    typer.run(main)
