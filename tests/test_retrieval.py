"""Nearest neighbours against their definition: all scores in fp64, sorted, of equal ones the lower index first."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import retrieval_oracle as oracle
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from replearn_kernels import retrieval, verification
from replearn_kernels.engine import native
from replearn_kernels.retrieval import walk

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = ["recall@1", "map", "mean_rank"]
SIMILARITIES = ["cosine", "product", "distance", "squared_distance"]
SIZES = [(1, 1, 1), (2, 3, 3), (33, 65, 48), (63, 257, 100), (65, 33, 640), (5, 130, 1152)]


def check(query, gallery, k, similarity, backend, left_out=None, ties_by_rounding=False, **options):
    of_pairs = oracle.scores(query, gallery, similarity, left_out)
    values, columns = oracle.topk(of_pairs, k)
    found = retrieval.topk(query, gallery, k, similarity=similarity, backend=backend, **options)
    if ties_by_rounding:  # in fp64, where the oracle sums in another order: other columns of the same score
        assert all(len(set(row)) == k for row in found.indices.tolist())
        np.testing.assert_allclose(np.take_along_axis(of_pairs, found.indices.numpy(), 1), values, rtol=1e-14)
    else:
        np.testing.assert_array_equal(found.indices.numpy(), columns)
    if similarity in ("distance", "squared_distance"):
        values = np.sqrt(-values) if similarity == "distance" else -values
    wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
    assert found.values.dtype == wanted and found.indices.dtype == torch.int64
    tolerance = {"rtol": 1e-12} if wanted == torch.float64 else {"rtol": 1.2e-7, "atol": 2e-45}  # the last digit
    with np.errstate(under="ignore", over="ignore"):
        np.testing.assert_allclose(found.values.numpy(), values.astype(found.values.numpy().dtype), **tolerance)
    return found


@pytest.mark.parametrize("n, m, d", SIZES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_neighbours_with_ties(backend, similarity, n, m, d, filter_dtype, small_walk):
    """Of whole numbers most scores occur several times: the order of equal ones is the index's."""
    query, gallery = oracle.whole_numbers(n, m, d)
    for k in sorted({1, min(5, m), m}):
        check(query, gallery, k, similarity, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_dtype_and_any_strides(backend, similarity, dtype, filter_dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 2 * 33, generator=g).to(dtype)[:, ::2]
    y = torch.randn(33, 90, generator=g).to(dtype).T
    assert x.stride(1) == 2 and y.stride(0) == 1
    check(x, y, 7, similarity, backend)
    check(x[:1].expand(6, -1), y, 7, similarity, backend)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_rows_of_very_different_length(backend, similarity, filter_dtype):
    """From 1e-30 to 1e30 in one gallery, and rows of zeros; products underflow in fp32."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 20, generator=g), torch.randn(70, 20, generator=g)
    y *= 10.0 ** torch.linspace(-30, 15, 70)[:, None]
    x *= 10.0 ** torch.linspace(-30, 15, 30)[:, None]
    x[3] = y[5] = y[66] = 0
    ties_by_rounding = similarity not in ("cosine", "product")
    check(x, y, 12, similarity, backend, ties_by_rounding=ties_by_rounding)
    check(x.double() * 1e20, y.double() * 1e20, 70, similarity, backend, ties_by_rounding=ties_by_rounding)


@pytest.mark.parametrize("similarity", ["distance", "squared_distance"])
def test_from_far_away(backend, similarity, filter_dtype):
    """Distances that fp64 rounds to the same number are equal, however well the filter tells their rows apart."""
    x = torch.tensor([[1e15, 0.0]])
    y = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [1e-2, 0.0], [-1e-2, 0.0], [-1e-3, 0.0]])
    for k in range(1, 6):
        assert retrieval.topk(x, y, k, similarity=similarity, backend=backend).indices.tolist() == [[*range(k)]]
    ranks = {"metrics": "mean_rank", "similarity": similarity, "backend": backend}
    assert [retrieval.evaluate(x, y, target=torch.tensor([i]), **ranks)["mean_rank"] for i in range(5)] == [
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize("scale", [1e-149, 1e149])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_any_scale_of_fp64(backend, similarity, scale):
    x, _ = oracle.whole_numbers(40, 1, 6)
    scale = 2.0 ** round(np.log2(scale))
    expected = retrieval.topk(x.double(), k=7, similarity=similarity, backend=backend)
    found = retrieval.topk(x.double() * scale, k=7, similarity=similarity, backend=backend)
    assert torch.equal(found.indices, expected.indices)
    assert found.values.min() >= 0 or similarity in ("cosine", "product")
    ranks = {"query_labels": torch.arange(40) % 3, "metrics": METRICS, "similarity": similarity, "backend": backend}
    assert retrieval.evaluate(x.double() * scale, **ranks) == retrieval.evaluate(x.double(), **ranks)


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_collapsed_model(backend, similarity, spread, filter_dtype, small_walk):
    """All rows within what the filter can tell apart, or equal: scores decide. Most rows have a twin."""
    g = torch.Generator().manual_seed(3)
    y = 10 + spread * torch.randn(150, 24, generator=g)
    y[70:] = y[:80].clone()
    check(y[:20] + spread, y, 9, similarity, backend)


@pytest.mark.parametrize("place", ["first", "last"])
def test_every_lane(backend, place, filter_dtype, small_walk):
    """The nearest column in each place of a tile, the last of which has one vector and a part."""
    m = 48 + 17
    gallery = torch.randn(m, 40, generator=torch.Generator().manual_seed(4))
    far = gallery if place == "first" else -gallery
    for k in (1, m):
        found = retrieval.topk(far, gallery, k, backend=backend).indices[:, 0 if place == "first" else -1]
        if place == "first" or k == m:
            assert found.tolist() == list(range(m))


def test_a_batch_against_itself(backend, filter_dtype, small_walk):
    x, _ = oracle.whole_numbers(60, 1, 12)
    itself = np.eye(60, dtype=bool)
    of_pairs = oracle.scores(x, x, "cosine", itself)
    for found in (
        retrieval.topk(x, k=59, backend=backend),
        retrieval.topk(x, x.clone(), 59, exclude_self=True, backend=backend),
        retrieval.topk(x, k=59, query_ids=torch.arange(60) * 10**15, backend=backend),
    ):
        np.testing.assert_array_equal(found.indices.numpy(), oracle.topk(of_pairs, 59)[1])
    full = retrieval.topk(x, k=60, query_ids=torch.arange(60), backend=backend)
    assert (full.indices[:, -1] == -1).all() and (full.values[:, -1] == -torch.inf).all()


@pytest.mark.parametrize("similarity", ["product", "distance"])
def test_ids_that_leave_out(backend, similarity, filter_dtype, small_walk):
    """Where both columns are equal, as person and camera; some queries keep fewer than k rows, one none."""
    query, gallery = oracle.whole_numbers(25, 70, 6)
    g = torch.Generator().manual_seed(5)
    of_query = torch.randint(-2, 2, (25, 2), generator=g)
    of_gallery = torch.randint(-2, 2, (70, 2), generator=g)
    of_gallery[:, 1] = torch.where(of_gallery[:, 0] == 1, 1, of_gallery[:, 1])
    of_gallery[:40] = of_query[7]
    ids = {"query_ids": of_query, "gallery_ids": of_gallery}
    left_out = (of_query[:, None] == of_gallery).all(2).numpy()
    assert left_out[7].sum() >= 40
    check(query, gallery, 60, similarity, backend, left_out, **ids)
    everything = {"query_ids": torch.zeros(25, dtype=torch.int32), "gallery_ids": torch.zeros(70, dtype=torch.uint8)}
    found = check(query, gallery, 3, similarity, backend, np.ones((25, 70), dtype=bool), **everything)
    assert (found.indices == -1).all()


def test_no_query_and_one_column(backend):
    y = torch.randn(3, 5)
    assert retrieval.topk(torch.empty(0, 5), y, 2, backend=backend).indices.shape == (0, 2)
    assert retrieval.topk(y, y[:1], 1, backend=backend).indices.tolist() == [[0]] * 3
    assert retrieval.topk(torch.empty(2, 0), torch.empty(4, 0), 2, backend=backend).indices.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_whatever_torch_is_told_of_products(backend, precision, cut_products, monkeypatch):
    """Neither a lower precision of fp32 products nor autocast changes a neighbour."""
    monkeypatch.setattr(walk, "_first_dtype", lambda scores: torch.float32)
    x = F.normalize(10 + torch.randn(300, 64, generator=torch.Generator().manual_seed(6)))
    expected = check(x[:40], x, 10, "cosine", backend)
    with cut_products(precision), torch.autocast("cpu"):
        found = retrieval.topk(x[:40], x, 10, backend=backend)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


def test_a_bf16_filter_gives_way_where_it_cannot_tell(monkeypatch):
    """In the second block of rows the filter is fp32's, as too many pairs of the first were in doubt."""
    monkeypatch.setattr(walk, "_first_dtype", lambda scores: torch.bfloat16)
    monkeypatch.setattr(walk, "_CPU_TILE", (16, 48))
    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append(out.dtype), mm(a, b, out=out))[1])
    x = 10 + 1e-3 * torch.randn(300, 40, generator=torch.Generator().manual_seed(7))
    check(x[:40], x, 5, "cosine", "torch")
    assert seen == 7 * [torch.bfloat16] + 14 * [torch.float32]
    seen.clear()
    check(x[:40] - 10, x - 10, 5, "cosine", "torch")
    assert seen == 21 * [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype(backend, dtype, filter_dtype):
    x, labels = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5

    def results():
        curve = verification.roc_of_labels(x, query_labels=labels, far=0.1, backend=backend)
        scores = retrieval.evaluate(x, query_labels=labels, metrics=METRICS, backend=backend)
        return [*retrieval.topk(x, k=3, backend=backend), torch.tensor(list(scores.values())), curve.thresholds]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected):
        assert torch.equal(one.to(other.dtype), other.to(one.dtype).to(other.dtype))


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
def test_threads_and_tiles_change_no_bit(monkeypatch):
    x = F.normalize(torch.randn(1500, 32, generator=torch.Generator().manual_seed(8)))
    expected = retrieval.topk(x, k=20, backend="cpp")
    torch.set_num_threads(2)
    for tile in ((1024, 1024), (64, 700)):
        monkeypatch.setattr(walk, "_CPU_TILE", tile)
        found = retrieval.topk(x, k=20, backend="cpp")
        assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    torch.set_num_threads(1)
    found = retrieval.topk(x, k=20, backend="torch")
    assert torch.equal(found.indices, expected.indices)


