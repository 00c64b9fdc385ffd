"""The curve of all pairs of a labelled set: that of a list of all pairs, whose scores are rounded to its resolution."""

import numpy as np
import pytest
import retrieval_oracle as oracle
import torch
import torch.nn.functional as F
from test_retrieval import SIMILARITIES
from test_retrieval_metrics import labels_of as drawn_labels

from replearn_kernels import verification
from replearn_kernels.engine import native
from replearn_kernels.retrieval import walk
from replearn_kernels.verification import counting, labelled
from replearn_kernels.verification.curve import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def second_filter(filter_dtype, monkeypatch):
    """The second walk's, however many pairs it leaves in doubt."""
    monkeypatch.setattr(counting, "MOST_IN_DOUBT", 1)
    monkeypatch.setattr(walk, "MOST_IN_DOUBT", 1)


BEST = tuple(OBJECTIVES)
FARS = (0.0, 0.003, 0.01, 0.1, 0.3, 0.7, 0.99, 1.0)


def listed(query, gallery, same, counted, similarity, backend, resolution):
    """The curve of the pairs that count, bool [N, M]."""
    pairs = counted.nonzero()
    squares = "squared_distance" if "distance" in similarity else similarity
    values = verification.pair_similarities(query, gallery, pairs=pairs, similarity=squares, backend=backend)
    scores = -values if "distance" in similarity else values
    return verification.roc((scores / resolution).floor(), same[counted])


def check(query, gallery, same, counted, similarity, backend, best=BEST, **options):
    """``options`` tell the labels and what is left out."""
    options |= {"similarity": similarity, "backend": backend}
    curve = verification.roc_of_labels(query, gallery, far=FARS, best=best, **options)
    columns = query if gallery is None else gallery
    expected = listed(query, columns, same, counted, similarity, backend, curve.resolution)
    assert (curve.same_pairs, curve.other_pairs) == (expected.same_pairs, expected.other_pairs)
    scores = curve.thresholds
    if "distance" in similarity:
        scores = -(scores.square() if similarity == "distance" else scores)
    levels = (scores / curve.resolution).round()
    levels[0] = torch.inf
    for of_curve, of_list in ((curve.same, expected.same), (curve.other, expected.other)):
        at_least = torch.searchsorted(-expected.thresholds, -levels, right=True) - 1
        assert torch.equal(of_curve, of_list[at_least])
    assert curve.tar_at_far(FARS) == expected.tar_at_far(FARS)
    assert curve.eer == expected.eer
    for objective in best:
        assert curve.best(objective).value == expected.best(objective).value
    low, high = curve.auc_bounds
    assert low <= expected.auc <= high and low <= curve.auc <= high
    return curve


def labels_of(n, m, classes):
    of_query, of_gallery = drawn_labels(n, m, classes)
    of_query[0], of_gallery[:2] = 10**12, torch.tensor([10**12, 10**13])  # pairs of both kinds
    return of_query, of_gallery


SIZES = [(1, 2, 1), (2, 3, 3), (33, 65, 48), (63, 257, 100), (65, 33, 640), (5, 130, 1152)]


