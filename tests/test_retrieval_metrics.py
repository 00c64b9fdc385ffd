"""Retrieval metrics against their definitions: every query's columns sorted by fp64 scores."""

import numpy as np
import pytest
import retrieval_oracle as oracle
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from test_retrieval import SIMILARITIES

from replearn_kernels import retrieval
from replearn_kernels.retrieval import ranking

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = list(oracle.METRICS)


def check(query, gallery, positive, similarity, backend, left_out=None, metrics=METRICS, **options):
    expected = oracle.metrics(oracle.scores(query, gallery, similarity, left_out), positive)
    options |= {"similarity": similarity, "backend": backend, "metrics": metrics}
    found = retrieval.evaluate(query, gallery, reduction="none", missing="skip", **options)
    assert list(found) == list(metrics)
    for name in metrics:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-14, err_msg=name)
    means = retrieval.evaluate(query, gallery, missing="skip", **options)
    skipped = int(np.isnan(expected["mean_rank"]).sum())
    assert means.pop("skipped") == skipped and means.pop("queries") == len(query) - skipped
    for name in metrics:
        over_queries = np.nanmedian if name == "median_rank" else np.nanmean
        assert means[name] == pytest.approx(over_queries(expected[name]), rel=1e-13), name


def labels_of(n, m, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, classes - 1, (n,), generator=g), torch.randint(-1, classes - 1, (m,), generator=g)


@pytest.mark.parametrize("n, m, d, classes", [(2, 3, 3, 1), (33, 65, 48, 3), (40, 257, 100, 30), (20, 300, 2, 2)])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_by_label_with_ties(backend, similarity, n, m, d, classes, filter_dtype, small_walk):
    """One positive and hundreds, in turn and by halves; some queries have none."""
    query, gallery = oracle.whole_numbers(n, m, d)
    of_query, of_gallery = labels_of(n, m, classes)
    positive = (of_query[:, None] == of_gallery).numpy()
    check(query, gallery, positive, similarity, backend, query_labels=of_query, gallery_labels=of_gallery)


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_alone(backend, metric, filter_dtype, small_walk):
    """It looks no farther than it counts, which changes nothing."""
    query, gallery = oracle.whole_numbers(40, 200, 5)
    of_query, of_gallery = labels_of(40, 200, 4)
    positive = (of_query[:, None] == of_gallery).numpy()
    labels = {"query_labels": of_query, "gallery_labels": of_gallery}
    check(query, gallery, positive, "cosine", backend, metrics=[metric], **labels)


@pytest.mark.parametrize("similarity", ["cosine", "distance"])
def test_by_target(backend, similarity, filter_dtype, small_walk):
    query, gallery = oracle.whole_numbers(30, 100, 6)
    target = torch.randint(0, 100, (30, 4), generator=torch.Generator().manual_seed(1))
    target[3, 1:] = -1  # one positive
    target[4] = target[4, 0]  # one, named four times
    target[5] = -1  # none
    positive = np.zeros((30, 101), dtype=bool)
    np.put_along_axis(positive, target.numpy() % 101, True, 1)
    check(query, gallery, positive[:, :100], similarity, backend, target=target)
    positive = np.zeros((30, 100), dtype=bool)
    np.put_along_axis(positive, target[:, :1].numpy(), True, 1)
    positive[5] = False
    check(query, gallery, positive, similarity, backend, target=target[:, 0])


def test_a_batch_against_itself(backend, filter_dtype, small_walk):
    x, _ = oracle.whole_numbers(90, 1, 7)
    labels = labels_of(90, 1, 12)[0]
    labels[0] = 99  # alone
    itself = np.eye(90, dtype=bool)
    positive = (labels[:, None] == labels).numpy() & ~itself
    of_rows = {"query_labels": labels, "gallery_labels": labels, "exclude_self": True}
    check(x, x, positive, "cosine", backend, itself, **of_rows)
    options = {"metrics": METRICS, "missing": "skip", "backend": backend}
    expected = oracle.metrics(oracle.scores(x, x, "cosine", itself), positive)
    found = retrieval.evaluate(x, query_labels=labels, **options)
    assert found["map"] == pytest.approx(np.nanmean(expected["map"]), rel=1e-13) and found["skipped"] == 1
    twice = torch.stack((2 * torch.arange(90), 2 * torch.arange(90) + 1), 1)
    found = retrieval.evaluate(x, x.repeat_interleave(2, 0), target=twice, metrics="mean_rank", backend=backend)
    assert found == {"mean_rank": found["mean_rank"], "queries": 90, "skipped": 0} and found["mean_rank"] >= 1