SETS = """
import torch
from replearn_kernels import retrieval, verification
from replearn_kernels.retrieval import walk
results = [torch.ops.replearn_kernels.instruction_set()]
for d in (3, 40, 100):
    x = torch.randn(300, d, generator=torch.Generator().manual_seed(d))
    for dtype in (torch.float32, torch.bfloat16):
        walk._first_dtype = lambda scores: dtype
        for k in (1, 30, 299):
            results += retrieval.topk(x, k=k)
        labels = torch.arange(300) % 6
        results.append(retrieval.evaluate(x, query_labels=labels, metrics=["map", "precision@9"]))
    curve = verification.roc_of_labels(x, query_labels=labels, best="f1")
    results += curve.thresholds, curve.same, curve.other
torch.save(results, {path!r})
"""


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    found = {}
    for name in ("baseline", "avx2", "avx512"):
        path = str(tmp_path / name)
        environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SETS.format(path=path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            assert "must be one of" in done.stderr and name != "baseline", done.stderr
            continue
        kind, *found[name] = torch.load(path)
        assert kind == name
    for results in found.values():
        for one, other in zip(results, found["baseline"], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_beside_scikit_learn(backend):
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    model = NearestNeighbors(n_neighbors=8).fit(x)
    distances, indices = model.kneighbors()
    found = retrieval.topk(x, k=8, similarity="distance", backend=backend)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.values, distances, rtol=1e-12)


def test_as_an_operator():
    x, y = torch.randn(20, 6), torch.randn(30, 6)
    ids = torch.arange(20), torch.arange(30)
    operator = torch.ops.replearn_kernels.topk
    for arguments in (
        (x, None, 3, "cosine", False, None, None, "auto"),
        (x, y, 3, "distance", False, *ids, "torch"),
        (x.double(), y.double(), 3, "product", False, None, None, "auto"),
    ):
        torch.library.opcheck(operator, arguments)
    with pytest.raises(NotImplementedError):
        torch.func.vmap(lambda rows: retrieval.topk(rows, y, 3).values)(x[None])
    x.requires_grad_()
    assert not retrieval.topk(x, y, 3).values.requires_grad
    assert not torch.compile(lambda a: retrieval.topk(a, y, 3).values, fullgraph=True)(x).requires_grad


def test_in_one_graph_of_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: retrieval.topk(a, b, k=4).indices + 1, fullgraph=True, dynamic=True)
    for n, m in ((10, 20), (11, 40), (30, 7)):
        x, y = torch.randn(n, 6), torch.randn(m, 6)
        assert torch.equal(compiled(x, y), retrieval.topk(x, y, 4).indices + 1)


