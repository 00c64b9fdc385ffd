"""The DINO modules: center and warm-up, in one process and in two; and bad input, to modules and functions."""

import copy

import pytest
import torch
import torch.distributed as dist
from dino_oracle import DTYPES, head_loss, heads, logits
from processes import Ranks, needs_gloo

from replearn_kernels import DINOHeadLoss, DINOLoss, dino_head_loss, dino_loss

NAN, INF = float("nan"), float("inf")


# -- modules -----------------------------------------------------------------------------------------------------------


def test_center_follows_the_teacher(rng):
    """After the loss, by momentum 0.8, in training mode only; the step before it still has its gradients."""
    student, teacher, _ = logits(rng, 4, 2, 5, 20, torch.float32)
    student.requires_grad_()
    module, center = DINOLoss(20, center_momentum=0.8), torch.zeros(20)
    losses = []
    for step in range(3):
        losses.append(module(student, teacher + step))
        torch.testing.assert_close(losses[-1], dino_loss(student, teacher + step, center))
        center = 0.8 * center + 0.2 * (teacher + step).mean((0, 1))
        torch.testing.assert_close(module.center, center)
    sum(losses).backward()
    assert student.grad.isfinite().all()
    module.eval()(student, teacher)
    torch.testing.assert_close(module.center, center)
    module.train()(student[:, :0], teacher[:, :0])
    torch.testing.assert_close(module.center, center)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_center_is_the_mean_of_the_logits(dtype, monkeypatch, rng):
    monkeypatch.setattr("replearn_kernels.dino._SUM_ROWS", 7)
    student, weight, teacher, teacher_weight, _ = heads(rng, 4, 2, 5, 20, 6, dtype)
    module = DINOHeadLoss(20, center_momentum=0.5)
    loss = module(student, teacher, weight, teacher_weight)
    torch.testing.assert_close(loss, head_loss(student, weight, teacher, teacher_weight, torch.zeros(20)))
    mean = (teacher.double() @ teacher_weight.double().t()).mean((0, 1))
    torch.testing.assert_close(module.center, 0.5 * mean.float(), rtol=1e-5, atol=1e-7)


def test_center_is_state_and_stays_in_fp32(rng):
    module = DINOLoss(20)
    module(*logits(rng, 3, 2, 4, 20)[:2])
    assert list(module.state_dict()) == ["center"] and not list(module.parameters())
    center = module.center.clone()
    assert module.half().center.dtype == torch.float32 and torch.equal(module.center, center)
    assert module.to(torch.bfloat16).center.dtype == torch.float32 and torch.equal(module.center, center)
    assert module.double().center.dtype == torch.float64
    assert module.to("meta").center.is_meta
    fresh = DINOLoss(20)
    fresh.load_state_dict({"center": center})
    assert torch.equal(fresh.center, center)


def test_warm_up():
    """From 0.04 to 0.07 in four epochs; the last of them has the full temperature."""
    module = DINOLoss(5, teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=4)
    expected = {0: 0.04, 1: 0.05, 1.5: 0.055, 2: 0.06, 3: 0.07, 4: 0.07, 100: 0.07}
    assert {epoch: module.teacher_temp_at(epoch) for epoch in expected} == pytest.approx(expected)
    assert DINOLoss(5, teacher_temp=0.07).teacher_temp_at(0) == 0.07
    single = DINOLoss(5, teacher_temp=0.07, warmup_teacher_temp_epochs=1)
    assert [single.teacher_temp_at(epoch) for epoch in (0, 1)] == [0.04, 0.07]


