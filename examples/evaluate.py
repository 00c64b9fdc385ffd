"""What frozen features are worth: k-NN and linear probes, with all labels or few, retrieval and verification."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from digits import CHANCE, NUM_CLASSES, Digits
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from training import console

from replearn_kernels import retrieval, verification

LABELS_PER_DIGIT = 10
DRAWS = 10  # of the few labels, whose scores are averaged
Scores = dict[str, float]


@dataclass
class Features:
    """Features of images, unit vectors [N, d], and the labels of the images, [N]."""

    vectors: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Features":
        return Features(self.vectors[rows], self.labels[rows])

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both, for the functions of torch."""
        return torch.from_numpy(self.vectors), torch.from_numpy(self.labels)


@torch.no_grad()
def encode(encoder: Callable[[Tensor], Tensor], data: Digits) -> Features:
    """Frozen features of all images, without augmentation."""
    return Features(F.normalize(encoder(data.images), dim=1).cpu().numpy(), data.labels.cpu().numpy())


def knn_accuracy(train: Features, held_out: Features, neighbours: int = 5) -> float:
    """Share of held-out images that most of their nearest training images agree with."""
    queries, gallery = held_out.tensors, train.tensors
    return retrieval.knn_accuracy(
        queries[0], gallery[0], queries[1], gallery[1], neighbours, temperature=None, similarity="distance"
    )


def linear_probe_accuracy(train: Features, held_out: Features) -> float:
    """Accuracy of a logistic regression on the features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    with threadpool_limits(1):  # products this small are 30 times slower on two busy cores than on one
        return model.fit(train.vectors, train.labels).score(held_out.vectors, held_out.labels)


def representation_scores(encoder: nn.Module, train: Digits, held_out: Digits) -> Scores:
    """Accuracies on held-out images, with the labels of all training images and with few.

    With all 1437 labels even random features do well on digits; few labels show what was learned without them.
    """
    train, held_out = encode(encoder, train), encode(encoder, held_out)
    draws = StratifiedShuffleSplit(DRAWS, train_size=LABELS_PER_DIGIT * NUM_CLASSES, random_state=0)
    few = [train[rows] for rows, _ in draws.split(train.vectors, train.labels)]
    return {
        "linear probe": linear_probe_accuracy(train, held_out),
        "5-NN": knn_accuracy(train, held_out),
        "linear probe, 100 labels": float(np.mean([linear_probe_accuracy(part, held_out) for part in few])),
        "1-NN, 100 labels": float(np.mean([knn_accuracy(part, held_out, neighbours=1) for part in few])),
    }


def probe(
    method: str, untrained: nn.Module, trained: nn.Module, train: Digits, held_out: Digits
) -> tuple[Scores, Scores]:
    """Prints and returns what both encoders are worth: first the untrained one."""
    before, after = (representation_scores(model, train, held_out) for model in (untrained, trained))
    title = f"{method}, {len(held_out)} held-out images"
    console.print(score_table(title, {"trained": after, "untrained": before}, CHANCE))
    return before, after


def recall_at_1(features: Features) -> float:
    """Share of images whose nearest other image is of their class."""
    vectors, labels = features.tensors
    return retrieval.recall_at_k(vectors, query_labels=labels, similarity="distance", missing="skip")


def verification_curve(features: Features) -> verification.Curve:
    """ROC of the cosine as a test of whether two images are of one class, over all pairs."""
    vectors, labels = features.tensors
    return verification.roc_of_labels(vectors, query_labels=labels)


def score_table(title: str, scores: dict[str, Scores], chance: Scores | float) -> Table:
    """Every score, a column per encoder (the first one is the example's), and what guessing would give."""
    first, *others = scores
    table = Table(title=title)
    table.add_column("score")
    table.add_column(first, justify="right", style="bold green")
    for name in (*others, "chance"):
        table.add_column(name, justify="right")
    for score in scores[first]:
        guess = chance if isinstance(chance, float) else chance[score]
        values = [*(of_encoder[score] for of_encoder in scores.values()), guess]
        table.add_row(score, *(f"{value:.1%}" for value in values))
    return table
