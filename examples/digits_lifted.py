"""Lifted structured embedding of handwritten digits: it tells apart digits that it never saw.

Oh Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", 2016 (arXiv:1511.06452).

    python examples/digits_lifted.py --output-dir demo_output
"""

from pathlib import Path

import typer
from augment import Views
from digits import Digits
from evaluate import Scores
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare
from unseen import cross_validate, report

from replearn_kernels import LiftedStructureLoss


def train(f: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains encoder ``f``; returns the loss of every step."""
    lifted_structure_loss = LiftedStructureLoss()
    view = Views()
    training = Training(f.parameters(), data, epochs)
    for images, labels in training:
        # Lengths are free, as in the paper: among unit vectors no distance exceeds 2, too little for so many negatives.
        training.step(lifted_structure_loss(f(view(images)), labels))
    return training.losses


def main(
    epochs: Epochs = 10,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> dict[str, Scores]:
    """Train with the lifted structured loss on some digits, three times, and retrieve and verify the others."""
    prepare(seed, output_dir)
    folds = cross_validate(train, epochs, device)
    return report("Lifted structured", folds, output_dir / "digits_lifted.png")


if __name__ == "__main__":
    typer.run(main)
