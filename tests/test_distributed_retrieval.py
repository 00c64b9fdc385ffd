"""Retrieval over the galleries of all ranks: what one process finds, to the bit, and errors that reach all."""

import numpy as np
import pytest
import retrieval_oracle as oracle
import torch
import torch.distributed as dist
from processes import RankError, Ranks, needs_gloo

from replearn_kernels import retrieval, verification

pytestmark = needs_gloo

METRICS = list(oracle.METRICS)
# Queries and rows of the gallery of each rank.
SHARDS = {2: [((7, 5), (20, 9)), ((0, 6), (17, 0))], 3: [((4, 4, 4), (9, 9, 9)), ((5, 0, 1), (0, 12, 3))]}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def problem(shards):
    """Rows with ties, labels, ids, targets; each as parts of the ranks."""
    of_queries, of_galleries = shards
    n, m = sum(of_queries), sum(of_galleries)
    query, gallery = oracle.whole_numbers(n, m, 5)
    g = torch.Generator().manual_seed(1)

    def draw(most, *shape):
        return torch.randint(0, most, shape, generator=g)

    return {
        "query": query.split(of_queries),
        "gallery": gallery.split(of_galleries),
        "query_labels": draw(3, n).split(of_queries),
        "gallery_labels": draw(3, m).split(of_galleries),
        "query_ids": (10**12 * draw(4, n, 2)).split(of_queries),
        "gallery_ids": (10**12 * draw(4, m, 2)).split(of_galleries),
        "target": draw(m, n, 2).split(of_queries),
    }


def calls(similarity, backend, problem, group):
    """Of one rank, or of all with the parts put together: what retrieval makes of it."""

    def call(function, names, **options):
        return function(
            **{name: problem[name] for name in names}, similarity=similarity, backend=backend, group=group, **options
        )

    both, labels = ["query", "gallery"], ["query_labels", "gallery_labels"]
    ids = ["query_ids", "gallery_ids"]
    lenient = {"metrics": METRICS, "missing": "skip"}
    yield tuple(call(retrieval.topk, both, k=12))
    yield tuple(call(retrieval.topk, both + ids, k=12))
    yield tuple(call(retrieval.topk, ["query"], k=3))
    yield call(retrieval.evaluate, both + labels, **lenient)
    yield call(retrieval.evaluate, both + labels + ids, **lenient)
    yield call(retrieval.evaluate, [*both, "target"], **lenient)
    yield call(retrieval.evaluate, ["query", "query_labels"], **lenient)
    yield call(retrieval.evaluate, [*both, "target"], metrics=METRICS, missing="skip", reduction="none")
    yield call(retrieval.knn_predict, [*both, "gallery_labels"], k=5)


def curves(similarity, backend, problem, group):
    """As :func:`calls`."""
    for names in (["query", "gallery"], ["query", "gallery", "query_ids", "gallery_ids"], ["query"]):
        labels = [f"{side}_labels" for side in ("query", "gallery") if side in names]
        options = {name: problem[name] for name in names + labels}
        options |= {"similarity": similarity, "backend": backend, "group": group}
        curve = verification.roc_of_labels(far=(0.01, 0.1), best="f1", **options)
        low, high = curve.auc_bounds
        assert low <= curve.auc <= high
        yield tuple(getattr(curve, name) for name in ("thresholds", "same", "other"))


def on_rank(rank, similarity, backend, shards):
    own = {name: parts[rank] for name, parts in problem(shards).items()}
    return [_as_numpy(found) for found in calls(similarity, backend, own, dist.group.WORLD)]


def _as_numpy(found):
    if isinstance(found, tuple):
        return [part.numpy() for part in found]
    if isinstance(found, dict):
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in found.items()}
    return found.numpy()


@pytest.mark.parametrize("similarity, backend", [("cosine", "auto"), ("distance", "auto"), ("product", "torch")])
def test_as_in_one_process(ranks, similarity, backend):
    for shards in SHARDS[ranks.world_size]:
        whole = {name: torch.cat(parts) for name, parts in problem(shards).items()}
        of_ranks = zip(*ranks.run(on_rank, similarity, backend, shards))
        for of_all, parts in zip(calls(similarity, backend, whole, None), of_ranks, strict=True):
            of_all = _as_numpy(of_all)
            if isinstance(of_all, list):
                for k, found in enumerate(of_all):
                    np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), found)
            elif isinstance(of_all, np.ndarray):
                np.testing.assert_array_equal(np.concatenate(parts), of_all)
            elif isinstance(of_all["map"], float):
                assert all(part == parts[0] for part in parts)
                assert parts[0] == pytest.approx(of_all, rel=1e-14)
            else:
                for name in METRICS:
                    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), of_all[name])


