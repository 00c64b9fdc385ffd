"""SimCLR on handwritten digits: two random views of an image agree, and differ from all other views of the batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020 (arXiv:2002.05709).

    python examples/digits_simclr.py --output-dir demo_output
"""

import copy
from pathlib import Path

import plots
import typer
from augment import Views
from digits import Digits, load_split
from encoders import encoder, projection_head
from evaluate import Scores, encode, probe
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare

from replearn_kernels import NTXentLoss

TEMPERATURE = 0.2


def train(f: nn.Module, g: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains encoder ``f`` under projection head ``g``; returns the loss of every step."""
    nt_xent_loss = NTXentLoss(TEMPERATURE)
    view = Views()
    training = Training([*f.parameters(), *g.parameters()], data, epochs)
    for images, _ in training:
        z_i, z_j = g(f(view(images))), g(f(view(images)))
        training.step(nt_xent_loss(z_i, z_j))
    return training.losses


def main(
    epochs: Epochs = 60,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> tuple[Scores, Scores]:
    """Train an encoder of handwritten digits with SimCLR, without labels, and probe its features."""
    prepare(seed, output_dir)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    f, g = encoder().to(device), projection_head().to(device)
    untrained = copy.deepcopy(f)
    losses = train(f, g, train_data, epochs)

    features = encode(untrained, held_out), encode(f, held_out)
    plots.save_training("NT-Xent loss", losses, *features, output_dir / "digits_simclr.png")
    return probe("SimCLR", untrained, f, train_data, held_out)


if __name__ == "__main__":
    typer.run(main)
