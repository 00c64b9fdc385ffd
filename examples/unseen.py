"""Digits never seen in training: three encoders, each tested on the digits that its own training left out."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plots
import torch
from augment import Views, turned
from digits import Digits, load_images
from encoders import encoder
from evaluate import Features, Scores, encode, recall_at_1, score_table, verification_curve
from torch import nn
from training import console

# Mirrored, 2 and 5 are much alike, and so are 6 and 9 turned: of such a pair both are unseen, or none is.
UNSEEN_DIGITS = ((0, 1, 7), (2, 5, 8), (3, 4, 6, 9))
CHANCE_RECALL = float(np.mean([1 / len(digits) for digits in UNSEEN_DIGITS]))
CHANCE = {
    "recall@1, as scanned": CHANCE_RECALL,
    "verification AUC, as scanned": 0.5,
    "recall@1, random views": CHANCE_RECALL,
    "verification AUC, random views": 0.5,
}
Train = Callable[[nn.Module, Digits, int], list[float]]


@dataclass
class Fold:
    """The losses of one training, and the features of images of digits that it left out.

    By the trained encoder, the untrained one, and as raw pixels: of the images as scanned, and of random views of them.
    """

    losses: list[float]
    features: dict[str, tuple[Features, Features]]


def cross_validate(train: Train, epochs: int, device: str) -> list[Fold]:
    """Trains a new encoder per fold by ``train(encoder, data, epochs)``, on all turns and mirror images of its digits.

    Every digit is unseen in one fold.
    """
    images = load_images().to(device)
    folds = []
    for digits in UNSEEN_DIGITS:
        unseen = torch.isin(images.labels, torch.tensor(digits, device=device))
        folds.append(train_fold(train, images[~unseen], images[unseen], epochs))
    return folds


def train_fold(train: Train, seen: Digits, unseen: Digits, epochs: int) -> Fold:
    f = encoder().to(seen.images.device)
    untrained = copy.deepcopy(f)
    losses = train(f, turned(seen, mirrored=True), epochs)
    encoders = {"trained": f, "untrained": untrained, "raw pixels": nn.Flatten()}
    views = Digits(Views()(unseen.images), unseen.labels)
    return Fold(losses, {name: (encode(model, unseen), encode(model, views)) for name, model in encoders.items()})


def report(method: str, folds: list[Fold], path: Path) -> dict[str, Scores]:
    """Draws the figure (of the views), prints every encoder's mean scores and returns them."""
    views = [{name: views for name, (_, views) in fold.features.items()} for fold in folds]
    plots.save_verification(f"{method} loss", [fold.losses for fold in folds], views, path)
    of_folds = [{name: fold_scores(*features) for name, features in fold.features.items()} for fold in folds]
    scores = {name: mean([of_fold[name] for of_fold in of_folds]) for name in of_folds[0]}
    console.print(score_table(f"{method}, digits never seen, mean of {len(folds)} folds", scores, CHANCE))
    return scores


def fold_scores(scans: Features, views: Features) -> Scores:
    """Retrieval and verification, in the order of ``CHANCE``."""
    values = [score for images in (scans, views) for score in (recall_at_1(images), verification_curve(images).auc)]
    return dict(zip(CHANCE, values, strict=True))


def mean(scores: list[Scores]) -> Scores:
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
