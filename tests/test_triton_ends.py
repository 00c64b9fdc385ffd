"""The kernels between and after the sweeps, in Triton's interpreter: what combines statistics, adds partial sums, and
turns sums into gradients. Against the objectives' formulas and plain products, in fp64.
"""

from __future__ import annotations

import pytest
import torch
from triton_harness import interpreter, relative_error

import replearn_kernels as rk
from replearn_kernels.engine.problem import Inputs, Problem
from replearn_kernels.objectives import Softmax, SupCon
from replearn_kernels.triton_kernels import (
    EPILOGUES,
    Side,
    TileInputs,
    combine,
    combine_losses,
    combine_statistics,
    finish_gradients,
    outputs,
)
from replearn_kernels.triton_kernels.statistics import merge

pytestmark = interpreter


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def random(rng, *shape):
    return torch.randn(*shape, generator=rng)


@pytest.fixture
def blocks_of_32(monkeypatch):
    monkeypatch.setattr(combine, "_BLOCK", 32)


# -- between the sweeps ---------------------------------------------------------------------------------------------


def statistics_of(rng, quantities: int, count: int) -> torch.Tensor:
    """(max, sum of exp, sum of positives)."""
    table = random(rng, quantities, count)
    table[1] = table[1].exp()
    return table


def combined(objective, problem: Problem, tables, mean: bool):
    rows, columns = tables
    shape = rows.shape[1], 0 if columns is None else columns.shape[1]
    inputs = TileInputs.of(shape, problem.scale, row_table=rows, column_table=columns)
    counts = problem.positive_counts.contiguous() if problem.is_batch else 0
    return combine_statistics(EPILOGUES[objective.name], inputs, counts, mean)


def expected(objective, problem: Problem, tables, mean: bool):
    tables = [None if table is None else table.double() for table in tables]
    losses = objective.row_losses(problem, *tables)
    share = 1 / max(float(objective.rows_counted(problem)), 1) if mean else 1.0
    return losses.sum() * share, share, objective.coefficients(problem, *tables, torch.ones(problem.rows).double())


def softmax_problem(n: int, m: int, symmetric: bool, scale: float) -> tuple[Softmax, Problem]:
    objective = Softmax(symmetric)
    inputs = Inputs(torch.zeros(n, 2), [torch.zeros(m, 2)], None, None, None, None, torch.tensor(scale), None)
    return objective, Problem.build(inputs, [True] * 3, objective)


def batch_problem(labels: torch.Tensor, objective: SupCon) -> Problem:
    inputs = Inputs(torch.zeros(len(labels), 2), [], None, None, labels, None, torch.tensor(14.3), None)
    return Problem.build(inputs, [True] * 2, objective)


def check_combined(objective, problem, tables, mean):
    loss, state, *coefficients = combined(objective, problem, tables, mean)
    value, share, exact = expected(objective, problem, tables, mean)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)
    assert state[2].item() == pytest.approx(float(share), rel=1e-6)
    assert state[3].item() == 0
    for got, wanted in zip(coefficients, exact):
        assert (got is None) == (wanted is None)
        if got is not None:
            highest = torch.finfo(torch.float32).max  # for a row that is compared with nobody
            torch.testing.assert_close(got.double(), wanted.clamp(max=highest), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n, m", [(1, 1), (2, 3), (33, 33), (65, 97), (257, 300)])
def test_softmax(n, m, symmetric, mean, rng, blocks_of_32):
    """Several steps of 32, the last of them ragged; columns that are nobody's positive."""
    objective, problem = softmax_problem(n, m, symmetric, 7.5)
    tables = statistics_of(rng, 3, n), statistics_of(rng, 2, m) if symmetric else None
    check_combined(objective, problem, tables, mean)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1000.0, -20.0])
def test_softmax_at_any_scale(scale, rng):
    objective, problem = softmax_problem(40, 50, True, scale)
    check_combined(objective, problem, (statistics_of(rng, 3, 40), statistics_of(rng, 2, 50)), True)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("groups", [[0], [0, 0], [0, 1], [0, 0, 0, 5, 5, 7], list(range(70)), [3] * 33])
