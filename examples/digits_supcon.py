"""Supervised contrastive learning on handwritten digits: all views of all images of a digit agree.

Khosla et al., "Supervised Contrastive Learning", 2020 (arXiv:2004.11362).

    python examples/digits_supcon.py --output-dir demo_output
"""

import copy
from pathlib import Path

import plots
import torch
import typer
from augment import Views
from digits import Digits, load_split
from encoders import encoder, projection_head
from evaluate import Scores, encode, probe
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare

from replearn_kernels import SupConLoss

TEMPERATURE = 0.1


def train(f: nn.Module, g: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains encoder ``f`` under projection head ``g``; returns the loss of every step."""
    sup_con_loss = SupConLoss(TEMPERATURE)
    view = Views()
    training = Training([*f.parameters(), *g.parameters()], data, epochs)
    for images, labels in training:
        views = [g(f(view(images))) for _ in range(2)]
        training.step(sup_con_loss(torch.stack(views, dim=1), labels))
    return training.losses


def main(
    epochs: Epochs = 40,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> tuple[Scores, Scores]:
    """Train an encoder of handwritten digits with supervised contrastive learning, and probe its features."""
    prepare(seed, output_dir)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    f, g = encoder().to(device), projection_head().to(device)
    untrained = copy.deepcopy(f)
    losses = train(f, g, train_data, epochs)

    features = encode(untrained, held_out), encode(f, held_out)
    plots.save_training("SupCon loss", losses, *features, output_dir / "digits_supcon.png")
    return probe("SupCon", untrained, f, train_data, held_out)


if __name__ == "__main__":
    typer.run(main)
