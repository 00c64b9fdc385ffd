"""The DINO losses in the dispatcher, and what they cost: schemas, fakes, torch.compile, autocast; work and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dino_oracle import head_loss, heads, logits

from replearn_kernels import DINOHeadLoss, DINOLoss, count_work, dino_head_loss, dino_loss

ROOT = Path(__file__).parents[1]

# -- work and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted, expected", [((), 1), ((0,), 3), ((1,), 3), ((0, 1), 4)])
def test_work_of_the_head_loss(wanted, expected, rng):
    """In products of V B x K x d: 1 + U / V forward; the same again backward, and 1 a gradient."""
    inputs = heads(rng, 3, 2, 5, 100, 8, torch.float32)
    for i in wanted:
        inputs[i].requires_grad_()
    with count_work() as work:
        loss = head_loss(*inputs)
        if wanted:
            loss.backward()
    sweeps = 2 if wanted else 1
    assert work.units(3 * 5, 100, 8) == pytest.approx(expected + sweeps * 2 / 3, rel=1e-12)


def test_logits_take_no_products(rng):
    student, *fixed = logits(rng, 3, 2, 5, 100)
    with count_work() as work:
        dino_loss(student.requires_grad_(), *fixed).backward()
    assert work.flops == 0


MEMORY = """
import gc, torch
from bench.memory import host_peak
from replearn_kernels import dino_head_loss, dino_loss

def head(b, k, v=10, u=2, d=64):
    student, weight = torch.randn(v, b, d, requires_grad=True), torch.randn(k, d, requires_grad=True)
    teacher, teacher_weight, center = torch.randn(u, b, d), torch.randn(k, d), torch.zeros(k)
    return lambda: dino_head_loss(student, teacher, weight, teacher_weight, center).backward()

def logits(b, k, v=10, u=2):
    student, teacher, center = torch.randn(v, b, k, requires_grad=True), torch.randn(u, b, k), torch.zeros(k)
    return lambda: dino_loss(student, teacher, center).backward()

for case, prototypes in ((head, 65536), (logits, 16384)):  # large beside what an allocator wastes
    case(4, 100)()
    step = case(48, prototypes)
    gc.collect()
    print(host_peak(step)[0] / (10 * 48 * prototypes * 4))
"""


def test_peak_memory():
    """Forward and backward, in units of the student's logits: half of them, beside the gradient of given logits."""
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    head, logits = (float(line) for line in result.stdout.split())
    assert head < 0.5
    assert logits < 1.5


# -- the dispatcher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction, wanted", [("mean", (0, 1)), ("none", (0,))])
def test_opcheck(reduction, wanted):
    """Whichever of features and prototypes need a gradient; contiguous or not."""
    ops = torch.ops.replearn_kernels
    inputs = [torch.randn(3, 4, 6), torch.randn(9, 6), torch.randn(2, 4, 6), torch.randn(6, 9).t(), torch.randn(9)]
    for i in wanted:
        inputs[i].requires_grad_()
    torch.library.opcheck(ops.dino_head_loss.default, (*inputs, 0.1, 0.04, reduction))
    tables = [table.detach() for table in ops.dino_head_loss(*inputs, 0.1, 0.04, reduction)]
    needs_grad = [i in wanted for i in range(2)]
    detached = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(
        ops.dino_head_loss_backward.default, (*tables, *detached, 0.1, 0.04, reduction, needs_grad)
    )
    if 1 not in wanted:
        student = torch.randn(4, 3, 9).transpose(0, 1).requires_grad_(0 in wanted)
        torch.library.opcheck(
            ops.dino_loss.default, (student, torch.randn(2, 4, 9), torch.randn(9), 0.1, 0.04, reduction)
        )


