"""Options of modules and functions: what is refused at once, what repr shows, and that no argument is swallowed."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import unit_rows

import replearn_kernels
from replearn_kernels import (
    ArcFaceLoss,
    ClipLoss,
    ContrastiveLoss,
    CosFaceLoss,
    CosineSimilarityLoss,
    DINOHeadLoss,
    DINOLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    NPairLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    TripletMarginLoss,
    arcface_loss,
    clip_loss,
    contrastive_loss,
    cosface_loss,
    info_nce_loss,
    lifted_structure_loss,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
)

ARC_FACE, DINO = partial(ArcFaceLoss, 8, 4), partial(DINOLoss, 20)
OVER_PAIRS = [ClipLoss, ContrastiveLoss, InfoNCELoss, LiftedStructureLoss, NPairLoss, NTXentLoss, SigLipLoss]
OVER_PAIRS += [SupConLoss, TripletMarginLoss]
EVERY = [*OVER_PAIRS, ARC_FACE, partial(CosFaceLoss, 8, 4), DINO, partial(DINOHeadLoss, 20), CosineSimilarityLoss]


def flags():
    """(module, name) of every option that is a bool."""
    for make in EVERY:
        kind = getattr(make, "func", make)
        for name, parameter in inspect.signature(kind).parameters.items():
            if isinstance(parameter.default, bool):
                yield make, name


@pytest.mark.parametrize("make, flag", list(flags()))
@pytest.mark.parametrize("wrong", [0, 1, 0.07, None, "no", np.bool_(True)])
def test_a_flag_is_a_bool(make, flag, wrong):
    with pytest.raises(TypeError, match=f"{flag} must be a bool, got {type(wrong).__name__}"):
        make(**{flag: wrong})


def test_a_temperature_is_no_flag():
    with pytest.raises(TypeError, match="local_loss must be a bool, got float"):
        ClipLoss(0.07)
    with pytest.raises(TypeError, match="cache_labels must be a bool, got float"):
        SigLipLoss(0.07)
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match="output_dict must be a bool, got int"):
        ClipLoss()(x, x, 1.0, None, 1)


@pytest.mark.parametrize(
    "make, options, exception, message",
    [
        (ClipLoss, dict(rank=-1), ValueError, "rank must be at least 0, got -1"),
        (ClipLoss, dict(rank=0.0), TypeError, "rank must be an int, got float"),
        (SigLipLoss, dict(world_size=0), ValueError, "world_size must be at least 1, got 0"),
        (SigLipLoss, dict(world_size="2"), TypeError, "world_size must be an int, got str"),
        (SigLipLoss, dict(dist_impl="ring"), ValueError, "dist_impl must be one of bidir, .*, got 'ring'"),
        (SigLipLoss, dict(chunk_size=-1), ValueError, "chunk_size must be at least 0, got -1"),
        (SigLipLoss, dict(chunk_size=1.5), TypeError, "chunk_size must be an int, got float"),
        (CosineSimilarityLoss, dict(backend="cpp"), ValueError, "backend must be one of auto, torch, eager, got 'cpp'"),
        *((make, dict(group="all"), TypeError, "group must be .* process group, got str") for make in OVER_PAIRS),
        *((make, dict(reduction="avg"), ValueError, "reduction must be one of") for make in EVERY),
        *((make, dict(backend="gpu"), ValueError, "backend must be one of") for make in EVERY),
    ],
)
def test_options_are_checked_by_the_constructor(make, options, exception, message):
    with pytest.raises(exception, match=message):
        make(**options)


def test_open_clips_settings(rng):
    """The loss of chunks is the loss; and the settings are attributes, as there."""
    x, y = unit_rows(rng, 9, 4), unit_rows(rng, 9, 4)
    loss = SigLipLoss(True, 1, 1, "gather", 512)
    assert torch.equal(loss(x, y, 3.0, -1.0), siglip_loss(x, y, 3.0, -1.0))
    assert (loss.rank, loss.world_size, loss.dist_impl, loss.chunk_size) == (1, 1, "gather", 512)
    assert ClipLoss(True, rank=2).rank == 2 and ClipLoss(True).local_loss


BY_SCALE = {
    "clip_loss": lambda x, **k: clip_loss(x, x, **k),
    "siglip_loss": lambda x, **k: siglip_loss(x, x, **k),
    "info_nce_loss": lambda x, **k: info_nce_loss(x, x, **k),
    "ClipLoss": lambda x, **k: ClipLoss()(x, x, **k),
    "SigLipLoss": lambda x, **k: SigLipLoss()(x, x, **k),
    "InfoNCELoss": lambda x, **k: InfoNCELoss()(x, x, **k),
    "ClipLoss ": lambda x, **k: ClipLoss(**k),
    "SigLipLoss ": lambda x, **k: SigLipLoss(**k),
    "InfoNCELoss ": lambda x, **k: InfoNCELoss(**k),
}


@pytest.mark.parametrize("name", BY_SCALE)
def test_a_temperature_is_told_what_it_should_be(name):
    with pytest.raises(TypeError, match=f"^{name.strip()} takes no temperature: call it with logit_scale = 1 / temp"):
        BY_SCALE[name](torch.randn(4, 3), temperature=0.07)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):  # any other slip is Python's
        BY_SCALE[name](torch.randn(4, 3), temprature=0.07)


def test_repr_shows_what_is_not_the_default():
    assert repr(ClipLoss()) == "ClipLoss()"
    assert repr(ClipLoss(True, rank=1, label_smoothing=0.1)) == "ClipLoss(local_loss=True, rank=1, label_smoothing=0.1)"
    assert repr(SigLipLoss(chunk_size=64, world_size=2)) == "SigLipLoss(world_size=2, chunk_size=64)"
    assert repr(InfoNCELoss(batch_negatives=False)) == "InfoNCELoss(batch_negatives=False)"
    assert repr(ARC_FACE(scale=np.float32(3))) == "ArcFaceLoss(dim=8, classes=4, scale=3.0)"
    assert repr(TripletMarginLoss(1, memory_budget=0)) == "TripletMarginLoss(margin=1.0, memory_budget=0)"


def other_value(name, default):
    """A valid value that is not the default."""
    words = dict(reduction="sum", backend="eager", strategy="ring", mining="batch_all", distance="cosine")
    words["dist_impl"] = "shift"
    if isinstance(default, bool):
        return not default
    return words[name] if name in words else default + (0.05 if isinstance(default, float) else 1)


@pytest.mark.parametrize("make", EVERY)
def test_repr_shows_every_option(make):
    kind = getattr(make, "func", make)
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty or name in ("group", "use_horovod"):
            continue
        value = other_value(name, parameter.default)
        assert f"{name}={value!r}" in repr(make(**{name: value}))


@pytest.mark.parametrize("base", [ClipLoss, DINOLoss])
def test_repr_of_a_subclass(base):
    class Ours(base):
        def __init__(self, *args, extra, **options):
            super().__init__(*args, **options)

    loss = Ours(20, extra=1, reduction="sum") if base is DINOLoss else Ours(extra=1, reduction="sum")
    assert repr(loss).endswith("reduction='sum')")


def test_repr_of_a_mixin_and_of_an_argument_that_is_a_tensor():
    class Mixin:
        def __init__(self, *args, **options):
            super().__init__(*args, **options)

    class Mixed(Mixin, ClipLoss):
        pass

    class Weighted(ClipLoss):
        def __init__(self, weight, **options):
            super().__init__(**options)
            self.weight = weight

    assert repr(Mixed(True)) == "Mixed(local_loss=True)"
    assert repr(Weighted(torch.ones(3), label_smoothing=0.1)) == "Weighted(label_smoothing=0.1)"


# -- nothing that is passed is left without a gradient -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpp", "eager"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_bias_of_clip_has_a_gradient_of_zero(backend, shape, rng):
    """As in open_clip: without one DistributedDataParallel waits for it in the next step. The loss keeps its bits."""
    x, y = unit_rows(rng, 9, 4).requires_grad_(), unit_rows(rng, 9, 4)
    for dtype in (torch.float32, torch.float64, torch.float16):
        bias = torch.full(shape, -10.0, dtype=dtype, requires_grad=True)
        loss = ClipLoss(backend=backend)(x, y, 5.0, bias)
        assert torch.equal(loss, ClipLoss(backend=backend)(x, y, 5.0)) and loss.dtype == torch.float32
        loss.backward()
        assert bias.grad.shape == shape and bias.grad == 0


def test_the_bias_of_clip_compiles(rng):
    x, y, bias = unit_rows(rng, 9, 4), unit_rows(rng, 9, 4), torch.tensor([-10.0], requires_grad=True)
    compiled = torch.compile(ClipLoss(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x, y, 5.0, bias), bias)
    assert gradient.shape == (1,) and gradient == 0


@pytest.mark.parametrize(
    "bias, exception",
    [
        ("a", TypeError), (torch.zeros(2), ValueError), (torch.nan, ValueError),
        (torch.tensor(torch.inf, requires_grad=True), ValueError),
    ],
)
def test_the_bias_of_clip_is_checked(bias, exception):
    with pytest.raises(exception, match="logit_bias must be"):
        ClipLoss()(torch.randn(4, 3), torch.randn(4, 3), 5.0, bias)


LABELS = torch.arange(6) % 3
DIFFERENTIABLE = [
    lambda p, **k: clip_loss(p(6, 4), p(6, 4), p(), logit_bias=p(), **k),
    lambda p, **k: siglip_loss(p(6, 4), p(6, 4), p(), p(), **k),
    lambda p, **k: info_nce_loss(p(6, 4), p(8, 4), negatives=p(5, 4), logit_scale=p(), **k),
    lambda p, **k: info_nce_loss(p(6, 4), p(6, 4), negatives=p(6, 2, 4), logit_scale=p(), batch_negatives=False, **k),
    lambda p, **k: info_nce_loss(p(6, 4), p(6, 4), negatives=p(0, 4), logit_scale=p(), batch_negatives=False, **k),
    lambda p, **k: info_nce_loss(p(0, 4), p(6, 4), negatives=p(0, 4), logit_scale=p(), symmetric=True, **k),
    lambda p, **k: n_pair_loss(p(6, 4), p(6, 4), labels=LABELS, **k),
    lambda p, **k: nt_xent_loss(p(6, 4), p(6, 4), temperature=p().square() + 1, **k),
    lambda p, **k: sup_con_loss(p(6, 4), torch.arange(6), temperature=p().square() + 1, **k),  # no positive pair
    lambda p, **k: lifted_structure_loss(p(6, 4), torch.arange(6), **k),
    lambda p, **k: contrastive_loss(p(6, 4), LABELS, **k),
    *(lambda p, m=m, **k: triplet_margin_loss(p(6, 4), LABELS * 0, mining=m, **k)
      for m in ("batch_hard", "semi_hard", "batch_all")),
    lambda p, **k: arcface_loss(p(6, 4), p(5, 4), LABELS, **k),
    lambda p, **k: cosface_loss(p(0, 4), p(5, 4), LABELS[:0], **k),
]  # fmt: skip


@pytest.mark.parametrize("loss", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ["torch", "cpp", "eager"])
def test_every_tensor_gets_a_gradient(loss, backend):
    given = []

    def parameter(*shape):
        given.append(torch.randn(shape, requires_grad=True))
        return given[-1]

    loss(parameter, backend=backend).backward()
    for tensor in given:
        assert tensor.grad is not None and tensor.grad.isfinite().all(), tensor.shape


# -- labels ------------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
LABELLED = {
    "sup_con": sup_con_loss,
    "lifted": lifted_structure_loss,
    "contrastive": contrastive_loss,
    "triplet": triplet_margin_loss,
    "cosine": replearn_kernels.cosine_similarity_loss,
    "n_pair": lambda x, labels: n_pair_loss(x, x.flip(0), labels=labels),
    "siglip": lambda x, labels: siglip_loss(x, x, 3.0, query_group=labels, key_group=labels),
}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("loss", [arcface_loss, cosface_loss])
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_classifiers_take_any_integers(dtype, loss, backend, rng):
    x, weight, labels = unit_rows(rng, 6, 4), unit_rows(rng, 5, 4), torch.tensor([0, 4, 2, 2, 1, 3])
    loss = partial(loss, x, weight, backend=backend)
    assert torch.equal(loss(labels.to(dtype)), loss(labels))


@pytest.mark.parametrize("backend", ["torch", "cpp", "eager"])
def test_minus_one_is_no_class(backend, rng):
    """As torch's own cross entropy ignores -100 alone, a label that is no class is an error."""
    x = unit_rows(rng, 2, 4)
    for labels in ([0, -1], [-100, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got (-1|-100|2)"):
            arcface_loss(x, x, torch.tensor(labels), backend=backend)


@pytest.mark.parametrize("name", LABELLED)
def test_minus_one_is_a_label_as_any_other(name, rng):
    x = unit_rows(rng, 6, 4)
    loss = LABELLED[name]
    assert torch.equal(loss(x, LABELS - 1), loss(x, LABELS))
    assert loss(x, torch.tensor([-1, -1, 5, 6, 7, 8])) != loss(x, torch.arange(6))


# -- logits ------------------------------------------------------------------------------------------------------------


def test_logits_of_classifiers(rng):
    module, x = ARC_FACE(scale=3.0), torch.randn(5, 8, generator=rng)
    torch.testing.assert_close(module.logits(x), 3 * F.normalize(x) @ F.normalize(module.weight).t())
    for wrong, exception, message in (
        (x.half(), TypeError, "weight and embeddings must have the same dtype, got torch.float32 and torch.float16"),
        (x[:, :3], ValueError, "weight and embeddings must have the same width d, got 8 and 3"),
        (x[0], ValueError, "embeddings must have 2 dimensions"),
        ([1.0], TypeError, "embeddings must be a torch.Tensor, got list"),
    ):
        with pytest.raises(exception, match=message):
            module.logits(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.logits(x.bfloat16()).float(), module.logits(x).float())
