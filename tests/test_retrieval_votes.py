"""What nearest neighbours vote for, against scikit-learn and DINO's formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from replearn_kernels import retrieval

pytestmark = pytest.mark.usefixtures("one_thread")


def test_vote(backend):
    g = torch.Generator().manual_seed(10)
    x, y = torch.randn(60, 8, generator=g), torch.randn(200, 8, generator=g)
    labels, wanted = torch.randint(-3, 4, (200,), generator=g), torch.randint(-3, 4, (60,), generator=g)
    options = {"k": 9, "backend": backend}
    model = KNeighborsClassifier(9).fit(y, labels)
    found = retrieval.knn_predict(x, y, labels, temperature=None, similarity="distance", **options)
    np.testing.assert_array_equal(found, model.predict(x))
    # DINO's: softmax-like weights, summed by class
    values, indices = F.normalize(x).mm(F.normalize(y).T).topk(9)
    votes = torch.zeros(60, 7).scatter_add_(1, labels[indices] + 3, (values / 0.07).exp())
    expected = votes.argmax(1) - 3
    assert torch.equal(retrieval.knn_predict(x, y, labels, **options), expected)
    assert retrieval.knn_accuracy(x, y, wanted, labels, **options) == (expected == wanted).double().mean().item()
    model = KNeighborsClassifier(9).fit(y, labels)
    alone = retrieval.knn_predict(y, None, labels, temperature=None, similarity="distance", **options)
    others = [model.fit(np.delete(y, i, 0), np.delete(labels, i)).predict(y[i : i + 1])[0] for i in range(0, 200, 9)]
    assert alone[::9].tolist() == others
    near = torch.cdist(x, y).topk(9, largest=False)
    votes = torch.zeros(60, 7).scatter_add_(1, labels[near.indices] + 3, (-near.values / 2).exp())
    found = retrieval.knn_predict(x, y, labels, temperature=2.0, similarity="distance", **options)
    assert torch.equal(found, votes.argmax(1) - 3)


def test_vote_beyond_fp32(backend):
    """Products of 1e50, and as many neighbours as there are rows: of memory in proportion to them."""
    x, y = torch.tensor([[3e25, 1e25]]), torch.tensor([[1e25, 0.0], [2e25, 0.0], [0.0, 3e25]])
    labels = torch.tensor([5, 5, 1])
    assert retrieval.knn_predict(x, y, labels, 3, similarity="product", backend=backend).tolist() == [5]
    y = torch.randn(20000, 2)
    assert retrieval.knn_predict(y[:1], y, torch.arange(20000) // 2, 20000, backend=backend).shape == (1,)


def test_vote_where_few_neighbours_are_left(backend):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    ids = {"query_ids": torch.tensor([0, 1]), "gallery_ids": torch.tensor([0, 0, 1]), "backend": backend}
    assert retrieval.knn_predict(x, y, torch.tensor([7, 7, 9]), 3, **ids).tolist() == [9, 7]
    ids["gallery_ids"] = torch.tensor([0, 0, 0])
    with pytest.raises(ValueError, match="query 0 has none"):
        retrieval.knn_predict(x, y, torch.tensor([7, 7, 9]), 3, **ids)
