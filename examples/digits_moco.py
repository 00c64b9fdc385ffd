"""MoCo on handwritten digits: a query tells its key from a queue of keys of the batches before, and from them alone.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020 (arXiv:1911.05722).

    python examples/digits_moco.py --output-dir demo_output
"""

import copy
from pathlib import Path

import plots
import torch.nn.functional as F
import typer
from augment import Views
from digits import Digits, load_split
from encoders import PROJECTION, encoder, projection_head
from evaluate import Scores, encode, probe
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare

from replearn_kernels import MomentumEncoder, NegativeQueue, info_nce_loss

TEMPERATURE = 0.2
MOMENTUM = 0.99
QUEUE_SIZE = 1024  # four batches: from an epoch on, the queue would hold every query's own image


def train(f_q: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains the query encoder ``f_q``, head included; returns the loss of every step."""
    view = Views()
    f_k = MomentumEncoder(f_q, MOMENTUM)
    queue = NegativeQueue(QUEUE_SIZE, PROJECTION, device=data.images.device)
    training = Training(f_q.parameters(), data, epochs)
    for images, _ in training:
        query = F.normalize(f_q(view(images)), dim=1)
        key = F.normalize(f_k(view(images)), dim=1)
        negatives = queue.negatives()
        loss = info_nce_loss(query, key, negatives=negatives, batch_negatives=False, logit_scale=1 / TEMPERATURE)
        training.step(loss)
        f_k.update(f_q)
        queue.push(key)
    return training.losses


def main(
    epochs: Epochs = 60,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> tuple[Scores, Scores]:
    """Train an encoder of handwritten digits with MoCo, without labels, and probe its features."""
    prepare(seed, output_dir)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    backbone, head = encoder().to(device), projection_head().to(device)
    untrained = copy.deepcopy(backbone)
    losses = train(nn.Sequential(backbone, head), train_data, epochs)

    features = encode(untrained, held_out), encode(backbone, held_out)
    plots.save_training("MoCo loss", losses, *features, output_dir / "digits_moco.png")
    return probe("MoCo", untrained, backbone, train_data, held_out)


if __name__ == "__main__":
    typer.run(main)
