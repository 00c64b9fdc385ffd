"""Every row of the README's table of bad input: the exception, and that its message names the argument."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from replearn_kernels import (
    ClipLoss,
    ContrastiveLoss,
    LiftedStructureLoss,
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
from replearn_kernels.engine import native

Q, K = torch.randn(4, 3), torch.randn(6, 3)
NAN, INF = float("nan"), float("inf")

TABLE = [
    # query, key, keywords, exception, what the message must say
    ([[1.0]], K, {}, TypeError, "query must be a torch.Tensor, got list"),
    (Q, None, {}, TypeError, "key must be a torch.Tensor, got NoneType"),
    (Q[0], K, {}, ValueError, r"query must have 2 dimensions \[N, d\], got shape \(3,\)"),
    (Q, K[None], {}, ValueError, r"key must have 2 dimensions \[N, d\], got shape \(1, 6, 3\)"),
    (Q, K[:, :2], {}, ValueError, "key and query must have the same width d, got 2 and 3"),
    (Q, K.double(), {}, TypeError, "key and query must have the same dtype, got torch.float64 and torch.float32"),
    (Q, K.to("meta"), {}, ValueError, "key and query must be on the same device, got meta and cpu"),
    (Q.long(), K.long(), {}, TypeError, "query must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (Q.cfloat(), K.cfloat(), {}, TypeError, "query must be fp16, bf16, fp32 or fp64, got torch.complex64"),
    (K, Q, {}, ValueError, "target is needed when there are more queries than keys, got N = 6 and M = 4"),
    (Q, K, dict(target=[0, 1, 2, 3]), TypeError, "target must be a torch.Tensor, got list"),
    (Q, K, dict(target=torch.zeros(4)), TypeError, "target must be int64, got torch.float32"),
    (Q, K, dict(target=torch.arange(3)), ValueError, r"target must have shape \(4,\), one per row, got \(3,\)"),
    (Q, K, dict(target=torch.arange(4).to("meta")), ValueError, "target must be on the features' device cpu, got meta"),
    (Q, K, dict(target=torch.tensor([0, 1, 2, 6])), ValueError, r"target must be in \[0, 6\), got 6"),
    (Q, K, dict(target=torch.tensor([0, 1, -1, 5])), ValueError, r"target must be in \[0, 6\), got -1"),
    (Q, K[:0], dict(target=torch.zeros(4).long()), ValueError, r"target must be in \[0, 0\)"),
    (Q, K, dict(logit_scale=NAN), ValueError, "logit_scale must be finite in torch.float32, got nan"),
    (Q, K, dict(logit_scale=INF), ValueError, "logit_scale must be finite in torch.float32, got inf"),
    (Q, K, dict(logit_scale=torch.tensor(NAN)), ValueError, "logit_scale must be finite in torch.float32, got nan"),
    (Q, K, dict(logit_scale=1e39), ValueError, "logit_scale must be finite in torch.float32, got 1e\\+39"),
    (Q, K, dict(logit_scale=torch.tensor(1e39, dtype=torch.float64)), ValueError, "logit_scale must be finite"),
    (Q.to_sparse(), K, {}, TypeError, "query must be a dense .strided. tensor, got layout torch.sparse_coo"),
    (Q, K, dict(symmetric="no"), TypeError, "symmetric must be a bool, got str"),
    (Q, K, dict(logit_scale=torch.ones(2)), ValueError, r"logit_scale must be .* tensor of one element, 0-d or \[1\], got shape \(2,\)"),
    (Q, K, dict(logit_scale=torch.tensor(2)), TypeError, "logit_scale must be floating-point, got torch.int64"),
    (Q, K, dict(logit_scale=torch.tensor(2.0).to("meta")), ValueError, "logit_scale must be on the features' device"),
    (Q, K, dict(logit_scale="10"), TypeError, "logit_scale must be a float or a tensor of one element, got str"),
    (Q, K, dict(negatives=torch.randn(3)), ValueError, "negatives must have 2 dimensions"),
    (Q, K, dict(negatives=torch.randn(5, 2)), ValueError, "negatives and query must have the same width d, got 2 and 3"),
    (Q, K, dict(negatives=torch.randn(5, 2, 3)), ValueError, "one set per query, got 5 for 4 queries"),
    (Q, K, dict(negatives=torch.randn(5, 3).half()), TypeError, "negatives and query must have the same dtype"),
    (Q, K, dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    (Q, K, dict(reduction=None), ValueError, "reduction must be one of mean, sum, none, got None"),
    (Q, K, dict(backend="cuda"), ValueError, "backend must be one of auto, triton, cpp, torch, eager, got 'cuda'"),
    (Q, K, dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (Q, K, dict(label_smoothing=NAN), ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    (Q, K, dict(label_smoothing="a"), TypeError, "label_smoothing must be a float, got str"),
    (Q, K, dict(memory_budget=-1), ValueError, "memory_budget must be at least 0 bytes, got -1"),
    (Q, K, dict(memory_budget=1e9), TypeError, r"memory_budget must be an int \(bytes\), got float"),
]  # fmt: skip


@pytest.mark.parametrize("query, key, keywords, exception, message", TABLE)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_info_nce(query, key, keywords, exception, message, backend):
    with pytest.raises(exception, match=message):
        info_nce_loss(query, key, **{"backend": backend, **keywords})


LABELS = torch.tensor([0, 1, 1, 2])
T, V = TypeError, ValueError
FAMILY = [
    # call, exception, what the message must say
    (lambda **k: siglip_loss(Q, K, 1.0, **k), V, "image_features and text_features must have the same number of rows"),
    (lambda **k: siglip_loss(Q, Q[:, :2], 1.0, **k), V, "text_features and image_features must have the same width d"),
    (lambda **k: siglip_loss(Q, Q, NAN, **k), V, "logit_scale must be finite"),
    (lambda **k: siglip_loss(Q, Q, 1.0, torch.tensor(INF), **k), V, "logit_bias must be finite"),
    (lambda **k: siglip_loss(Q, Q, 1.0, torch.zeros(1, 1), **k), V, r"logit_bias must be a float or a tensor of one element, 0-d or \[1\], got shape"),
    (lambda **k: siglip_loss(Q, Q, 1.0, "a", **k), T, "logit_bias must be a float or a tensor of one element, got str"),
    (lambda **k: siglip_loss(Q, Q, 1.0, query_group=LABELS, **k), V, "query_group and key_group must be given together"),
    (lambda **k: siglip_loss(Q, K, 1.0, query_group=LABELS, key_group=LABELS, **k), V, r"key_group must have shape \(6,\)"),
    (lambda **k: siglip_loss(Q, Q, 1.0, query_group=LABELS, key_group=Q[:, 0], **k), T, "key_group must be integers"),
    (lambda **k: nt_xent_loss(Q, K, **k), V, "z_i and z_j must have the same number of rows, got 4 and 6"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=0.0, **k), V, "temperature must be positive and finite, got 0"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=-1, **k), V, "temperature must be positive and finite, got -1"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=torch.tensor(0.0), **k), V, "temperature must be positive and finite"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=None, **k), T, "temperature must be a float, got NoneType"),
    (lambda **k: nt_xent_loss(Q.long(), Q, **k), T, "z_i must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (lambda **k: sup_con_loss(Q, **k), V, "labels are needed for features"),
    (lambda **k: sup_con_loss(Q, LABELS.float(), **k), T, "labels must be integers, got torch.float32"),
    (lambda **k: sup_con_loss(Q, LABELS.to_sparse(), **k), T, r"labels must be a dense \(strided\) tensor, got layout"),
    (lambda **k: lifted_structure_loss(Q, None, **k), T, "labels must be a torch.Tensor, got NoneType"),
    (lambda **k: contrastive_loss(Q, None, **k), T, "labels must be a torch.Tensor, got NoneType"),
    (lambda **k: sup_con_loss(Q, LABELS > 0, **k), T, "labels must be integers, got torch.bool"),
    (lambda **k: sup_con_loss(Q, LABELS[:3], **k), V, r"labels must have shape \(4,\), one per row, got \(3,\)"),
    (lambda **k: sup_con_loss(Q, LABELS.to("meta"), **k), V, "labels must be on the features' device cpu, got meta"),
    (lambda **k: sup_con_loss(Q, [0, 1, 1, 2], **k), T, "labels must be a torch.Tensor, got list"),
    (lambda **k: sup_con_loss(Q[0], LABELS, **k), V, r"features must have 2 dimensions \[N, d\], or 3 \[B, V, d\], got"),
    (lambda **k: sup_con_loss(Q, LABELS, normalize="no", **k), T, "normalize must be a bool, got str"),
    (lambda **k: siglip_loss(Q, Q, 1.0, normalize=1, **k), T, "normalize must be a bool, got int"),
    (lambda **k: n_pair_loss(Q, Q, normalize=None, **k), T, "normalize must be a bool, got NoneType"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=10**400, **k), V, "temperature must be positive and finite, got 1000"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=1e-39, **k), V, "temperature must be positive and finite"),
    (lambda **k: nt_xent_loss(Q, Q, temperature=torch.tensor(-2.0), **k), V, "temperature must be .* got -2"),
    (lambda **k: n_pair_loss(Q, K, **k), V, "anchor and positive must have the same number of rows, got 4 and 6"),
    (lambda **k: n_pair_loss(Q, Q, labels=LABELS[:2], **k), V, r"labels must have shape \(4,\)"),
    (lambda **k: arcface_loss(Q, K, None, **k), T, "labels must be a torch.Tensor, got NoneType"),
    (lambda **k: arcface_loss(Q, K, LABELS.float(), **k), T, "labels must be integers, got torch.float32"),
    (lambda **k: arcface_loss(Q, K, LABELS + 4, **k), V, r"labels must be in \[0, 6\), got 6"),
    (lambda **k: arcface_loss(Q, K, LABELS - 1, **k), V, r"labels must be in \[0, 6\), got -1"),
    (lambda **k: arcface_loss(Q, K[:, :2], LABELS, **k), V, "weight and embeddings must have the same width d"),
    (lambda **k: arcface_loss(Q, K, LABELS, margin=-0.1, **k), V, r"margin must be in \[0, 3.14159\], got -0.1"),
    (lambda **k: arcface_loss(Q, K, LABELS, margin=NAN, **k), V, "margin must be in"),
    (lambda **k: cosface_loss(Q, K, LABELS, margin=2.1, **k), V, r"margin must be in \[0, 2\], got 2.1"),
    (lambda **k: cosface_loss(Q, K, LABELS, margin="a", **k), T, "margin must be a float, got str"),
    (lambda **k: arcface_loss(Q, K, LABELS, scale=0.0, **k), V, "scale must be positive and finite, got 0"),
    (lambda **k: arcface_loss(Q, K, LABELS, scale=torch.tensor(3.0), **k), T, "scale must be a float, got Tensor"),
    (lambda **k: siglip_loss(Q, Q, 1.0, reduction="avg", **k), V, "reduction must be one of"),
    (lambda **k: sup_con_loss(Q, LABELS, reduction="avg", **k), V, "reduction must be one of"),
    (lambda **k: arcface_loss(Q, K, LABELS, memory_budget=-1, **k), V, "memory_budget must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, exception, message", FAMILY)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_family(call, exception, message, backend):
    with pytest.raises(exception, match=message):
        call(backend=backend)


BATCH = [
    # embeddings, labels, keywords, exception, message: of every loss over distances, and its module
    ([[1.0]], LABELS, {}, T, "embeddings must be a torch.Tensor, got list"),
    (Q[0], LABELS, {}, V, r"embeddings must have 2 dimensions \[N, d\], got shape \(3,\)"),
    (Q.long(), LABELS, {}, T, "embeddings must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (Q.to_sparse(), LABELS, {}, T, "embeddings must be a dense .strided. tensor, got layout torch.sparse_coo"),
    (Q, [0, 1, 1, 2], {}, T, "labels must be a torch.Tensor, got list"),
    (Q, LABELS.float(), {}, T, "labels must be integers, got torch.float32"),
    (Q, LABELS > 0, {}, T, "labels must be integers, got torch.bool"),
    (Q, LABELS[:3], {}, V, r"labels must have shape \(4,\), one per row, got \(3,\)"),
    (Q, LABELS[None], {}, V, r"labels must have shape \(4,\), one per row, got \(1, 4\)"),
    (Q, LABELS.to("meta"), {}, V, "labels must be on the features' device cpu, got meta"),
    (Q, LABELS, dict(margin=NAN), V, r"margin must be in \[0, .*\], got nan"),
    (Q, LABELS, dict(margin=INF), V, r"margin must be in \[0, .*\], got inf"),
    (Q, LABELS, dict(margin=-0.1), V, r"margin must be in \[0, .*\], got -0.1"),
    (Q, LABELS, dict(margin=True), T, "margin must be a float, got bool"),
    (Q, LABELS, dict(margin="1"), T, "margin must be a float, got str"),
    (Q, LABELS, dict(margin=torch.tensor(1.0)), T, "margin must be a float, got Tensor"),
    (Q, LABELS, dict(normalize=1), T, "normalize must be a bool, got int"),
    (Q, LABELS, dict(reduction="avg"), V, "reduction must be one of mean, sum, none.*, got 'avg'"),
    (Q, LABELS, dict(reduction=None), V, "reduction must be one of mean, sum, none.*, got None"),
    (Q, LABELS, dict(backend="cuda"), V, "backend must be one of auto, triton, cpp, torch, eager, got 'cuda'"),
    (Q, LABELS, dict(memory_budget=-1), V, "memory_budget must be at least 0 bytes, got -1"),
    (Q, LABELS, dict(memory_budget=1e9), T, r"memory_budget must be an int \(bytes\), got float"),
]  # fmt: skip
OVER_DISTANCES = [
    (lifted_structure_loss, LiftedStructureLoss, {}),
    (contrastive_loss, ContrastiveLoss, {}),
    *((triplet_margin_loss, TripletMarginLoss, dict(mining=m)) for m in ("batch_hard", "semi_hard", "batch_all")),
]


@pytest.mark.parametrize("loss, module, options", OVER_DISTANCES)
@pytest.mark.parametrize("embeddings, labels, keywords, exception, message", BATCH)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_over_distances(loss, module, options, embeddings, labels, keywords, exception, message, backend):
    options = {"backend": backend, **options, **keywords}
    with pytest.raises(exception, match=message):
        loss(embeddings, labels, **options)
    with pytest.raises(exception, match=message):
        module(**options)(embeddings, labels)
    if keywords:  # at once
        with pytest.raises(exception, match=message):
            module(**options)


I4, TRIPLETS = torch.arange(4), (torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([3, 3]))
TRIPLET = [
    (dict(labels=None), V, "labels are needed to mine triplets"),
    (dict(mining="batch_all", margin=None), V, "margin must be a number with mining='batch_all'.*the soft margin is"),
    (dict(labels=LABELS, mining="hard"), V, "mining must be one of batch_hard, semi_hard, batch_all, got 'hard'"),
    (dict(labels=LABELS, mining=None), V, "mining must be one of .*, got None"),
    (dict(labels=LABELS, distance="l1"), V, "distance must be one of euclidean, squared_euclidean, cosine, got 'l1'"),
    (dict(triplets=I4), T, r"triplets must be \(anchor, positive, negative\), got Tensor"),
    (dict(triplets=(I4, I4)), T, r"triplets must be \(anchor, positive, negative\), got tuple"),
    (dict(triplets=([0], [1], [2])), T, "triplets: anchor must be a torch.Tensor, got list"),
    (dict(triplets=(I4, I4, None)), T, "triplets: negative must be a torch.Tensor, got NoneType"),
    (dict(triplets=(I4.int(), I4, I4)), T, "triplets: anchor must be int64, got torch.int32"),
    (dict(triplets=(I4, I4.float(), I4)), T, "triplets: positive must be int64, got torch.float32"),
    (dict(triplets=(I4, I4[:2], I4)), V, r"triplets: positive must have shape \(4,\), one per row, got \(2,\)"),
    (dict(triplets=(I4[None], I4, I4)), V, r"triplets: anchor must have shape \(1,\), one per row, got \(1, 4\)"),
    (dict(triplets=(I4[0], I4, I4)), V, r"triplets: anchor must have shape \(0,\), one per row, got \(\)"),
    (dict(triplets=(I4, I4 + 1, I4)), V, r"triplets: positive must be in \[0, 4\), got 4"),
    (dict(triplets=(I4, I4, I4 - 1)), V, r"triplets: negative must be in \[0, 4\), got -1"),
    (dict(triplets=(I4, I4, I4.to("meta"))), V, "triplets: negative must be on the features' device cpu, got meta"),
    (dict(triplets=TRIPLETS, labels=LABELS.float()), T, "labels must be integers"),
    (dict(triplets=TRIPLETS, margin=NAN), V, "margin must be in"),
]


@pytest.mark.parametrize("keywords, exception, message", TRIPLET)
@pytest.mark.parametrize("backend", ["auto", "torch", "eager"])
def test_triplets(keywords, exception, message, backend):
    with pytest.raises(exception, match=message):
        triplet_margin_loss(Q, backend=backend, **keywords)
    inputs = {name: keywords[name] for name in keywords.keys() & {"labels", "triplets"}}
    options = {name: keywords[name] for name in keywords.keys() - {"labels", "triplets"}}
    with pytest.raises(exception, match=message):
        TripletMarginLoss(backend=backend, **options)(Q, **inputs)


@pytest.mark.parametrize("flag, make", [("smooth", LiftedStructureLoss), ("squared", ContrastiveLoss)])
def test_flags_of_losses_over_distances(flag, make):
    function = lifted_structure_loss if flag == "smooth" else contrastive_loss
    with pytest.raises(TypeError, match=f"{flag} must be a bool, got int"):
        function(Q, LABELS, **{flag: 1})
    with pytest.raises(TypeError, match=f"{flag} must be a bool, got int"):
        make(**{flag: 1})
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'mean_nonzero'"):
        function(Q, LABELS, reduction="mean_nonzero")  # only triplets have that mean


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_functional_transforms_of_losses_over_distances_are_refused(transform):
    for loss, _, options in OVER_DISTANCES:
        with pytest.raises(NotImplementedError, match="torch.func transforms.*backend='eager'"):
            transform(lambda x: loss(x, LABELS, **options))(Q)  # noqa: B023


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard", "batch_all", None])
def test_the_formulas_over_distances_have_functional_transforms(mining):
    """As README promises of backend="eager": torch.func's gradient and Hessian are torch.autograd's."""
    x, options = torch.randn(7, 2, dtype=torch.float64), dict(margin=3.0, backend="eager")
    losses = [partial(triplet_margin_loss, mining=mining)] if mining else [lifted_structure_loss, contrastive_loss]
    for loss in losses:
        of_rows = partial(loss, labels=torch.arange(7) % 3, **options)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(of_rows(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(of_rows)(x), gradient)
        hessian = torch.autograd.functional.hessian(of_rows, x)
        torch.testing.assert_close(torch.func.hessian(of_rows)(x), hessian)


def test_forward_mode_is_refused_not_dropped():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q))
        for options in (dict(), dict(mining="batch_hard"), dict(triplets=(LABELS[:2], LABELS[1:3], LABELS[2:]))):
            with pytest.raises(NotImplementedError, match="forward|jvp"):
                triplet_margin_loss(x, LABELS, **options)


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_empty_batches_are_zero(backend):
    empty, none = torch.randn(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for loss in (
        siglip_loss(empty, empty, 1.0, -1.0, backend=backend),
        siglip_loss(empty, K, 1.0, query_group=none, key_group=torch.zeros(6).long(), backend=backend),
        nt_xent_loss(empty, empty, backend=backend),
        sup_con_loss(empty, none, backend=backend),
        n_pair_loss(empty, empty, labels=none, backend=backend),
        arcface_loss(empty, K, none, backend=backend),
    ):
        (gradient,) = torch.autograd.grad(loss, empty)
        assert loss.item() == 0 and gradient.shape == (0, 3)


@pytest.mark.parametrize(
    "image, text, scale, exception, message",
    [
        (Q, K, 1.0, ValueError, "image_features and text_features must have the same number of rows, got 4 and 6"),
        (Q, Q.half(), 1.0, TypeError, "text_features and image_features must have the same dtype"),
        (Q[0], Q, 1.0, ValueError, "image_features must have 2 dimensions"),
        (Q, Q[:, :1], 1.0, ValueError, "text_features and image_features must have the same width d, got 1 and 3"),
        (Q, Q, NAN, ValueError, "logit_scale must be finite"),
        (Q, Q, None, TypeError, "logit_scale must be a float or a tensor of one element, got NoneType"),
    ],
)
def test_clip(image, text, scale, exception, message):
    with pytest.raises(exception, match=message):
        clip_loss(image, text, scale)
    with pytest.raises(exception, match=message):
        ClipLoss()(image, text, scale)


@pytest.mark.parametrize("reduction, shape", [("mean", ()), ("sum", ()), ("none", (0,))])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("name", ["torch", "cpp", "eager"])
def test_no_rows(reduction, shape, symmetric, columns, name):
    """N = 0: the loss is 0 and the gradients are zeros."""
    query = torch.randn(0, 3, requires_grad=True)
    key = torch.randn(columns, 3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = info_nce_loss(
        query, key, logit_scale=scale, symmetric=symmetric, reduction=reduction, backend=name, memory_budget=0
    )
    assert loss.shape == shape and (loss == 0).all()
    loss.sum().backward()
    assert query.grad.shape == (0, 3) and (key.grad == 0).all() and scale.grad == 0


def test_triton_without_gpu_or_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend='triton' needs"):
        info_nce_loss(Q, K, backend="triton")


def test_cpp_where_it_was_not_built(monkeypatch):
    """Asked for by name it is an error; "auto" takes the torch backend, and says so once."""
    monkeypatch.setattr(native, "_missing", "it was not built")
    with pytest.raises(RuntimeError, match="backend='cpp' is not available: it was not built"):
        info_nce_loss(Q, K, backend="cpp")
    from replearn_kernels.engine import backends

    backends.warn_without_native.cache_clear()
    with pytest.warns(UserWarning, match="slower 'torch' backend"):
        loss = info_nce_loss(Q, K)
    torch.testing.assert_close(loss, info_nce_loss(Q, K, backend="eager"))


def test_import_is_quiet_and_needs_no_triton():
    """Importing the package imports neither triton nor anything that prints."""
    code = "import sys, replearn_kernels; assert 'triton' not in sys.modules or 'torch._inductor' in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == 0 and result.stdout == result.stderr == b"", result.stderr.decode()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_functional_transforms_are_refused(transform):
    argument = torch.randn(2, 4, 3) if transform is torch.func.vmap else Q
    with pytest.raises(NotImplementedError, match="torch.func transforms.*backend='eager'"):
        transform(lambda q: info_nce_loss(q, K))(argument)


@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("make", [lambda: torch.tensor(2).expand(4), lambda: torch.arange(24).view(4, 6)[:, 0] // 6])
def test_target_of_any_strides(make, name):
    for reduction in ("mean", "none"):
        losses = [info_nce_loss(Q, K, target=make(), reduction=reduction, backend=b) for b in (name, "eager")]
        torch.testing.assert_close(*losses)


def test_meta_tensors_have_shapes():
    loss = info_nce_loss(Q.to("meta"), K.to("meta"), reduction="none")
    assert loss.shape == (4,) and loss.is_meta


def test_infinite_upstream_gradient_stays_in_its_row():
    query = Q.clone().requires_grad_()
    info_nce_loss(query, K, reduction="none").backward(torch.tensor([0.0, 1.0, 1.0, INF]))
    expected = Q.clone().requires_grad_()
    info_nce_loss(expected, K, reduction="none", backend="eager").backward(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(query.grad[:3], expected.grad[:3])
