"""pytorch-metric-learning's losses and miners and ours in their place: values, gradients, and what they stand in."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from replearn_kernels.integrations import pytorch_metric_learning as ours

OURS = {**ours._classes[0].ours, **ours._classes[1].ours}
THEIRS = {**ours._classes[0].theirs, **ours._classes[1].theirs}
EXACT = dict(rtol=1e-9, atol=1e-11)
LP, COSINE = distances.LpDistance, distances.CosineSimilarity


def products():
    return distances.DotProductSimilarity(normalize_embeddings=False)


def combined(*parts) -> dict:
    """Arguments of a constructor, each part made anew: distances and reducers are modules of one loss each."""
    return {name: value for part in parts for name, value in part().items()}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Each test is told what is left to their code, and none is told without expecting it."""
    monkeypatch.setattr(ours, "_told", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is computed by pytorch-metric-learning")
        yield
    ours.undo()


LABELS = {
    "pairs": lambda n: torch.arange(n) // 2,
    "eights": lambda n: torch.arange(n) % 4,
    "some alone": lambda n: torch.where(torch.arange(n) % 3 == 0, 1000 + torch.arange(n), torch.arange(n) % 5),
    "one": lambda n: torch.zeros(n, dtype=torch.int64),
    "all alone": torch.arange,
}


def batch(n: int, d: int = 12, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 0.2 * torch.rand(n, 1, generator=rng)  # of products over 708 theirs rounds the probability to 0
    return (torch.randn(n, d, generator=rng, dtype=torch.float64) * lengths).to(dtype)


def loss_and_gradients(loss, embeddings, labels, *, references=None, ref_labels=None, indices=None):
    leaves = [embeddings.clone().requires_grad_()]
    if references is not None:
        leaves.append(references.clone().requires_grad_())
    value = loss(leaves[0], labels, indices, *leaves[1:], *([ref_labels] if references is not None else []))
    value.backward()
    return [value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def assert_same(name: str, options, *given, **keywords) -> list:
    """``options``: a function that makes a constructor's arguments."""
    results, expected = (
        loss_and_gradients(classes[name](**options()), *given, **keywords) for classes in (OURS, THEIRS)
    )
    for a, b in zip(results, expected, strict=True):
        largest = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        limit = 3e-9 if name == "CircleLoss" else 1e-11  # theirs takes x for log(1 + exp(x)) from 20 on
        torch.testing.assert_close(a, b, rtol=1e-9, atol=limit * largest)
    return results


SIMILARITIES = [dict, lambda: dict(distance=products())]
EVERY_DISTANCE = [dict, lambda: dict(distance=COSINE()), lambda: dict(distance=products())]
PAIR_LOSSES = {  # name -> (ways to construct it, distances)
    "NTXentLoss": ([dict, lambda: dict(temperature=0.5)], SIMILARITIES),
    "SupConLoss": ([dict, lambda: dict(temperature=0.3)], SIMILARITIES),
    "CircleLoss": ([dict, lambda: dict(m=0.25, gamma=16)], [dict]),
    "MultiSimilarityLoss": ([dict, lambda: dict(alpha=1.5, beta=20, base=0.3)], SIMILARITIES),
    "ContrastiveLoss": ([dict, lambda: dict(pos_margin=0.2, neg_margin=0.6)], EVERY_DISTANCE),
    "LiftedStructureLoss": ([dict, lambda: dict(neg_margin=0.5, pos_margin=0.1)], EVERY_DISTANCE),
    "GeneralizedLiftedStructureLoss": ([dict, lambda: dict(neg_margin=0.5, pos_margin=0.1)], EVERY_DISTANCE),
    "TripletMarginLoss": ([dict, lambda: dict(margin=0.3)], EVERY_DISTANCE[:2]),
}
REDUCERS = [dict, *(lambda cls=cls: dict(reducer=cls()) for cls in (reducers.MeanReducer, reducers.SumReducer))]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_one_batch(name, labels):
    arguments, kinds = PAIR_LOSSES[name]
    for n, way, distance, reducer in itertools.product((1, 2, 33), arguments, kinds, REDUCERS):
        assert_same(name, partial(combined, way, distance, reducer), batch(n), LABELS[labels](n))


WITH_REFERENCES = [name for name in PAIR_LOSSES if name not in ("LiftedStructureLoss", "TripletMarginLoss")]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", WITH_REFERENCES)
def test_references(name, labels):
    arguments, kinds = PAIR_LOSSES[name]
    by_distance = kinds is EVERY_DISTANCE
    for (n, m), way, distance in itertools.product([(1, 2), (9, 40), (33, 20)], arguments, kinds[by_distance:]):
        given = dict(references=batch(m, seed=1), ref_labels=LABELS[labels](m))
        assert_same(name, partial(combined, way, distance), batch(n), LABELS[labels](n), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_dtypes(name, dtype):
    """Near fp64's of the same rows, which are normalised in their dtype."""
    labels, rows = LABELS["eights"](33), batch(33, dtype=dtype)
    value, gradient = loss_and_gradients(OURS[name](), rows, labels)
    exact, expected = loss_and_gradients(THEIRS[name](), rows.double(), labels)
    tolerance = {torch.float32: 2e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}[dtype]
    assert value.dtype is torch.float32 or name == "ContrastiveLoss"  # whose two reducers' sum has the features' dtype
    assert gradient.dtype is dtype
    assert (value - exact).abs() <= tolerance * exact
    assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()


def test_self_supervised():
    for symmetric, name in itertools.product((True, False), ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss")):
        results = []
        for classes in (OURS, THEIRS):
            rows, other = batch(17).requires_grad_(), batch(17, seed=1).requires_grad_()
            value = losses.SelfSupervisedLoss(classes[name](), symmetric=symmetric)(rows, other)
            value.backward()
            results.append([value.detach(), rows.grad, other.grad])
        torch.testing.assert_close(*results, **EXACT)


def test_what_they_stand_in():
    """A regularizer of the embeddings, several losses with weights, and reducers that look at every loss."""
    labels, rows = LABELS["eights"](33), batch(33)
    for options in (
        lambda: dict(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3),
        lambda: dict(reducer=reducers.ThresholdReducer(low=0.5)),
        lambda: dict(reducer=reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64))),
        lambda: dict(reducer=reducers.DoNothingReducer()),
    ):
        for name in ("NTXentLoss", "SupConLoss"):
            results = [classes[name](**options())(rows, labels) for classes in (OURS, THEIRS)]
            for a, b in zip(*(torch.utils._pytree.tree_leaves(result) for result in results), strict=True):
                torch.testing.assert_close(a, b, **EXACT) if isinstance(a, torch.Tensor) else None
    several = [
        losses.MultipleLosses([classes["NTXentLoss"](), classes["CircleLoss"]()], weights=[1.0, 0.1])(rows, labels)
        for classes in (OURS, THEIRS)
    ]
    torch.testing.assert_close(*several, **EXACT)


CLASSIFIERS = {"ArcFaceLoss": [{}, dict(margin=40.0, scale=30)], "CosFaceLoss": [{}, dict(margin=0.2, scale=30)]}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    labels, rows = torch.arange(33) % 7, batch(33)
    for options, triplets in itertools.product(CLASSIFIERS[name], (None, (torch.arange(5), torch.arange(5) + 7))):
        indices = None if triplets is None else (*triplets, torch.arange(5) + 1)
        results = []
        for classes in (OURS, THEIRS):
            torch.manual_seed(0)
            loss = classes[name](
                7, 12, weight_regularizer=regularizers.LpRegularizer(), weight_reg_weight=0.2, **options
            )
            results.append([*loss_and_gradients(loss, rows, labels, indices=indices), loss.W.grad])
        torch.testing.assert_close(*results, **EXACT)
    with pytest.raises(ValueError, match="ref_emb"):  # theirs
        OURS[name](7, 12)(rows, labels, ref_emb=batch(33, seed=1), ref_labels=labels.clone())


def mined(name: str, rows, labels, **options) -> list[set]:
    return [set(zip(*(i.tolist() for i in classes[name](**options)(rows, labels)))) for classes in (OURS, THEIRS)]


@pytest.mark.parametrize("labels", LABELS)
def test_miners(labels):
    rows, labels = batch(40), LABELS[labels](40)
    for distance in (dict(), dict(distance=COSINE()), dict(distance=LP(normalize_embeddings=False))):
        assert len(set(map(frozenset, mined("BatchHardMiner", rows, labels, **distance)))) == 1
        for kind, margin in itertools.product(("all", "hard", "semihard"), (0.0, 0.2, 2.0)):
            options = dict(margin=margin, type_of_triplets=kind, **distance)
            ours_found, expected = mined("TripletMarginMiner", rows, labels, **options)
            assert ours_found == expected


def test_triplets_at_the_margin_are_taken():
    rows = torch.tensor([[0.0], [1.0], [3.0], [-1.0]])  # D_an - D_ap: 3 - 1, 1 - 1 of the first row
    labels = torch.tensor([0, 0, 1, 1])
    for margin, kind in itertools.product((2.0, 0.0), ("all", "semihard")):
        distance = LP(normalize_embeddings=False)
        ours_found, expected = mined(
            "TripletMarginMiner", rows, labels, margin=margin, type_of_triplets=kind, distance=distance
        )
        assert ours_found == expected
        assert margin == 0 or (0, 1, 2) in ours_found


@pytest.mark.parametrize("reducer", [dict, lambda: dict(reducer=reducers.ThresholdReducer(low=0.1, high=0.6))])
def test_mined_triplets(reducer):
    rows, labels = batch(33), LABELS["eights"](33)
    for distance in (dict, lambda: dict(distance=COSINE())):
        triplets = OURS["TripletMarginMiner"](margin=0.3, **distance())(rows, labels)
        assert len(triplets[0]) > 10
        assert_same("TripletMarginLoss", partial(combined, reducer, distance), rows, labels, indices=triplets)
    empty = tuple(i[:0] for i in triplets)
    assert OURS["TripletMarginLoss"]()(rows, labels, empty) == 0


LEFT = [
    ("NTXentLoss", dict, "an indices_tuple"), ("TripletMarginLoss", lambda: dict(swap=True), "swap"),
    ("TripletMarginLoss", lambda: dict(smooth_loss=True), "smooth_loss"),
    ("MultiSimilarityLoss", lambda: dict(distance=LP()), "the distance LpDistance"),
    ("ContrastiveLoss", lambda: dict(distance=LP(power=2)), "p=2 and power=2"),
    ("ContrastiveLoss", lambda: dict(reducer=reducers.ThresholdReducer(low=0.1)), "the reducer ThresholdReducer"),
    ("TripletMarginLoss", lambda: dict(reducer=reducers.ThresholdReducer(low=0.1)), "the reducer ThresholdReducer"),
    ("SupConLoss", lambda: dict(distance=distances.SNRDistance()), "the distance SNRDistance"),
    ("ContrastiveLoss", lambda: dict(distance=LP(p=1)), "p=1 and power=1"),
    ("TripletMarginLoss", lambda: dict(margin=-0.1), "a negative margin"),
    ("SupConLoss", lambda: dict(temperature=-0.1), "a temperature that is not positive"),
    ("NTXentLoss", lambda: dict(distance=COSINE(collect_stats=True)), "collect_stats"),
    ("TripletMarginLoss", lambda: dict(reducer=reducers.AvgNonZeroReducer(collect_stats=True)), "collect_stats"),
    ("MultiSimilarityLoss", lambda: dict(alpha=torch.tensor(2.0)), "a tensor for alpha"),
    ("CircleLoss", lambda: dict(gamma=torch.tensor(20.0)), "a tensor for gamma"),
    ("ContrastiveLoss", lambda: dict(neg_margin=torch.tensor(0.7)), "a tensor for neg_margin"),
    ("TripletMarginLoss", lambda: dict(margin=torch.tensor(0.7)), "a tensor for margin"),
]


@pytest.mark.parametrize("name, options, why", LEFT)
def test_what_is_left_to_them_is_told_once(name, options, why):
    rows, labels = batch(17), LABELS["eights"](17)
    indices = THEIRS["BatchHardMiner"]()(rows, labels) if why == "an indices_tuple" else None
    with pytest.warns(UserWarning, match=f"{name} with {why}"):
        assert_same(name, options, rows, labels, indices=indices)
    assert_same(name, options, rows, labels, indices=indices)  # no second warning, which would be an error here


def test_triplets_of_an_anchor_are_drawn_by_them():
    with pytest.warns(UserWarning, match="TripletMarginLoss with triplets_per_anchor"):
        loss = OURS["TripletMarginLoss"](triplets_per_anchor=2)(batch(17), LABELS["eights"](17))
    assert 0 < loss < 2  # of distances of unit rows


@pytest.mark.parametrize("options", [
    dict(swap=True), dict(smooth_loss=True), dict(margin=-0.1), dict(distance=LP(power=2)),
    dict(reducer=reducers.AvgNonZeroReducer(collect_stats=True)),
], ids=str)  # fmt: skip
def test_mined_triplets_that_are_left_to_them(options):
    rows, labels = batch(17), LABELS["eights"](17)
    triplets = THEIRS["BatchHardMiner"]()(rows, labels)
    with pytest.warns(UserWarning, match="TripletMarginLoss with"):
        assert_same("TripletMarginLoss", lambda: options, rows, labels, indices=triplets)


@pytest.mark.parametrize("name, options, why", [
    ("BatchHardMiner", dict(allowed_pos_range=(0.0, 1.2)), "a range of distances"),
    ("BatchHardMiner", dict(allowed_neg_range=(1.0, 2.0)), "a range of distances"),
    ("BatchHardMiner", dict(collect_stats=True), "collect_stats"),
    ("TripletMarginMiner", dict(collect_stats=True), "collect_stats"),
    ("TripletMarginMiner", dict(margin=-0.2), "a margin that is negative or infinite"),
    ("TripletMarginMiner", dict(margin=float("inf")), "a margin that is negative or infinite"),
    ("TripletMarginMiner", dict(type_of_triplets="easy"), "easy triplets"),
    ("TripletMarginMiner", dict(distance=distances.SNRDistance()), "the distance SNRDistance"),
])  # fmt: skip
def test_miners_that_are_left_to_them(name, options, why):
    with pytest.warns(UserWarning, match=f"{name} with {why}"):
        ours_found, expected = mined(name, batch(33), LABELS["eights"](33), **options)
    assert ours_found == expected


def test_distances_of_triplets_that_are_not_normalised():
    labels = LABELS["eights"](33)
    assert_same("TripletMarginLoss", lambda: dict(distance=LP(normalize_embeddings=False)), batch(33), labels)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_dtypes_of_labels(name, dtype):
    labels = (torch.arange(17) % 2).to(dtype)
    assert_same(name, dict, batch(17), labels)
    if name in WITH_REFERENCES and name != "ContrastiveLoss" and "Lifted" not in name:
        given = dict(references=batch(20, seed=1), ref_labels=(torch.arange(20) % 2).to(dtype))
        assert_same(name, dict, batch(17), labels, **given)
    for miner in ("BatchHardMiner", "TripletMarginMiner"):
        ours_found, expected = mined(miner, batch(17), labels)
        assert ours_found == expected


def test_references_without_labels():
    with pytest.warns(UserWarning, match="one tensor of labels"):
        given = batch(9), LABELS["pairs"](9), None, batch(9, seed=1)
        values = [classes["NTXentLoss"]()(*given) for classes in (OURS, THEIRS)]
    torch.testing.assert_close(*values)


def test_classes_that_are_far_apart():
    """Losses below the rounding of 1 are not counted by the reducers that count losses above 0, as theirs are 0."""
    labels = torch.arange(16) // 2
    centers = torch.eye(8, dtype=torch.float64)[labels]
    near = torch.cat([torch.zeros(8, 8), 0.7 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))]).double()
    for reducer in (dict, lambda: dict(reducer=reducers.AvgNonZeroReducer())):
        for name in ("SupConLoss", "NTXentLoss"):
            options = partial(combined, lambda: dict(temperature=0.02), reducer)
            value, _ = assert_same(name, options, centers + near, labels)
            assert value > 0


def test_reducers_of_parts():
    """A reducer for one part alone: the other has the default one."""
    for parts in ({}, {"pos_loss": reducers.SumReducer()}):
        labels = LABELS["eights"](17)
        options = partial(combined, lambda parts=parts: dict(reducer=reducers.MultipleReducers(parts)))
        assert_same("ContrastiveLoss", options, batch(17), labels)
    options = dict(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3)
    for name in ("TripletMarginLoss", "ContrastiveLoss"):
        assert_same(name, lambda: options, batch(17), LABELS["eights"](17))


@pytest.mark.parametrize("name, options, why", [
    ("ArcFaceLoss", dict(distance=COSINE(power=2)), "p=2 and power=2"), ("ArcFaceLoss", dict(margin=-5), "a margin"),
    ("ArcFaceLoss", dict(margin=150), "a margin outside of 0 to 133"), ("CosFaceLoss", dict(margin=-0.1), "a margin"),
    ("CosFaceLoss", dict(distance=COSINE(p=1)), "p=1 and power=1"),
    ("CosFaceLoss", dict(collect_stats=True), "collect_stats"),
])  # fmt: skip
def test_classifiers_that_are_left_to_them(name, options, why):
    results = []
    with pytest.warns(UserWarning, match=f"{name} with {why}"):
        for classes in (OURS, THEIRS):
            torch.manual_seed(0)
            results.append(loss_and_gradients(classes[name](7, 12, **options), batch(33), torch.arange(33) % 7))
    torch.testing.assert_close(*results, **EXACT)


def test_subclasses_of_ours():
    with pytest.raises(TypeError, match="Mine replaces pos_calc, which .*ContrastiveLoss does not call"):

        class Mine(OURS["ContrastiveLoss"]):
            def pos_calc(self, distance, margin):
                return distance

    class WithAnotherDefault(OURS["ContrastiveLoss"]):
        def get_default_distance(self):
            return COSINE()

    rows, labels = batch(17), LABELS["eights"](17)
    expected = THEIRS["ContrastiveLoss"](distance=COSINE())(rows, labels)
    torch.testing.assert_close(WithAnotherDefault()(rows, labels), expected, **EXACT)


def test_references_of_distances_are_left_to_them():
    given = dict(references=batch(20, seed=1), ref_labels=LABELS["eights"](20))
    with pytest.warns(UserWarning, match="distances to references"):
        assert_same("ContrastiveLoss", dict, batch(9), LABELS["eights"](9), **given)
    with pytest.warns(UserWarning, match="one tensor of labels"):
        labels = LABELS["eights"](9)
        assert_same("NTXentLoss", dict, batch(9), labels, references=batch(9, seed=1), ref_labels=labels)


def test_cross_batch_memory():
    """Its pairs are an indices_tuple: theirs."""
    with pytest.warns(UserWarning, match="indices_tuple"):
        results = []
        for classes in (OURS, THEIRS):
            memory = losses.CrossBatchMemory(classes["NTXentLoss"](), embedding_size=12, memory_size=64)
            results.append([memory(batch(16, dtype=torch.float32, seed=i), torch.arange(16) % 4) for i in range(3)])
        torch.testing.assert_close(*results)


def test_apply():
    ours.apply()
    ours.apply()
    for module, names in ((losses, ours._classes[0].ours), (miners, ours._classes[1].ours)):
        for name, cls in names.items():
            assert getattr(module, name) is cls and issubclass(cls, THEIRS[name])
    ours.undo()
    for name, cls in THEIRS.items():
        assert getattr(losses, name, getattr(miners, name, None)) is cls


def test_bad_input():
    with pytest.raises(ValueError, match="backend"):
        OURS["NTXentLoss"](backend="cuda")
    with pytest.raises(TypeError, match="temperatur"):
        OURS["NTXentLoss"](temperatur=0.1)
    with pytest.raises(ValueError, match="labels"):  # theirs
        OURS["NTXentLoss"]()(batch(5), torch.arange(4))
