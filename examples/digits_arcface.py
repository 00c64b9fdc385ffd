"""ArcFace on handwritten digits: trained on the digits 0 to 6, it tells apart 7, 8 and 9, which it never saw.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019 (arXiv:1801.07698).

    python examples/digits_arcface.py --output-dir demo_output
"""

import copy
from pathlib import Path

import plots
import typer
from augment import Views, turned
from digits import Digits, load_images, load_split
from encoders import FEATURES, encoder
from evaluate import Features, Scores, encode, recall_at_1, score_table, verification_curve
from torch import nn
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, console, prepare

from replearn_kernels import ArcFaceLoss

SEEN_DIGITS = 7  # 0 to 6
SCALE = 16.0  # the paper's 64 is for many thousand classes
CHANCE = {
    "recall@1, unseen digits": 1 / 3,
    "verification AUC, unseen digits": 0.5,
    "TAR at 1% FAR, unseen digits": 0.01,
    "recall@1, seen digits": 1 / 7,
}


def train(f: nn.Module, data: Digits, epochs: int) -> list[float]:
    """Trains encoder ``f``, and the class centres that the loss owns; returns the loss of every step."""
    arcface_loss = ArcFaceLoss(FEATURES, len(data.labels.unique()), scale=SCALE).to(data.images.device)
    view = Views()
    training = Training([*f.parameters(), *arcface_loss.parameters()], data, epochs)
    for images, labels in training:
        training.step(arcface_loss(f(view(images)), labels))
    return training.losses


def scores(unseen: Features, seen: Features) -> Scores:
    """Retrieval and verification among images of new digits, and retrieval among held-out images of known ones."""
    curve = verification_curve(unseen)
    values = recall_at_1(unseen), curve.auc, curve.tar_at_far(0.01), recall_at_1(seen)
    return dict(zip(CHANCE, values, strict=True))


def main(
    epochs: Epochs = 20,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> tuple[Scores, Scores]:
    """Train an encoder of the digits 0 to 6 with ArcFace, and retrieve and verify images of 7, 8 and 9."""
    prepare(seed, output_dir)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    f = encoder().to(device)
    untrained = copy.deepcopy(f)
    losses = train(f, turned(train_data[train_data.labels < SEEN_DIGITS]), epochs)

    images = load_images().to(device)
    unseen, seen = images[images.labels >= SEEN_DIGITS], held_out[held_out.labels < SEEN_DIGITS]
    before, after = (scores(encode(model, unseen), encode(model, seen)) for model in (untrained, f))
    title = f"ArcFace, {len(unseen)} images of unseen digits"
    console.print(score_table(title, {"trained": after, "untrained": before}, CHANCE))
    features = encode(untrained, held_out), encode(f, held_out)
    plots.save_training("ArcFace loss", losses, *features, output_dir / "digits_arcface.png")
    return before, after


if __name__ == "__main__":
    typer.run(main)
