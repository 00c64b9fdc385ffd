"""Parameters of declared losses that are tensors: how modules hold them, what calls make of them, what is refused.

Values and gradients are those of every case in declared_cases.py.
"""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from accuracy import assert_as_accurate
from declared_cases import CASES, inputs_of, value_and_gradients
from declared_toys import Contrastive
from learned_toys import Bias, Columns, Steep
from metric_cases import LABELS, small_batch_tiles
from torch import nn

from replearn_kernels import count_work
from replearn_kernels.declare import PairLoss, fuse, largest, logsumexp, softplus, total
from replearn_kernels.declare.objective import Declared, objective_of
from replearn_kernels.engine import plan

BACKENDS = ["eager", "torch", "cpp"]


def rows(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x, _, labels, _ = inputs_of(n, 4, LABELS["pairs"](n), dtype=torch.float32)
    return x.requires_grad_(), labels


def learned(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values]


def test_a_module_holds_its_parameters():
    """They are found by optimizers, saved, copied and moved with the module, and loss and module see the same."""
    fused = fuse(Steep(nn.Parameter(torch.tensor(0.3)), gamma=4.0))
    assert [name for name, _ in fused.named_parameters()] == ["learned.margin"]
    assert list(fused.state_dict()) == ["learned.margin"]
    x, labels = rows()
    before = fused(x, labels)
    before.backward()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).double().float()):
        assert other.learned["margin"] is not fused.learned["margin"]
        assert torch.equal(other(x, labels), before)
        with torch.no_grad():
            other.learned["margin"].add_(0.1)
        assert other(x, labels) != before
        assert other.loss.margin is other.learned["margin"]
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    assert fused(x, labels) < before
    fused.load_state_dict({"learned.margin": torch.tensor(0.3)})
    assert torch.equal(fused(x, labels), before)
    assert "margin=Parameter" in repr(fused)


