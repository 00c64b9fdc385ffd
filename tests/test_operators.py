"""The dispatcher: schemas, fakes, autograd, torch.compile, autocast, no_grad, FakeTensor, functional transforms."""

from functools import partial

import pytest
import torch
from accuracy import unit_rows
from torch.autograd import forward_ad

from replearn_kernels import (
    ClipLoss,
    arcface_loss,
    clip_loss,
    contrastive_loss,
    count_work,
    dino_head_loss,
    dino_loss,
    info_nce_loss,
    lifted_structure_loss,
    n_pair_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_margin_loss,
)
from replearn_kernels.engine import native


def arguments(symmetric, reduction, memory_budget, backend, own=False, any_size=False):
    """A sample call of the pair_loss operator."""
    query, key, queue = (torch.randn(n, 6, requires_grad=True) for n in (5, 7, 3))
    negatives = torch.randn(5, 4, 6, requires_grad=True) if own else None
    needs_grad = [True] * (5 if own else 4)
    return (
        query, [key, queue], negatives, torch.tensor([0, 6, 2, 2, 1]), None, None,
        torch.tensor(2.0, requires_grad=True), *[None] * 6,
        "softmax", [float(symmetric), 0.1, 0.0, 0.0], reduction, backend, memory_budget, needs_grad, any_size,
    )  # fmt: skip


OVER_DISTANCES = {
    "lifted": [1.0],
    "hard_lifted": [1.0],
    "margin_contrastive": [1.0, 1.0],
    "batch_hard": [0.0, 0.2],
    "batch_all": [0.2, 1.0, 1.0],
}


def family_arguments(name, reduction, backend, any_size=False):
    """The same for the other objectives."""
    query, key = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    rows, columns = torch.tensor([0, 0, 1, -2, 1, 9]), torch.tensor([0, 1, 1, 5, -2, -2, 0])
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (2.0, -1.0))
    options, none = (reduction, backend, 0), (None,) * 6  # no bias, nor values, guide or learned parameters
    arguments = {
        "moco": (
            query, [key], torch.randn(6, 1, 5, requires_grad=True), None, None, None, scale, *none,
            "softmax", [0.0, 0.1, 0.0, 1.0], *options, [True] * 4,
        ),
        "sup_con": (query, [], None, None, rows, None, scale, *none, "sup_con", [0.0], *options, [True] * 2),
        "sigmoid": (query, [key], None, None, None, None, scale, bias, *none[1:], "sigmoid", [0.0], *options,
                    [True] * 4),
        "groups": (query, [key], None, None, rows, columns, scale, bias, *none[1:], "sigmoid", [1.0], *options,
                   [True] * 4),
        "margin": (query, [key], None, rows.abs() % 7, None, None, scale.detach(), *none, "margin_softmax", [0.5, 1.0],
                   *options, [True, True, False]),
        **{
            objective: (query, [], None, None, rows, None, scale.detach(), *none, objective, parameters, *options,
                        [True, False])
            for objective, parameters in OVER_DISTANCES.items()
        },
    }[name]  # fmt: skip
    return *arguments, any_size


