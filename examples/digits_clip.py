"""CLIP on handwritten digits: the whole training set is one batch of the fused loss.

Trains two small encoders, names held-out digits zero-shot, retrieves captions never seen in
training, and compares the cost of the fused loss with the eager one for growing batches.

    python examples/digits_clip.py --output-dir demo_output
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import plots
import torch
import torch.nn.functional as F
import typer
from digits import (
    NUM_CLASSES,
    TRAIN_WORDINGS,
    UNSEEN_WORDINGS,
    Digits,
    DualEncoder,
    captions,
    draw_captions,
    load_split,
    tokenize,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scaling import Figure, scaling
from torch import Tensor

from replearn_kernels import ClipLoss

PEAK_LEARNING_RATE = 3e-3
console = Console()


def train(model: DualEncoder, data: Digits, steps: int) -> list[float]:
    """Trains on all of ``data`` as one batch per step; returns the loss of every step."""
    clip_loss = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps)
    losses = []
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for _ in range(steps):
            # New wordings every step, or the image encoder would learn each image's by heart.
            loss = clip_loss(*model(data.images, draw_captions(data.labels)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    return losses


def loss_floor(labels: Tensor) -> float:
    """The loss of encoders that know every digit and nothing else about image or wording.

    Labels [N]. An image then finds its caption among the captions of its digit by chance, so
    the floor is the mean log of how many there are.
    """
    return labels.bincount()[labels].log().mean().item()


@dataclass
class Evaluation:
    """Held-out images sorted by class, against class prompts and captions in unseen wordings."""

    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor  # [N]
    class_similarity: Tensor  # [N, 10], to the prompt ensemble of each class
    gallery: list[str]  # G captions, wording by wording
    gallery_similarity: Tensor  # [N, G]

    @property
    def gallery_labels(self) -> Tensor:
        """The digit that each caption of the gallery names, [G]."""
        return torch.arange(len(self.gallery)) % NUM_CLASSES

    @property
    def zero_shot_accuracy(self) -> float:
        """Share of images nearest to the prompt ensemble of their own class."""
        return (self.class_similarity.argmax(1) == self.labels).float().mean().item()

    @property
    def recall_at_1(self) -> float:
        """Share of images whose nearest caption in the gallery names their digit."""
        retrieved = self.gallery_labels[self.gallery_similarity.argmax(1)]
        return (retrieved == self.labels).float().mean().item()


@torch.no_grad()
def evaluate(model: DualEncoder, data: Digits) -> Evaluation:
    """Cosines of held-out images with class prompts (training wordings) and unseen captions."""
    order = data.labels.argsort(stable=True)
    images = model.encode_image(data.images[order])
    prompts = model.encode_text(tokenize(captions(TRAIN_WORDINGS)))
    classes = F.normalize(prompts.view(-1, NUM_CLASSES, prompts.shape[1]).mean(0), dim=-1)
    gallery = captions(UNSEEN_WORDINGS)
    return Evaluation(
        images=data.images[order],
        labels=data.labels[order],
        class_similarity=images @ classes.T,
        gallery=gallery,
        gallery_similarity=images @ model.encode_text(tokenize(gallery)).T,
    )


def result_table(evaluation: Evaluation) -> Table:
    """Both scores beside what guessing would give; every digit has as many captions as another."""
    table = Table(title=f"{len(evaluation.labels)} held-out images")
    table.add_column("task")
    table.add_column("score", justify="right", style="bold green")
    table.add_column("chance", justify="right")
    rows = {
        f"zero-shot accuracy, ensemble of {len(TRAIN_WORDINGS)} wordings": (evaluation.zero_shot_accuracy),
        f"image -> text recall@1, {len(evaluation.gallery)} captions in unseen wordings": (evaluation.recall_at_1),
    }
    for task, score in rows.items():
        table.add_row(task, f"{score:.1%}", f"{1 / NUM_CLASSES:.1%}")
    return table


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
    output_dir: Annotated[Path, typer.Option(help="Where the PNGs go.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of split, weights and wordings.")] = 0,
    skip_scaling: Annotated[bool, typer.Option(help="Skip the comparison with eager.")] = False,
) -> None:
    """Train CLIP on handwritten digits with the fused loss, and show what it learned and cost."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # encoders this small lose more to threads than they gain; scaling has its own processes
    output_dir.mkdir(parents=True, exist_ok=True)
    train_data, held_out = load_split(seed)
    model = DualEncoder()
    console.print(f"One batch of {len(train_data)} image-caption pairs per step")
    losses = train(model, train_data, steps)
    evaluation = evaluate(model, held_out)
    console.print(result_table(evaluation))
    plots.save_digits(evaluation, losses, loss_floor(train_data.labels), output_dir / "digits_clip.png")

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
