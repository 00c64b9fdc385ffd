"""Handwritten digits as an image-text problem: the data, the captions and the two encoders.

Each of scikit-learn's 1797 images (8 x 8 pixels) is paired with a sentence that names its digit.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

NUM_CLASSES = 10
CHANCE = 1 / NUM_CLASSES
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SYMBOLS = [str(digit) for digit in range(NUM_CLASSES)]

WORDINGS = [
    " ".join(filter(None, parts))
    for parts in product(
        ("", "a scan of", "a picture of", "someone wrote"),
        ("the digit {digit}", "the number {digit}", "a handwritten {digit}"),
        ("", "in pencil", "in ink", "on paper"),
    )
]
UNSEEN_WORDINGS = WORDINGS[::5]  # compositions that training never shows, of parts that it does
TRAIN_WORDINGS = [wording for wording in WORDINGS if wording not in UNSEEN_WORDINGS]


def captions(wordings: list[str]) -> list[str]:
    """Every digit in every wording, by name and by symbol: 2 W sentences of each of 10 digits."""
    return [wording.format(digit=digit) for wording in wordings for digits in (WORDS, SYMBOLS) for digit in digits]


PAD = 0
MAX_WORDS = 8
_TRAIN_WORDS = sorted({word for text in captions(TRAIN_WORDINGS) for word in text.split()})
VOCABULARY = {word: index for index, word in enumerate(_TRAIN_WORDS, start=PAD + 1)}


def tokenize(texts: list[str]) -> Tensor:
    """Sentences to word indices, int64 [len(texts), MAX_WORDS], padded with ``PAD``."""
    rows = [[VOCABULARY[word] for word in text.split()] for text in texts]
    return torch.tensor([row + [PAD] * (MAX_WORDS - len(row)) for row in rows])


@dataclass
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and their labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Digits":
        return Digits(self.images[rows], self.labels[rows])

    def to(self, device: str) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


def load_images() -> Digits:
    """All 1797 images."""
    pixels, labels = load_digits(return_X_y=True)
    return Digits(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long())


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Training (1437) and held-out (360) images, with the same share of every digit."""
    digits = load_images()
    train, held_out = train_test_split(range(len(digits)), test_size=0.2, stratify=digits.labels, random_state=seed)
    return digits[train], digits[held_out]


def draw_captions(labels: Tensor) -> Tensor:
    """One training caption in a random wording per label [N]: tokens [N, MAX_WORDS]."""
    table = tokenize(captions(TRAIN_WORDINGS)).to(labels.device).view(-1, NUM_CLASSES, MAX_WORDS)
    wording = torch.randint(len(table), labels.shape, device=labels.device)
    return table[wording, labels]


class ImageEncoder(nn.Module):
    """Small convolutional net: images [N, 1, 8, 8] to features [N, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 128),
            nn.GELU(),
            nn.Linear(128, dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class TextEncoder(nn.Module):
    """Mean of the word embeddings, then an MLP: tokens [N, MAX_WORDS] to features [N, dim].

    The order of the words is lost, but a caption names one digit in any order.
    """

    def __init__(self, dim: int, width: int = 64):
        super().__init__()
        self.words = nn.EmbeddingBag(len(VOCABULARY) + 1, width, mode="mean", padding_idx=PAD)
        self.mlp = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.words(tokens))


class DualEncoder(nn.Module):
    """Both encoders into one space of unit vectors, and the learned scale of their similarities.

    It starts as in CLIP (``scale`` = 1 / 0.07, no bias) or, for instance, as in SigLIP (10 and -10).
    """

    def __init__(self, dim: int = 64, scale: float = 1 / 0.07, bias: float | None = None):
        super().__init__()
        self.image_encoder = ImageEncoder(dim)
        self.text_encoder = TextEncoder(dim)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to unit vectors [N, dim]."""
        return F.normalize(self.image_encoder(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [N, MAX_WORDS] to unit vectors [N, dim]."""
        return F.normalize(self.text_encoder(tokens), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor | None, ...]:
        """Image features [N, dim], text features [N, dim], logit scale and bias: what the losses take, in order."""
        scale = self.log_scale.clamp(max=torch.tensor(100.0).log()).exp()
        return self.encode_image(images), self.encode_text(tokens), scale, self.bias
