"""ArcFace on handwritten digits, on several processes: each owns a part of the classes, and all share one encoder.

    torchrun --nproc_per_node 2 examples/train_arcface_distributed.py

With a million classes the classifier is what does not fit: here every rank has 1 / R of its weight, gradient and
optimizer state, and the rows of the batch travel. Three things look at all parameters, and must be told of the other
ranks' classes: initial weights, clipping by norm, and predictions.
"""

import torch
import torch.distributed as dist
import typer
from augment import QUARTERS, Views, turned
from digits import Digits, load_images, load_split
from digits_arcface import CHANCE, SCALE, SEEN_DIGITS, scores
from encoders import FEATURES, encoder
from evaluate import Scores, encode
from ranks import join
from torch import Tensor, nn
from training import Epochs, Seed, Training, console

from replearn_kernels import ArcFaceLoss

LARGEST_NORM = 5.0  # of the gradients of encoder and classes together


class ShardedTraining(Training):
    """Training of an encoder that every rank has, and of classes of which each rank has its own."""

    def __init__(self, model: nn.Module, arcface_loss: ArcFaceLoss, data: Digits, epochs: int):
        self.replicated, self.sharded = list(model.parameters()), list(arcface_loss.parameters())
        super().__init__([*self.replicated, *self.sharded], data, epochs)

    def update(self) -> None:
        clip_over_ranks(self.replicated, self.sharded, LARGEST_NORM)
        super().update()


def clip_over_ranks(replicated: list[nn.Parameter], sharded: list[nn.Parameter], largest: float) -> Tensor:
    """As clip_grad_norm_ of all: of the shards each rank knows its own, so their squares are summed over the ranks.

    A norm that differed from rank to rank would scale the replicated gradients differently, and the copies of the
    encoder would drift apart.
    """
    common = nn.utils.get_total_norm([p.grad for p in replicated])
    squares = nn.utils.get_total_norm([p.grad for p in sharded]).square()
    dist.all_reduce(squares)
    norm = (common.square() + squares).sqrt()
    nn.utils.clip_grads_with_norm_([*replicated, *sharded], largest, norm)
    return norm


def train(f: nn.Module, arcface_loss: ArcFaceLoss, data: Digits, epochs: int) -> list[float]:
    """Every rank draws the same batches and views, and takes every R-th image of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel = nn.parallel.DistributedDataParallel(f)  # of the encoder alone: nobody averages what is spread
    view = Views()
    training = ShardedTraining(f, arcface_loss, data, epochs)
    for images, labels in training:
        own = slice(rank, None, world)
        training.step(arcface_loss(parallel(view(images)[own]), labels[own]))
    return training.losses


@torch.no_grad()
def predict(f: nn.Module, arcface_loss: ArcFaceLoss, images: Tensor) -> Tensor:
    """The nearest class of each image, of the classes of all ranks. Each rank tells the others its best, no weight."""
    best, place = arcface_loss.logits(f(images)).max(dim=1)
    found = torch.stack([best, (place + arcface_loss.first_class).to(best.dtype)])
    of_ranks = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, found)
    values, classes = torch.stack(of_ranks, dim=1)
    return classes.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0).long()


def run(epochs: int, seed: int, device: torch.device) -> tuple[Scores, float]:
    """Scores on unseen digits, as digits_arcface.py has them; accuracy on held-out images of seen ones."""
    torch.manual_seed(seed)
    train_data, held_out = (part.to(device) for part in load_split(seed))
    data, f = turned(train_data[train_data.labels < SEEN_DIGITS]), encoder().to(device)
    classes = len(data.labels.unique())
    arcface_loss = ArcFaceLoss(FEATURES, classes, scale=SCALE, group=dist.group.WORLD).to(device)
    train(f, arcface_loss, data, epochs)
    images, seen = load_images().to(device), held_out[held_out.labels < SEEN_DIGITS]
    turns = turned(seen)
    accuracy = (predict(f, arcface_loss, turns.images) == turns.labels).float().mean().item()
    return scores(*(encode(f, part) for part in (images[images.labels >= SEEN_DIGITS], seen))), accuracy


def main(epochs: Epochs = 20, seed: Seed = 0) -> None:
    """Train an encoder of the digits 0 to 6 with ArcFace on all ranks that torchrun starts, each with its classes."""
    device = join(timeout=60)
    console.quiet = dist.get_rank() > 0
    of_unseen, accuracy = run(epochs, seed, device)
    for name, value in of_unseen.items():
        console.print(f"{name} {value:.1%} (chance {CHANCE[name]:.0%})")
    chance = 1 / (QUARTERS * SEEN_DIGITS)
    console.print(f"accuracy, all turns of held-out images of seen digits {accuracy:.1%} (chance {chance:.0%})")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
