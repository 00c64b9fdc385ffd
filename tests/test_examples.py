"""The examples on real data, with fewer epochs: each learns, and draws its figure."""

import sys
from pathlib import Path

import pytest

for library in ("sklearn", "matplotlib", "rich", "typer"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits_arcface  # noqa: E402
import digits_dino  # noqa: E402
import digits_lifted  # noqa: E402
import digits_moco  # noqa: E402
import digits_siglip  # noqa: E402
import digits_simclr  # noqa: E402
import digits_supcon  # noqa: E402
import digits_triplet  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from augment import Views, turned  # noqa: E402
from digits import CHANCE, load_images  # noqa: E402
from evaluate import Features, recall_at_1, verification_curve  # noqa: E402
from unseen import UNSEEN_DIGITS  # noqa: E402

PNG_SIGNATURE = b"\x89PNG"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(example, epochs, output_dir):
    """What the example's command returns, once its figure is there."""
    scores = example.main(epochs=epochs, output_dir=output_dir / "new", device="cpu")
    (figure,) = (output_dir / "new").iterdir()
    assert figure.name == f"{example.__name__}.png"
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    return scores


# Beside each threshold, the least of seeds 0 to 2. Untrained features are above chance too: 88 to 92% with 100 labels.


def test_simclr_needs_few_labels(tmp_path):
    before, after = run(digits_simclr, 20, tmp_path)
    accuracy = after["linear probe, 100 labels"]
    assert accuracy > 9 * CHANCE  # 93.6%
    assert accuracy > before["linear probe, 100 labels"] + 0.02  # 3.4 points


def test_moco_needs_few_labels(tmp_path):
    before, after = run(digits_moco, 20, tmp_path)
    accuracy = after["linear probe, 100 labels"]
    assert accuracy > 9 * CHANCE  # 92.6%
    assert accuracy > before["linear probe, 100 labels"] + 0.02  # 3.2 points


def test_dino_needs_few_labels(tmp_path):
    before, after = run(digits_dino, 10, tmp_path)
    assert after["5-NN"] > 9 * CHANCE  # 96.9%
    assert after["linear probe, 100 labels"] > before["linear probe, 100 labels"] + 0.005  # 1.5 points


def test_supcon_separates_digits(tmp_path):
    before, after = run(digits_supcon, 10, tmp_path)
    assert after["5-NN"] > 9.5 * CHANCE  # 98.1%
    assert after["1-NN, 100 labels"] > before["1-NN, 100 labels"] + 0.03  # 5.3 points


def test_arcface_verifies_digits_it_never_saw(tmp_path):
    before, after = run(digits_arcface, 6, tmp_path)
    auc = "verification AUC, unseen digits"
    assert after[auc] > 0.8  # 0.851; chance is 0.5
    assert after[auc] > before[auc] + 0.03  # 0.055
    tar = "TAR at 1% FAR, unseen digits"
    assert after[tar] > before[tar] + 0.02  # 4.5 points, to 30.1%; chance is 1%
    assert after["recall@1, unseen digits"] > 0.95  # 99.1%; chance is 33%
    assert after["recall@1, seen digits"] > 0.95  # 99.2%; chance is 14%


@pytest.mark.parametrize("example", (digits_lifted, digits_triplet), ids=lambda example: example.__name__)
def test_metric_learning_verifies_digits_it_never_saw(example, tmp_path):
    scores = run(example, 4, tmp_path)
    before, after = scores["untrained"], scores["trained"]
    auc = "verification AUC, random views"
    assert after[auc] > max(before[auc], scores["raw pixels"][auc]) + 0.04  # 6.0 points
    assert after["recall@1, random views"] > 0.8  # 85.3%; chance is 31%
    assert after["recall@1, as scanned"] > 0.95  # 99.1%


def test_turned_and_mirrored_digits_are_classes_of_their_own():
    data = load_images()[torch.tensor([3, 7])]  # a 3 and a 7
    copies = turned(data, mirrored=True)
    assert copies.labels.tolist() == [label + 8 * copy for copy in range(8) for label in (3, 7)]
    torch.testing.assert_close(copies.images[2:4].rot90(-1, dims=(2, 3)), data.images)
    torch.testing.assert_close(copies.images[8:10].flip(3), data.images)


def test_every_digit_is_unseen_once_beside_its_double():
    assert sorted(digit for digits in UNSEEN_DIGITS for digit in digits) == list(range(10))
    for pair in ({2, 5}, {6, 9}):
        assert any(pair <= set(digits) for digits in UNSEEN_DIGITS)


def test_siglip_names_digits_zero_shot(tmp_path):
    scores = run(digits_siglip, 40, tmp_path)
    assert min(scores.values()) > 8.5 * CHANCE  # 96.1%


def test_views_without_strength_are_the_images():
    images = load_images().images[:16]
    still = Views(degrees=0, slant=0, zoom=(1, 1), shift=0, noise=0)
    torch.testing.assert_close(still(images), images)


def test_zoomed_view_is_a_crop():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 2:6, 2:6] = 1
    view = Views(degrees=0, slant=0, zoom=(2, 2), shift=0, noise=0)(image)
    torch.testing.assert_close(view[..., 1:7, 1:7], torch.ones(1, 1, 6, 6))


def test_every_image_gets_a_view_of_its_own():
    images = load_images().images[:1].expand(8, -1, -1, -1)
    assert Views(noise=0)(images).flatten(1).unique(dim=0).shape[0] == 8


def test_retrieval_and_verification_by_hand():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]])  # cosines: 0.8, 0.6, and 0 of the first with the last
    pairs_near, pairs_far = Features(vectors, np.array([0, 0, 1])), Features(vectors, np.array([0, 1, 1]))
    assert recall_at_1(pairs_near) == 1  # the last image, which has none of its class, is left out
    assert verification_curve(pairs_near).auc == 1  # 0.8 against 0.6 and 0
    assert recall_at_1(pairs_far) == 0.5  # the first has none, and is the second's nearest
    assert verification_curve(pairs_far).auc == 0.5  # 0.6 against 0.8 and 0
