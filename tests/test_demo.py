"""The demo on real data: it learns, it repeats itself for a seed, and it draws."""

import sys
from pathlib import Path

import pytest

for library in ("sklearn", "matplotlib", "rich", "typer"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402
import digits_clip  # noqa: E402
import plots  # noqa: E402
import scaling  # noqa: E402
import torch  # noqa: E402

CHANCE = 1 / digits.NUM_CLASSES
PNG_SIGNATURE = b"\x89PNG"
pytestmark = pytest.mark.usefixtures("one_thread")


def train(steps, seed=0):
    torch.manual_seed(seed)
    train_data, _ = digits.load_split(seed)
    model = digits.DualEncoder()
    return model, digits_clip.train(model, train_data, steps)


@pytest.fixture(scope="module")
def trained(one_thread):
    model, losses = train(steps=45)
    return digits_clip.evaluate(model, digits.load_split(seed=0)[1]), losses


def test_split_keeps_every_image_once_and_every_digit_in_both_parts():
    train_data, held_out = digits.load_split(seed=0)
    assert (len(train_data), len(held_out)) == (1437, 360)
    for part in (train_data, held_out):
        assert part.labels.bincount().min() > 0.09 * len(part)


def test_unseen_wordings_are_new_sentences_of_known_words():
    trained_on, unseen = (set(digits.captions(w)) for w in (digits.TRAIN_WORDINGS, digits.UNSEEN_WORDINGS))
    assert not trained_on & unseen
    assert (digits.tokenize(sorted(unseen)) != digits.PAD).any(1).all()


def test_drawn_captions_name_the_digit_of_their_image():
    labels = torch.arange(digits.NUM_CLASSES).repeat(50)
    for label, tokens in zip(labels, digits.draw_captions(labels), strict=True):
        names = {digits.VOCABULARY[digits.WORDS[label]], digits.VOCABULARY[digits.SYMBOLS[label]]}
        assert len(names & set(tokens.tolist())) == 1


def test_held_out_scores_are_far_above_chance(trained):
    evaluation, _ = trained
    assert evaluation.zero_shot_accuracy > 8.5 * CHANCE
    assert evaluation.recall_at_1 > 8.5 * CHANCE


def test_untrained_encoders_score_near_chance():
    torch.manual_seed(0)
    evaluation = digits_clip.evaluate(digits.DualEncoder(), digits.load_split(seed=0)[1])
    assert evaluation.zero_shot_accuracy < 3 * CHANCE
    assert evaluation.recall_at_1 < 3 * CHANCE


def test_loss_falls_towards_its_floor(trained):
    _, losses = trained
    floor = digits_clip.loss_floor(digits.load_split(seed=0)[0].labels)
    assert floor < losses[-1] < floor + 0.4
    assert losses[0] > floor + 2


def test_a_seed_fixes_the_run():
    assert train(steps=3)[1] == train(steps=3)[1]


def test_command_writes_its_figure(tmp_path):
    digits_clip.main(steps=3, output_dir=tmp_path / "new", skip_scaling=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits_clip.png"]
    assert (tmp_path / "new" / "digits_clip.png").read_bytes().startswith(PNG_SIGNATURE)


def test_eager_and_fused_agree_on_what_is_timed():
    inputs = scaling.random_inputs(96)
    torch.testing.assert_close(scaling.LOSSES["fused"](*inputs), scaling.LOSSES["eager"](*inputs))


def test_figures_are_measured_in_fresh_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logits_bytes = 4 * 1024**2
    eager, fused = (scaling.measure(implementation, 1024) for implementation in ("eager", "fused"))
    assert 2 * logits_bytes < eager.peak_bytes < 20 * logits_bytes
    assert 0 < fused.peak_bytes < 20 * logits_bytes
    assert min(eager.seconds, fused.seconds) > 0


def test_large_eager_batches_are_estimated_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "LARGEST_EAGER", 1024)
    monkeypatch.setattr(scaling, "measure", lambda implementation, n: scaling.Figure(implementation, n, 2.0, 3e6))
    figures = list(scaling.scaling(sizes=(1024, 2048)))
    assert [(item.implementation, item.n, item.estimated) for item in figures] == [
        ("eager", 1024, False),
        ("fused", 1024, False),
        ("eager", 2048, True),
        ("fused", 2048, False),
    ]
    assert (figures[2].seconds, figures[2].peak_bytes) == (8.0, 12e6)

    plots.save_scaling(figures, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG_SIGNATURE)
    assert digits_clip.scaling_table(figures).row_count == 2
