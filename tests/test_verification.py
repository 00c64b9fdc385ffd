"""Curves of given pairs against scikit-learn and by hand, and folds against their definition."""

import numpy as np
import pytest
import retrieval_oracle as oracle
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve
from test_retrieval import SIMILARITIES

from replearn_kernels import verification
from replearn_kernels.verification.curve import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(pairs, levels, seed=0):
    """Values with ties, and kinds of pairs that they tell badly."""
    g = torch.Generator().manual_seed(seed)
    same = torch.rand(pairs, generator=g) < 0.3
    same[0], same[1] = True, False
    values = (torch.randn(pairs, generator=g) + same) * levels
    return values.round() / levels, same


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("pairs, levels", [(2, 1), (7, 2), (300, 3), (2000, 1000), (2000, 2**40)])
def test_as_scikit_learn(pairs, levels, distance):
    values, same = drawn(pairs, levels)
    curve = verification.roc(-values if distance else values, same, distance=distance)
    far, tar, thresholds = roc_curve(same, values, drop_intermediate=False)
    np.testing.assert_array_equal(curve.far, far)
    np.testing.assert_array_equal(curve.tar, tar)
    np.testing.assert_array_equal(curve.thresholds, -thresholds if distance else thresholds)
    assert curve.auc == pytest.approx(roc_auc_score(same, values), rel=1e-12) and curve.auc_bounds == (curve.auc,) * 2
    assert (curve.same_pairs, curve.other_pairs) == (int(same.sum()), int((~same).sum()))
    line = interp1d(far, tar)
    assert curve.eer == pytest.approx(brentq(lambda x: 1 - x - line(x), 0, 1), abs=1e-9)
    fars = [0, 1e-3, 0.01, 0.29, 0.5, 1, *np.unique(far)]
    assert curve.tar_at_far(fars) == [tar[far <= each].max() for each in fars]
    assert curve.tar_at_far(fars[3]) == curve.tar_at_far(fars)[3]
    accepted = [(-values <= t) if distance else (values >= t) for t in curve.threshold_at_far(fars)]
    assert [float(of[same].double().mean()) for of in accepted] == curve.tar_at_far(fars)
    assert all(float(of[~same].double().mean()) <= each for of, each in zip(accepted, fars))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_threshold(objective):
    values, same = drawn(500, 20, seed=1)

    def value(threshold):
        told = values >= threshold
        hits, false = int((told & same).sum()), int((told & ~same).sum())
        tar, far = hits / int(same.sum()), false / int((~same).sum())
        precision = hits / max(hits + false, 1)
        f1 = 2 * precision * tar / (precision + tar) if hits else 0.0
        return {"accuracy": (told == same).double().mean().item(), "balanced_accuracy": (tar + 1 - far) / 2, "f1": f1}

    best = verification.roc(values, same).best(objective)
    of_all = {t: value(t)[objective] for t in [*values.unique().tolist(), np.inf]}
    assert best.value == pytest.approx(max(of_all.values()), rel=1e-14)
    assert best.threshold == max(t for t, of in of_all.items() if of >= best.value - 1e-14)


BY_HAND = [  # values, same; EER and its threshold, AUC, TAR at FAR 0 and 1/2, the best accuracy and its threshold
    ([3, 2, 1, 0], [1, 1, 0, 0], 0, 2, 1, [1, 1], (1, 2)),
    ([0, 1, 2, 3], [1, 1, 0, 0], 1, 2, 0, [0, 0], (0.5, np.inf)),
    ([3, 2, 1, 0], [1, 0, 1, 0], 0.5, 2, 0.75, [0.5, 1], (0.75, 3)),
    ([3, 2, 1, 0], [0, 1, 1, 0], 0.5, 2, 0.5, [0, 1], (0.75, 1)),
    ([5, 5, 5, 5], [1, 1, 0, 0], 0.5, 5, 0.5, [0, 0], (0.5, np.inf)),  # one value: half-way from nothing to all
    ([2, 2, 2, 1], [1, 1, 0, 0], 1 / 3, 2, 0.75, [0, 1], (0.75, 2)),  # on the line from (0, 0) to (1/2, 1)
]