@pytest.mark.parametrize("name", ["moco", "sup_con", "sigmoid", "groups", "margin", *OVER_DISTANCES])
@pytest.mark.parametrize("reduction, any_size", [("mean", False), ("none", False), ("mean", True)])
def test_opcheck_of_the_family(name, reduction, any_size, backend):
    torch.library.opcheck(
        torch.ops.replearn_kernels.pair_loss.default, family_arguments(name, reduction, backend, any_size)
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction, any_size", [("mean", False), ("none", False), ("mean", True)])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(symmetric, reduction, any_size, memory_budget, own, backend):
    given = arguments(symmetric, reduction, memory_budget, backend, own, any_size)
    torch.library.opcheck(torch.ops.replearn_kernels.pair_loss.default, given)


@pytest.mark.parametrize("wanted", range(3))
def test_opcheck_of_one_tile_where_not_all_is_needed(wanted, backend):
    """Real and fake kernels agree on what is saved for (query, key, scale), whichever needs a gradient."""
    inputs = [torch.randn(5, 6), torch.randn(5, 6), torch.tensor(2.0)]
    inputs[wanted].requires_grad_()
    query, key, scale = inputs
    config = ("softmax", [1.0, 0.0, 0.0, 0.0], "mean", backend, 2**20, [i == wanted for i in range(3)], False)
    given = query, [key], None, None, None, None, scale, *[None] * 6, *config
    torch.library.opcheck(torch.ops.replearn_kernels.pair_loss.default, given)


def test_opcheck_tile_passes():
    if not native.available():
        pytest.skip(native.why_missing())
    s, target = torch.randn(5, 7), torch.tensor([0, 6, 2, 9, -3])
    groups = torch.randint(3, (5,), dtype=torch.int32), torch.randint(3, (7,), dtype=torch.int32)
    ops, pairs, empty = torch.ops.replearn_kernels, (2.0, 0.5, target, *groups, 0, False), torch.empty(5, 7)
    points = (torch.rand(5, 3), torch.rand(7, 3), torch.rand(5), torch.rand(7), False)
    to = (False, torch.rand(5, 3), torch.rand(5, 3), torch.rand(7, 3), torch.rand(7, 3))
    for arguments in (
        (ops.softmax_statistics_, s, *pairs, False, False, torch.zeros(3, 5), torch.zeros(2, 7)),
        (ops.softmax_weights_, s, torch.empty(5, 7), *pairs, False, False, torch.zeros(5, 5), torch.zeros(5, 7)),
        (ops.sigmoid_statistics_, s, *pairs, torch.zeros(3, 5), None),
        (ops.sigmoid_weights_, s, torch.empty(5, 7), *pairs, torch.zeros(3, 5), None),
        (ops.hardest_statistics_, s, *pairs, torch.zeros(5, 5), torch.zeros(5, 7)),
        (ops.margin_contrastive_statistics_, s, *pairs, 1.0, True, torch.zeros(2, 5), torch.zeros(2, 7)),
        (ops.margin_contrastive_weights_, s, empty, *pairs, 1.0, False, torch.zeros(2, 5), torch.zeros(2, 7)),
        (ops.batch_all_statistics_, s, *pairs, 1.0, torch.zeros(6, 5), torch.zeros(6, 7)),
        (ops.batch_all_weights_, s, empty, *pairs, 0.5, torch.zeros(6, 5), torch.zeros(6, 7)),
        (ops.semi_hard_statistics_, s.clone(), *pairs, torch.zeros(9, 5), torch.zeros(9, 7), *points),
        (ops.hardest_statistics_, s.clone(), *pairs, torch.zeros(5, 5), torch.zeros(5, 7), *points),
        (ops.batch_all_weights_, s.clone(), empty, *pairs, 0.5, torch.zeros(6, 5), torch.zeros(6, 7), *points, *to),
        (ops.pair_squares, s, target % 5, target % 3),
        (ops.add_differences_, torch.rand_like(s), s, target % 5, target % 3, torch.rand(5)),
        (ops.vector_exp, -torch.rand(9)),
        (ops.vector_log1p, torch.rand(9)),
    ):
        torch.library.opcheck(arguments[0].default, arguments[1:])


def test_opcheck_of_the_checks_of_a_compiled_formula():
    query, keys, own, target, *others = arguments(True, "mean", 0, "eager")[:13]
    for given in ((keys, target, *others, "softmax"), ([], None, *others, "sup_con")):
        inputs = query, given[0], None, *given[1:]
        torch.library.opcheck(torch.ops.replearn_kernels.checked_rows.default, inputs)


@pytest.mark.parametrize("case", ["clip", "chunks", "queue", "own"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic, backend, rng):
    """fullgraph, with the encoders around it: the same values and gradients as without."""
    torch._dynamo.reset()
    weight = torch.randn(8, 6, generator=rng)

    def step(x, y, scale, weight):
        q, k = x @ weight, y @ weight
        if case == "clip":
            return clip_loss(q, k, scale.exp(), normalize=True, backend=backend)
        negatives = {"chunks": None, "queue": k.detach()[:3], "own": q.unsqueeze(1) * k[:4]}[case]
        return info_nce_loss(
            q, k, negatives=negatives, logit_scale=scale.exp(), normalize=True, backend=backend, memory_budget=0
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (12, 20):
        inputs = [torch.randn(n, 8, generator=rng), torch.randn(n, 8, generator=rng), torch.tensor(0.5), weight]
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs]
            loss = function(*leaves)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_compile_module(rng):
    x, y = unit_rows(rng, 9, 4), unit_rows(rng, 9, 4)
    loss = torch.compile(ClipLoss(), fullgraph=True)(x, y, torch.tensor(3.0), output_dict=True)
    torch.testing.assert_close(loss["contrastive_loss"], clip_loss(x, y, 3.0))


def test_compile_with_a_symbolic_float(backend, rng):
    compiled = torch.compile(
        lambda x, s: clip_loss(x, x, s, backend=backend), backend="aot_eager", fullgraph=True, dynamic=True
    )
    x = unit_rows(rng, 9, 4)
    for scale in (1.0, 2.0, 3.5):
        torch.testing.assert_close(compiled(x, scale), clip_loss(x, x, scale))


def test_bad_values_are_found_in_a_compiled_graph(backend):
    compiled = torch.compile(lambda q, t: info_nce_loss(q, q, target=t, backend=backend), fullgraph=True)
    with pytest.raises(ValueError, match="target must be in"):
        compiled(torch.randn(3, 2), torch.tensor([0, 1, 3]))


def test_autocast(backend, rng):
    """Features enter the products in autocast's dtype, also where the two towers differ; logits and loss stay fp32."""
    x, y = unit_rows(rng, 30, 8).requires_grad_(), unit_rows(rng, 30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(x, y.bfloat16(), torch.tensor(20.0), backend=backend)
    assert loss.dtype == torch.float32
    half = x.detach().bfloat16().requires_grad_()
    expected = clip_loss(half, y.bfloat16(), 20.0, backend=backend)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad, half.grad.float())


def test_autocast_leaves_double_alone(backend, rng):
    x, y = (unit_rows(rng, 6, 4, dtype=torch.float64) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(x, y, 2.0, backend=backend), clip_loss(x, y, 2.0, backend=backend))
        assert clip_loss(x, y, 2.0, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "siglip", "n_pair", "arcface"])
def test_compile_of_the_family(name, backend, rng):
    torch._dynamo.reset()
    labels = torch.tensor([0, 0, 1, 2, 1, 0, 3, 3, 4, 0])
    step = {
        "nt_xent": lambda x, y, s: nt_xent_loss(x, y, temperature=s, backend=backend),
        "sup_con": lambda x, y, s: sup_con_loss(x, labels, temperature=s, backend=backend) + y.sum() * 0,
        "siglip": lambda x, y, s: siglip_loss(x, y, s, s - 3, backend=backend),
        "n_pair": lambda x, y, s: n_pair_loss(x * s, y, labels=labels, backend=backend),
        "arcface": lambda x, y, s: arcface_loss(x * s, y, labels, backend=backend),
    }[name]
    compiled = torch.compile(step, fullgraph=True)
    inputs = [unit_rows(rng, 10, 6), unit_rows(rng, 10, 6), torch.tensor(0.7)]
    results = []
    for function in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


COMPILED = {
    "lifted": lifted_structure_loss,
    "hard lifted": lambda x, labels, **k: lifted_structure_loss(x, labels, smooth=False, **k),
    "contrastive": contrastive_loss,
    "batch_hard": lambda x, labels, **k: triplet_margin_loss(x, labels, mining="batch_hard", **k),
    "batch_all": lambda x, labels, **k: triplet_margin_loss(x, labels, mining="batch_all", **k),
    "semi_hard": triplet_margin_loss,
    "semi_hard by anchor": lambda x, labels, **k: triplet_margin_loss(x, labels, reduction="none", **k).sum(),
    "given": lambda x, labels, **k: triplet_margin_loss(x, triplets=(labels, labels + 1, labels + 2), **k),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_over_distances(name, backend, rng):
    """One graph, though how many triplets there are only the data tells: other labels need no other graph."""
    torch._dynamo.reset()
    step = partial(COMPILED[name], backend=backend)
    compiled = torch.compile(lambda x, labels: step(x * 2, labels), fullgraph=True, backend="aot_eager")
    for labels in ([0, 0, 1, 2, 1, 0, 3, 3, 4, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]):
        inputs, results = (torch.randn(10, 6, generator=rng), torch.tensor(labels)), []
        for function in (lambda x, labels: step(x * 2, labels), compiled):
            leaf = inputs[0].clone().requires_grad_()
            loss = function(leaf, inputs[1])
            results.append([loss, *torch.autograd.grad(loss, leaf)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


FORMULAS = {
    "clip": lambda x, labels, s, **k: clip_loss(x, x.roll(1, 0), s, **k),
    "info_nce": lambda x, labels, s, **k: info_nce_loss(x, x.roll(1, 0), target=labels, logit_scale=s, **k),
    "siglip": lambda x, labels, s, **k: siglip_loss(x, x.roll(1, 0), s, s - 3, **k),
    "sup_con": lambda x, labels, s, **k: sup_con_loss(x, labels, temperature=s, **k),
    "arcface": lambda x, labels, s, **k: arcface_loss(x, x.roll(1, 0), labels, scale=3.0, **k) + s,
    "lifted": lambda x, labels, s, **k: lifted_structure_loss(x, labels, **k) * s,
    "batch_hard": lambda x, labels, s, **k: triplet_margin_loss(x, labels, mining="batch_hard", **k) * s,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_compile_of_the_plain_formulas(name, rng):
    """backend="eager" in one graph too: its checks of values are a node of the graph."""
    torch._dynamo.reset()
    x, labels = torch.randn(10, 6, generator=rng), torch.tensor([0, 0, 1, 2, 1, 0, 3, 3, 4, 0])
    step = partial(FORMULAS[name], backend="eager")
    compiler = "inductor" if name == "sup_con" else "aot_eager"  # an exception in a loop of inductor's ends the process
    compiled, results = torch.compile(step, fullgraph=True, backend=compiler), []
    for function in (step, compiled):
        leaves = [x.clone().requires_grad_(), torch.tensor(0.7).requires_grad_()]
        loss = function(leaves[0], labels, leaves[1])
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    if name in ("clip", "info_nce", "siglip", "sup_con"):
        with pytest.raises(ValueError, match="(logit_scale|temperature) must be .*finite"):
            compiled(leaves[0], labels, torch.tensor(torch.nan))
    if name in ("info_nce", "arcface"):
        with pytest.raises(ValueError, match=r"(target|labels) must be in \[0, 10\)"):
            compiled(leaves[0], labels + 6, torch.tensor(0.7))


def test_given_triplets_out_of_range_are_found_in_a_compiled_graph(backend):
    compiled = torch.compile(
        lambda x, n: triplet_margin_loss(x, triplets=(n, n, n), backend=backend), fullgraph=True, backend="aot_eager"
    )
    for wrong in ([0, 1, 3], [0, -1, 2]):
        with pytest.raises((ValueError, RuntimeError), match=r"triplets must be in \[0, 3\)"):
            compiled(torch.randn(3, 2), torch.tensor(wrong))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_one_unit(context, backend, rng):
    x, y = unit_rows(rng, 300, 16).requires_grad_(), unit_rows(rng, 300, 16)
    with context(), count_work() as work:
        loss = clip_loss(x, y, 2.0, backend=backend)
    assert not loss.requires_grad
    assert work.units(300, 300, 16) == 1
    torch.testing.assert_close(loss, clip_loss(x, y, 2.0, backend="eager").detach())


def test_fake_tensors(backend):
    with torch._subclasses.FakeTensorMode():
        x = torch.randn(1000, 64, requires_grad=True)
        loss = info_nce_loss(x, torch.randn(2000, 64), reduction="none", backend=backend)
        assert loss.shape == (1000,)
        loss.sum().backward()
        assert x.grad.shape == (1000, 64)


def test_second_derivative_through_the_dispatcher(backend):
    args = arguments(True, "mean", 0, backend)
    loss = torch.ops.replearn_kernels.pair_loss(*args)[0]
    (gradient,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("memory_budget", [0, 2**20])
def test_upstream_gradients_that_are_dual_or_batched_are_refused(memory_budget, upstream, backend, rng):
    """A tangent would be dropped by the C++ passes, and batches have no rule: the formula takes both."""
    x, y = unit_rows(rng, 20, 8).requires_grad_(), unit_rows(rng, 20, 8)
    for name in (backend, "eager"):
        loss = clip_loss(x, y, 9.0, backend=name, memory_budget=memory_budget)
        plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.tensor(upstream), torch.tensor(2.0))
            if name == "eager":
                (gradient,) = torch.autograd.grad(loss, x, dual, retain_graph=True)
                torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, 2 * plain)
            else:
                with pytest.raises(NotImplementedError, match="forward-mode"):
                    torch.autograd.grad(loss, x, dual, retain_graph=True)
        batch = torch.tensor([1.0, upstream])
        if name == "eager":
            (gradients,) = torch.autograd.grad(loss, x, batch, is_grads_batched=True)
            torch.testing.assert_close(gradients[1], upstream * plain)
        else:
            with pytest.raises(NotImplementedError, match="is_grads_batched"):
                torch.autograd.grad(loss, x, batch, is_grads_batched=True)


@pytest.mark.parametrize("name", ["triplets", "dino", "dino_head", "dispatcher"])
def test_the_other_operators_refuse_such_gradients_too(name, backend):
    x, n = torch.randn(2, 6, 4).requires_grad_(), torch.arange(4)
    w, center = torch.randn(5, 4), torch.zeros(4)
    loss = {
        "triplets": lambda: triplet_margin_loss(x[0], triplets=(n, n + 1, n + 2), backend=backend),
        "dino": lambda: dino_loss(x, x.detach(), center),
        "dino_head": lambda: dino_head_loss(x, x.detach(), w, w, torch.zeros(5)),
        "dispatcher": lambda: torch.ops.replearn_kernels.pair_loss(*arguments(True, "mean", 0, backend))[0],
    }[name]()
    inputs = x if name != "dispatcher" else None
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss.backward(forward_ad.make_dual(torch.tensor(1.0), torch.tensor(2.0)), inputs=inputs, retain_graph=True)
    if name != "dispatcher":
        with pytest.raises(NotImplementedError, match="is_grads_batched"):
            torch.autograd.grad(loss, x, torch.ones(2), is_grads_batched=True)


def test_activation_checkpointing(backend, rng):
    """Activation checkpointing runs the forward pass again, with the same result."""
    x, y = unit_rows(rng, 20, 8).requires_grad_(), unit_rows(rng, 20, 8)
    plain = torch.autograd.grad(clip_loss(x, y, 9.0, backend=backend), x)[0]
    loss = torch.utils.checkpoint.checkpoint(
        lambda x, y: clip_loss(x, y, 9.0, backend=backend), x, y, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)