def test_epoch_reaches_the_loss(rng):
    student, weight, teacher, teacher_weight, _ = heads(rng, 3, 2, 4, 20, 6)
    options = dict(student_temp=0.2, teacher_temp=0.1, warmup_teacher_temp_epochs=3, reduction="sum", backend="eager")
    expected = head_loss(
        student, weight, teacher, teacher_weight, torch.zeros(20), student_temp=0.2, teacher_temp=0.07, reduction="sum"
    )
    torch.testing.assert_close(DINOHeadLoss(20, **options)(student, teacher, weight, teacher_weight, 1), expected)
    torch.testing.assert_close(
        DINOLoss(20, **options)(student @ weight.t(), teacher @ teacher_weight.t(), epoch=1), expected
    )


def test_repr():
    assert repr(DINOLoss(20, center_momentum=0.8)) == "DINOLoss(out_dim=20, center_momentum=0.8)"
    head = DINOHeadLoss(20, shard_prototypes=False, warmup_teacher_temp_epochs=3, backend="eager")
    assert repr(head) == (
        "DINOHeadLoss(out_dim=20, shard_prototypes=False, warmup_teacher_temp_epochs=3, backend='eager')"
    )


def update_center(rank):
    """One of two processes, with batches of 3 and 1."""
    rng = torch.Generator().manual_seed(0)
    student, weight, teacher, teacher_weight, _ = heads(rng, 3, 2, 4, 20, 6, torch.float32)
    own = slice(0, 3) if rank == 0 else slice(3, 4)
    module, head = DINOLoss(20), DINOHeadLoss(20)
    for loss in (module, torch.compile(copy.deepcopy(module), backend="eager")):
        loss(student[:, own] @ weight.t(), teacher[:, own] @ teacher_weight.t())
        expected = 0.1 * (teacher @ teacher_weight.t()).mean((0, 1))
        torch.testing.assert_close(loss.center, expected)
    head(student[:, own], teacher[:, own], weight, teacher_weight)
    torch.testing.assert_close(head.center, expected)


def differ(rank, change, head):
    """What is wrong on rank 1, and what each of the two says."""
    rng = torch.Generator().manual_seed(0)
    student, weight, teacher, teacher_weight, _ = heads(rng, 3, 2, 4, 6, 5, torch.float32)
    options = dict(center_momentum=0.5 if (rank, change) == (1, "momentum") else 0.9)
    if head == "group":
        module = DINOHeadLoss(6, group=dist.group.WORLD, **options)
    else:
        module = (DINOHeadLoss if head else DINOLoss)(6, **options)
    if rank == 1 and change == "dtype":
        module.double()
    if rank == 1 and change == "training":
        module.eval()
    if not head:
        student, teacher = student @ weight.t(), teacher @ teacher_weight.t()
    if rank == 1 and change == "shape":
        student = student[..., :4]
    call = torch.compile(module, backend="eager") if change == "shape" else module
    try:
        epoch = -1 if (rank, change) == (1, "epoch") else 0
        call(student, teacher, *((weight, teacher_weight) if head else ()), epoch=epoch)
    except ValueError as error:
        return str(error)


def evaluate(rank):
    """Alone: nothing is exchanged."""
    student, teacher, _ = logits(torch.Generator().manual_seed(rank), 3, 2, 4, 6, torch.float32)
    if rank == 1:
        torch.testing.assert_close(DINOLoss(6).eval()(student, teacher), dino_loss(student, teacher, torch.zeros(6)))


@needs_gloo
def test_two_processes(tmp_path):
    with Ranks(2, tmp_path) as ranks:
        ranks.run(update_center)
        ranks.run(evaluate)
        for head in (False, True, "group"):
            message = "center_momentum must be the same on every rank of the group, got 0.9 on rank 0 and 0.5 on rank 1"
            assert ranks.run(differ, "momentum", head) == [message] * 2
            assert all("center.dtype must be the same" in message for message in ranks.run(differ, "dtype", head))
            for change, error in (("shape", "the same"), ("epoch", "epoch must be at least 0, got -1")):
                told, own = ranks.run(differ, change, head)
                assert error in own and f"rank 1: ValueError: {own}" in told
        assert all("training must be the same" in message for message in ranks.run(differ, "training", "group"))


