"""How losses are declared: what an author writes, what is derived, and what is said of what cannot be declared."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from declared_cases import CASES, Clip, Contrastive, SigLip, Squares, inputs_of
from metric_cases import LABELS, assert_same
from torch._dynamo.testing import CompileCounterWithBackend

from replearn_kernels import circle_loss, count_work, hard_negative_loss
from replearn_kernels.declare import (
    PairLoss,
    fuse,
    logsumexp,
    sqrt,
    total,
    where,
)
from replearn_kernels.declare.definition import definition_of
from replearn_kernels.declare.objective import objective_of
from replearn_kernels.declare.pair_loss import Facts
from replearn_kernels.declare.torch_source import functions_of

EIGHTS = LABELS["eights"]


# -- definitions ----------------------------------------------------------------------------------------------------


LEARNED = torch.ones((), requires_grad=True)


def declared(terms, loss=None, **attributes):
    """An instance of a loss with these terms, its fields a = 0.5 (a parameter) and flag = True (an option)."""
    members = {"terms": terms, "__annotations__": {"a": "float", "flag": "bool"}, "a": 0.5, "flag": True, **attributes}
    if loss is not None:
        members["loss"] = loss
    return dataclass(frozen=True)(type("Declared", (PairLoss,), members))()


def one(expression):
    """Terms of one total."""
    return lambda self, s, pair: {"t": total(expression(self, s, pair))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: declared(one(lambda self, s, p: s if s > 0 else 0)), r"\(s > 0\) has no truth value.*where\("),
        (lambda: declared(one(lambda self, s, p: s if self.a > 0 else 0)), "must be a bool, int or str field"),
        (lambda: declared(one(lambda self, s, p: math.exp(s))), "s is no number"),
        (lambda: declared(one(lambda self, s, p: s * torch.ones(3))), r"tensor of shape \(3,\).*float field"),
        (lambda: declared(one(lambda self, s, p: torch.ones(3) * s)), r"tensor of shape \(3,\).*float field"),
        (lambda: declared(one(lambda self, s, p: torch.sin(s))), "terms.. cannot take torch's sin: use"),
        (lambda: declared(one(lambda self, s, p: s.mul_(2))), "no method 'mul_': in-place operations change"),
        (lambda: declared(one(lambda self, s, p: s.tanh())), "no method 'tanh': use"),
        (lambda: declared(one(lambda self, s, p: s**1.5)), r"\*\* takes the exponents"),
        (lambda: declared(one(lambda self, s, p: s / 0)), "divided by 0"),
        (lambda: declared(one(lambda self, s, p: p.same * s)), r"takes numbers, got the condition same"),
        (lambda: declared(one(lambda self, s, p: where(s, 1, 0))), "where takes conditions"),
        (lambda: declared(one(lambda self, s, p: s & p.same)), "& takes conditions"),
        (lambda: declared(one(lambda self, s, p: where(p.same & (self.a > 0), s, 0))), "is the same for all pairs"),
        (lambda: declared(lambda self, s, p: {"t": total(s, where=sqrt(2) < 1)}), "takes conditions|holds for no pair"),
        (lambda: declared(one(lambda self, s, p: total(s))), "a total is taken over.*return it as a term"),
        (lambda: declared(one(lambda self, s, p: s - logsumexp(s))), "a logsumexp is taken over.*return it as a term"),
        (lambda: declared(lambda self, s, p: {"t": total(s) / total(1)}), "a total is taken over.*return it as a term"),
        (lambda: declared(lambda self, s, p: {"t": torch.exp(total(s))}), "a total is taken over.*return it as a term"),
        (lambda: declared(lambda self, s, p: {"t": total(s).mean()}), "a total is taken over.*return it as a term"),
        (lambda: declared(one(lambda self, s, p: where(p.same and s > 0, s, 0))), "join conditions by & . ~"),
        (lambda: declared(one(lambda self, s, p: max(s, 0))), r"maximum\(a, b\)"),
        (lambda: declared(one(lambda self, s, p: s.exp())), r"no method 'exp': write exp\(x\)"),
        (lambda: declared(one(lambda self, s, p: s.max())), r"no method 'max': .* a term of its own, largest\(x\)"),
        (lambda: declared(one(lambda self, s, p: self.a.item() * s)), "no method 'item': it stands for the value"),
        (lambda: declared(one(lambda self, s, p: s**self.a)), r"takes the exponents 1, 2, .* got a: write exp"),
        (lambda: declared(one(lambda self, s, p: s[0])), "one value of one pair, not a sequence"),
        (lambda: declared(one(lambda self, s, p: where(s == 1, s, 0))), "conditions are made of >"),
        (lambda: declared(one(lambda self, s, p: where(p.positive, s, 0))), "pair has no 'positive': there are"),
        (lambda: declared(one(lambda self, s, p: where(torch.ones(3) > 0, s, 0))), r"tensor of shape \(3,\)"),
        (lambda: declared(one(lambda self, s, p: s), scale=True), "did you mean scaled"),
        (lambda: declared(one(lambda self, s, p: s), similarity="distance", batch=True, scaled=True), "no logit_scale"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row, column: row.t), r"define loss\(self, row\)"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t, symmetric=True), "loss.self, row, col"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t - row.t[0]), "mixes rows"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t / row.t.mean().detach()), "mixes rows"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t.cumsum(0)), "mixes rows"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t.detach()), "no gradient in any term"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t * LEARNED), "its float fields"),
        (lambda: declared(lambda self, s, p: {"t": s}), r"t must be total\(...\), logsumexp"),
        (lambda: declared(lambda self, s, p: total(s)), "must return a dict of terms"),
        (lambda: declared(lambda self, s, p: {}), "must return a dict of terms"),
        (lambda: declared(lambda self, s, p: {"a b": total(s)}), "needs a name of its own, an ASCII identifier"),
        (lambda: declared(lambda self, s, p: {"t": total(s, where=True)}), "takes conditions"),
        (lambda: declared(one(lambda self, s, p: where(p.target, s, 0)), batch=True), "rows of a batch have no target"),
        (lambda: declared(one(lambda self, s, p: s), similarity="euclidean"), "similarity must be one of product"),
        (lambda: declared(one(lambda self, s, p: s), similarity="distance"), "distances are those of a batch"),
        (lambda: declared(one(lambda self, s, p: s), symmetric=True), r"define loss\(self, row, column\)"),
        (
            lambda: declared(one(lambda self, s, p: s), lambda self, row, c: row.t, symmetric=True, batch=True),
            "columns of a batch are its rows",
        ),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.u), "no term or value 'u': there are t"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.logit_scale), "or value 'logit_scale'"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t.mean()), "one value for every row"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: 3), "must return a tensor"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t > 0), "floating-point losses"),
        (lambda: declared(one(lambda self, s, p: s), lambda self, row: row.t / row.t.sum()), "mixes rows"),
        (lambda: declared(one(lambda self, s, p: s), counted=lambda self, row: row.t.sum()), "counted must return one"),
        (lambda: PairLoss(), "must be a frozen dataclass"),
        (lambda: dataclass(frozen=True)(type("Bad", (PairLoss,), {}))(), "must define terms"),
        (lambda: dataclass(type("Bad", (PairLoss,), {}))(), "must be a frozen dataclass"),
        (lambda: Clip, r"takes an instance of a PairLoss.*call fuse\(Clip\(\)\)"),
        (lambda: torch.nn.Linear(2, 2), "takes an instance of a PairLoss"),
        (lambda: Contrastive(torch.ones(3)), r"Contrastive.margin must be a float or a tensor of one.*\(3,\)"),
        (lambda: Contrastive(torch.ones((), dtype=torch.int64)), "Contrastive.margin must be floating-point"),
        (lambda: Contrastive(torch.tensor(math.nan)), "Contrastive.margin must be finite"),
        (lambda: Contrastive(math.inf), "Contrastive.margin must be finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_declared_is_said(make, message):
    with pytest.raises((TypeError, ValueError, AttributeError, ZeroDivisionError, NotImplementedError), match=message):
        fuse(make())


def test_fields_are_numbers_or_options():
    with pytest.raises(TypeError, match="margins must be annotated float, float . Tensor, bool, int or str, got list"):
        members = {"__annotations__": {"margins": list}, "margins": None}
        fuse(dataclass(frozen=True)(type("Bad", (PairLoss,), members))())


def test_values_of_parameters_change_no_structure():
    assert objective_of(Contrastive(0.5)) is objective_of(Contrastive(2))
    assert objective_of(Contrastive(0.5)) is not objective_of(Contrastive(0.5, squared=False))
    assert not objective_of(Contrastive()).needs_statistics
    assert not objective_of(SigLip()).needs_statistics
    assert objective_of(Clip()).needs_statistics


def test_a_class_that_is_defined_again_is_another_loss():
    """As in a notebook, whose second try must not find the first one's kernels."""
    first, second = (declared(one(lambda self, s, p: s), lambda self, row: _FACTOR[0] * row.t) for _ in range(2))
    assert objective_of(first).name != objective_of(second).name


