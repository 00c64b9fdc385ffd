"""Declarations at the edges: what a class can hold, large expressions, other processes, one loss beside another."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from declared_cases import Clip, Contrastive, Everything, Margin, inputs_of
from metric_cases import LABELS

import replearn_kernels as rk
from replearn_kernels.declare import PairLoss, exp, fuse, logsumexp, relu, sigmoid, total, where
from replearn_kernels.declare.objective import objective_of

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> str:
    """What a new process prints."""
    env = os.environ | environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


def rows(n: int = 12, d: int = 4):
    x, y, labels, scale = inputs_of(n, d, LABELS["pairs"](n))
    return x, y, labels, scale


# -- what a class holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnFacts(PairLoss):
    batch = True

    def terms(self, s, pair):
        pair.other = pair.other & (s > 0.5)
        return {"t": total(s, where=pair.other)}


def test_what_is_written_to_a_pair_stays_with_the_loss():
    x, _, labels, _ = rows()
    before = fuse(Contrastive(), backend="eager")(x, labels), rk.circle_loss(x, labels)
    fused = fuse(OwnFacts())(x, labels)
    s = x @ x.t()
    assert torch.allclose(fused, torch.where((labels[:, None] != labels) & (s > 0.5), s, 0).sum() / len(x))
    assert (fuse(Contrastive(), backend="eager")(x, labels), rk.circle_loss(x, labels)) == before


@pytest.mark.parametrize("name", ["row_values", "column_values", "terms", "loss", "counted"])
def test_names_and_formulas_are_no_fields(name):
    members = {"__annotations__": {name: "bool"}, name: True}
    with pytest.raises(TypeError, match=f"{name} cannot be a field: write {name} = ... without a type"):
        fuse(dataclass(frozen=True)(type("Fields", (PairLoss,), members))())


@dataclass(frozen=True)
class Chosen(PairLoss):
    """What is compared, as its object says."""

    batch: bool
    similarity: str
    scaled: bool = False
    guide: str = ""

    def terms(self, s, pair):
        return {"t": total((pair.guide - s if self.guide else s) ** 2, where=pair.every)}


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_settings_can_be_fields(backend):
    x, y, labels, _ = rows()
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).t()
    for similarity, s in (("product", x @ x.t()), ("cosine", cosines), ("distance", torch.cdist(x, x))):
        ours = fuse(Chosen(True, similarity), backend=backend, reduction="none")(x)
        torch.testing.assert_close(ours, (s.fill_diagonal_(0) ** 2).sum(1), rtol=1e-5, atol=1e-5)
    ours = fuse(Chosen(False, "product", scaled=True), backend=backend, reduction="sum")(x, y, 3.0)
    torch.testing.assert_close(ours, ((3 * x @ y.t()) ** 2).sum())
    ours = fuse(Chosen(False, "product", guide="product"), backend=backend, reduction="sum")(
        x, y, row_guide=y, column_guide=x
    )
    torch.testing.assert_close(ours, ((y @ x.t() - x @ y.t()) ** 2).sum())


@pytest.mark.parametrize(("loss", "message"), [
    (Chosen(False, "distance"), "distances are those of a batch"),
    (Chosen(True, "distance", scaled=True), "distances take no logit_scale"),
    (Chosen(True, "near"), "similarity must be one of product, cosine, distance, squared_distance, got 'near'"),
    (Chosen(True, "product", guide="own"), 'guide must be "product" or "cosine"'),
    (Chosen(1, "product"), "batch must be bool, got 1"),
])  # fmt: skip
def test_settings_that_are_fields_are_checked(loss, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fuse(loss)


@dataclass(frozen=True)
class Doubled(PairLoss):
    margin: float = 1.0

    batch = True

    def __post_init__(self):
        object.__setattr__(self, "margin", 2 * self.margin)

    def terms(self, s, pair):
        return {"t": logsumexp(s)}

    def loss(self, row):
        return row.t * self.margin


def test_post_init_runs_once():
    x, _, labels, _ = rows()
    assert torch.allclose(fuse(Doubled())(x, labels), fuse(Doubled(), backend="eager")(x, labels))


def test_names_hold_no_code():
    terms = {"terms": lambda self, s, pair: {"t": total(s)}}
    for name in ('A"""\nimport os', "A b", "\u00b5"):
        with pytest.raises(TypeError, match="must be an ASCII identifier"):
            fuse(dataclass(frozen=True)(type(name, (PairLoss,), terms))())