def test_a_bar(capsys):
    x = torch.randn(30, 4)
    expected = retrieval.topk(x, k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = retrieval.topk(x, k=2, progress=True)
    assert torch.equal(found.indices, expected.indices)
    assert "30/30" in capsys.readouterr().out


X, Y = torch.ones(4, 3), torch.ones(6, 3)
BAD = [
    (TypeError, "query must be a torch.Tensor, got list", lambda: retrieval.topk([[1.0]], Y)),
    (ValueError, r"query must have 2 dimensions \[N, d\]", lambda: retrieval.topk(X[0], Y, 1)),
    (TypeError, "gallery must be fp16, bf16, fp32 or fp64", lambda: retrieval.topk(X, Y.long(), 1)),
    (ValueError, "same width d, got 2 and 3", lambda: retrieval.topk(X, Y[:, :2], 1)),
    (TypeError, "same dtype", lambda: retrieval.topk(X, Y.double(), 1)),
    (ValueError, "same device", lambda: retrieval.topk(X, Y.to("meta"), 1)),
    (ValueError, "k must be at least 1, got 0", lambda: retrieval.topk(X, Y, 0)),
    (TypeError, "k must be an int", lambda: retrieval.topk(X, Y, 2.0)),
    (ValueError, "k must be at most 6, the number of rows .* got 7", lambda: retrieval.topk(X, Y, 7)),
    (ValueError, "k must be at most 3, the number of rows .* got 4", lambda: retrieval.topk(X, k=4)),
    (ValueError, "k must be at most 3", lambda: retrieval.topk(X, X, 4, exclude_self=True)),
    (ValueError, r"gallery must have 2 dimensions \[M, d\] \(labels", lambda: retrieval.topk(X, torch.arange(4), 1)),
    (ValueError, "similarity must be one of cosine, product", lambda: retrieval.topk(X, Y, 1, similarity="l2")),
    (ValueError, "backend must be one of auto, cpp, torch", lambda: retrieval.topk(X, Y, 1, backend="triton")),
    (TypeError, "exclude_self must be a bool", lambda: retrieval.topk(X, Y, 1, exclude_self=1)),
    (TypeError, "progress must be a bool", lambda: retrieval.topk(X, Y, 1, progress="yes")),
    (ValueError, "same number of rows, got 6 and 4", lambda: retrieval.topk(X, Y, 1, exclude_self=True)),
    (ValueError, "given together", lambda: retrieval.topk(X, Y, 1, query_ids=torch.arange(4))),
    (
        ValueError,
        "as many columns, got 1 and 2",
        lambda: retrieval.topk(X, Y, 1, query_ids=torch.arange(4), gallery_ids=torch.ones(6, 2).long()),
    ),
    (
        TypeError,
        "query_ids must be integers",
        lambda: retrieval.topk(X, Y, 1, query_ids=X[:, 0], gallery_ids=torch.arange(6)),
    ),
    (
        ValueError,
        r"gallery_ids must have shape \(6,\)",
        lambda: retrieval.topk(X, Y, 1, query_ids=torch.arange(4), gallery_ids=torch.arange(4)),
    ),
    (
        ValueError,
        "exclude_self must not be given with ids",
        lambda: retrieval.topk(X, X, 1, exclude_self=True, query_ids=torch.arange(4), gallery_ids=torch.arange(4)),
    ),
    (ValueError, "without a gallery", lambda: retrieval.topk(X, k=1, gallery_ids=torch.arange(4))),
    (
        ValueError,
        "gallery must be finite, got NaN or infinity in row 5, and 1 such",
        lambda: retrieval.topk(X, Y.index_fill(0, torch.tensor(5), torch.nan), 1),
    ),
    (
        ValueError,
        "query must be finite.* row 2",
        lambda: retrieval.topk(X.index_fill(0, torch.tensor(2), torch.inf), Y, 1),
    ),
    (
        ValueError,
        r"a length outside of \[3e-151, 3e\+150\] in row 0, and 4 such",
        lambda: retrieval.topk(X.double() * 1e200, Y.double(), 1),
    ),
    (
        ValueError,
        r"a length outside of .* row 3",
        lambda: retrieval.topk(torch.eye(4).double() * torch.tensor([1, 0, 1, 1e-160], dtype=torch.float64), k=1),
    ),
    (
        ValueError,
        "query must have at least one row",
        lambda: retrieval.knn_accuracy(X[:0], Y, torch.arange(0), torch.arange(6), 1),
    ),
    (TypeError, "group must be a torch.distributed process group", lambda: retrieval.topk(X, Y, 1, group="all")),
    (
        ValueError,
        "temperature must be positive",
        lambda: retrieval.knn_predict(X, Y, torch.arange(6), 1, temperature=0),
    ),
    (ValueError, r"gallery_labels must have shape \(6,\)", lambda: retrieval.knn_predict(X, Y, torch.arange(4), 1)),
    (TypeError, "gallery must be a torch.Tensor, got list", lambda: retrieval.knn_predict(X, [], torch.arange(4), 1)),
]


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
