"""SigLIP on handwritten digits: every pair of an image and a caption is classified on its own, as matching or not.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023 (arXiv:2303.15343).

    python examples/digits_siglip.py --output-dir demo_output
"""

from pathlib import Path

import plots
import typer
from digits import Digits, DualEncoder, draw_captions, load_split
from evaluate import Scores
from training import DEFAULT_DEVICE, Device, Epochs, OutputDir, Seed, Training, console, prepare
from zero_shot import evaluate, result_table

from replearn_kernels import SigLipLoss

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0  # the paper's: at first, hardly any pair is thought to match


def train(model: DualEncoder, data: Digits, epochs: int) -> list[float]:
    """Trains on images with captions in new wordings every epoch; returns the loss of every step."""
    siglip_loss = SigLipLoss()
    training = Training(model.parameters(), data, epochs)
    for images, labels in training:
        image_features, text_features, scale, bias = model(images, draw_captions(labels))
        training.step(siglip_loss(image_features, text_features, scale, bias))
    return training.losses


def main(
    epochs: Epochs = 100,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    device: Device = DEFAULT_DEVICE,
) -> Scores:
    """Train image and text encoders of handwritten digits with SigLIP, and name held-out digits zero-shot."""
    prepare(seed, output_dir)
    train_data, held_out = load_split(seed)
    model = DualEncoder(scale=INITIAL_SCALE, bias=INITIAL_BIAS).to(device)
    losses = train(model, train_data.to(device), epochs)
    evaluation = evaluate(model.cpu(), held_out)
    console.print(result_table(evaluation))
    console.print(f"learned scale {model.log_scale.exp().item():.1f}, bias {model.bias.item():.1f}")
    plots.save_digits(evaluation, "SigLIP loss", losses, output_dir / "digits_siglip.png")
    return {"zero-shot accuracy": evaluation.zero_shot_accuracy, "recall@1": evaluation.recall_at_1}


if __name__ == "__main__":
    typer.run(main)