@pytest.mark.parametrize("values, same, eer, eer_threshold, auc, tars, best", BY_HAND)
def test_by_hand(values, same, eer, eer_threshold, auc, tars, best):
    curve = verification.roc(torch.tensor(values).float(), torch.tensor(same).bool())
    assert curve.eer == pytest.approx(eer) and curve.eer_threshold == eer_threshold
    assert curve.auc == pytest.approx(auc)
    assert curve.tar_at_far((0, 0.5)) == tars
    assert curve.best() == pytest.approx(best)
    assert curve.resolution == 0 and curve.thresholds[0] == np.inf


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_similarities_of_pairs(backend, dtype, similarity):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 2 * 33, generator=g).to(dtype)[:, ::2], torch.randn(33, 30, generator=g).to(dtype).T
    x[3] = 0
    pairs = torch.stack((torch.randint(20, (70,), generator=g), torch.randint(30, (70,), generator=g)), 1)
    options = {"similarity": similarity, "backend": backend}

    def expected(a, b):
        scores = oracle.scores(a, b, similarity)
        return scores if "distance" not in similarity else (np.sqrt(-scores) if similarity == "distance" else -scores)

    found = verification.pair_similarities(x, y, pairs=pairs.int(), **options)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected(x, y)[tuple(pairs.T.numpy())], rtol=1e-12, atol=1e-15)
    found = verification.pair_similarities(x, pairs=tuple(pairs.T % 20), **options)
    np.testing.assert_allclose(found, expected(x, x)[tuple(pairs.T.numpy() % 20)], rtol=1e-12, atol=1e-15)
    found = verification.pair_similarities(x, y[:20], **options)
    np.testing.assert_allclose(found, np.diag(expected(x, y[:20])), rtol=1e-12, atol=1e-15)
    assert verification.pair_similarities(x, pairs=pairs[:0], **options).shape == (0,)


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("folds", [10, 2, "given"])
def test_folds(folds, distance):
    values, same = drawn(205, 30, seed=2)
    members = np.array_split(np.arange(205), 10 if folds == "given" else folds)
    if folds == "given":
        folds = torch.arange(205) * 7 % 10 - 4
        members = [np.flatnonzero(folds == k - 4) for k in range(10)]
    result = verification.k_fold(-values if distance else values, same, folds=folds, far=0.1, distance=distance)
    values, same = values.numpy().astype(np.float64), same.numpy()
    for k, held_out in enumerate(members):
        rest = np.setdiff1d(np.arange(205), held_out)
        levels = np.unique(values[rest])[::-1]
        between = np.concatenate(([np.inf], (levels[1:] + levels[:-1]) / 2, levels[-1:]))
        told = values[rest] >= between[:, None]
        accuracy = (told == same[rest]).mean(1)
        threshold = between[accuracy.argmax()]
        assert result.thresholds[k] == (-threshold if distance else threshold)
        assert result.accuracy[k] == ((values[held_out] >= threshold) == same[held_out]).mean()
        at_far = between[np.flatnonzero((told & ~same[rest]).sum(1) / (~same[rest]).sum() <= 0.1).max()]
        accepted = values[held_out] >= at_far
        assert result.tar[k] == accepted[same[held_out]].mean() and result.far[k] == accepted[~same[held_out]].mean()
    assert result.mean == pytest.approx(result.accuracy.numpy().mean())
    assert result.standard_error == pytest.approx(result.accuracy.numpy().std(ddof=1) / len(members) ** 0.5)


def test_no_zero_below_zero():
    for distance in (False, True):
        assert verification.roc(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([True, False, True]), distance=distance)
    zeros = verification.roc(torch.tensor([0.0, -0.0]), torch.tensor([True, False]), distance=True).thresholds[1:]
    assert zeros.tolist() == [0.0] and not zeros.signbit().any()
    x = torch.ones(2, 3)
    assert not verification.pair_similarities(x, x, similarity="distance").signbit().any()


@pytest.mark.parametrize("low, high", [(float(np.nextafter(1, 0)), 1.0), (1.6e308, 1.7e308), (5e-324, 1e-323)])
def test_folds_of_two_values(low, high):
    """A threshold halfway between numbers that have none between them, or whose sum is none."""
    same = torch.arange(8) % 2 == 0
    values = torch.tensor([low, high], dtype=torch.float64)[same.long()]
    result = verification.k_fold(values, same, folds=2)
    assert result.mean == 1 and ((result.thresholds > low) & (result.thresholds <= high)).all()