def test_compile(rng):
    """fullgraph, by the default compiler: the same values and gradients as without."""
    torch._dynamo.reset()
    student, weight, *fixed = heads(rng, 3, 2, 4, 20, 6, torch.float32)
    inputs = student, weight, (student @ weight.t()).contiguous()

    def step(features, prototypes, logits):
        return head_loss(features, prototypes, *fixed), dino_loss(logits, logits[:2], fixed[-1], reduction="none")

    check_compiled(step, torch.compile(step, fullgraph=True), inputs)


def test_compile_for_any_shape_and_temperature(rng):
    """fullgraph, with a layer around the loss."""
    torch._dynamo.reset()
    weight, prototypes = torch.randn(8, 6, generator=rng), torch.randn(20, 6, generator=rng)

    def step(x, weight, prototypes, temp):
        features, center = x @ weight, prototypes.detach().sum(1)
        return (head_loss(features, prototypes, features[:2], prototypes, center, teacher_temp=temp),)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, temp in ((5, 0.04), (7, 0.05)):
        check_compiled(step, compiled, (torch.randn(3, b, 8, generator=rng), weight, prototypes), temp)


def check_compiled(step, compiled, inputs, *rest):
    found = []
    for function in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        losses = function(*leaves, *rest)
        found.append([*losses, *torch.autograd.grad(sum(loss.sum() for loss in losses), leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [DINOLoss, DINOHeadLoss])
def test_compile_modules(kind, rng):
    """fullgraph, with the center's update inside, over epochs of different temperature."""
    torch._dynamo.reset()
    student, weight, teacher, teacher_weight, _ = heads(rng, 3, 2, 4, 20, 6, torch.float32)
    logits, features = (student @ weight.t(), teacher @ teacher_weight.t()), (student, teacher, weight, teacher_weight)
    plain, module = (kind(20, teacher_temp=0.07, warmup_teacher_temp_epochs=3) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for epoch in range(4):
        tensors = logits if kind is DINOLoss else features
        torch.testing.assert_close(compiled(*tensors, epoch=epoch), plain(*tensors, epoch=epoch))
        torch.testing.assert_close(module.center, plain.center)


def test_fake_and_meta_tensors():
    with torch._subclasses.FakeTensorMode():
        student, weight = torch.randn(3, 400, 64, requires_grad=True), torch.randn(9000, 64, requires_grad=True)
        loss = head_loss(student, weight, student[:2], weight, torch.zeros(9000), reduction="none")
        assert loss.shape == (400,)
        loss.sum().backward()
        assert student.grad.shape == student.shape and weight.grad.shape == weight.shape
    meta = torch.randn(3, 4, 5, device="meta")
    assert dino_loss(meta, meta[:2], meta[0, 0]).is_meta


def test_autocast(rng):
    """Features and prototypes enter the products in autocast's dtype; logits, center and loss stay fp32."""
    inputs = heads(rng, 3, 2, 4, 20, 6, torch.float32)
    leaf = inputs[1].requires_grad_()
    half = [tensor.detach().bfloat16().requires_grad_(i == 1) for i, tensor in enumerate(inputs[:4])]
    expected = head_loss(*half, inputs[4])
    module, plain = DINOHeadLoss(20), DINOHeadLoss(20)
    student, weight, teacher, teacher_weight, center = inputs
    plain(student, teacher, weight, teacher_weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_loss(*inputs)
        module(student, teacher.bfloat16(), weight, teacher_weight)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    torch.testing.assert_close(module.center, plain.center, rtol=2**-7, atol=1e-4)
    loss.backward()
    expected.backward()
    assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, half[1].grad.float())


def test_forward_mode_is_refused():
    """A tangent would be dropped without a word."""
    logits, weight, center = torch.randn(2, 3, 5), torch.randn(4, 5), torch.zeros(4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        of_weight = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        for loss in (
            lambda: dino_loss(dual, logits, torch.zeros(5)),
            lambda: dino_head_loss(dual, logits, weight, weight, center),
            lambda: dino_head_loss(logits, logits, of_weight, weight, center),
        ):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                loss()