@pytest.mark.parametrize("by", ["labels", "target"])
def test_ids_that_leave_out(backend, by, filter_dtype, small_walk):
    """Re-identification: what one camera has of the same person is no candidate; another person's picture is."""
    query, gallery = oracle.whole_numbers(30, 120, 6)
    person, persons = labels_of(30, 120, 5)
    camera, cameras = labels_of(30, 120, 3, seed=1)
    person[2], persons[:3], camera[2], cameras[:3] = 50, 50, 4, 4  # all of its positives are left out
    same = (person[:, None] == persons).numpy()
    left_out = same & (camera[:, None] == cameras).numpy()
    ids = {"query_ids": torch.stack((person, camera), 1), "gallery_ids": torch.stack((persons, cameras), 1)}
    if by == "labels":
        positives = {"query_labels": person, "gallery_labels": persons}
    else:
        width = int(same.sum(1).max())
        target = torch.full((30, width), -1)
        for row, of_row in zip(target, same):
            row[: of_row.sum()] = torch.from_numpy(np.flatnonzero(of_row))
        positives = {"target": target}
    check(query, gallery, same & ~left_out, "product", backend, left_out, **positives, **ids)


def test_a_collapsed_model(backend, filter_dtype, small_walk):
    """Equal rows come in their order."""
    x = torch.ones(100, 9)
    labels = torch.arange(100) // 50
    positive = (labels[:, None] == labels).numpy() & ~np.eye(100, dtype=bool)
    of_rows = {"query_labels": labels, "gallery_labels": labels, "exclude_self": True}
    check(x, x, positive, "cosine", backend, np.eye(100, dtype=bool), **of_rows)


def test_blocks_of_few_rows_where_there_are_many_positives(backend, monkeypatch):
    monkeypatch.setattr(ranking, "_MOST_POSITIVES", 70)
    query, gallery = oracle.whole_numbers(20, 150, 5)
    labels = {"query_labels": torch.zeros(20).long(), "gallery_labels": torch.arange(150) % 3}
    blocks = [
        [(rows.start, rows.stop) for rows in ranking._row_blocks(torch.tensor([50, 20, 1, 90, 0, 0, 70]), 4, padded)]
        for padded in (False, True)
    ]
    assert blocks == [[(0, 2), (2, 3), (3, 4), (4, 7)], [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7)]]
    check(query, gallery, np.arange(150)[None].repeat(20, 0) % 3 == 0, "cosine", backend, **labels)


def test_k_of_any_size(backend):
    found = retrieval.recall_at_k(X, Y, k=(1, 10**30), target=torch.tensor([1, 0, 0, 0]), backend=backend)
    assert found == [0.75, 1.0]  # of equal rows the first is the nearest


def test_average_precision_of_scikit_learn(backend):
    x = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(2)))
    y = F.normalize(torch.randn(120, 16, generator=torch.Generator().manual_seed(3)))
    of_query, of_gallery = labels_of(50, 120, 4)
    options = {"query_labels": of_query, "gallery_labels": of_gallery, "backend": backend}
    each = [average_precision_score(of_gallery == label, y @ row) for row, label in zip(x, of_query)]
    assert retrieval.mean_average_precision(x, y, **options) == pytest.approx(np.mean(each), rel=1e-12)


def test_one_metric_by_its_name():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(60) // 6
    names = ["recall@1", "recall@4", "precision@3", "map@r", "r_precision", "map", "mrr", "median_rank"]
    found = retrieval.evaluate(x, query_labels=labels, metrics=names)
    assert retrieval.recall_at_k(x, query_labels=labels) == found["recall@1"]
    assert retrieval.recall_at_k(x, k=(1, 4), query_labels=labels) == [found["recall@1"], found["recall@4"]]
    assert retrieval.precision_at_k(x, k=3, query_labels=labels) == found["precision@3"]
    assert retrieval.map_at_r(x, query_labels=labels) == found["map@r"]
    assert retrieval.r_precision(x, query_labels=labels) == found["r_precision"]
    assert retrieval.mean_average_precision(x, query_labels=labels) == found["map"]
    assert retrieval.mrr(x, query_labels=labels) == found["mrr"]
    each = retrieval.mrr(x, query_labels=labels, reduction="none")
    assert each.shape == (60,) and each.mean() == pytest.approx(found["mrr"])