def test_sup_con(groups, mean, rng, blocks_of_32):
    """Rows alone, of which the mean is not taken; one class; all distinct."""
    objective = SupCon()
    table = statistics_of(rng, 3, len(groups))
    if len(groups) == 1:
        table[:2, 0] = torch.tensor([torch.finfo(torch.float32).min, 0.0])  # nobody to be compared with
    check_combined(objective, batch_problem(torch.tensor(groups), objective), (table, None), mean)


def test_known_sizes_of_groups_are_as_counted_ones(rng):
    labels, table = torch.arange(20).repeat(3), statistics_of(rng, 3, 60)
    results = []
    for counts in (torch.full((60,), 2), 2):
        inputs = TileInputs.of((60, 0), torch.tensor(3.0), row_table=table)
        results.append(combine_statistics(EPILOGUES["sup_con"], inputs, counts, True))
    assert batch_problem(labels, SupCon(3)).positive_counts.eq(2).all()
    for a, b in zip(*results):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["softmax", "sup_con"])
def test_nan_shows(name, rng):
    table = statistics_of(rng, 3, 40)
    table[1, 7] = float("nan")
    inputs = TileInputs.of((40, 0), torch.tensor(3.0), row_table=table)
    loss, state, rows, _ = combine_statistics(EPILOGUES[name], inputs, 0, True)
    assert loss.isnan() and state[1].item() == 0  # no exponent is shared
    assert rows[1].isnan().nonzero().flatten().tolist() == [7]


def test_no_rows(rng):
    inputs = TileInputs.of((0, 0), torch.tensor(3.0), row_table=torch.zeros(3, 0))
    loss, state, rows, _ = combine_statistics(EPILOGUES["softmax"], inputs, 0, True)
    assert loss.item() == 0 and state[2].item() == 1 and rows.shape == (5, 0)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("n", [0, 1, 33, 5000])
def test_total(n, mean, rng):
    table = random(rng, 3, n)
    loss, state, weight_sum = combine_losses(EPILOGUES["sigmoid"], TileInputs.of((n, 0), 1.0, row_table=table), mean)
    share = 1 / max(n, 1) if mean else 1.0
    torch.testing.assert_close(loss.double(), table[0].double().sum() * share, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight_sum, table[1].double() @ table[2].double(), rtol=1e-6, atol=1e-6)
    assert state[2].item() == pytest.approx(share) and not state[[0, 1, 3]].any()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("size", [1, 63, 65, 130])
def test_partial_sums_are_added(count, size, rng):
    partials, table = random(rng, count, 3, size), random(rng, 3, size + 5)[:, :size]
    exact = table.double() + partials.double().sum(0)
    merge(EPILOGUES["sigmoid"], partials, TileInputs.of((size, size), 1.0), table)
    torch.testing.assert_close(table.double(), exact, rtol=1e-5, atol=1e-5)


# -- the end --------------------------------------------------------------------------------------------------------


def new_side(rng, n, d, dtype=torch.bfloat16, features=False, norms=False, padding=0):
    """With features that are part of a wider matrix, if there is padding."""
    given = random(rng, n, d + padding).to(dtype)[:, :d] if features else None
    inverse = random(rng, n).abs() + 0.5 if norms else None
    return Side.of(random(rng, n, d), torch.full((n, d), float("nan"), dtype=dtype), given, inverse)


