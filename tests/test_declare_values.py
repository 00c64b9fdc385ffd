"""Values of rows and columns in declared losses: how they are named, how a call gives them, what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from declared_cases import CASES, Filtered, Graded, Imitation, OwnMargins, Regression, Sampled, inputs_of
from declared_toys import Spread
from metric_cases import LABELS, assert_same, small_batch_tiles
from test_declare_expressions import RandomExpressions
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from replearn_kernels.declare import PairLoss, equal, exp, fuse, log, logsumexp, relu, total, where
from replearn_kernels.declare.algebra import is_symmetric, seen_from_column
from replearn_kernels.declare.definition import definition_of
from replearn_kernels.declare.expressions import Expr
from replearn_kernels.declare.objective import objective_of
from replearn_kernels.engine import plan, schedules
from replearn_kernels.engine.backends.dense import TorchBackend

S, ROW, COLUMN = Expr("s"), Expr("row", "x"), Expr("column", "x")
ROW_Y, COLUMN_Y = Expr("row", "y"), Expr("column", "y")


@pytest.mark.parametrize(
    "e",
    [
        S, exp(S) + 2, abs(ROW - COLUMN), (ROW - COLUMN) ** 2, (ROW - COLUMN) ** 4, ROW + COLUMN, S * (ROW * COLUMN),
        equal(ROW, COLUMN), ~equal(ROW, COLUMN), abs(ROW - COLUMN) < abs(COLUMN_Y - ROW_Y), relu(ROW + COLUMN - S),
        (ROW > 1) & (COLUMN > 1), where((ROW > 1) | (COLUMN > 1), ROW_Y * COLUMN_Y, S), exp(-abs(ROW - COLUMN)) * S,
    ],
    ids=str,
)  # fmt: skip
def test_terms_without_sides(e):
    assert is_symmetric(e)


@pytest.mark.parametrize(
    "e",
    [
        ROW, COLUMN * S, ROW - COLUMN, ROW > COLUMN, ROW / COLUMN, relu(ROW - COLUMN), (ROW - COLUMN) ** 3,
        where(ROW > 1, COLUMN, S), abs(ROW - COLUMN_Y), abs(ROW / COLUMN), (ROW / COLUMN) ** 2,
        (ROW > 1) & (COLUMN_Y > 1), ROW * COLUMN_Y, abs(ROW - 1),
    ],
    ids=str,
)  # fmt: skip
def test_terms_with_sides(e):
    assert not is_symmetric(e)
    assert seen_from_column(seen_from_column(e)) is e


def test_losses_with_sides():
    sides = {cls: definition_of(cls, ()).has_sides for cls in (Graded, OwnMargins, Regression, Sampled)}
    assert sides == {Graded: True, OwnMargins: True, Regression: False, Sampled: False}


@dataclass(frozen=True)
class Random(PairLoss):
    """A loss of random terms of a batch with two values."""

    seed: int
    a: float = 0.3

    batch, row_values = True, ("x", "y")

    def terms(self, s, pair):
        values = pair.row.x, pair.column.x, pair.row.y, pair.column.y
        make = RandomExpressions(self.seed, s, *values, self.a)
        condition = make.condition(1)
        return {
            "t": total(make.value(3), where=make.random.choice([condition, pair.same & condition, pair.every])),
            "u": logsumexp(self.a * (make.value(2) + s) + pair.column.x),
            "v": logsumexp(-s - make.value(1), where=make.random.choice([pair.other, pair.every & ~condition])),
        }

    def loss(self, row):
        return row.x * row.t / 20 + row.u + torch.where(row.v > -torch.inf, row.v * row.y, 0)


def random_results(seed: int, backend: str, dtype=torch.float64) -> list[torch.Tensor]:
    x, _, labels, _ = inputs_of(23, 6, LABELS["pairs"](23), dtype=dtype)
    leaf, values = x.clone().requires_grad_(), {"x": x[:, 0] + 1.1, "y": x[:, 1].sign()}
    loss = fuse(Random(seed), backend=backend, memory_budget=0)
    value = loss(leaf, labels, row_values=values)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


@pytest.mark.parametrize(
    ("seed", "backend"), [*((seed, "torch") for seed in range(30)), *((seed, "cpp") for seed in range(5))]
)
def test_random_losses_are_those_of_eager(seed, backend):
    with small_batch_tiles(8):
        assert_same(random_results(seed, backend), random_results(seed, "eager"), rtol=1e-10, atol=1e-10)


@dataclass(frozen=True)
class OneWay(PairLoss):
    """Whose condition alone has sides."""

    batch, row_values = True, ("x",)

    def terms(self, s, pair):
        return {"s": total(s, where=pair.row.x > pair.column.x), "t": logsumexp(s, where=pair.row.x > pair.column.x)}

    def loss(self, row):
        return row.s + torch.where(row.t > -torch.inf, row.t, 0)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_condition_with_sides(backend):
    x, values = inputs_of(21, 4, torch.zeros(21, dtype=torch.int64))[0], {"x": torch.arange(21.0) * 7 % 21}
    results = []
    for by in ("eager", backend):
        leaf = x.clone().requires_grad_()
        with small_batch_tiles(8):
            value = fuse(OneWay(), backend=by)(leaf, row_values=values)
            results.append([value.detach(), *torch.autograd.grad(value, leaf)])
    assert_same(results[1], results[0])


@dataclass(frozen=True)
class Priced(PairLoss):
    """Of excluded pairs the term is not finite."""

    batch, scaled, row_values = True, True, ("price",)

    def terms(self, logit, pair):
        priced = pair.column.price > 0
        return {
            "a": total(logit * log(pair.column.price), where=priced),
            "b": logsumexp(logit / pair.column.price, where=priced),
        }

    def loss(self, row):
        return row.a + torch.where(row.b > -torch.inf, row.b, 0)


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_what_is_excluded_need_not_be_finite(backend):
    x, scale = inputs_of(21, 4, torch.zeros(21, dtype=torch.int64))[0].requires_grad_(), torch.tensor(2.0).double()
    price = torch.arange(21).double() % 4 - 1
    priced = (price > 0).nonzero().squeeze(1)
    scale.requires_grad_()
    with small_batch_tiles(8):
        value = fuse(Priced(), backend=backend, reduction="sum")(x, None, scale, row_values={"price": price})
        gradients = torch.autograd.grad(value, (x, scale))
    losses = []
    for i in range(21):
        kept = priced[priced != i]
        logits = scale * x[kept] @ x[i]
        losses.append((logits * price[kept].log()).sum() + (logits / price[kept]).logsumexp(0))
    expected = torch.stack(losses).sum()
    torch.testing.assert_close(value, expected)
    assert_same(gradients, torch.autograd.grad(expected, (x, scale)))


@dataclass(frozen=True)
class OwnLimits(PairLoss):
    """No statistics of columns: values of rows alone, and a guide."""

    row_values, guide = ("limit",), "product"

    def terms(self, s, pair):
        return {"s": logsumexp(s, where=pair.guide < pair.row.limit)}

    def loss(self, row):
        return torch.where(row.s > -torch.inf, row.s, 0) * row.limit


def test_chunks_of_rows(monkeypatch):
    """Both sweeps over one chunk of rows after another, each with its part of what the call gives."""
    monkeypatch.setattr(plan, "_CHUNK_BYTES", (2000, 2000))
    monkeypatch.setattr(plan, "_MIN_CHUNK_ROWS", 1)
    chunks = mock.Mock(side_effect=schedules._row_chunks)
    monkeypatch.setattr(schedules, "_row_chunks", chunks)
    x, y, _, _ = inputs_of(40, 4, torch.zeros(40, dtype=torch.int64))
    given = {"row_values": {"limit": torch.arange(40) % 7 / 4.0 - 1}, "row_guide": x.flip(0), "column_guide": y.flip(1)}
    results = []
    with small_batch_tiles(16):  # and no plan that was made before
        for backend in ("eager", "torch", "cpp"):
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            value = fuse(OwnLimits(), backend=backend, memory_budget=2000)(*leaves, **given)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert chunks.call_count == 2


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_any_layout_and_dtype_of_values(backend):
    """Slices, transposes, one value for all, half precision and truth values are numbers like others."""
    x, y, _, _ = inputs_of(19, 4, torch.zeros(19, dtype=torch.int64))
    plain = torch.tensor([0.0, 1.0, 1.0]).repeat(7)[:19]
    columns = {"log_q": torch.full((19,), 0.5), "weight": plain + 1}
    others = {"weight": torch.stack([plain + 1, plain], 1)[:, 0], "log_q": torch.tensor(0.5).expand(19)}
    loss, results = fuse(Sampled(), backend=backend), []
    for skipped, of_columns in ((plain, columns), (plain.bool(), others), (plain.bfloat16(), columns)):
        row_values = {"weight": plain.double() + 1, "skipped": skipped}
        results.append(loss(x, y, 2.0, row_values=row_values, column_values=of_columns))
    assert results[0] == results[1] == results[2]


def rows(n: int = 4) -> torch.Tensor:
    return torch.eye(n)


def sampled(row_values, column_values) -> torch.Tensor:
    return fuse(Sampled())(rows(), rows(), row_values=row_values, column_values=column_values)


def imitation(guide) -> torch.Tensor:
    return fuse(Imitation())(rows(), row_guide=guide)


def filtered(row_guide, column_guide) -> torch.Tensor:
    values = {"threshold": torch.ones(4)}
    return fuse(Filtered())(rows(), rows(), row_values=values, row_guide=row_guide, column_guide=column_guide)


ONES = torch.ones(4)
OF_ROWS, OF_COLUMNS = {"weight": ONES, "skipped": ONES}, {"log_q": ONES, "weight": ONES}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampled(None, OF_COLUMNS), ValueError, r"row_values must give .* Sampled .*weight, skipped.*got none"),
        (lambda: sampled(OF_ROWS, {"log_q": ONES}), ValueError, r"column_values must give .*log_q, weight.*got log_q"),
        (lambda: sampled(OF_ROWS | {"x": ONES}, OF_COLUMNS), ValueError, "got weight, skipped, x"),
        (lambda: sampled((ONES, ONES), OF_COLUMNS), TypeError, "row_values must be a dict of tensors by name, got tup"),
        (lambda: sampled(OF_ROWS | {"weight": 1.0}, OF_COLUMNS), TypeError, r"\['weight'\] must be a torch.Tensor"),
        (lambda: sampled(OF_ROWS | {"weight": ONES[:3]}, OF_COLUMNS), ValueError, r"must have shape \(4,\).*\(3,\)"),
        (lambda: sampled(OF_ROWS | {"weight": rows()}, OF_COLUMNS), ValueError, r"must have shape \(4,\)"),
        (lambda: sampled(OF_ROWS | {"weight": ONES.to_sparse()}, OF_COLUMNS), TypeError, "must be a dense"),
        (lambda: sampled(OF_ROWS, OF_COLUMNS | {"log_q": ONES.long()}), TypeError, "floating-point or bool, got"),
        (lambda: sampled(OF_ROWS, OF_COLUMNS | {"log_q": ONES.cfloat()}), TypeError, "must be floating-point or bool"),
        (lambda: sampled(OF_ROWS | {"weight": ONES.to("meta")}, OF_COLUMNS), ValueError, "device cpu, got meta"),
        (
            lambda: sampled(OF_ROWS | {"weight": ONES.clone().requires_grad_()}, OF_COLUMNS), ValueError,
            r"row_values\['weight'\] requires a gradient, which values do not get: pass row_values\['weight'\].detach",
        ),
        (lambda: fuse(Graded())(rows()), ValueError, "row_values must give the values that Graded names"),
        (lambda: fuse(Imitation())(rows()), ValueError, "row_guide is needed: Imitation has a guide"),
        (lambda: imitation(ONES), ValueError, "row_guide must have 2 dimensions"),
        (lambda: imitation(rows(3)), ValueError, "row_guide must have 4 rows, as the features, got 3"),
        (lambda: imitation(rows().long()), TypeError, "row_guide must be fp16, bf16, fp32 or fp64"),
        (lambda: imitation(rows().to("meta")), ValueError, "row_guide must be on .* device cpu, got meta"),
        (lambda: imitation(rows().requires_grad_()), ValueError, r"row_guide requires a gradient.*row_guide.detach"),
        (lambda: fuse(Spread())(rows(), row_guide=rows()), ValueError, "row_guide: Spread has no guide"),
        (lambda: filtered(rows(), rows().half()), TypeError, "column_guide and row_guide must have the same dtype"),
        (lambda: filtered(rows(), rows()[:, :2]), ValueError, "column_guide and row_guide must have the same width"),
        (lambda: filtered(rows(), None), ValueError, "column_guide is needed: Filtered has a guide"),
        (lambda: fuse(Graded())(rows(), column_values={}), TypeError, "unexpected keyword argument 'column_values'"),
        (
            lambda: CASES["toy clip"].call(rows(), rows(), None, 1.0, row_values={"x": ONES}), TypeError,
            "unexpected keyword argument 'row_values'",
        ),
    ],
)  # fmt: skip
def test_wrong_values(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_values_with_a_tangent():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ONES, ONES)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sampled(OF_ROWS | {"weight": dual}, OF_COLUMNS)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            imitation(forward_ad.make_dual(rows(), rows()))


def test_names_tell_losses_apart():
    """By values that formulas alone read, too, and by the guide."""
    attributes = [{}, {"row_values": ("x",)}, {"row_values": ("y",)}, {"column_values": ("x",)}, {"guide": "product"}]
    names = set()
    for more in attributes:
        members = {"terms": lambda self, s, pair: {"t": total(s)}} | more
        names.add(definition_of(dataclass(frozen=True)(type("One", (PairLoss,), members)), ()).name)
    assert len(names) == len(attributes)


def test_values_that_require_a_gradient_nobody_asks_for():
    with torch.no_grad():
        assert sampled(OF_ROWS | {"weight": ONES.clone().requires_grad_()}, OF_COLUMNS).isfinite()


def declared(term, **attributes) -> None:
    attributes = {"row_values": ("x",)} | attributes
    members = attributes | {"terms": lambda self, s, pair: {"t": term(s, pair)}}
    fuse(dataclass(frozen=True)(type("Bad", (PairLoss,), members))())


@pytest.mark.parametrize(
    ("term", "attributes", "message"),
    [
        (lambda s, p: total(p.row.y), {}, r"no value 'y': there are x\. .*row_values = \(.y.,\)"),
        (lambda s, p: total(p.column.x), {}, "pair.column has no value 'x'"),
        (lambda s, p: total(s), {"row_values": "x"}, r"Bad.row_values must be a tuple of names, ..weight.,., got 'x'"),
        (lambda s, p: total(s), {"row_values": ["x"]}, "must be a tuple of names"),
        (lambda s, p: total(s), {"row_values": ("a b",)}, "a value needs a name of its own, an ASCII identifier"),
        (lambda s, p: total(s), {"row_values": ("logit_scale",)}, "a value needs a name of its own"),
        (lambda s, p: total(s), {"row_values": ("x", "x")}, "names a value twice: x, x"),
        (lambda s, p: total(s), {"row_values": ("t",)}, "t is a value that calls give: a term needs another name"),
        (lambda s, p: total(s), {"column_values": ("t",)}, "t is a value that calls give"),
        (lambda s, p: total(s), {"column_values": ("x",), "batch": True}, "columns of a batch are its rows: give"),
        (lambda s, p: total(s), {"row_value": ("x",)}, "did you mean row_values"),
        (lambda s, p: total(s, where=p.row.x == s), {}, r"equal\(a, b\) what they come to"),
        (lambda s, p: total(s, where=p.row.x == 1), {}, r"row.x == 1: .*equal\(a, b\)"),
        (lambda s, p: total(s, where=p.row.x != s), {}, r"equal\(a, b\) what they come to"),
        (lambda s, p: total(s, where=p.row.x), {}, "takes conditions.*got row.x, which is a number: write row.x > 0"),
        (lambda s, p: total(s, where=p.every & p.row.x), {}, "& takes conditions.*write row.x > 0"),
        (lambda s, p: total(p.row.x % 10), {}, "row.x takes part in no operation but"),
        (lambda s, p: total(p.row.x), {}, "no term depends on the similarity"),
        (lambda s, p: total(s * p.row), {}, "takes expressions and numbers, got _Given"),
        (lambda s, p: total(p.guide), {}, 'no pair.guide: the class says of what, guide = "cosine" or "product"'),
        (lambda s, p: total(p.guide), {"guide": "distance"}, 'guide must be "product" or "cosine", or "" for none'),
    ],
)  # fmt: skip
def test_values_that_cannot_be_declared(term, attributes, message):
    with pytest.raises((TypeError, ValueError, AttributeError), match=message):
        declared(term, **attributes)


@dataclass(frozen=True)
class OtherCamera(PairLoss):
    """Pairs of one person and another camera, as whole numbers tell."""

    batch, row_values = True, ("person", "camera")

    def terms(self, s, pair):
        one_person = torch.eq(pair.row.person, pair.column.person)
        return {"s": total(s, where=one_person & torch.ne(pair.row.camera, pair.column.camera))}


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
def test_equal_numbers(backend):
    """NaN is no number: it equals none, not even itself."""
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    person, camera = torch.arange(40) % 5, torch.arange(40) // 7 % 3
    values = {"person": person.double(), "camera": camera.double()}
    values["person"][::9] = torch.nan
    together = values["person"].unsqueeze(1) == values["person"]
    expected = torch.where(together & (camera.unsqueeze(1) != camera), x @ x.t(), 0).sum(1)
    with small_batch_tiles(16):
        found = fuse(OtherCamera(), reduction="none", backend=backend)(x, row_values=values)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_guides_of_any_dtype_and_layout(backend, dtype):
    """Rows of a guide are not rounded to the features' dtype, nor have they to be contiguous."""
    x, guide, _, _ = inputs_of(19, 4, torch.zeros(19, dtype=torch.int64), dtype=torch.float32)
    guide = guide.to(dtype)
    expected = ((x @ x.t()).double() - (guide.double() @ guide.double().t())).square().fill_diagonal_(0).sum(1)
    for given in (guide, guide.t().contiguous().t(), torch.stack([guide, guide], 1)[:, 0]):
        with small_batch_tiles(8):
            found = fuse(Imitation(), backend=backend, reduction="none")(x, row_guide=given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guide_s_similarities_are_symmetric(dtype):
    """On the diagonal: a row must find a pair as its column has found it."""
    guide = torch.randn(67, 19, dtype=dtype)
    out = torch.empty(67, 80, dtype=dtype)[:, :67]
    TorchBackend._form_guide(guide, guide, True, out)
    assert torch.equal(out, out.t())
    torch.testing.assert_close(out, guide @ guide.t())


def test_a_guide_under_autocast():
    """As features, it enters the products in autocast's dtype."""
    x, guide, _, _ = inputs_of(19, 4, torch.zeros(19, dtype=torch.int64), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fuse(Imitation())(x, row_guide=guide)
    assert found == fuse(Imitation())(x.bfloat16(), row_guide=guide.bfloat16())


def test_one_graph_for_all_sizes():
    torch._dynamo.reset()
    loss, counter = fuse(Graded(), backend="torch"), CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter), []
    for n in (5, 12, 31):
        x, _, labels, _ = inputs_of(n, 4, torch.arange(n) % 3)
        values = {"grade": labels.double(), "weight": x[:, 0] + 2}
        ours, plain = (x.clone().requires_grad_() for _ in range(2))
        compiled(ours, row_values=values).backward()
        loss(plain, row_values=values).backward()
        torch.testing.assert_close(ours.grad, plain.grad)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_the_operator_with_values():
    x, y, labels, scale = (t.clone() for t in inputs_of(6, 4, torch.arange(6) % 2))
    values = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    features = [t.requires_grad_() for t in (x, y, scale)]
    arguments = features[0], [features[1]], None, None, None, None, features[2], None, *values, None, None, None
    config = objective_of(Sampled()).name, [0.0], "mean", "torch", 2**20, [1, 1, 1], False
    torch.library.opcheck(torch.ops.replearn_kernels.pair_loss.default, (*arguments, *config))
