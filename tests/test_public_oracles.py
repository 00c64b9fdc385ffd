"""Values and gradients of public implementations, where they define the same loss: `pip install -e ".[oracles]"`."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import value_and_gradients

from replearn_kernels import (
    ClipLoss,
    SigLipLoss,
    arcface_loss,
    contrastive_loss,
    cosface_loss,
    dino_loss,
    lifted_structure_loss,
    mine_triplets,
    nt_xent_loss,
    sup_con_loss,
    triplet_margin_loss,
)


def rows(rng, n, d):
    return torch.randn(n, d, generator=rng)


def assert_same(ours, theirs, *inputs, rtol=2e-5, atol=2e-6):
    for a, b in zip(value_and_gradients(ours, *inputs), value_and_gradients(theirs, *inputs)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("n", [2, 65, 300])
def test_open_clip(n, rng):
    theirs = pytest.importorskip("open_clip.loss")
    x, y = F.normalize(rows(rng, n, 32)), F.normalize(rows(rng, n, 32))
    scale, bias = torch.tensor(14.0), torch.tensor(-10.0)
    assert_same(ClipLoss(), theirs.ClipLoss(), x, y, scale)
    assert_same(SigLipLoss(), theirs.SigLipLoss(), x, y, scale, bias)


@pytest.mark.parametrize("n", [2, 64, 300])
def test_lightly_nt_xent(n, rng):
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    assert_same(lambda x, y: nt_xent_loss(x, y, temperature=0.2), theirs, rows(rng, n, 16), rows(rng, n, 16))


def test_lightly_dino(rng):
    theirs = pytest.importorskip("lightly.loss").DINOLoss(output_dim=33, teacher_temp=0.05, warmup_teacher_temp=0.05)
    center = theirs.center.value if hasattr(theirs.center, "value") else theirs.center
    student, teacher = torch.randn(5, 7, 33, generator=rng), torch.randn(2, 7, 33, generator=rng)
    before = center.detach().clone().flatten()
    assert_same(
        lambda s: dino_loss(s, teacher, before, teacher_temp=0.05),
        lambda s: theirs.eval()(list(teacher), list(s), epoch=0),
        student,
    )


@pytest.mark.parametrize("classes", [2, 9, 100])
def test_metric_learning_sup_con(classes, rng):
    """Theirs is 0 where there is only one class, and no negative; and takes the mean over single rows differently."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.1)
    labels = (torch.arange(200) // 2) % classes
    assert_same(
        lambda z: sup_con_loss(z, labels, temperature=0.1), lambda z: theirs(z, labels), rows(rng, 200, 16)
    )


@pytest.mark.parametrize("name, ours", [("ArcFaceLoss", arcface_loss), ("CosFaceLoss", cosface_loss)])
def test_metric_learning_margins(name, ours, rng):
    """Their margin is in degrees, their weight [d, C]."""
    module = pytest.importorskip("pytorch_metric_learning.losses")
    weight, labels = rows(rng, 50, 16), torch.randint(50, (64,), generator=rng)
    margin = 28.6 if name == "ArcFaceLoss" else 0.35
    theirs = getattr(module, name)(num_classes=50, embedding_size=16, margin=margin, scale=64)
    theirs.W.data = weight.t().clone()
    own = torch.deg2rad(torch.tensor(margin, dtype=torch.float64)).item() if name == "ArcFaceLoss" else margin

    def loss(x):
        return theirs(x, labels)

    x = rows(rng, 64, 16)
    assert_same(lambda x: ours(x, weight, labels, margin=own, scale=64.0), loss, x, rtol=1e-4, atol=1e-4)
    leaf = weight.clone().requires_grad_()
    (d_weight,) = torch.autograd.grad(ours(x, leaf, labels, margin=own, scale=64.0), leaf)
    (d_theirs,) = torch.autograd.grad(theirs(x, labels), theirs.W)
    torch.testing.assert_close(d_weight, d_theirs.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 11, 60])
