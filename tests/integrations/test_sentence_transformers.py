"""sentence-transformers' losses and ours in their place: values, gradients, training, several processes."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import without_torchvision_operators  # noqa: F401, before sentence_transformers
from datasets import Dataset
from processes import Ranks, needs_gloo
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import BatchHardTripletLossDistanceFunction as Distance
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from small_encoder import WORDS, load_encoder, sentences, small_encoder
from training import assert_same_training

from replearn_kernels.integrations import sentence_transformers as ours

OURS, THEIRS = ours._classes.ours, ours._classes.theirs
EXACT = dict(rtol=1e-11, atol=1e-13)
RANKING = "MultipleNegativesRankingLoss"
WITH_MARGIN = ["BatchHardTripletLoss", "BatchAllTripletLoss", "BatchSemiHardTripletLoss"]
TRIPLETS = [*WITH_MARGIN, "BatchHardSoftMarginTripletLoss"]


@pytest.fixture(autouse=True)
def _undone():
    yield
    ours.undo()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("guide"), seed=5)


def columns(n: int, count: int, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Embeddings of queries, documents and hard negatives, of any length."""
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 12, generator=rng) * (1 + column)).to(dtype) for column in range(count)]


def loss_and_gradients(loss, embeddings: list[torch.Tensor], labels=None) -> list[torch.Tensor]:
    leaves = [each.clone().requires_grad_() for each in embeddings]
    value = loss.compute_loss_from_embeddings(leaves, labels)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(results: list, expected: list, **tolerance) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


DIRECTIONS = [
    ("query_to_doc", *others)
    for count in range(4)
    for others in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), count)
]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 2.0)]


def ways() -> list[dict]:
    """Every combination that sentence-transformers takes."""
    found = []
    for directions, partition, (mode, strength) in itertools.product(DIRECTIONS, ("joint", "per_direction"), HARDNESS):
        if partition == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
            continue
        found.append(dict(
            directions=directions, partition_mode=partition, hardness_mode=mode, hardness_strength=strength
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("similarity, scale", [(cos_sim, 20.0), (dot_score, 0.7)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_option_of_the_ranking_loss(similarity, scale, count):
    assert len(ways()) == 40
    for n, way in itertools.product((1, 2, 33), ways()):
        options = dict(model=None, scale=scale, similarity_fct=similarity, **way)
        results = [loss_and_gradients(classes[RANKING](**options), columns(n, count)) for classes in (OURS, THEIRS)]
        assert_same(*results)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_dtypes_of_the_ranking_loss(dtype, tolerance):
    """Values near fp64's of the same rows, normalised in their dtype as there."""
    for way in ways()[::3]:
        options = dict(model=None, **way)
        embeddings = columns(65, 3, dtype)
        value, *gradients = loss_and_gradients(OURS[RANKING](**options), embeddings)
        exact, *expected = loss_and_gradients(THEIRS[RANKING](**options), [each.double() for each in embeddings])
        assert value.dtype is torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=4 * tolerance, atol=0)
        for a, b in zip(gradients, expected):
            assert a.dtype is dtype
            assert (a.double() - b).abs().max() <= 20 * tolerance * b.abs().max()


def test_a_scale_that_is_a_tensor():
    for way in ways()[::3]:
        scale = torch.tensor(20.0, dtype=torch.float64)
        results = [
            loss_and_gradients(classes[RANKING](None, scale=scale, **way), columns(9, 3)) for classes in (OURS, THEIRS)
        ]
        assert_same(*results)


def test_subclasses_of_ours():
    with pytest.raises(TypeError, match="Mine replaces sim_matrix, which .*GISTEmbedLoss does not call"):

        class Mine(OURS["GISTEmbedLoss"]):
            def sim_matrix(self, one, other):
                return one @ other.T

    class Whole(OURS["GISTEmbedLoss"]):
        def forward(self, sentence_features, labels):
            return labels.sum()

        def sim_matrix(self, one, other):
            return one @ other.T


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_options_of_ours(backend):
    for way in (ways()[0], ways()[-1]):
        loss = OURS[RANKING](None, **way, backend=backend, memory_budget=0, strategy="ring")
        assert_same(*(loss_and_gradients(one, columns(65, 3)) for one in (loss, THEIRS[RANKING](None, **way))))


@pytest.mark.parametrize("metric", [Distance.euclidean_distance, Distance.cosine_distance])
@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets(name, metric):
    """Labels with rows of their own alone, pairs and many; margins at which some, all and no triplets count."""
    rng = torch.Generator().manual_seed(3)
    batches = [torch.randint(high, (33,), generator=rng) for high in (2, 9, 40)]
    margins = [{"margin": margin} for margin in (0.3, 5.0)] if name in WITH_MARGIN else [{}]
    for labels, margin in itertools.product([*batches, torch.arange(33), torch.arange(33)[:, None] // 4], margins):
        losses = [classes[name](None, distance_metric=metric, **margin) for classes in (OURS, THEIRS)]
        assert_same(*(loss_and_gradients(loss, columns(33, 1), labels) for loss in losses), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int8])
@pytest.mark.parametrize("name", TRIPLETS)
def test_dtypes_of_labels(name, dtype):
    labels = (torch.arange(33) % 2).to(dtype)
    losses = [classes[name](None) for classes in (OURS, THEIRS)]
    assert_same(*(loss_and_gradients(loss, columns(33, 1), labels) for loss in losses), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name, expected", [
    ("BatchHardTripletLoss", 5.0), ("BatchHardSoftMarginTripletLoss", math.log(2)), ("BatchAllTripletLoss", 0.0)
])  # fmt: skip
def test_triplets_of_one_label(name, expected):
    for n in (1, 7):
        labels = torch.ones(n, dtype=torch.int64)
        results = [loss_and_gradients(classes[name](None), columns(n, 1), labels) for classes in (OURS, THEIRS)]
        assert_same(*results)
        assert results[0][0] == expected


def test_semi_hard_triplets_of_one_label():
    loss = OURS["BatchSemiHardTripletLoss"](None)
    value, gradient = loss_and_gradients(loss, columns(7, 1), torch.ones(7, dtype=torch.int64))
    assert value == 0 and not gradient.any()


def cached(classes: dict, encoder, **options):
    return classes["CachedMultipleNegativesRankingLoss"](encoder, mini_batch_size=4, **options)


def through_the_encoder(loss, encoder, count: int = 3) -> tuple[torch.Tensor, dict]:
    features = [encoder.preprocess(sentences(13, seed)) for seed in range(count)]
    encoder.zero_grad()
    value = loss(features, None)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", [ways()[0], ways()[5], ways()[-1]], ids=str)
def test_gradient_cache(encoder, way):
    value, gradients = through_the_encoder(cached(OURS, encoder, **way), encoder)
    for expected, expected_gradients in (
        through_the_encoder(cached(THEIRS, encoder, **way), encoder),
        through_the_encoder(OURS[RANKING](encoder, **way), encoder),
    ):
        torch.testing.assert_close(value, expected, **EXACT)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        features = [encoder.preprocess(sentences(13, seed)) for seed in range(3)]
        torch.testing.assert_close(cached(OURS, encoder, **way)(features, None), value, **EXACT)


def guided(classes: dict, name: str, encoder, guide, **options):
    cache = dict(mini_batch_size=4) if name.startswith("Cached") else {}
    return classes[name](encoder, guide, **cache, **options)


GIST = ["GISTEmbedLoss", "CachedGISTEmbedLoss"]


@pytest.mark.parametrize("name", GIST)
def test_gist(encoder, guide, name):
    contrasts = [dict(contrast_anchors=a, contrast_positives=p) for a in (True, False) for p in (True, False)]
    # The guide's cosines are 0.91 to 0.98: some negatives of most anchors are left at these.
    margins = [dict(), dict(margin=0.01), dict(margin=0.03, margin_strategy="relative"), dict(temperature=0.1)]
    for contrast, margin, count in itertools.product(contrasts, margins, (2, 3)):
        results = [
            through_the_encoder(guided(classes, name, encoder, guide, **contrast, **margin), encoder, count)
            for classes in (OURS, THEIRS)
        ]
        assert results[1][0] > 0.1
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=0)
        for parameter, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][parameter], rtol=1e-7, atol=1e-9)