# -- bad input ---------------------------------------------------------------------------------------------------------

S, T, C = torch.randn(3, 4, 6), torch.randn(2, 4, 6), torch.randn(6)  # student, teacher, center
F, G, W = torch.randn(3, 4, 5), torch.randn(2, 4, 5), torch.randn(6, 5)  # student's and teacher's features, weight

OPTIONS = [
    (dict(student_temp=0.0), ValueError, "student_temp must be positive and finite in torch.float32, got 0.0"),
    (dict(teacher_temp=-0.04), ValueError, "teacher_temp must be positive and finite in torch.float32, got -0.04"),
    (dict(teacher_temp=NAN), ValueError, "teacher_temp must be positive and finite in torch.float32, got nan"),
    (dict(student_temp=INF), ValueError, "student_temp must be positive and finite in torch.float32, got inf"),
    (dict(student_temp=1e-45), ValueError, "student_temp must be positive and finite in torch.float32, got 1e-45"),
    (dict(student_temp="0.1"), TypeError, "student_temp must be a float, got str"),
    (dict(teacher_temp=torch.tensor(0.1)), TypeError, "teacher_temp must be a float, got Tensor"),
    (dict(teacher_temp=True), TypeError, "teacher_temp must be a float, got bool"),
    (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    (dict(backend="triton"), ValueError, "backend must be one of auto, eager, got 'triton'"),
]

LOGITS = [
    ([[1.0]], T, C, TypeError, "student_logits must be a torch.Tensor, got list"),
    (S, None, C, TypeError, "teacher_logits must be a torch.Tensor, got NoneType"),
    (S, T, 0.0, TypeError, "center must be a torch.Tensor, got float"),
    (S[0], T, C, ValueError, r"student_logits must have 3 dimensions \[V, B, K\], got shape \(4, 6\)"),
    (S, T[None], C, ValueError, r"teacher_logits must have 3 dimensions \[V, B, K\], got shape \(1, 2, 4, 6\)"),
    (S[:0], T, C, ValueError, r"student_logits must have at least one view, got shape \(0, 4, 6\)"),
    (S, T[:0], C, ValueError, r"teacher_logits must have at least one view, got shape \(0, 4, 6\)"),
    (S, T[:, :3], C, ValueError, "teacher_logits and .* the same number of samples B, got 3 and 4"),
    (S, T[..., :5], C, ValueError, "teacher_logits and .* the same number of prototypes K, got 5 and 6"),
    (S[..., :0], T[..., :0], C[:0], ValueError, "there must be at least one prototype, got K = 0"),
    (S, T.half(), C, TypeError, "teacher_logits and student_logits must have the same dtype, got torch.float16"),
    (S, T.to("meta"), C, ValueError, "teacher_logits and student_logits must be on the same device, got meta and cpu"),
    (S.long(), T.long(), C, TypeError, "student_logits must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (S.to_sparse(), T, C, TypeError, "student_logits must be a dense"),
    (S, T, C[:5], ValueError, r"center must have shape \(6,\), one value per prototype, got \(5,\)"),
    (S, T, C[None], ValueError, r"center must have 1 dimensions \[K\], got shape \(1, 6\)"),
    (S, T, C.int(), TypeError, "center must be fp16, bf16, fp32 or fp64, got torch.int32"),
    (S, T, C.to("meta"), ValueError, "center must be on the student's device cpu, got meta"),
]  # fmt: skip

HEADS = [
    (F[0], G, W, W, C, ValueError, r"student_features must have 3 dimensions \[V, B, d\], got shape \(4, 5\)"),
    (F, G[:, :1], W, W, C, ValueError, "teacher_features and student_features must have the same number of samples B"),
    (F, G, W[0], W, C, ValueError, r"student_weight must have 2 dimensions \[K, d\], got shape \(5,\)"),
    (F, G, W, None, C, TypeError, "teacher_weight must be a torch.Tensor, got NoneType"),
    (F, G, W, W[:5], C, ValueError, "teacher_weight and .* the same number of prototypes K, got 5 and 6"),
    (F, G, W[:, :4], W, C, ValueError, "student_weight and student_features must have the same width d, got 4 and 5"),
    (F, G, W, W[:, :4], C, ValueError, "teacher_weight and student_features must have the same width d, got 4 and 5"),
    (F, G[..., :4], W, W, C, ValueError, "teacher_features and .* the same width d, got 4 and 5"),
    (F, G, W.double(), W, C, TypeError, "student_weight and student_features must have the same dtype"),
    (F, G, W, W.to("meta"), C, ValueError, "teacher_weight and student_features must be on the same device"),
    (F, G, W, W.long(), C, TypeError, "teacher_weight must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (F, G, W[:0], W[:0], C[:0], ValueError, "there must be at least one prototype, got K = 0"),
    (F, G, W, W, C[:5], ValueError, r"center must have shape \(6,\)"),
]  # fmt: skip


@pytest.mark.parametrize("student, teacher, center, exception, message", LOGITS)
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_bad_logits(student, teacher, center, exception, message, name):
    with pytest.raises(exception, match=message):
        dino_loss(student, teacher, center, backend=name)


@pytest.mark.parametrize("student, teacher, weight, teacher_weight, center, exception, message", HEADS)
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_bad_heads(student, teacher, weight, teacher_weight, center, exception, message, name):
    with pytest.raises(exception, match=message):
        dino_head_loss(student, teacher, weight, teacher_weight, center, backend=name)


@pytest.mark.parametrize("keywords, exception, message", OPTIONS)
def test_bad_options(keywords, exception, message):
    for call in (lambda: dino_loss(S, T, C, **keywords), lambda: dino_head_loss(F, G, W, W, C, **keywords)):
        with pytest.raises(exception, match=message):
            call()
    for module in (DINOLoss, DINOHeadLoss):
        with pytest.raises(exception, match=message):
            module(6, **keywords)


def test_temperature_of_a_double():
    """What fp32 cannot hold fp64 can."""
    assert dino_loss(S.double(), T.double(), C, student_temp=1e-45).isfinite()


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (dict(out_dim=0), ValueError, "out_dim must be at least 1, got 0"),
        (dict(out_dim=6.0), TypeError, "out_dim must be an int, got float"),
        (dict(warmup_teacher_temp=0), ValueError, "warmup_teacher_temp must be positive and finite"),
        (dict(warmup_teacher_temp_epochs=-1), ValueError, "warmup_teacher_temp_epochs must be at least 0, got -1"),
        (dict(warmup_teacher_temp_epochs=2.5), TypeError, "warmup_teacher_temp_epochs must be an int, got float"),
        (dict(center_momentum=1.5), ValueError, r"center_momentum must be in \[0, 1\], got 1.5"),
        (dict(center_momentum=None), TypeError, "center_momentum must be a float, got NoneType"),
    ],
)
def test_bad_module(arguments, exception, message):
    with pytest.raises(exception, match=message):
        DINOLoss(**{"out_dim": 6, **arguments})


@pytest.mark.parametrize(
    "epoch, exception, message",
    [
        (-1, ValueError, "epoch must be at least 0, got -1"),
        (NAN, ValueError, "epoch must be at least 0, got nan"),
        ("3", TypeError, "epoch must be a number, got str"),
        (True, TypeError, "epoch must be a number, got bool"),
    ],
)
def test_bad_epoch(epoch, exception, message):
    with pytest.raises(exception, match=message):
        DINOLoss(6)(S, T, epoch=epoch)


def test_bad_call_leaves_the_center():
    module = DINOLoss(7)
    with pytest.raises(ValueError, match=r"center must have shape \(6,\), one value per prototype, got \(7,\)"):
        module(S, T)
    assert (module.center == 0).all()