X, Y, L, M = torch.ones(4, 3), torch.ones(6, 3), torch.zeros(4).long(), torch.zeros(6).long()
BOTH = {"query_labels": L, "gallery_labels": M}
BAD = [
    (ValueError, "query_labels or a target must be given", lambda: retrieval.evaluate(X, Y)),
    (ValueError, "query_labels must not be given with target", lambda: retrieval.evaluate(X, Y, target=L, **BOTH)),
    (ValueError, "must not be given with target", lambda: retrieval.evaluate(X, Y, target=L, gallery_labels=M)),
    (ValueError, "without a gallery", lambda: retrieval.evaluate(X, **BOTH)),
    (ValueError, "gallery_labels must be given with a gallery", lambda: retrieval.evaluate(X, Y, query_labels=L)),
    (ValueError, "labels are given by their names", lambda: retrieval.evaluate(X, L)),
    (TypeError, "mrr got an unexpected argument 'labels': it takes query_labels", lambda: retrieval.mrr(X, labels=L)),
    (TypeError, "recall_at_k got an unexpected argument 'm", lambda: retrieval.recall_at_k(X, metrics=["map"])),
    (ValueError, "at least one metric", lambda: retrieval.evaluate(X, Y, metrics=[], **BOTH)),
    (ValueError, "at least one metric", lambda: retrieval.recall_at_k(X, Y, k=[], **BOTH)),
    (ValueError, "target must name at least one", lambda: retrieval.evaluate(X, Y, target=L[:, None][:, :0])),
    (TypeError, "query_labels must be integers", lambda: retrieval.evaluate(X, query_labels=X[:, 0])),
    (ValueError, r"query_labels must have shape \(4,\)", lambda: retrieval.evaluate(X, query_labels=M)),
    (TypeError, "target must be integers", lambda: retrieval.evaluate(X, Y, target=X[:, 0])),
    (TypeError, "target must be a torch.Tensor, got list", lambda: retrieval.evaluate(X, Y, target=[0, 1, 2, 3])),
    (ValueError, r"shape \(4,\) or \(4, P\)", lambda: retrieval.evaluate(X, Y, target=M)),
    (ValueError, r"target must be in \[-1, 6\), got 6", lambda: retrieval.evaluate(X, Y, target=L + 6)),
    (ValueError, r"target must be in \[-1, 6\), got -2", lambda: retrieval.evaluate(X, Y, target=L - 2)),
    (ValueError, "4 of 4 have none", lambda: retrieval.evaluate(X, Y, target=L - 1)),
    (ValueError, "1 of 4 have none", lambda: retrieval.evaluate(X, query_labels=torch.tensor([0, 0, 0, 1]))),
    (ValueError, "4 of 4 have none", lambda: retrieval.evaluate(X, Y, target=L - 1, missing="skip")),
    (ValueError, "query must have at least one row", lambda: retrieval.evaluate(X[:0], Y, target=L[:0])),
    (ValueError, "missing must be one of error, skip", lambda: retrieval.evaluate(X, Y, missing="zero", **BOTH)),
    (ValueError, "reduction must be one of mean, none", lambda: retrieval.evaluate(X, Y, reduction="sum", **BOTH)),
    (
        ValueError,
        "metrics must be of recall@k.*got 'recall'",
        lambda: retrieval.evaluate(X, Y, metrics="recall", **BOTH),
    ),
    (ValueError, "got 'recall@0'", lambda: retrieval.evaluate(X, Y, metrics=["recall@0"], **BOTH)),
    (TypeError, "metrics must be names, got int", lambda: retrieval.evaluate(X, Y, metrics=[1], **BOTH)),
    (TypeError, "metrics must be names, got NoneType", lambda: retrieval.evaluate(X, Y, metrics=None, **BOTH)),
    (TypeError, "k must be an int, got Tensor", lambda: retrieval.recall_at_k(X, Y, k=torch.tensor(1), **BOTH)),
    (ValueError, "k must be at least 1, got 0", lambda: retrieval.recall_at_k(X, Y, k=0, **BOTH)),
    (ValueError, "gallery must be finite", lambda: retrieval.evaluate(X, Y * torch.nan, **BOTH)),
    (TypeError, "progress must be a bool", lambda: retrieval.evaluate(X, Y, progress=1, **BOTH)),
]


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
