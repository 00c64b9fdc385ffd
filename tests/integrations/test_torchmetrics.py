"""torchmetrics' metrics by batches are the functions' of all rows, and torchmetrics' own of all pairs."""

import pytest
import torch
import torch.nn.functional as F
import without_torchvision_operators  # noqa: F401, before torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR, RetrievalRPrecision

from replearn_kernels import retrieval
from replearn_kernels.integrations.torchmetrics import KNNAccuracy, PairedRecall, RetrievalMetrics

G = torch.Generator().manual_seed(0)
QUERY, GALLERY = torch.randn(30, 8, generator=G), torch.randn(80, 8, generator=G)
OF_QUERY, OF_GALLERY = torch.arange(30) % 5, torch.arange(80) % 5


def updated(metric):
    for rows in torch.arange(30).split(7):
        metric.update(QUERY[rows], OF_QUERY[rows])
    for rows in torch.arange(80).split(30):
        metric.update(gallery=GALLERY[rows], gallery_labels=OF_GALLERY[rows])
    return metric


def test_as_torchmetrics_of_all_pairs():
    names = ["recall@3", "map", "mrr", "r_precision"]
    found = updated(RetrievalMetrics(names)).compute()
    scores = F.normalize(QUERY) @ F.normalize(GALLERY).T + 2  # its MAP takes no positive with a score of 0 or below
    positive = OF_QUERY[:, None] == OF_GALLERY
    number = torch.arange(30)[:, None].expand(-1, 80)
    theirs = [RetrievalHitRate(top_k=3), RetrievalMAP(), RetrievalMRR(), RetrievalRPrecision()]
    for name, metric in zip(names, theirs):
        expected = metric(scores.flatten(), positive.flatten(), indexes=number.flatten())
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_against_itself_and_ids():
    metric = RetrievalMetrics("map@r")
    for rows in torch.arange(30).split(7):
        metric.update(QUERY[rows], OF_QUERY[rows], query_ids=torch.arange(30)[rows] // 2)
    options = {"query_labels": OF_QUERY, "query_ids": torch.arange(30) // 2}
    assert metric.compute() == {"map@r": retrieval.map_at_r(QUERY, **options)}
    metric.reset()
    metric.update(QUERY[:10], OF_QUERY[:10])
    assert metric.compute()["map@r"] == retrieval.map_at_r(QUERY[:10], query_labels=OF_QUERY[:10])


def test_pairs():
    metric = PairedRecall(k=(1, 4))
    for rows in torch.arange(30).split(9):
        metric.update(QUERY[rows], GALLERY[rows])
    found = metric.compute()
    target = torch.arange(30)
    there = retrieval.recall_at_k(QUERY, GALLERY[:30], (1, 4), target=target)
    back = retrieval.recall_at_k(GALLERY[:30], QUERY, (1, 4), target=target)
    assert list(found) == [f"{way}_recall@{k}" for way in ("first_to_second", "second_to_first") for k in (1, 4)]
    assert [value.item() for value in found.values()] == pytest.approx([*there, *back])


def test_five_texts_of_an_image():
    texts, of_texts = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), torch.arange(50) // 5
    metric = PairedRecall(k=3)
    metric.update(QUERY[:10], texts[:20], torch.arange(10), of_texts[:20])
    metric.update(QUERY[:0], texts[20:], of_texts[:0], of_texts[20:])
    there = retrieval.recall_at_k(QUERY[:10], texts, 3, target=torch.arange(50).view(10, 5))
    back = retrieval.recall_at_k(texts, QUERY[:10], 3, target=of_texts)
    assert metric.compute() == {"first_to_second_recall@3": there, "second_to_first_recall@3": back}


def test_votes():
    found = updated(KNNAccuracy(k=7)).compute()
    assert found == retrieval.knn_accuracy(QUERY, GALLERY, OF_QUERY, OF_GALLERY, k=7)
    alone = KNNAccuracy(k=7)
    assert alone(QUERY, OF_QUERY) is None  # a call is an update
    assert alone.compute() == retrieval.knn_accuracy(QUERY, None, OF_QUERY, OF_QUERY, k=7)


BAD = [
    (ValueError, "metrics must be of", lambda: RetrievalMetrics(["recall@x"])),
    (ValueError, "missing must be one of", lambda: RetrievalMetrics(missing="no")),
    (ValueError, "similarity must be one of", lambda: KNNAccuracy(similarity="l2")),
    (ValueError, "k must be at least 1", lambda: PairedRecall(k=(1, 0))),
    (TypeError, "query_labels must be integers", lambda: RetrievalMetrics().update(QUERY, OF_QUERY.float())),
    (ValueError, r"query_labels must have shape \(3,\)", lambda: RetrievalMetrics().update(QUERY[:3], OF_QUERY)),
    (ValueError, "gallery_labels must be given with gallery", lambda: KNNAccuracy().update(gallery_labels=OF_GALLERY)),
    (ValueError, "query must be given to update", lambda: RetrievalMetrics().compute()),
    (ValueError, "same number of rows", lambda: PairedRecall().update(QUERY, GALLERY)),
    (ValueError, "given together", lambda: PairedRecall().update(QUERY, GALLERY, OF_QUERY)),
]


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_in_a_collection():
    collection = updated(MetricCollection({"retrieval": RetrievalMetrics(["mrr"]), "knn": KNNAccuracy(k=3)}))
    assert set(collection.compute()) == {"mrr", "knn"}
