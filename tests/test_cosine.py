"""cosine_similarity_loss: values and gradients, against hand-computed numbers and all pairs one by one in fp64."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accuracy import check_against_eager, unit_rows, value_and_gradients
from hypothesis import given, settings

from replearn_kernels import CosineSimilarityLoss, cosine_similarity_loss

BACKENDS = ["torch", "eager"]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def pair_by_pair(embeddings, labels):
    """``[N]``: the definition, one cosine at a time."""
    losses = []
    for i, anchor in enumerate(embeddings):
        positives, negatives = [], []
        for j, other in enumerate(embeddings):
            if j != i:
                cosine = anchor @ other / (anchor.norm() * other.norm())
                (positives if labels[i] == labels[j] else negatives).append(cosine)
        terms = [-torch.stack(positives).mean()] if positives else []
        terms += [torch.stack(negatives).mean()] if negatives else []
        losses.append(sum(terms, start=anchor.sum() * 0))
    return torch.stack(losses)


def dense(embeddings, labels):
    """The N x N formula in the embeddings' own dtype, as eager PyTorch would compute it; the loss in fp32 or fp64."""
    rows = F.normalize(embeddings)
    cosines = rows @ rows.t()
    same = labels[:, None] == labels
    negative, positive = (~same).to(cosines), same.to(cosines) - torch.eye(len(labels)).to(cosines)
    to_negatives, to_positives = ((cosines * m).sum(1) / m.sum(1).clamp(min=1) for m in (negative, positive))
    loss = (to_negatives - to_positives).mean()
    return loss if loss.dtype == torch.float64 else loss.float()


@pytest.mark.parametrize("name", BACKENDS)
def test_hand_computed(name):
    """Five directions in the plane, of any length, all with rational cosines."""
    x = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.1], [4.0, 3.0], [-7.0, 24.0]], dtype=torch.float64)
    labels = torch.tensor([5, 5, -3, -3, 8])
    expected = [
        -3 / 5 + (0 + 4 / 5 - 7 / 25) / 3,
        -3 / 5 + (4 / 5 + 24 / 25 + 3 / 5) / 3,
        -3 / 5 + (0 + 4 / 5 + 24 / 25) / 3,
        -3 / 5 + (4 / 5 + 24 / 25 + 44 / 125) / 3,
        (-7 / 25 + 3 / 5 + 24 / 25 + 44 / 125) / 4,  # alone in its class: no positives
    ]
    losses = cosine_similarity_loss(x, labels, reduction="none", backend=name)
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert cosine_similarity_loss(x, labels, backend=name).item() == pytest.approx(sum(expected) / 5, rel=1e-14)
    total = cosine_similarity_loss(x, labels, reduction="sum", backend=name)
    assert total.item() == pytest.approx(sum(expected), rel=1e-14)


@pytest.mark.parametrize("name", BACKENDS)
def test_hand_computed_gradient(name):
    """Two rows at a right angle, one label: moving one towards the other changes its cosine by 1 / its length."""
    x = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    for labels, sign in ((torch.tensor([1, 1]), -1), (torch.tensor([1, 2]), 1)):
        loss, gradient = value_and_gradients(lambda x: cosine_similarity_loss(x, labels, backend=name), x)  # noqa: B023
        assert loss == 0
        expected = sign * torch.tensor([[0.0, 0.5], [0.2, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=1e-16)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-3, 3), min_size=1, max_size=14), d=st.integers(1, 5), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", BACKENDS)