def test_folds_without_a_far():
    values, same = drawn(400, 30)
    result = verification.k_fold(values, same)
    assert result.tar is None and result.far is None and len(result.accuracy) == 10


X, VALUES, SAME = torch.ones(4, 3), torch.arange(4.0), torch.tensor([True, False, True, False])


def of_pairs(pairs):
    return verification.pair_similarities(X, pairs=pairs)


BAD = [
    (TypeError, "values must be a torch.Tensor, got list", lambda: verification.roc([1.0], SAME)),
    (TypeError, "values must be fp16, bf16, fp32 or fp64", lambda: verification.roc(VALUES.long(), SAME)),
    (ValueError, r"values must have 1 dimension \[P\], got shape \(4, 1\)", lambda: verification.roc(X[:, :1], SAME)),
    (TypeError, "same must be a torch.Tensor, got list", lambda: verification.roc(VALUES, [True] * 4)),
    (TypeError, "same must be bool, got torch.int64", lambda: verification.roc(VALUES, SAME.long())),
    (ValueError, r"same must have shape \(4,\), one per value, got \(3,\)", lambda: verification.roc(VALUES, SAME[:3])),
    (ValueError, "values must be finite, .* at 0, and 4 such in all", lambda: verification.roc(VALUES / 0, SAME)),
    (ValueError, "there must be pairs of one .*, got 4 and 0", lambda: verification.roc(VALUES, SAME | True)),
    (TypeError, "distance must be", lambda: verification.roc(VALUES, SAME, distance=1)),
    (ValueError, r"far must be in \[0, 1\], got 2", lambda: verification.roc(VALUES, SAME).tar_at_far(2)),
    (TypeError, "far must be a float", lambda: verification.roc(VALUES, SAME).tar_at_far("1e-3")),
    (ValueError, "objective must be one of accuracy", lambda: verification.roc(VALUES, SAME).best("eer")),
    (ValueError, "gallery or pairs must be given", lambda: verification.pair_similarities(X)),
    (ValueError, "gallery and query must have", lambda: verification.pair_similarities(X, X[:3])),
    (ValueError, r"pairs must have shape \(P, 2\), got \(4,\)", lambda: of_pairs(torch.arange(4))),
    (TypeError, "pairs must be integers", lambda: of_pairs(torch.zeros(4, 2))),
    (TypeError, "pairs must be a torch.Tensor, got list", lambda: of_pairs([(0, 1)])),
    (ValueError, r"rows in \[0, 4\) of the queries, got 4", lambda: of_pairs(torch.tensor([[0, 4]]))),
    (ValueError, r"rows in \[0, 4\) of the queries, got -1", lambda: of_pairs(torch.tensor([[-1, 0]]))),
    (ValueError, "query must be finite", lambda: verification.pair_similarities(X / 0, X)),
    (ValueError, "similarity must be one of", lambda: verification.pair_similarities(X, X, similarity="dot")),
    (ValueError, "folds must be at least 2", lambda: verification.k_fold(VALUES, SAME, folds=1)),
    (ValueError, "at most the 4 pairs, got", lambda: verification.k_fold(VALUES, SAME, folds=9)),
    (ValueError, "at most the 4 pairs, got 1", lambda: verification.k_fold(VALUES, SAME, folds=torch.zeros(4).long())),
    (ValueError, "fold 0 has 1 and 0: unless folds are", lambda: verification.k_fold(VALUES, SAME, folds=4)),
    (ValueError, "every fold .* fold 0 has 2 and 0", lambda: verification.k_fold(VALUES, SAME, folds=1 - SAME.long())),
    (TypeError, r"ndarray: torch.from_numpy\(values\) makes one", lambda: verification.roc(VALUES.numpy(), SAME)),
    (ValueError, "pairs must be two tensors", lambda: of_pairs((SAME,))),
    (ValueError, r"pairs must have shape \(4,\), one per row", lambda: of_pairs((torch.arange(4), torch.arange(3)))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