@dataclass(frozen=True)
class Option(PairLoss):
    squared: bool = True
    power: int = 2
    kind: str = "plain"

    def terms(self, s, pair):
        return {"t": total(s**self.power if self.squared else s)}

    def loss(self, row):
        return row.t if self.kind in {"plain", "simple", "raw"} else 2 * row.t


@pytest.mark.parametrize("wrong", [{"squared": 1}, {"power": 2.0}, {"power": True}, {"kind": ["plain"]}])
def test_options_have_their_types(wrong):
    with pytest.raises(TypeError, match=f"Option.{next(iter(wrong))} must be"):
        fuse(Option(**wrong))


# -- the mean -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted(PairLoss):
    weight: float = 1.0

    def terms(self, s, pair):
        return {"t": logsumexp(s), "w": total(self.weight * sigmoid(s), where=pair.target)}

    def loss(self, row):
        return row.t

    def counted(self, row):
        return row.w


@pytest.mark.parametrize("weight", [1.0, 0.001])
def test_a_count_may_be_small_and_has_no_gradient(weight):
    x, y, _, _ = rows()
    results = []
    for backend in ("eager", "torch"):
        leaf = x.clone().requires_grad_()
        loss = fuse(Weighted(weight), backend=backend)(leaf, y)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    count = weight * (x * y).sum(1).sigmoid().sum()
    expected = (x @ y.t()).logsumexp(1).sum() / count
    for loss, gradient in results:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, (x @ y.t()).softmax(1) @ y / count)


@dataclass(frozen=True)
class Dropped(PairLoss):
    batch = True

    def terms(self, s, pair):
        return {"t": logsumexp(s, where=pair.same)}

    def loss(self, row):
        return row.t[row.t > -math.inf]


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_rows_are_not_dropped(backend):
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"Dropped.loss must return one value for every row.*got \(4,\) for N = 5"):
        fuse(Dropped(), backend=backend)(x, torch.tensor([0, 0, 1, 1, 2]))


@dataclass(frozen=True)
class OfGroups(PairLoss):
    def terms(self, s, pair):
        return {"t": total(s * s, where=pair.same)}


def test_fewer_keys_than_queries_by_group():
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    of_x, of_y = torch.arange(9) % 3, torch.arange(4) % 3
    expected = torch.where(of_x[:, None] == of_y, (x @ y.t()).square(), 0).sum() / 9
    for backend in ("eager", "torch"):
        torch.testing.assert_close(fuse(OfGroups(), backend=backend)(x, y, query_group=of_x, key_group=of_y), expected)


# -- large expressions ----------------------------------------------------------------------------------------------


def iterated(s, times):
    for _ in range(times):
        s = 3.5 * s * (1 - s)
    return s


@dataclass(frozen=True)
class Long(PairLoss):
    kind: str = "shared"

    def terms(self, s, pair):
        if self.kind == "shared":  # 2^40 operations, were they written out
            return {"t": total(iterated(sigmoid(s), 40))}
        if self.kind == "sum":
            return {"t": total(sum(where(s > k / 300, s, k) for k in range(300)))}
        for _ in range(3000):
            s = relu(s) + 1
        return {"t": total(s)}


def test_shared_expressions_are_computed_once():
    x, y, _, _ = rows()
    expected = iterated((x @ y.t()).sigmoid(), 40).sum() / len(x)
    torch.testing.assert_close(fuse(Long())(x, y), expected)