def test_gist_with_another_vocabulary(encoder, tmp_path):
    """The guide reads the texts with its own tokenizer."""
    guide = small_encoder(tmp_path, seed=5, words=WORDS[::-1])
    losses = [classes["GISTEmbedLoss"](encoder, guide) for classes in (OURS, THEIRS)]
    assert all(loss.must_retokenize for loss in losses)
    (value, _), (expected, _) = (through_the_encoder(loss, encoder) for loss in losses)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    same, _ = through_the_encoder(OURS["GISTEmbedLoss"](encoder, encoder), encoder)
    assert (same - value).abs() > 1e-3


def test_settings_can_be_changed(encoder):
    loss, theirs = cached(OURS, encoder), cached(THEIRS, encoder)
    for one in (loss, theirs):
        one.scale, one.directions = 3.0, ("query_to_doc", "query_to_query")
    torch.testing.assert_close(through_the_encoder(loss, encoder)[0], through_the_encoder(theirs, encoder)[0])
    assert loss.get_config_dict() == theirs.get_config_dict()


def test_matryoshka(encoder):
    losses = [MatryoshkaLoss(encoder, classes[RANKING](encoder), [24, 12, 6]) for classes in (OURS, THEIRS)]
    (value, gradients), (expected, expected_gradients) = (through_the_encoder(loss, encoder) for loss in losses)
    torch.testing.assert_close(value, expected, **EXACT)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-12)


def test_apply():
    from sentence_transformers import losses

    own = dict(THEIRS)
    ours.apply()
    ours.apply()
    for name, cls in OURS.items():
        assert getattr(losses, name) is cls and issubclass(cls, own[name])
    assert isinstance(losses.BatchHardSoftMarginTripletLoss(None), own["BatchHardTripletLoss"])
    ours.undo()
    for name, cls in own.items():
        assert getattr(losses, name) is cls