def curves_on_rank(rank, similarity, backend, shards):
    own = {name: parts[rank] for name, parts in problem(shards).items()}
    return [_as_numpy(found) for found in curves(similarity, backend, own, dist.group.WORLD)]


@pytest.mark.parametrize("similarity, backend", [("cosine", "auto"), ("distance", "auto"), ("product", "torch")])
def test_curves_of_all_pairs_as_in_one_process(ranks, similarity, backend):
    """On every rank that of all ranks' pairs."""
    for shards in SHARDS[ranks.world_size]:
        whole = {name: torch.cat(parts) for name, parts in problem(shards).items()}
        of_ranks = zip(*ranks.run(curves_on_rank, similarity, backend, shards))
        for of_all, parts in zip(curves(similarity, backend, whole, None), of_ranks, strict=True):
            for part in parts:
                for points, expected in zip(part, _as_numpy(of_all), strict=True):
                    np.testing.assert_array_equal(points, expected)


def fails(rank, name):
    """The error's text on this rank; the group goes on."""
    x, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)), torch.arange(4) % 2
    group = dist.group.WORLD
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        if name == "NaN on one":
            retrieval.topk(x * (torch.nan if rank == 1 else 1), k=1, group=group)
        elif name == "another k":
            retrieval.topk(x, k=1 + rank, group=group)
        elif name == "another width":
            retrieval.topk(x[:, : 3 - rank], k=1, group=group)
        elif name == "no gallery on one":
            retrieval.topk(x, x if rank else None, k=1, group=group)
        elif name == "target of one":
            retrieval.evaluate(x, x, target=labels + 1000 * rank, group=group)
        elif name == "k of all":
            retrieval.topk(x, x, k=4 * dist.get_world_size() + 1, group=group)
        elif name == "another metric":
            retrieval.evaluate(x, x, target=labels, metrics=["mrr", "map"][: 1 + rank], group=group)
        elif name == "another FAR":
            verification.roc_of_labels(x, query_labels=labels, far=0.1 * (1 + rank), group=group)
        elif name == "no two of a label":
            verification.roc_of_labels(x, query_labels=labels + 10 * torch.arange(4) + 100 * rank, group=group)
        elif name == "missing labels on one":
            retrieval.evaluate(x, query_labels=labels if rank else None, group=group)
    found = retrieval.topk(x, x, k=1, group=group).indices
    assert found[:, 0].tolist() == list(range(4 * rank, 4 * rank + 4))
    return str(error.value)


@pytest.mark.parametrize(
    "name, own, of_others",
    [
        ("NaN on one", "query must be finite", "failed on other ranks"),
        ("another k", "k must be the same on every rank", None),
        ("another width", "d must be the same on every rank", None),
        ("no gallery on one", "gallery must be the same on every rank", None),
        ("target of one", r"target must be in \[-1, ", None),
        ("k of all", "k must be at most", None),
        ("another metric", "metrics must be the same on every rank of the group, got mrr on rank 0", None),
        ("another FAR", "far must be the same on every rank of the group, got (0.1,) on rank 0", None),
        ("no two of a label", "there must be pairs of one label", None),
        ("missing labels on one", "must be", None),
    ],
)
def test_errors_reach_every_rank(ranks, name, own, of_others):
    texts = ranks.run(fails, name)
    wanted = [own] * len(texts)
    if of_others is not None:
        wanted = [own if rank == 1 else of_others for rank in range(len(texts))]
    if name == "missing labels on one":
        wanted = ["query_labels or a target"] + ["failed on other ranks"] * (len(texts) - 1)
    for text, of_rank in zip(texts, wanted):
        assert np.char.find(text, of_rank.replace("\\", "")) >= 0, (text, of_rank)


def none_positive(rank):
    x = torch.randn(4, 3)
    target = torch.full((4,), -1 if rank else 0)
    with pytest.raises(ValueError) as error:
        retrieval.evaluate(x, x, target=target, group=dist.group.WORLD)
    found = retrieval.evaluate(x, x, target=target, missing="skip", metrics="mrr", group=dist.group.WORLD)
    return str(error.value), found["queries"], found["skipped"]


def test_queries_without_a_positive_are_counted_over_all_ranks(ranks):
    size = ranks.world_size
    for text, queries, skipped in ranks.run(none_positive):
        assert f"{4 * size - 4} of {4 * size} have none" in text
        assert (queries, skipped) == (4, 4 * size - 4)


def test_a_rank_that_is_in_another_call(ranks):
    with pytest.raises(RankError, match="different calls met"):
        ranks.run(in_another_call)


def in_another_call(rank):
    x = torch.randn(4, 3)
    (retrieval.topk if rank else retrieval.evaluate)(
        x, group=dist.group.WORLD, **({"k": 1} if rank else {"query_labels": torch.zeros(4).long()})
    )
