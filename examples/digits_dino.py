"""DINO on handwritten digits: a student predicts, from any view, what its teacher makes of another.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021 (arXiv:2104.14294).

    python examples/digits_dino.py --output-dir demo_output
"""

import copy
from pathlib import Path

import plots
import torch
import torch.nn.functional as F
import typer
from augment import Views
from digits import Digits, load_split
from encoders import PROJECTION, encoder, projection_head
from evaluate import Scores, encode, probe
from torch import Tensor, nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, prepare

from replearn_kernels import DINOLoss, MomentumEncoder

PROTOTYPES = 256
MOMENTUM = 0.99
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 2


class Prototypes(nn.Module):
    """Cosines of features [N, PROJECTION] with each prototype: the logits [N, PROTOTYPES]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(PROTOTYPES, PROJECTION))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def train(student: nn.Module, data: Digits, epochs: int) -> tuple[nn.Module, list[float]]:
    """Trains the student, heads included; returns the teacher and the loss of every step."""
    global_view, local_view = Views(), Views(zoom=(1.0, 1.5))
    teacher = MomentumEncoder(student, MOMENTUM)
    dino_loss = DINOLoss(PROTOTYPES).to(data.images.device)
    training = Training(student.parameters(), data, epochs)
    for images, _ in training:
        global_views = torch.cat([global_view(images) for _ in range(GLOBAL_VIEWS)])
        local_views = torch.cat([local_view(images) for _ in range(LOCAL_VIEWS)])
        student_logits = student(torch.cat([global_views, local_views])).unflatten(0, (-1, len(images)))
        teacher_logits = teacher(global_views).unflatten(0, (-1, len(images)))
        training.step(dino_loss(student_logits, teacher_logits, training.epoch))
        teacher.update(student)
    return teacher.encoder, training.losses


def main(
    epochs: Epochs = 30,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> tuple[Scores, Scores]:
    """Train an encoder of handwritten digits with DINO, without labels, and probe the teacher's features."""
    prepare(seed, output_dir)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    backbone = encoder()
    untrained = copy.deepcopy(backbone).to(device)
    # What all images share must go before they are normalised, or the teacher, centered, is left without an opinion.
    centered_head = nn.Sequential(projection_head(), nn.BatchNorm1d(PROJECTION, affine=False), Prototypes())
    student = nn.Sequential(backbone, centered_head).to(device)
    (teacher, *_), losses = train(student, train_data, epochs)

    features = encode(untrained, held_out), encode(teacher, held_out)
    plots.save_training("DINO loss", losses, *features, output_dir / "digits_dino.png")
    return probe("DINO", untrained, teacher, train_data, held_out)


if __name__ == "__main__":
    typer.run(main)