def trained(classes: dict, directory, dtype: torch.dtype) -> list[float]:
    encoder = small_encoder(directory, dtype)
    data = Dataset.from_dict(
        {name: sentences(64, seed) for seed, name in enumerate(("anchor", "positive", "negative"))}
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=16, num_train_epochs=4, learning_rate=1e-3,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = classes[RANKING](encoder)
    trainer = SentenceTransformerTrainer(encoder, arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    assert_same_training(*(partial(trained, classes, tmp_path) for classes in (OURS, THEIRS)))


def on_one_rank(rank: int, way: dict, gathers: bool) -> list:
    """Ours and theirs on the same ranks, before anything averages gradients."""
    world_size = dist.get_world_size()
    part = [each[5 * rank : 5 * rank + 5] for each in columns(5 * world_size, 3)]
    losses = [classes[RANKING](None, gather_across_devices=gathers, **way) for classes in (OURS, THEIRS)]
    return [[value.numpy() for value in loss_and_gradients(loss, part)] for loss in losses]


@needs_gloo
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes(world_size, tmp_path):
    with Ranks(world_size, tmp_path) as ranks:
        for way, gathers in [*((way, True) for way in ways()[::3]), (ways()[0], False), (ways()[-1], False)]:
            for results, expected in ranks.run(on_one_rank, way, gathers):
                assert_same(*([torch.as_tensor(value) for value in side] for side in (results, expected)))


def cached_on_one_rank(rank: int, directory, way: dict) -> list:
    encoder = load_encoder(directory)
    results = []
    for classes in (OURS, THEIRS):
        encoder.zero_grad()
        value = cached(classes, encoder, gather_across_devices=True, **way)(
            [encoder.preprocess(sentences(5, 10 * rank + column)) for column in range(3)], None
        )
        value.backward()
        results.append([value.detach().numpy(), *(p.grad.numpy() for p in encoder.parameters() if p.grad is not None)])
    return results


@needs_gloo
def test_gradient_cache_in_two_processes(tmp_path):
    small_encoder(tmp_path)
    with Ranks(2, tmp_path) as ranks:
        for found, expected in ranks.run(cached_on_one_rank, tmp_path, ways()[-1]):
            assert_same(*([torch.as_tensor(v) for v in side] for side in (found, expected)), rtol=1e-9, atol=1e-11)


def gist_on_one_rank(rank: int, directory) -> list:
    """Documents of every process; anchors of one alone are not compared."""
    encoder, guide = load_encoder(directory / "encoder"), load_encoder(directory / "guide")
    results = []
    for classes, name in itertools.product((OURS, THEIRS), GIST):
        loss = guided(classes, name, encoder, guide, gather_across_devices=True, contrast_anchors=False, margin=0.01)
        encoder.zero_grad()
        value = loss([encoder.preprocess(sentences(5, 10 * rank + column)) for column in range(3)], None)
        value.backward()
        results.append([value.detach().numpy(), *(p.grad.numpy() for p in encoder.parameters() if p.grad is not None)])
    return results


@needs_gloo
def test_gist_in_two_processes(tmp_path):
    for seed, name in enumerate(("encoder", "guide")):
        (tmp_path / name).mkdir()
        small_encoder(tmp_path / name, seed=seed)
    with Ranks(2, tmp_path) as ranks:
        for plain, cached_one, expected, expected_cached in ranks.run(gist_on_one_rank, tmp_path):
            for a, b in ((plain, expected), (cached_one, expected_cached)):
                tensors = [[torch.as_tensor(value) for value in side] for side in (a, b)]
                assert tensors[1][0] > 0.1
                assert_same(*tensors, rtol=1e-7, atol=1e-9)


def test_bad_input(encoder):
    embeddings = columns(5, 2)
    with pytest.raises(NotImplementedError, match="similarity_fct must be cos_sim or dot_score"):
        OURS[RANKING](None, similarity_fct=euclidean_sim).compute_loss_from_embeddings(embeddings)
    with pytest.raises(NotImplementedError, match="distance_metric must be"):
        loss = OURS["BatchHardTripletLoss"](None, distance_metric=partial(Distance.euclidean_distance, squared=True))
        loss.compute_loss_from_embeddings(embeddings[:1], torch.arange(5))
    with pytest.raises(ValueError, match="got 1"):
        OURS[RANKING](None).compute_loss_from_embeddings(embeddings[:1])
    for name in TRIPLETS:
        with pytest.raises(ValueError, match=f"{name} needs 5 labels, one per row"):
            OURS[name](None).compute_loss_from_embeddings(embeddings[:1], torch.arange(4))
    for name in GIST:
        with pytest.raises(NotImplementedError, match="gather_across_devices=True takes contrast_anchors=False"):
            guided(OURS, name, encoder, encoder, gather_across_devices=True)
    with pytest.raises(ValueError, match="got 4"):
        OURS["GISTEmbedLoss"](encoder, encoder)([{}] * 4, None)
    with pytest.raises(ValueError, match="backend"):
        OURS[RANKING](None, backend="cuda")
    with pytest.raises(ValueError, match="partition_mode"):  # theirs
        OURS[RANKING](None, partition_mode="both")