@pytest.mark.parametrize("n, m, d", SIZES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_queries_against_a_gallery(backend, similarity, n, m, d, small_walk):
    query, gallery = oracle.whole_numbers(n, m, d)
    query[0, 0] = 2  # not all zero
    of_query, of_gallery = labels_of(n, m, 4)
    labels = {"query_labels": of_query, "gallery_labels": of_gallery}
    same = of_query[:, None] == of_gallery
    check(query, gallery, same, torch.ones(n, m).bool(), similarity, backend, **labels)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("n", [3, 33, 130, 257])
def test_a_batch_against_itself(backend, similarity, n, small_walk):
    """Each pair of two rows once."""
    x = torch.randn(n, 20, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(n) % max(n // 4, 2)
    x += 2 * torch.randn(n, 20, generator=torch.Generator().manual_seed(2))[labels]
    same = labels[:, None] == labels
    once = torch.ones(n, n).bool().triu(1)
    curve = check(x, None, same, once, similarity, backend, query_labels=labels)
    assert curve.same_pairs + curve.other_pairs == n * (n - 1) // 2
    options = {"query_labels": labels, "gallery_labels": labels, "exclude_self": True}
    check(x, x.clone(), same, ~torch.eye(n).bool(), similarity, backend, **options)


@pytest.mark.parametrize("gallery", [True, False])
def test_ids_that_leave_out(backend, gallery, small_walk):
    """Pairs of one video say nothing about whether a person is known again."""
    query, columns = oracle.whole_numbers(70, 140, 6)
    of_query, of_gallery = labels_of(70, 140, 5)
    video, videos = (torch.stack((labels, torch.arange(len(labels)) % 3), 1) for labels in (of_query, of_gallery))
    if not gallery:
        left_out = (video[:, None] == video).all(2) | ~torch.ones(70, 70).bool().triu(1)
        same = of_query[:, None] == of_query
        check(query, None, same, ~left_out, "cosine", backend, query_labels=of_query, query_ids=video)
        return
    options = {"query_labels": of_query, "gallery_labels": of_gallery, "query_ids": video, "gallery_ids": videos}
    left_out = (video[:, None] == videos).all(2)
    assert left_out.any()
    check(query, columns, of_query[:, None] == of_gallery, ~left_out, "cosine", backend, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_dtype_and_any_strides(backend, similarity, dtype, small_walk):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 2 * 33, generator=g).to(dtype)[:, ::2]
    y = torch.randn(33, 90, generator=g).to(dtype).T
    of_query, of_gallery = labels_of(40, 90, 3)
    labels = {"query_labels": of_query, "gallery_labels": of_gallery}
    same = of_query[:, None] == of_gallery
    check(x, y, same, torch.ones(40, 90).bool(), similarity, backend, **labels)
    labels["query_labels"] = of_query[:6]
    check(x[:1].expand(6, -1), y, same[:6], torch.ones(6, 90).bool(), similarity, backend, **labels)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", ["lengths", "tiny", "huge", "far away", "collapsed", "equal", "zeros"])
def test_rows_that_a_filter_tells_badly(backend, kind, similarity, small_walk):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(150, 24, generator=g, dtype=torch.float64)
    x = {
        "lengths": x * 10.0 ** torch.linspace(-30, 15, 150)[:, None].double(),
        "tiny": x * 2.0**-490,
        "huge": x * 2.0**490,
        "far away": 1e6 + x,
        "collapsed": 1 + 1e-9 * x,
        "equal": torch.ones_like(x),
        "zeros": x * (torch.arange(150) % 2)[:, None],
    }[kind]
    labels = torch.arange(150) % 15
    once = torch.ones(150, 150).bool().triu(1)
    check(x, None, labels[:, None] == labels, once, similarity, backend, query_labels=labels)


@pytest.mark.parametrize("place", ["first", "last"])
def test_every_lane(backend, place, small_walk):
    """The one pair of one label in each place of a tile, the last of which has one vector and a part."""
    m = 48 + 17
    gallery = torch.randn(m, 40, generator=torch.Generator().manual_seed(4))
    for column in range(m):
        options = {"query_labels": torch.tensor([column]), "gallery_labels": torch.arange(m), "backend": backend}
        query = gallery[column : column + 1] * (1 if place == "first" else -1)
        curve = verification.roc_of_labels(query, gallery, far=0, **options)
        assert curve.tar_at_far(0) == (place == "first") and curve.same_pairs == 1 and curve.other_pairs == m - 1
        assert curve.eer == (place == "last")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_whatever_torch_is_told_of_products(backend, precision, cut_products, small_walk):
    x = F.normalize(10 + torch.randn(200, 64, generator=torch.Generator().manual_seed(6)))
    labels = torch.arange(200) % 30
    once = torch.ones(200, 200).bool().triu(1)
    with cut_products(precision), torch.autocast("cpu"):
        check(x, None, labels[:, None] == labels, once, "cosine", backend, query_labels=labels)


def test_counts_of_a_few_bins_at_a_time(backend, monkeypatch, small_walk):
    x = torch.randn(120, 30, generator=torch.Generator().manual_seed(5))
    options = {"query_labels": torch.arange(120) % 20, "far": FARS, "best": BEST, "backend": backend}
    walks = []
    count = labelled._count
    monkeypatch.setattr(labelled, "_count", lambda *args: walks.append(len(args[1])) or count(*args))
    expected = verification.roc_of_labels(x, **options)
    assert walks[0] == 0 and len(walks) == 2
    monkeypatch.setattr(labelled, "MOST_BINS", 7)
    found = verification.roc_of_labels(x, **options)
    assert walks[2] == 0 and sum(walks[3:]) == walks[1] and max(walks[3:]) == 7
    for name in ("thresholds", "same", "other"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_curve_to_draw(backend):
    """Of no FAR in particular: 20 per decade, down to that of one pair."""
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(200) % 40
    curve = verification.roc_of_labels(x, query_labels=labels, backend=backend)
    exact = listed(
        x, x, labels[:, None] == labels, torch.ones(200, 200).bool().triu(1), "cosine", backend, curve.resolution
    )
    fars = [10 ** (-k / 20) for k in range(86)]
    assert fars[-1] * curve.other_pairs >= 1 > fars[-1] * 10 ** (-1 / 20) * curve.other_pairs
    assert curve.tar_at_far(fars) == exact.tar_at_far(fars)
    assert abs(curve.auc - exact.auc) < 5e-6  # 75 of 15 million comparisons of a pair with a pair
    assert curve.resolution == 2.0**-26 and (curve.thresholds[0], curve.thresholds[-1]) == (np.inf, -np.inf)
    assert (curve.far.diff() >= 0).all() and (curve.tar.diff() >= 0).all() and (curve.thresholds.diff() < 0).all()


def test_what_a_curve_was_not_asked_for(backend):
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(5))
    curve = verification.roc_of_labels(x, query_labels=torch.arange(200) % 40, far=0.01, best="f1", backend=backend)
    assert curve.tar_at_far([0.01]) == [curve.tar_at_far(0.01)] and curve.best("f1").value > 0
    assert curve.tar_at_far(torch.tensor([0.01, 1.0])) == [curve.tar_at_far(np.float32(0.01)), 1]
    assert curve.tar_at_far(0.5 / curve.other_pairs) == curve.tar_at_far(0)
    assert len(curve.thresholds) <= 7
    with pytest.raises(ValueError, match="not asked for a FAR"):
        curve.tar_at_far(1 / curve.other_pairs)
    with pytest.raises(ValueError, match=r"not asked for a FAR of 0.3: roc_of_labels\(..., far=\(0.3,\)\) finds it"):
        curve.tar_at_far(0.3)
    with pytest.raises(ValueError, match="not asked for a FAR of 0.3"):
        curve.threshold_at_far(0.3)
    with pytest.raises(
        ValueError, match=r"not asked for the best accuracy: roc_of_labels\(..., best='accuracy'\) finds it"
    ):
        curve.best("accuracy")


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
def test_threads_and_tiles_change_no_bit(monkeypatch):
    x = F.normalize(torch.randn(1500, 32, generator=torch.Generator().manual_seed(8)))
    options = {"query_labels": torch.arange(1500) % 100, "best": BEST}
    expected = verification.roc_of_labels(x, backend="cpp", **options)
    torch.set_num_threads(2)
    for tile in ((1024, 1024), (64, 700)):
        monkeypatch.setattr(walk, "_CPU_TILE", tile)
        found = verification.roc_of_labels(x, backend="cpp", **options)
        for name in ("thresholds", "same", "other"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.set_num_threads(1)
    found = verification.roc_of_labels(x, backend="torch", **options)
    assert torch.equal(found.same, expected.same) and torch.equal(found.thresholds, expected.thresholds)


def test_a_threshold_accepts_what_the_curve_says(backend):
    """Rows that are opposite to each other: cosines below -1 by rounding."""
    z = torch.randn(60, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x, labels = torch.cat((z, z, -z)), torch.arange(180) % 7
    pairs = torch.ones(180, 180).triu(1).nonzero()
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    for similarity in SIMILARITIES:
        options = {"similarity": similarity, "backend": backend}
        values = verification.pair_similarities(x, pairs=pairs, **options)
        curve = verification.roc_of_labels(x, query_labels=labels, far=FARS, best="f1", **options)
        for threshold, *accepted in zip(curve.thresholds, curve.same, curve.other):
            accepts = values <= threshold * (1 + 1e-15) if "distance" in similarity else values >= threshold
            assert [accepts[same].sum(), accepts[~same].sum()] == accepted


def test_queries_that_are_longer_than_the_gallery(backend, small_walk):
    query, gallery = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    every, same = torch.ones(30, 30).bool(), labels[:, None] == labels
    for similarity in SIMILARITIES:
        options = {"query_labels": labels, "gallery_labels": labels}
        check(10 * query, gallery, same, every, similarity, backend, **options)


X, LABELS = torch.randn(6, 3), torch.arange(6) % 2


def call(query=X, gallery=None, **options):
    return lambda: verification.roc_of_labels(query, gallery, **{"query_labels": LABELS, **options})


BAD = [
    (TypeError, "query must be a torch.Tensor, got list", call([1.0])),
    (ValueError, "query must be finite, got NaN or infinity in row 0", call(X / 0)),
    (ValueError, r"query_labels must have shape \(6,\)", call(query_labels=LABELS[:3])),
    (ValueError, "gallery_labels must be given with a gallery", call(gallery=X)),
    (ValueError, "gallery_labels must not be given without a gallery", call(gallery_labels=LABELS)),
    (ValueError, "pairs of one label and pairs of different ones, got 15 and 0", call(query_labels=LABELS * 0)),
    (ValueError, "pairs of one label and pairs of different ones, got 0 and 15", call(query_labels=torch.arange(6))),
    (ValueError, "got 0 and 0", call(X[:1], query_labels=LABELS[:1])),
    (ValueError, "got 0 and 0", call(X[:0], query_labels=LABELS[:0])),
    (ValueError, "got 0 and 0", call(query_ids=LABELS * 0)),
    (ValueError, r"far must be in \[0, 1\], got -1", call(far=(0.1, -1))),
    (TypeError, "far must be a float", call(far="x")),
    (ValueError, "best must be one of accuracy, balanced_accuracy, f1", call(best="auc")),
    (TypeError, "best must be names, got NoneType", call(best=None)),
    (ValueError, "similarity must be one of", call(similarity="dot")),
    (ValueError, "must be given together", call(gallery=X, gallery_labels=LABELS, query_ids=LABELS)),
    (TypeError, "progress must be", call(progress=1)),
    (ValueError, "backend must be one of", call(backend="triton")),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD, ids=[f"{message} {n}" for n, (_, message, _) in enumerate(BAD)])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