def test_long_sums_and_what_is_too_deep():
    x, y, _, _ = rows()
    s = x @ y.t()
    expected = sum(torch.where(s > k / 300, s, k) for k in range(300)).sum() / len(x)
    torch.testing.assert_close(fuse(Long("sum"))(x, y), expected)
    compile(fuse(Long("sum")).source("triton"), "long", "exec")
    with pytest.raises(ValueError, match="nests some hundred operations"):
        fuse(Long("deep"))


def test_a_number_that_is_not_finite():
    for function in (lambda: exp(1000), lambda: where(exp(1000) > 0, 1, 0)):
        with pytest.raises(ValueError, match=r"exp\(1000\) is not finite"):
            function()


# -- other processes, other losses ----------------------------------------------------------------------------------


def test_names_are_the_same_in_every_process():
    """Ranks compare them; the order of a set differs between processes."""
    code = "import declared_cases as c, test_declare_edges as e\n"
    code += "from replearn_kernels.declare.objective import objective_of\n"
    code += "print(*(objective_of(loss).name for loss in (c.Clip(), c.Contrastive(), c.Everything(), e.Option())))"
    names = [objective_of(loss).name for loss in (Clip(), Contrastive(), Everything(), Option())]
    assert [python(code, PYTHONHASHSEED=seed).split() for seed in "12"] == [names, names]


class Circle(torch.nn.Module):
    def forward(self, x, labels):
        return rk.circle_loss(x, labels)


def test_an_exported_program_runs_in_another_process(tmp_path):
    x, _, labels, _ = rows()
    torch.export.save(torch.export.export(Circle(), (x, labels)), tmp_path / "circle.pt2")
    torch.save((x, labels), tmp_path / "inputs.pt")
    code = f"import torch, replearn_kernels; program = torch.export.load({str(tmp_path / 'circle.pt2')!r}).module()\n"
    code += f"print(program(*torch.load({str(tmp_path / 'inputs.pt')!r})).item())"
    assert float(python(code)) == Circle()(x, labels).item()


def test_a_program_without_its_loss_says_so():
    scale = torch.ones(())
    with pytest.raises(RuntimeError, match="calls the declared loss 'Nowhere-1'.*fuse it first"):
        torch.ops.replearn_kernels.pair_loss(
            torch.ones(2, 2), [torch.ones(2, 2)], None, None, None, None, scale, None, *[None] * 5,
            "Nowhere-1", [0.0], "mean", "torch", 0, [0, 0, 0], False,
        )  # fmt: skip


def test_two_new_losses_in_one_graph():
    """Both are found while the graph is traced, though none was called before."""
    losses = []
    for factor in (2.0, 3.0):
        members = {"terms": lambda self, s, pair, factor=factor: {"t": total(factor * s)}}
        losses.append(fuse(dataclass(frozen=True)(type("New", (PairLoss,), members))()))
    x, y, _, _ = rows()
    torch._dynamo.reset()
    step = torch.compile(lambda x, y: losses[0](x, y) + losses[1](x, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x, y), 5 * (x @ y.t()).sum() / len(x))


def test_a_module_from_elsewhere_in_one_graph(tmp_path):
    """What is unpickled in a process that has not fused it is known before a graph is traced."""
    torch.save(fuse(Everything()), tmp_path / "module.pt")
    code = f"import torch\nfused = torch.load({str(tmp_path / 'module.pt')!r}, weights_only=False)\n"
    code += "step = torch.compile(lambda x, y: fused(x, y, 2.0), fullgraph=True, backend='aot_eager')\n"
    code += "x = torch.linspace(-1, 1, 12).view(4, 3)\nprint((step(x, x) == fused(x, x, 2.0)).item())"
    assert python(code) == "True\n"


@pytest.mark.parametrize("loss", [Contrastive(), Margin()], ids=str)
def test_a_default_device_is_nobody_s_concern(loss):
    x, y, labels, _ = rows()
    inputs = (x, labels) if loss.batch else (x, y, 2.0)
    leaf = x.requires_grad_()
    with torch.device("meta"):
        fused = fuse(loss)
        value = fused(*inputs)
        (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.equal(value, fused(*inputs))
    assert torch.equal(gradient, torch.autograd.grad(fused(*inputs), leaf)[0])
