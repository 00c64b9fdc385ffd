"""CLIP on handwritten digits: the whole training set is one batch of the fused loss.

Trains two small encoders, names held-out digits zero-shot, retrieves captions never seen in
training, and compares the cost of the fused loss with the eager one for growing batches.

    python examples/digits_clip.py --output-dir demo_output
"""

from pathlib import Path
from typing import Annotated

import plots
import typer
from digits import Digits, DualEncoder, draw_captions, load_split
from rich.table import Table
from scaling import Figure, scaling
from torch import Tensor
from training import OutputDir, Seed, Training, console, prepare
from zero_shot import evaluate, result_table

from replearn_kernels import ClipLoss


def train(model: DualEncoder, data: Digits, steps: int) -> list[float]:
    """Trains on all of ``data`` as one batch per step; returns the loss of every step."""
    clip_loss = ClipLoss()
    training = Training(model.parameters(), data, epochs=steps, batch_size=len(data))
    for images, labels in training:
        # New wordings every step, or the image encoder would learn each image's by heart.
        training.step(clip_loss(*model(images, draw_captions(labels))))
    return training.losses


def loss_floor(labels: Tensor) -> float:
    """The loss of encoders that know every digit and nothing else about image or wording.

    Labels [N]. An image then finds its caption among the captions of its digit by chance, so
    the floor is the mean log of how many there are.
    """
    return labels.bincount()[labels].log().mean().item()


def scaling_table(figures: list[Figure]) -> Table:
    """Time and peak memory of a step, one row per batch size."""
    table = Table(
        title="CLIP loss, forward + backward",
        caption="~ estimated: grown by the square of N from the largest batch measured",
    )
    for name in ("N", "eager", "fused", "speed-up", "eager peak", "fused peak", "ratio"):
        table.add_column(name, justify="right")
    by_size: dict[int, dict[str, Figure]] = {}
    for figure in figures:
        by_size.setdefault(figure.n, {})[figure.implementation] = figure
    for n, pair in by_size.items():
        eager, fused = pair["eager"], pair["fused"]
        mark = "~" if eager.estimated else ""
        table.add_row(
            f"{n:,}",
            f"{mark}{eager.seconds:.3f} s",
            f"{fused.seconds:.3f} s",
            f"{mark}{eager.seconds / fused.seconds:.1f}x",
            f"{mark}{eager.peak_bytes / 1e6:,.0f} MB",
            f"{fused.peak_bytes / 1e6:,.0f} MB",
            f"{mark}{eager.peak_bytes / fused.peak_bytes:.1f}x",
        )
    return table


def main(
    steps: Annotated[int, typer.Option(help="Training steps, each on all images.")] = 150,
    output_dir: OutputDir = Path("demo_output"),
    seed: Seed = 0,
    skip_scaling: Annotated[bool, typer.Option(help="Skip the comparison with eager.")] = False,
) -> None:
    """Train CLIP on handwritten digits with the fused loss, and show what it learned and cost."""
    prepare(seed, output_dir)
    train_data, held_out = load_split(seed)
    model = DualEncoder()
    console.print(f"One batch of {len(train_data)} image-caption pairs per step")
    losses = train(model, train_data, steps)
    evaluation = evaluate(model, held_out)
    console.print(result_table(evaluation))
    floor = loss_floor(train_data.labels)
    plots.save_digits(evaluation, "CLIP loss", losses, output_dir / "digits_clip.png", floor)

    if not skip_scaling:
        figures = []
        with console.status("measuring, each figure in a fresh process") as status:
            for figure in scaling():
                figures.append(figure)
                status.update(f"measured {figure.implementation} at N = {figure.n:,}")
        console.print(scaling_table(figures))
        plots.save_scaling(figures, output_dir / "scaling.png")
    console.print(f"Figures in {output_dir}/")


if __name__ == "__main__":
    typer.run(main)
