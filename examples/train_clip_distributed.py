"""CLIP on handwritten digits, on several processes: one batch, sharded; a checkpoint after every epoch.

    torchrun --nproc_per_node 2 --max-restarts 3 examples/train_clip_distributed.py
    torchrun --nproc_per_node 2 --max-restarts 3 examples/train_clip_distributed.py --fail-in-epoch 3
    torchrun --nproc_per_node 2 examples/train_clip_distributed.py --chunk 60

The second command kills one rank in its fourth epoch. torchrun starts all ranks again, they go on from the checkpoint,
and end with the same weights: epochs draw their images and captions from seeds of their own. The third holds the
encoders' activations of 60 images at a time (gradient_cache.py), with the gradients of the whole batch.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from digits import CHANCE, Digits, DualEncoder, draw_captions, load_split
from gradient_cache import cached_backward
from ranks import join, starts_before
from torch import nn
from training import Epochs, Seed
from zero_shot import evaluate

from replearn_kernels import ClipLoss

BATCH_SIZE = 480  # of all ranks together: a digit has about 48 captions of its own in it


class Run:
    """What a checkpoint holds: model, optimizer, and how many epochs they have seen."""

    def __init__(self, device: torch.device, checkpoint: Path):
        self.checkpoint, self.epochs_done = checkpoint, 0
        self.model = DualEncoder().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3, weight_decay=0.01)
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epochs_done = state["epochs_done"]

    def save(self) -> None:
        """By rank 0. Under another name first, so that a rank killed here leaves the last checkpoint as it was."""
        self.epochs_done += 1
        if dist.get_rank() == 0:
            state = {"model": self.model, "optimizer": self.optimizer}
            new = self.checkpoint.with_suffix(".new")
            torch.save({name: s.state_dict() for name, s in state.items()} | {"epochs_done": self.epochs_done}, new)
            os.replace(new, self.checkpoint)
        dist.barrier()  # nobody is an epoch ahead of what a restart would find


def train_epoch(run: Run, parallel: nn.Module, loss: ClipLoss, data: Digits, seed: int, chunk: int) -> float:
    """One pass; the mean loss of this rank. All ranks draw one order and take every R-th image of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + run.epochs_done))
    torch.manual_seed(seed + 1000 * run.epochs_done + rank)  # captions
    losses = []
    for batch in order.split(BATCH_SIZE):
        own = data[batch[rank::world]]
        images, captions = own.images, draw_captions(own.labels)
        run.optimizer.zero_grad()
        value = cached_backward(parallel, loss, list(zip(images.split(chunk), captions.split(chunk))))
        run.optimizer.step()
        losses.append(value.item())
    return sum(losses) / len(losses)


def train(
    epochs: int, checkpoint: Path, seed: int, device: torch.device, fail_in_epoch: int = -1, chunk: int = BATCH_SIZE
) -> float | None:
    """Up to ``epochs`` in all, from the checkpoint if there is one. On rank 0 the zero-shot accuracy."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    run = Run(device, checkpoint)
    if rank == 0:
        print(f"{world} ranks, epochs done: {run.epochs_done}", flush=True)
    parallel = nn.parallel.DistributedDataParallel(run.model)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    while run.epochs_done < epochs:
        if run.epochs_done == fail_in_epoch and rank == world - 1:
            os._exit(1)
        mean = train_epoch(run, parallel, loss, train_data, seed, chunk)
        run.save()
        if rank == 0:
            print(f"epoch {run.epochs_done}: loss {mean:.3f}", flush=True)
    return evaluate(run.model, held_out).zero_shot_accuracy if rank == 0 else None


def main(
    epochs: Epochs = 30,
    checkpoint: Annotated[Path, typer.Option(help="Written after every epoch; resumed from.")] = Path("clip.pt"),
    seed: Seed = 0,
    timeout: Annotated[int, typer.Option(help="Seconds that a rank waits for the others.", min=1)] = 60,
    fail_in_epoch: Annotated[int, typer.Option(help="The last rank dies in this epoch, the first time.")] = -1,
    chunk: Annotated[int, typer.Option(help="Images whose activations are held at a time.", min=1)] = BATCH_SIZE,
) -> None:
    """Train CLIP on handwritten digits on all ranks that torchrun starts, and name held-out digits zero-shot."""
    device = join(timeout)
    accuracy = train(epochs, checkpoint, seed, device, fail_in_epoch if starts_before() == 0 else -1, chunk)
    if accuracy is not None:
        print(f"zero-shot accuracy {accuracy:.1%} (chance {CHANCE:.0%})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