def test_any_labels_equal_all_pairs(name, labels, d, seed):
    """Any mixture of classes, of one row and of all rows too, with a random upstream gradient."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), d, generator=rng, dtype=torch.float64)
    upstream = torch.randn(len(labels), generator=rng, dtype=torch.float64)
    labels = torch.tensor(labels)

    def ours(x):
        return (cosine_similarity_loss(x, labels, reduction="none", backend=name) * upstream).sum()

    for a, b in zip(value_and_gradients(ours, x), value_and_gradients(lambda x: pair_by_pair(x, labels) @ upstream, x)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, d, classes", [(2, 1, 1), (64, 48, 8), (257, 100, 3), (1000, 16, 300)])
@pytest.mark.parametrize("name", BACKENDS)
def test_as_accurate_as_eager(n, d, classes, dtype, name, rng):
    x = (3 * torch.randn(n, d, generator=rng)).to(dtype)
    labels = torch.randint(classes, (n,), generator=rng)
    check_against_eager(lambda x: cosine_similarity_loss(x, labels, backend=name), lambda x: dense(x, labels), x)


def test_one_row_against_a_large_class(rng):
    """The total without the own class is what remains of sums N times as large: exact all the same."""
    n = 3000
    x = unit_rows(rng, 1, 16) + 1e-2 * torch.randn(n, 16, generator=rng)
    labels = torch.zeros(n, dtype=torch.int64)
    labels[1234] = 1
    check_against_eager(
        lambda x: cosine_similarity_loss(x, labels, reduction="none")[[0, 1234, 2999]].sum(),
        lambda x: few_rows(x, labels, [0, 1234, 2999]),
        x,
    )


def few_rows(x, labels, chosen):
    """The definition for some rows."""
    rows = F.normalize(x)
    total = 0
    for i in chosen:
        cosines = rows @ rows[i]
        others = torch.arange(len(x)) != i
        positives, negatives = cosines[(labels == labels[i]) & others], cosines[labels != labels[i]]
        total = total + negatives.mean() - (positives.mean() if len(positives) else 0)
    return total


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_twice(name, reduction, rng):
    def loss(x, labels):
        return cosine_similarity_loss(x, labels, reduction=reduction, backend=name)

    x = torch.randn(6, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    for labels in ([0, 1, 0, 2, 1, 0], [4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 4, 5]):
        inputs = (x, torch.tensor(labels))
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_few_rows(name, dtype):
    """N = 0 and N = 1 (one row has no pairs), and rows without width."""
    for n, d in ((0, 3), (1, 3), (4, 0)):
        for reduction in ("mean", "sum", "none"):
            x = torch.randn(n, d, dtype=torch.float64).to(dtype).requires_grad_()
            loss = cosine_similarity_loss(x, torch.arange(n) // 2, reduction=reduction, backend=name)
            assert loss.shape == ((n,) if reduction == "none" else ()) and (loss == 0).all()
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            loss.sum().backward()
            assert x.grad.dtype == dtype and x.grad.shape == (n, d) and (x.grad == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_zeros(name, dtype, rng):
    """Cosine 0 with all: they weigh in the means of the others, and their own gradients are 0, also the second ones."""
    x = torch.randn(5, 3, generator=rng).to(dtype)
    x[1] = x[4] = 0
    labels = torch.tensor([0, 0, 0, 1, 1])
    leaf = x.clone().requires_grad_()
    losses = cosine_similarity_loss(leaf, labels, reduction="none", backend=name)
    unit = F.normalize(x.double())
    c02, c03, c23 = (unit[i] @ unit[j] for i, j in ((0, 2), (0, 3), (2, 3)))
    expected = torch.stack([c03 / 2 - c02 / 2, c02 * 0, c23 / 2 - c02 / 2, (c03 + c23) / 3, c02 * 0])
    torch.testing.assert_close(losses, expected.float())
    (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    for derivative in (gradient, second):
        assert derivative.isfinite().all() and (derivative[[1, 4]] == 0).all() and (derivative[0] != 0).any()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integers(dtype, rng):
    """Only equality counts: the dtype's extremes, any order, any strides."""
    x = torch.randn(6, 3, generator=rng)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    labels = torch.tensor([high, low, 7, high, 7, high], dtype=dtype)
    expected = cosine_similarity_loss(x, torch.tensor([2, 0, 1, 2, 1, 2]), backend="eager")
    for name in BACKENDS:
        torch.testing.assert_close(cosine_similarity_loss(x, labels, backend=name), expected)
        every_second = torch.stack([labels, labels], dim=1)[:, 0]
        torch.testing.assert_close(cosine_similarity_loss(x, every_second, backend=name), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_strides(name, rng):
    labels = torch.arange(6) % 2
    for x in (torch.randn(4, 6, generator=rng).t(), torch.randn(12, 8, generator=rng)[::2, ::2]):
        assert not x.is_contiguous()
        results = []
        for leaf in (x.detach().requires_grad_(), x.contiguous().requires_grad_()):
            loss = cosine_similarity_loss(leaf, labels, backend=name)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        for strided, contiguous in zip(*results):
            torch.testing.assert_close(strided, contiguous)
    ones = torch.ones(1, 4).expand(6, 4)  # all cosines are 1: -1 + 1
    torch.testing.assert_close(cosine_similarity_loss(ones, labels, backend=name), torch.tensor(0.0))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_and_no_grad(name, rng):
    """Under autocast nothing is rounded to bf16: the same bits."""
    x, labels = torch.randn(20, 8, generator=rng), torch.arange(20) // 4
    outside = value_and_gradients(lambda x: cosine_similarity_loss(x, labels, backend=name), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_gradients(lambda x: cosine_similarity_loss(x, labels, backend=name), x)
        assert cosine_similarity_loss(x.bfloat16(), labels, backend=name).dtype == torch.float32
    for a, b in zip(inside, outside):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    with torch.no_grad():
        loss = cosine_similarity_loss(x.requires_grad_(), labels, backend=name)
    assert not loss.requires_grad and torch.equal(loss, outside[0])


def test_deterministic_on_threads(rng):
    """Large enough for PyTorch to split the work: the same bits in every run."""
    x, labels = torch.randn(4000, 32, generator=rng), torch.randint(5, (4000,), generator=rng)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [value_and_gradients(lambda x: cosine_similarity_loss(x, labels), x) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_no_pairs_are_formed(rng):
    """100,000 rows, whose N x N matrix of cosines would take 80 GB, against the identity of class sums."""
    n = 100_000
    x, labels = unit_rows(rng, n, 4, dtype=torch.float64), torch.arange(n) % 2
    sums = torch.stack([x[0::2].sum(0), x[1::2].sum(0)])
    between, within = sums[0] @ sums[1], (sums * sums).sum() - n
    expected = 2 * between / (n / 2) - within / (n / 2 - 1)
    torch.testing.assert_close(cosine_similarity_loss(x, labels, reduction="sum"), expected)


def test_opcheck(rng):
    rows = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 4, 0, 2, 4])
    class_sums = torch.ops.replearn_kernels.class_sums
    torch.library.opcheck(class_sums.default, (rows, classes))
    same = (classes[:, None] == classes).double()
    torch.testing.assert_close(class_sums(rows, classes), same @ rows)


@pytest.mark.parametrize("compiler, sizes", [("inductor", [12]), ("aot_eager", [12, 20, 7])])
def test_compile(compiler, sizes, rng):
    """fullgraph, with an encoder before it: the same values and gradients as without."""
    torch._dynamo.reset()

    def step(x, weight, labels):
        return cosine_similarity_loss(x @ weight, labels)

    compiled = torch.compile(step, fullgraph=True, dynamic=len(sizes) > 1, backend=compiler)
    for n in sizes:
        inputs = torch.randn(n, 8, generator=rng), torch.randn(8, 6, generator=rng)
        labels = torch.arange(n) % 3
        results = [value_and_gradients(lambda *x, f=f: f(*x, labels), *inputs) for f in (step, compiled)]  # noqa: B023
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_functional_transforms(rng):
    """Refused by the closed form, as by the other losses; the specification has them."""
    x, labels = torch.randn(6, 3, generator=rng), torch.arange(6) // 2
    with pytest.raises(NotImplementedError, match="torch.func transforms.*backend='eager'"):
        torch.func.grad(lambda x: cosine_similarity_loss(x, labels))(x)
    (_, expected) = value_and_gradients(lambda x: cosine_similarity_loss(x, labels), x)
    ours = torch.func.grad(lambda x: cosine_similarity_loss(x, labels, backend="eager"))(x)
    torch.testing.assert_close(ours, expected)


def test_meta_tensors_have_shapes():
    x, labels = torch.randn(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    loss = cosine_similarity_loss(x, labels, reduction="none")
    assert loss.shape == (4,) and loss.is_meta


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_spreads(name, rng):
    """Nothing is masked: a NaN reaches every row that is compared with it."""
    x = torch.randn(4, 3, generator=rng)
    x[2, 1] = float("nan")
    assert cosine_similarity_loss(x, torch.tensor([0, 0, 1, 1]), reduction="none", backend=name).isnan().all()


def test_module(rng):
    x, labels = torch.randn(6, 3, generator=rng), torch.arange(6) // 2
    module = CosineSimilarityLoss(reduction="sum", backend="eager")
    torch.testing.assert_close(module(x, labels), cosine_similarity_loss(x, labels) * 6)
    assert not module.state_dict() and "reduction='sum'" in repr(module)


def test_training_lowers_the_loss(rng):
    """Free rows of three classes: towards -1 within and, on a plane, -1/2 between."""
    x, labels = torch.randn(12, 2, generator=rng).requires_grad_(), torch.arange(12) % 3
    optimizer = torch.optim.SGD([x], lr=2.0)
    for _ in range(300):
        loss = cosine_similarity_loss(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(-1.5, abs=1e-3)


X, LABELS = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    "embeddings, labels, keywords, exception, message",
    [
        ([[1.0]], LABELS, {}, TypeError, "embeddings must be a torch.Tensor, got list"),
        (X[0], LABELS, {}, ValueError, r"embeddings must have 2 dimensions \[N, d\], got shape \(3,\)"),
        (X.long(), LABELS, {}, TypeError, "embeddings must be fp16, bf16, fp32 or fp64, got torch.int64"),
        (X.to_sparse(), LABELS, {}, TypeError, "embeddings must be a dense .strided. tensor"),
        (X, [0, 1, 2, 3], {}, TypeError, "labels must be a torch.Tensor, got list"),
        (X, None, {}, TypeError, "labels must be a torch.Tensor, got NoneType"),
        (X, LABELS.float(), {}, TypeError, "labels must be integers, got torch.float32"),
        (X, LABELS.bool(), {}, TypeError, "labels must be integers, got torch.bool"),
        (X, LABELS.cfloat(), {}, TypeError, "labels must be integers, got torch.complex64"),
        (X, LABELS[:3], {}, ValueError, r"labels must have shape \(4,\), one per row, got \(3,\)"),
        (X, LABELS[:, None], {}, ValueError, r"labels must have shape \(4,\), one per row, got \(4, 1\)"),
        (X, LABELS.to("meta"), {}, ValueError, "labels must be on the features' device cpu, got meta"),
        (X, LABELS, dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
        (X, LABELS, dict(backend="cpp"), ValueError, "backend must be one of auto, torch, eager, got 'cpp'"),
    ],
)  # fmt: skip
def test_bad_input(embeddings, labels, keywords, exception, message):
    for arguments in (keywords, {"backend": "eager", **keywords}):
        with pytest.raises(exception, match=message):
            cosine_similarity_loss(embeddings, labels, **arguments)