def exact_gradient(side: Side, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient, and <x, sums> of the side."""
    sums = side.sums.double()
    if side.features is None:
        return sums * factor, torch.zeros(())
    x = side.features.double()
    if side.inverse_norms is None:
        return sums * factor, (x * sums).sum()
    inverse = side.inverse_norms.double().unsqueeze(1)
    unit = x * inverse
    along = (unit * sums).sum(1, keepdim=True)
    whole = (inverse > 0) & (inverse < torch.finfo(torch.float32).tiny ** -0.5)
    return (sums - unit * torch.where(whole, along, 0)) * inverse * factor, (unit * sums).sum()


SCALE, UPSTREAM, SHARE = torch.tensor(-3.0), torch.tensor(0.5), torch.tensor(0.25)


def check_gradients(sides, scale_gradient=None, halves=1, **options) -> None:
    exact = [exact_gradient(side, -3.0 * 0.125) for side in sides]
    finish_gradients(sides, SCALE, (UPSTREAM, SHARE), scale_gradient, halves=halves, **options)
    for side, (gradient, _) in zip(sides, exact):
        rounding = torch.finfo(side.out.dtype).eps
        assert (side.out.double() - gradient).abs().max() <= rounding * gradient.abs().max() + 1e-6
    if scale_gradient is not None:
        wanted = sum(along for _, along in exact) * 0.125 / halves
        torch.testing.assert_close(scale_gradient.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [1, 3, 48, 100, 640, 1152])
@pytest.mark.parametrize("n", [1, 2, 33, 65])
def test_two_sides(n, d, rng):
    """Rows of the features further apart than they are long; more programs than partial sums are loaded at once."""
    sides = [new_side(rng, n, d, features=True, padding=5), new_side(rng, n + 3, d)]
    check_gradients(sides, torch.empty(()), counter=torch.zeros(1))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sides_that_all_tell_of_the_scale(count, dtype, rng):
    sides = [new_side(rng, 5 + 7 * i, 32, dtype, features=True) for i in range(count)]
    check_gradients(sides, torch.empty((), dtype=torch.float64), halves=2)


@pytest.mark.parametrize("folded", [1, 4, 64])
def test_many_programs(folded, rng, monkeypatch):
    monkeypatch.setattr(outputs, "_ELEMENTS", 16)
    monkeypatch.setattr(outputs, "_FOLDED", outputs.tl.constexpr(folded))
    counter = torch.zeros(1)
    for _ in range(2):  # the counter is 0 again
        check_gradients([new_side(rng, 50, 16, features=True), new_side(rng, 20, 16)], torch.empty(()), counter=counter)
        assert counter.item() == 0


def test_normalised_rows(rng):
    """A row of zeros, one too short to be squared, and others."""
    sides = [new_side(rng, 40, 24, torch.float32, features=True, norms=True) for _ in range(2)]
    sides[0].features[3], sides[0].inverse_norms[3] = 0, 0
    sides[0].features[4], sides[0].inverse_norms[4] = 1e-25, torch.finfo(torch.float32).tiny ** -0.5
    check_gradients(sides)
    assert not sides[0].out[3].any() and sides[0].out[4].any()


def test_sums_in_place_and_no_gradient_but_the_scales(rng):
    side = new_side(rng, 33, 20, torch.float32, features=True)
    in_place, exact = side._replace(out=side.sums), side.sums * (-3.0 * 0.125)
    of_scale = torch.empty(())
    finish_gradients([side._replace(out=None)], SCALE, (UPSTREAM, SHARE), of_scale)
    assert of_scale.item() == pytest.approx(exact_gradient(side, 1.0)[1].item() * 0.125, rel=1e-5)
    finish_gradients([in_place], SCALE, (UPSTREAM, 0.25))
    torch.testing.assert_close(side.sums, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sides", [0, 1])
def test_bias(sides, rng):
    of_bias, weight_sum = torch.empty(()), torch.tensor(8.0, dtype=torch.float64)
    given = [new_side(rng, 9, 8) for _ in range(sides)]
    finish_gradients(given, SCALE, (UPSTREAM, SHARE), weight_sum=weight_sum, bias_gradient=of_bias)
    assert of_bias.item() == 1.0


def test_no_rows_have_a_scale_gradient_of_zero(rng):
    of_scale = torch.full((), float("nan"))
    check_gradients([new_side(rng, 4, 8)], None)
    finish_gradients([new_side(rng, 0, 8, features=True), new_side(rng, 4, 8)], SCALE, (UPSTREAM, SHARE), of_scale)
    assert of_scale.item() == 0


# -- whole losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, True), (False, False, True),
                                   (True, False, False), (False, True, False)])  # fmt: skip
@pytest.mark.parametrize("loss", ["clip", "siglip", "queue"])
def test_whatever_needs_a_gradient(loss, needs, rng):
    """Frozen towers, a learnable scale alone; and a second backward call over what the first has left."""
    functions = {
        "clip": lambda x, y, s, **k: rk.clip_loss(x, y, s, **k),
        "siglip": lambda x, y, s, **k: rk.siglip_loss(x, y, s, s - 8, **k),
        "queue": lambda x, y, s, **k: rk.info_nce_loss(x, x.detach(), negatives=y, logit_scale=s, **k),
    }
    values = [random(rng, 20, 8).div(3).bfloat16(), random(rng, 20, 8).div(3).bfloat16(), torch.tensor(5.0)]
    results = []
    for backend in ("eager", "triton"):
        wide = backend == "eager"
        leaves = [(v.double() if wide else v.clone()).requires_grad_(need) for v, need in zip(values, needs)]
        value = functions[loss](*leaves, backend=backend)
        due = [leaf for leaf in leaves if leaf.requires_grad]
        if not value.requires_grad:
            return
        first = torch.autograd.grad(value, due, retain_graph=True)
        again = torch.autograd.grad(value, due)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        results.append((value, *first))
    for exact, got in zip(*results):
        assert relative_error(got.detach(), exact.detach()) <= 2**-6


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
def test_own_negatives_of_any_strides_tell_of_the_scale(layout, rng):
    """Where the queries are frozen, the scale's gradient is read off the keys and every query's own negatives."""
    own = {
        "permuted": random(rng, 3, 6, 5).permute(2, 0, 1),
        "sliced": random(rng, 5, 3, 12)[..., ::2],
        "expanded": random(rng, 5, 3, 1).expand(5, 3, 6),
    }[layout]
    query, key = random(rng, 5, 6), random(rng, 5, 6)
    gradients = []
    for backend, dtype in (("eager", torch.float64), ("triton", torch.float32)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (key, own)]  # in fp32 the same memory, and strides
        scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
        loss = rk.info_nce_loss(query.to(dtype), leaves[0], negatives=leaves[1], logit_scale=scale, backend=backend)
        gradients.append(torch.autograd.grad(loss, [*leaves, scale]))
    for exact, got in zip(*gradients):
        assert relative_error(got, exact) <= 1e-5


def test_wide_features_end_by_other_kernels(rng, monkeypatch):
    """The same to a rounding, beyond what the kernel of outputs holds."""
    x, y, scale = random(rng, 9, 40), random(rng, 9, 40), torch.tensor(2.0)
    results = []
    for widest in (64, 32):
        monkeypatch.setattr("replearn_kernels.engine.backends.triton._WIDEST_OUTPUT", widest)
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
        results.append(torch.autograd.grad(rk.clip_loss(*leaves, backend="triton"), leaves))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("needs_grad", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["symmetric", "smoothed", "target", "sup_con", "pairs", "sigmoid"])
def test_what_is_saved_is_as_the_fake_kernels_say(name, dtype, reduction, needs_grad, rng):
    """torch.compile knows the tensors between forward and backward call from these alone."""
    query, key = random(rng, 6, 5).to(dtype), random(rng, 8, 5).to(dtype)
    scale, bias, labels = torch.tensor(2.0), torch.tensor(-1.0), torch.arange(6) // 2
    batch = query, [], None, None, labels, None, scale, *[None] * 6
    target = labels if name == "target" else None
    arguments = {
        "symmetric": (query, [key], None, None, None, None, scale, *[None] * 6, "softmax", [1.0, 0.0, 0.0, 0.0]),
        "smoothed": (query, [key], None, None, None, None, scale, *[None] * 6, "softmax", [1.0, 0.1, 0.0, 0.0]),
        "target": (query, [key], None, target, None, None, scale, *[None] * 6, "softmax", [1.0, 0.0, 0.0, 0.0]),
        "sup_con": (*batch, "sup_con", [0.0]),
        "pairs": (*batch, "sup_con", [2.0]),
        "sigmoid": (query, [key], None, None, None, None, scale, bias, *[None] * 5, "sigmoid", [0.0]),
    }[name]
    of_query, of_key, of_scalars = (bool(needs) for needs in needs_grad)
    due = [of_query, *([of_key] if arguments[1] else []), of_scalars, *([of_scalars] if name == "sigmoid" else [])]
    torch.library.opcheck(
        torch.ops.replearn_kernels.pair_loss.default,
        (*arguments, reduction, "triton", 0, due, False),
        test_utils=("test_schema", "test_faketensor"),
    )