def test_another_loss_in_the_module_brings_its_own():
    fused, (x, labels) = fuse(Contrastive(nn.Parameter(torch.tensor(1.0)))), rows()
    expected = fuse(Contrastive(0.5))(x, labels)
    fused.loss = replace(fused.loss, margin=0.5)
    assert not list(fused.parameters())
    assert torch.equal(fused(x, labels), expected)
    fused.loss = Contrastive(nn.Parameter(torch.tensor(0.5)))
    assert len(list(fused.parameters())) == 1
    assert torch.equal(fused(x, labels), expected)
    assert "learned" not in repr(fuse(Contrastive(0.5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_without_a_gradient_is_a_number(backend):
    """It costs nothing: the loss is the one that numbers make."""
    x, labels = rows()
    plain, (margin,) = objective_of(Contrastive(1.0)), learned(1.0)
    assert objective_of(Contrastive(torch.tensor([1.0]))) is plain
    assert objective_of(Contrastive(margin)) is not plain
    with torch.no_grad():
        assert objective_of(Contrastive(margin)) is plain
        assert torch.equal(
            fuse(Contrastive(margin), backend=backend)(x, labels), fuse(Contrastive(1.0), backend=backend)(x, labels)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [Contrastive, Steep, lambda margin: Steep(gamma=margin)])
def test_frozen_rows(loss, reduction, backend):
    """The gradient of the parameter alone is the same, and no product is there for those of the rows."""
    x, labels = rows()
    weights, gradients = torch.linspace(1, 2, 12), []
    for features in (x, x.detach()):
        (margin,) = learned(1.3)
        result = fuse(loss(margin), backend=backend, reduction=reduction)(features, labels)
        gradients += torch.autograd.grad((result * weights).sum(), margin)
    torch.testing.assert_close(*gradients)
    if backend != "eager" and loss is not Contrastive:
        with count_work() as work:
            fuse(loss(margin), backend=backend)(x.detach(), labels).backward()
        assert work.units(12, 12, 4) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_of_the_formula_alone(backend):
    @dataclass(frozen=True)
    class Weighted(PairLoss):
        weight: float | torch.Tensor = 1.0

        batch = True

        def terms(self, s, pair):
            return {"t": total(s**2)}

        def loss(self, row):
            return row.t * self.weight**2

    x, _ = rows()
    (weight,) = learned(3.0)
    loss = fuse(Weighted(weight), backend=backend, reduction="sum")(x)
    assert torch.allclose(torch.autograd.grad(loss, weight)[0], 2 * loss / 3)


def test_a_parameter_that_no_term_reads():
    @dataclass(frozen=True)
    class Idle(PairLoss):
        idle: float = 1.0

        batch = True

        def terms(self, s, pair):
            return {"t": total(s**2, where=s > self.idle)}

    (idle,) = learned(0.1)
    fuse(Idle(idle))(rows()[0]).backward()
    assert idle.grad == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if "learned" in name])
def test_as_accurate_as_eager(name, dtype):
    inputs = inputs_of(257, 40, LABELS["eights"](257), dtype=dtype)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact = value_and_gradients(CASES[name].call, wide, CASES[name], backend="eager")
    eager = value_and_gradients(CASES[name].call, inputs, CASES[name], backend="eager")
    for backend in ("torch", "cpp"):
        ours = value_and_gradients(CASES[name].call, inputs, CASES[name], backend=backend)
        assert_as_accurate(ours, eager, exact)


@pytest.mark.parametrize("kind", ["0-d", "[1]", "fp64", "bf16", "expanded"])
def test_any_tensor_of_one_element(kind):
    """Its gradient has its shape and dtype, whatever the features'."""
    value = torch.tensor(1.25, dtype={"fp64": torch.float64, "bf16": torch.bfloat16}.get(kind))
    value = value.expand(1) if kind == "expanded" else value.reshape(1) if kind == "[1]" else value
    margin = value.clone().requires_grad_()
    x, labels = rows()
    expected = fuse(Contrastive(1.25))(x, labels)
    loss = fuse(Contrastive(margin))(x, labels)
    assert torch.equal(loss, expected)
    loss.backward()
    assert margin.grad.shape == margin.shape
    assert margin.grad.dtype == margin.dtype
    assert margin.grad != 0


def test_gradients_reach_what_a_parameter_is_made_of():
    raw, (x, labels) = torch.zeros((), requires_grad=True), rows()
    fuse(Contrastive(nn.functional.softplus(raw) + 0.5))(x, labels).backward()
    (margin,) = learned(math.log(2) + 0.5)
    fuse(Contrastive(margin))(x, labels).backward()
    torch.testing.assert_close(raw.grad, margin.grad / 2)


@pytest.mark.parametrize("wrong, message", [
    (math.nan, "Contrastive.margin must be finite in torch.float32, got nan"),
    (1e300, "Contrastive.margin must be finite in torch.float32"),
])  # fmt: skip
def test_values_that_come_later_are_checked(wrong, message):
    fused, (x, labels) = fuse(Contrastive(*learned(1.0))), rows()
    fused.loss = Contrastive(torch.tensor(wrong, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ValueError, match=message):
        fused(x, labels)
    with pytest.raises(ValueError, match=r"Contrastive.margin must be .* one element.*\(2,\)"):
        fused.loss = Contrastive(torch.ones(2, requires_grad=True))
    for not_finite in (math.nan, torch.tensor(math.inf)):
        fused.loss = Contrastive(not_finite)
        with pytest.raises(ValueError, match="Contrastive.margin must be finite, got"):
            fused(x, labels)
    fused.loss = Contrastive(torch.ones((), device="meta", requires_grad=True))
    with pytest.raises(ValueError, match="Contrastive.margin must be on the features' device"):
        fused(x, labels)


def test_names_that_a_module_has_already():
    @dataclass(frozen=True)
    class Half(PairLoss):
        half: float | torch.Tensor = 0.5
        training: float | torch.Tensor = 0.5

        batch = True

        def terms(self, s, pair):
            return {"t": total(self.half * s + self.training * s**2)}

    for given in ({"half": nn.Parameter(torch.ones(()))}, {"training": nn.Parameter(torch.ones(()))}):
        with pytest.raises(ValueError, match=f"Half.{next(iter(given))}: torch's modules have another"):
            fuse(Half(**given))
    (half,) = learned(0.5)
    fuse(Half(half, half))(rows()[0]).backward()
    assert half.grad != 0


def test_terms_whose_names_come_to_the_same():
    @dataclass(frozen=True)
    class Alike(PairLoss):
        c: float | torch.Tensor
        b_by_c: float | torch.Tensor

        batch = True

        def terms(self, s, pair):
            return {"a_by_b": total(softplus(self.c * s)), "a": total(softplus(s * s * self.b_by_c))}

        def loss(self, row):
            return row.a_by_b + row.a

    x, results = rows()[0].detach().double(), []
    for backend in BACKENDS:
        given = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 1.0)]
        results.append(torch.autograd.grad(fuse(Alike(*given), backend=backend)(x), given))
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0])
    assert abs(results[0][0] - results[0][1]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_has_no_gradient_in_a_parameter(backend):
    @dataclass(frozen=True)
    class Weighed(PairLoss):
        weight: float | torch.Tensor

        batch = True

        def terms(self, s, pair):
            return {"a": logsumexp(self.weight * s)}

        def loss(self, row):
            return row.a * 1.0

        def counted(self, row):
            return torch.ones_like(row.a) * self.weight

    (weight,), x = learned(2.0), rows()[0].detach()
    (mean,) = torch.autograd.grad(fuse(Weighed(weight), backend=backend)(x), weight)
    (whole,) = torch.autograd.grad(fuse(Weighed(weight), backend=backend, reduction="sum")(x), weight)
    torch.testing.assert_close(mean, whole / 24)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_chunks_of_rows(backend, monkeypatch):
    """One after the other, in the forward call; their gradients in the parameters add up."""
    monkeypatch.setattr(plan, "_CHUNK_BYTES", (2000, 2000))
    monkeypatch.setattr(plan, "_MIN_CHUNK_ROWS", 1)
    combined = mock.Mock(side_effect=Declared._coefficients, autospec=True)
    monkeypatch.setattr(Declared, "_coefficients", lambda *given: combined(*given))
    generator, results = torch.Generator().manual_seed(0), []
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (50, 20))
    with small_batch_tiles(16):  # and no plan that was made before
        for name in (backend, "eager"):
            given = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 2.0)]
            loss = fuse(Rows(*given), backend=name, memory_budget=2000)(x, y, target=torch.arange(50) % 20)
            results.append(torch.autograd.grad(loss, given))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    assert combined.call_count > 2