_FACTOR = [2.0]


def test_work_is_counted():
    """One sweep, or two; half of the square for a batch."""
    x, y, labels, scale = (t.requires_grad_() if t.is_floating_point() else t for t in inputs_of(64, 8, EIGHTS(64)))
    unit = 2 * 64 * 64 * 8
    for call, least in (
        (lambda: fuse(SigLip(), memory_budget=0)(x, y, scale), 3 * unit),
        (lambda: fuse(Clip(), memory_budget=0)(x, y, scale), 4 * unit),
        (lambda: fuse(Contrastive(), memory_budget=0)(x, labels), 2 * unit),
    ):
        with count_work() as work:
            call().backward()
        assert least <= work.flops <= 1.3 * least


def test_text_of_the_torch_functions():
    """Distances are negative for the engine, and positive for the author."""
    functions = functions_of(definition_of(Contrastive, (False,)))
    s = torch.tensor([[-0.5, -2.0]], dtype=torch.float64)
    same = torch.tensor([[True, False]])
    rests, over, slopes = functions.values_and_slopes(s, 1.0, 1.3, True, False, same, ~same)
    assert [functions.factors(None, 1.0, 1.3), functions.offsets(None, 1.0, 1.3)] == [(-1.0, 1.0), (0.0, 0.0)]
    assert [r.tolist() for r in rests] == [[[-0.5, -2.0]], [[0.8, 0.0]]]
    assert over[0] is same
    assert slopes[0] == -1
    assert slopes[1].tolist() == [[1.0, 0.0]]