def test_metric_learning_miners(classes, rng):
    """The hardest of every anchor, and the same sets of triplets. In fp64: theirs may take distances from products."""
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    x, labels = rows(rng, 90, 8).double(), torch.randint(classes, (90,), generator=rng)
    euclidean = distances.LpDistance(normalize_embeddings=False)

    theirs = miners.BatchHardMiner(distance=euclidean)(x, labels)
    ours = mine_triplets(x, labels, mining="batch_hard")
    assert set(zip(*(t.tolist() for t in ours))) == set(zip(*(t.tolist() for t in theirs))) != set()

    for theirs_name, name in (("all", "batch_all"), ("hard", "batch_all_hard"), ("semihard", "batch_all_semi_hard")):
        miner = miners.TripletMarginMiner(margin=0.3, type_of_triplets=theirs_name, distance=euclidean)
        theirs = miner(x, labels)
        ours = mine_triplets(x, labels, mining=name, margin=0.3)
        assert set(zip(*(t.tolist() for t in ours))) == set(zip(*(t.tolist() for t in theirs))) != set(), name


@pytest.fixture
def metric_learning():
    """pytorch-metric-learning with Euclidean distances of the rows as they are."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    class Parts:
        euclidean = distances.LpDistance(normalize_embeddings=False)
        squared = distances.LpDistance(normalize_embeddings=False, power=2)
        cosine = distances.CosineSimilarity()
        mean, total = reducers.MeanReducer(), reducers.SumReducer()

    Parts.losses, Parts.miners = losses, miners
    return Parts


def labelled_rows(rng, n=64, d=16, classes=9):
    return rows(rng, n, d).double() / d**0.5, torch.randint(classes, (n,), generator=rng)


@pytest.mark.parametrize("classes", [2, 9, 40])
def test_metric_learning_lifted_structure(classes, rng, metric_learning):
    """Their mean is over ordered pairs, and takes of a pair (i, j) what either order has: ours over unordered ones."""
    x, labels = labelled_rows(rng, classes=classes)
    options = dict(neg_margin=1.3, pos_margin=0, distance=metric_learning.euclidean)
    mean = metric_learning.losses.LiftedStructureLoss(reducer=metric_learning.mean, **options)
    total = metric_learning.losses.LiftedStructureLoss(reducer=metric_learning.total, **options)
    ours = dict(labels=labels, margin=1.3)
    assert_same(
        lambda x: lifted_structure_loss(x, **ours), lambda x: mean(x, labels), x, rtol=1e-9, atol=1e-11
    )
    assert_same(
        lambda x: 2 * lifted_structure_loss(x, reduction="sum", **ours), lambda x: total(x, labels), x,
        rtol=1e-9, atol=1e-11,
    )  # fmt: skip


@pytest.mark.parametrize("squared", [False, True])
def test_metric_learning_contrastive(squared, rng, metric_learning):
    """They sum positives and negatives apart, over ordered pairs. Squares are of distances there, not of the hinge:
    with all negatives beyond the margin the two agree."""
    x, labels = labelled_rows(rng)
    distance = metric_learning.squared if squared else metric_learning.euclidean
    margin = 1.4
    if squared:
        x = x + 3 * torch.eye(16, dtype=torch.float64)[labels]
    theirs = metric_learning.losses.ContrastiveLoss(0, margin, distance=distance, reducer=metric_learning.total)
    assert_same(
        lambda x: 2 * contrastive_loss(x, labels, margin=margin, squared=squared, reduction="sum"),
        lambda x: theirs(x, labels), x, rtol=1e-9, atol=1e-11,
    )  # fmt: skip


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("mining", ["batch_all", "batch_hard"])
def test_metric_learning_triplets(distance, mining, rng, metric_learning):
    """Of all triplets, and of BatchHardMiner's; the mean over the violated ones is their reducer's default."""
    x, labels = labelled_rows(rng)
    measure = getattr(metric_learning, distance)
    miner = metric_learning.miners.BatchHardMiner(distance=measure) if mining == "batch_hard" else None
    ours = dict(margin=0.2, mining=mining, distance="squared_euclidean" if distance == "squared" else distance)
    for reduction, reducer in (("mean", metric_learning.mean), ("mean_nonzero", None)):
        theirs = metric_learning.losses.TripletMarginLoss(0.2, distance=measure, reducer=reducer)
        assert_same(
            lambda x: triplet_margin_loss(x, labels, reduction=reduction, **ours),  # noqa: B023
            lambda x: theirs(x, labels, miner(x, labels) if miner else None), x, rtol=1e-9, atol=1e-11,  # noqa: B023
        )  # fmt: skip