@dataclass(frozen=True)
class Rows(PairLoss):
    margin: float | torch.Tensor
    gamma: float | torch.Tensor

    def terms(self, s, pair):
        return {"all": logsumexp(self.gamma * s + self.margin * s**2), "most": largest(self.margin * s - s**2)}

    def loss(self, row):
        return row.all - row.most * self.margin


def test_what_would_never_be_read_is_refused():
    fused = fuse(Contrastive(0.5))
    with pytest.raises(AttributeError, match="margin is a field of the loss: write module.loss = dataclasses.replace"):
        fused.margin = nn.Parameter(torch.ones(()))
    fused.anything = nn.Linear(1, 1)  # of the user's own
    assert len(list(fused.parameters())) == 2
    for wrong in ("0.5", None, [1.0], True):
        with pytest.raises(TypeError, match="Contrastive.margin must be a number or a tensor of one element"):
            fused.loss = Contrastive(wrong)
        with pytest.raises(TypeError, match="Contrastive.margin must be a number or a tensor of one element"):
            fuse(Contrastive(wrong))


def test_second_derivatives_are_refused_but_by_the_formula():
    (margin,), (x, labels) = learned(1.0), rows()
    for backend in ("eager", "cpp"):
        loss = fuse(Contrastive(margin), backend=backend)(x, labels)
        (gradient,) = torch.autograd.grad(loss, margin, create_graph=True)
        if backend == "eager":
            assert torch.autograd.grad(gradient, margin)[0] > 0
        else:
            with pytest.raises(NotImplementedError, match="differentiable once"):
                gradient.backward()


def test_one_graph_for_all_sizes():
    fused = fuse(Steep(nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([4.0]))))
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    for n in (12, 15, 9):
        x, labels = rows(n)
        ours, plain = (
            torch.autograd.grad(module(x, labels), [x, *fused.parameters()]) for module in (compiled, fused)
        )
        torch.testing.assert_close(ours, plain)


def test_the_operator_of_what_learns():
    x, y, labels, scale = inputs_of(6, 4, torch.arange(6) % 2)
    given = {"query_group": labels, "key_group": labels}
    for loss, options in ((Bias(*learned(1.0)), given), (Columns(*learned(1.0, 2.0)), {})):
        name, two = objective_of(loss).name, len(vars(loss)) == 2
        values = [torch.rand(1, 6, dtype=torch.float64) if two else None for _ in range(2)]
        features = [t.clone().requires_grad_() for t in (x, y, scale)]
        parameters = torch.tensor([0.5, 1.0][: 1 + two], dtype=torch.float64, requires_grad=True)
        groups = [labels, labels] if options else [None, None]
        arguments = features[0], [features[1]], None, None, *groups, features[2], None, *values, None, None, parameters
        config = name, [float(bool(options)), *[0.0] * (1 + two)], "mean", "torch", 2**20, [1] * 4, False
        torch.library.opcheck(torch.ops.replearn_kernels.pair_loss.default, (*arguments, *config))