# -- modules --------------------------------------------------------------------------------------------------------


def test_a_module_as_any_other():
    fused = fuse(Contrastive(0.7), reduction="sum")
    assert repr(fused) == "FusedBatchLoss(loss=Contrastive(margin=0.7, squared=True), reduction='sum', normalize=False)"
    x, _, labels, _ = inputs_of(12, 4, LABELS["pairs"](12))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.double()):
        assert torch.equal(other(x, labels), fused(x, labels))
    assert not list(fused.parameters())


def test_options_are_checked():
    for options, message in (
        ({"reduction": "max"}, "reduction must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"memory_budget": -1}, "memory_budget must be at least 0"),
        ({"normalize": 1}, "normalize must be a bool"),
        ({"strategy": "tree"}, "strategy must be one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fuse(Clip(), **options)


def test_calls_are_checked():
    x, y, labels, scale = inputs_of(6, 3, LABELS["pairs"](6))
    for call, message in (
        (lambda: fuse(Contrastive())(x, labels, 2.0), "Contrastive takes no logit_scale"),
        (lambda: fuse(Contrastive())(x), "labels are needed: Contrastive tells"),
        (lambda: fuse(Clip())(x, y[:4]), "target is needed"),
        (lambda: fuse(SigLip())(x, y, query_group=labels), "must be given together"),
        (lambda: fuse(Clip())(x, y, temperature=0.1), "takes no temperature"),
        (lambda: fuse(Clip())(x, y, math.nan), "logit_scale must be finite"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_source_is_shown():
    text = fuse(Clip()).source("triton")
    assert "def weights(s, row, column, inputs):" in text
    compile(text, "shown", "exec")
    assert "def values_and_slopes(" in fuse(Clip()).source("torch")
    assert "struct Loss {" in fuse(Clip()).source("cpp")
    with pytest.raises(ValueError, match="backend must be one of"):
        fuse(Clip()).source("eager")


def test_eager_has_second_derivatives_and_the_others_refuse_them():
    x, _, labels, _ = inputs_of(8, 3, LABELS["pairs"](8))
    for backend in ("eager", "torch"):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(fuse(Contrastive(), backend=backend)(leaf, labels), leaf, create_graph=True)
        if backend == "eager":
            gradient.square().sum().backward()
            assert leaf.grad.isfinite().all()
        else:
            with pytest.raises(NotImplementedError, match="differentiable once"):
                gradient.square().sum().backward()


# -- torch.compile --------------------------------------------------------------------------------------------------


FUSED_CLIP, FUSED_SQUARES, FUSED_CONTRASTIVE = fuse(Clip()), fuse(Squares()), fuse(Contrastive())
COMPILED = {
    "circle": CASES["circle"].call,
    "debiased": CASES["debiased"].call,
    "toy clip": lambda x, y, labels, scale: FUSED_CLIP(x, y, scale),
    "toy contrastive": lambda x, y, labels, scale: FUSED_CONTRASTIVE(x, labels),
    "toy squares": lambda x, y, labels, scale: FUSED_SQUARES(x, labels),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name):
    loss = COMPILED[name]

    def values(call, n):
        x, y, labels, scale = (t.clone() for t in inputs_of(n, 5, LABELS["pairs"](n)))
        leaves = [x.requires_grad_(), y.requires_grad_(), scale.requires_grad_()]
        value = call(x, y, labels, scale)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return [value.detach(), *gradients]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    graphs = []
    for n in (10, 14, 33, 80):
        assert_same(values(compiled, n), values(loss, n), rtol=1e-10)
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[1:2] * 3  # one for all sizes from the second on


def test_parameters_and_options_of_a_compiled_call():
    """Other numbers are other results; another option is another loss."""
    x, y, labels, _ = inputs_of(12, 4, LABELS["pairs"](12))

    fused = {squared: fuse(Contrastive(0.7, squared)) for squared in (True, False)}

    def step(x, y, labels, margin, squared):
        contrastive = fused[squared](x, labels)
        return contrastive + circle_loss(x, labels, margin=margin) + hard_negative_loss(x, y, beta=margin)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for margin in (0.3, 0.5, 0.8):
        for squared in (True, False):
            torch.testing.assert_close(compiled(x, y, labels, margin, squared), step(x, y, labels, margin, squared))


def test_facts_are_named():
    assert repr(Facts.same & ~Facts.target) == "(same & not(target))"
