"""What image-text encoders are worth: zero-shot classes, and captions in wordings never seen in training."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from digits import (
    CHANCE,
    NUM_CLASSES,
    TRAIN_WORDINGS,
    UNSEEN_WORDINGS,
    Digits,
    DualEncoder,
    captions,
    tokenize,
)
from rich.table import Table
from torch import Tensor


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
        table.add_row(task, f"{score:.1%}", f"{CHANCE:.1%}")
    return table
