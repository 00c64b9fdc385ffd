"""What every example's training has in common: its options, its loop of batches, its progress bar."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import Digits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
console = Console()

Epochs = Annotated[int, typer.Option(help="Passes over the training images.", min=1)]
OutputDir = Annotated[Path, typer.Option(help="Where the PNG goes.")]
Seed = Annotated[int, typer.Option(help="Of split, weights, batches and views.", min=0)]
Device = Annotated[str, typer.Option(help="Where torch computes.")]


def prepare(seed: int, output_dir: Path) -> None:
    """Before anything random: the seed. Encoders this small lose more to threads than they gain."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    output_dir.mkdir(parents=True, exist_ok=True)


class Training:
    """One run: shuffled batches, AdamW on a one-cycle schedule, a progress bar, and the loss of every step.

    ::

        training = Training(model.parameters(), data, epochs)
        for images, labels in training:
            training.step(loss_function(model(images), labels))
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        data: Digits,
        epochs: int,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
    ):
        self.data, self.epochs, self.batch_size = data, epochs, batch_size
        self.batches = len(data) // batch_size  # of an epoch; what is left over is skipped
        self.total = epochs * self.batches
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, total_steps=self.total)
        self.losses: list[float] = []

    @property
    def epoch(self) -> int:
        """Counted from 0."""
        return len(self.losses) // self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels, for each of which :meth:`step` must be called."""
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training", total=self.total, loss=math.nan)
            for _ in range(self.epochs):
                order = torch.randperm(len(self.data))
                for rows in order.split(self.batch_size)[: self.batches]:
                    yield self.data.images[rows], self.data.labels[rows]
                    progress.update(task, advance=1, loss=self.losses[-1])

    def step(self, loss: Tensor) -> None:
        """One step of the optimizer and of its schedule."""
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        self.losses.append(loss.item())

    def update(self) -> None:
        """With the gradients that are there."""
        self.optimizer.step()
        self.schedule.step()
