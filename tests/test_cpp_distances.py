"""The C++ passes over distances: equal to the plain PyTorch ones, in every instruction set; bad arguments raise."""

import json
import os
import subprocess
import sys

import pytest
import torch

from replearn_kernels.engine import distances, native
from replearn_kernels.engine.columns import BatchColumns, Tile
from replearn_kernels.engine.problem import Pairs
from replearn_kernels.objectives import BatchAll, BatchHard, Lifted, MarginContrastive, SemiHard
from replearn_kernels.objectives.triplet_distance import TripletDistance

EUCLIDEAN = TripletDistance("euclidean")

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
ops = torch.ops.replearn_kernels

SIZES = [(1, 1), (3, 15), (4, 16), (65, 17), (130, 100), (64, 513), (65, 65)]
CLOSE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float64: dict(rtol=1e-13, atol=1e-13)}
TILES = pytest.mark.parametrize("rows, columns", SIZES)
DTYPES = pytest.mark.parametrize("dtype", CLOSE)


def sample(rows, columns, dtype, nan=False):
    """A strided tile of negative distances, symmetric where it is square and then on the diagonal; and its pairs."""
    diagonal = rows == columns
    v = -torch.rand(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1] * 3
    if diagonal:
        v.copy_(v + v.t()).fill_diagonal_(0)
    if nan:
        v[rows // 2] = torch.nan
        if diagonal:
            v.fill_diagonal_(0)
    narrow = torch.int32 if dtype == torch.float32 else torch.int64
    groups = [torch.randint(-2, 5, (size,)).to(narrow) for size in (rows, columns)]
    if diagonal:
        groups[1] = groups[0]
    return v, Pairs(1.0, 0.0, None, *groups, 0, diagonal)


def points_of(rows, columns, d, dtype, squared, diagonal):
    """Rows with near columns among them, given and centred."""
    x = torch.randn(rows, d + 2, dtype=dtype)[:, 1 : d + 1]
    y = x if diagonal else torch.randn(columns, d, dtype=dtype)
    if not diagonal:
        shared = min(rows, columns) // 2
        y[:shared] = x[:shared] + 1e-3 * torch.randn(shared, d, dtype=dtype)
        y[0] = x[0]
    elif rows > 3:
        x[3] = x[2] + 1e-3
        x[1] = x[0]
    return x, y, distances.Points(x, y, x.square().sum(1), y.square().sum(1), squared, diagonal)


@TILES
@DTYPES
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("d", [1, 19])
def test_distances_and_their_chain(rows, columns, dtype, squared, d):
    """Around a pass: products become distances before it, and after it W what the products with it need."""
    diagonal = rows == columns
    x, y, points = points_of(rows, columns, d, dtype, squared, diagonal)
    products = x @ y.t()
    ours, expected = (torch.empty(rows, columns + 3, dtype=dtype)[:, 2 : columns + 2].copy_(products) for _ in "ab")
    objective, like = MarginContrastive(1.0), torch.empty((), dtype=dtype)
    _, pairs = sample(rows, columns, dtype)
    tables = [objective.new_statistics(n, n, like)[0] for n in (rows, columns)]
    ops.margin_contrastive_statistics_(ours, *pairs.of_any_loss, *objective.roles, *tables, *points[:5])
    distances.negative_distances_(expected, points)
    exact = -(x.double().unsqueeze(1) - y.double()).square().sum(2)
    exact = exact if squared else -(-exact).sqrt()
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    torch.testing.assert_close(ours.double(), exact, rtol=4e-5 if dtype == torch.float32 else 1e-12, atol=0)

    # The plain pass, its chain, and the gradient by both; once from products, once from distances.
    w = torch.empty(rows, columns, dtype=dtype)
    objective.weights(expected, w, pairs, *(t.clone() for t in tables))
    sums = distances.chain_(w, expected, points)
    every = torch.cat([x, y]) if not diagonal else x
    source = BatchColumns(every, needs_grad=False, has_positives=True)
    tile = Tile(x, slice(0, rows), source, 0, slice(0, columns) if diagonal else slice(rows, rows + columns))
    gradient = torch.zeros_like(every)
    distances.finish_tile_(every, every, tile, sums, gradient)
    for formed in (False, True):
        out, ours_gradient = torch.empty_like(w), torch.zeros_like(every)
        given = expected.clone() if formed else products.clone()
        d_rows, d_columns = ours_gradient[:rows], None if diagonal else ours_gradient[rows:]
        ops.margin_contrastive_weights_(
            given, out, *pairs.of_any_loss, *objective.roles, *(t.clone() for t in tables), *points[:5], formed, x,
            d_rows,
            None if diagonal else y, d_columns,
        )  # fmt: skip
        torch.testing.assert_close(out, w, **CLOSE[dtype])
        torch.testing.assert_close(ours_gradient, gradient, **CLOSE[dtype])


def tables_of(new, rows, columns, diagonal):
    """Row and column tables; on the diagonal the columns are the rows."""
    row = new(rows)
    return row, None if diagonal else new(columns)


@TILES
@DTYPES
@pytest.mark.parametrize("nan", [False, True])
def test_hardest_pairs(rows, columns, dtype, nan):
    """Two tiles folded into the same tables: of equal values the earlier stays."""
    objective, like = BatchHard(0.2, EUCLIDEAN), torch.empty((), dtype=dtype)
    v, pairs = sample(rows, columns, dtype, nan)
    v = v.round(decimals=1)  # many ties
    tables = []
    for run in (lambda *a: ops.hardest_statistics_(a[0], *pairs.of_any_loss, *a[2:]), objective.update_statistics):
        row, column = tables_of(lambda n: objective.new_statistics(n, n, like)[0], rows, columns, pairs.diagonal)  # noqa: B023
        if column is not None:
            column[4] += 1000
        for tile in (v, v - 0.5):
            run(tile.clone(), pairs, row, column)
        tables.append((row, column))
    for ours, expected in zip(*tables):
        if ours is not None and not nan:
            assert torch.equal(ours, expected)
        if ours is not None and nan:  # no NaN wins; the loss of its row is NaN by its squares
            assert not ours.isnan().any() and not expected.isnan().any()


@TILES
@DTYPES
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("nan", [False, True])
def test_margin_contrastive(rows, columns, dtype, squared, nan):
    objective, like = MarginContrastive(2.0, squared), torch.empty((), dtype=dtype)
    v, pairs = sample(rows, columns, dtype, nan)
    check_pass(objective, v, pairs, like, lambda n: objective.new_statistics(n, n, like)[0])


@TILES
@DTYPES
@pytest.mark.parametrize("most", [0, 1, 47, 48, 49, 60])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_batch_all(rows, columns, dtype, most, distance):
    """Up to 48 thresholds are compared one by one, more are searched; some rows have fewer, at -inf."""
    objective, like = BatchAll(0.2, TripletDistance(distance)), torch.empty((), dtype=dtype)
    v, pairs = sample(rows, columns, dtype)

    def new(count):
        thresholds = torch.linspace(0, 4, most, dtype=dtype).unsqueeze(1) + torch.rand(count, dtype=dtype)
        thresholds[: most // 3, ::2] = -torch.inf
        return torch.cat([torch.zeros(1, count), torch.rand(1, count), thresholds, torch.zeros(most, count)]).to(dtype)

    check_pass(objective, v, pairs, like, new)


@TILES
@DTYPES
@pytest.mark.parametrize("most", [0, 1, 7, 8, 9, 48, 49, 60])
def test_semi_hard(rows, columns, dtype, most):
    """Two tiles folded into the same tables: of equal values the earlier stays. Up to 48 thresholds are compared one by
    one, 8 at a time, more are searched; some rows have fewer, at -inf."""
    objective, like = SemiHard(EUCLIDEAN), torch.empty((), dtype=dtype)
    v, pairs = sample(rows, columns, dtype)
    v = v.round(decimals=1)  # many ties, also with thresholds

    def new(count):
        lead = objective.new_statistics(count, count, like)[0]
        thresholds = -(torch.rand(most, count, dtype=dtype) * 4).round(decimals=1).sort(dim=0).values
        thresholds[: most // 3, ::2] = -torch.inf
        nothing = torch.full_like(thresholds, torch.finfo(dtype).min)
        return torch.cat([lead, thresholds, nothing, torch.full_like(thresholds, -1)])

    ours = tables_of(new, rows, columns, pairs.diagonal)
    expected = [None if table is None else table.clone() for table in ours]
    for tile in (v, v - 0.5):
        ops.semi_hard_statistics_(tile, *pairs.of_any_loss, *ours)
        objective.update_statistics(tile, pairs, *expected)
    for a, b in zip(ours, expected):
        assert a is None or torch.equal(a, b)


def check_pass(objective, v, pairs, like, new):
    """The statistics and the weights of an objective whose tables take losses, twice into the same tables."""
    tables = tables_of(new, *v.shape, pairs.diagonal)
    for table in tables:
        if table is not None:
            table[1] = torch.linspace(-1, 2, table.shape[1])
    ours, expected = ([None if t is None else t.clone() for t in tables] for _ in "ab")
    family = objective.family
    for tile in (v, v * 0.7):
        getattr(ops, f"{family}_statistics_")(tile, *pairs.of_any_loss, *objective.roles, *ours)
        objective.update_statistics(tile, pairs, *expected)
    compare(ours, expected, like.dtype)

    columns = [t if t is not None else r for t, r in zip((ours[1], expected[1]), (ours[0], expected[0]))]
    a, b = torch.empty_like(v), torch.empty_like(v)
    getattr(ops, f"{family}_weights_")(v, a, *pairs.of_any_loss, *objective.roles, ours[0], columns[0])
    objective.weights(v, b, pairs, expected[0], columns[1])
    for w in (a, b):
        w.masked_fill_(v.isnan(), 0)  # NaN or not: the loss says so
        if pairs.diagonal:  # a row with itself is no pair, and the chain writes over it
            w.fill_diagonal_(0)
    compare([a, *ours], [b, *expected], like.dtype)


def compare(ours, expected, dtype):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    rows = columns = 700
    _, pairs = sample(rows, columns, dtype)
    pairs, like = pairs._replace(diagonal=False), torch.empty((), dtype=dtype)
    _, _, points = points_of(rows, columns, 8, dtype, False, False)
    objectives = [BatchHard(0.2, EUCLIDEAN), MarginContrastive(2.0), BatchAll(0.2, EUCLIDEAN)]

    def run():
        out = []
        for objective in objectives:
            tables = [objective.new_statistics(n, n, like)[0] for n in (rows, columns)]
            if isinstance(objective, BatchAll):
                tables = [torch.cat([t, t[:1] + 1.5, t[:1]]) for t in tables]
            s = points.rows @ points.columns.t()
            told = pairs.of_any_loss
            getattr(ops, f"{objective.family}_statistics_")(s, *told, *objective.roles, *tables, *points[:5])
            out += [s, *tables]
            if objective.sweeps_gradients:
                w, d_rows, d_columns = (torch.zeros_like(t) for t in (s, points.rows, points.columns))
                to = True, points.rows, d_rows, points.columns, d_columns
                native_pass = getattr(ops, f"{objective.family}_weights_")
                native_pass(s, w, *told, *objective.roles, *tables, *points[:5], *to)
                out += [w, d_rows, d_columns]
        return out

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


SETS = """
import json, torch
from replearn_kernels import contrastive_loss, lifted_structure_loss, triplet_margin_loss
from replearn_kernels.engine.problem import Inputs
from replearn_kernels.engine.schedules import Config, row_statistics
torch.manual_seed(0)
x = torch.randn(67, 19)
x[40] = x[3] + 1e-4
results = [torch.ops.replearn_kernels.instruction_set()]
losses = [(lifted_structure_loss, dict(smooth=True)), (lifted_structure_loss, dict(smooth=False)),
          (contrastive_loss, dict(margin=6.0)), (contrastive_loss, dict(margin=6.0, squared=False)),
          *((triplet_margin_loss, dict(mining=m)) for m in ("batch_hard", "semi_hard", "batch_all"))]

def semi_hard_table(x, labels):
    inputs = Inputs(x, [], None, None, labels, None, torch.ones((), dtype=x.dtype), None)
    return row_statistics(inputs, Config("semi_hard", [0.0], "none", "cpp", 0, [False, False]))[1]

for classes in (1, 9):  # batch_all: of many thresholds and of few
    for dtype in (torch.float32, torch.float64):
        for loss, options in losses:
            y = x.to(dtype, copy=True).requires_grad_()
            value = loss(y, torch.arange(67) % classes - (torch.arange(67) > 60).long(), backend="cpp", **options)
            value.backward()
            results.append([value.item(), y.grad.flatten().tolist()])
        table = semi_hard_table(x.to(dtype), torch.arange(67) % (2 * classes))
        results.append([0.0, table.clamp(min=-1e6).flatten().tolist()])
print(json.dumps(results))
"""


def run_with(instruction_set: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": instruction_set}
    return subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True)


def test_every_instruction_set_gives_the_same():
    widest = run_with("")
    assert widest.returncode == 0, widest.stderr
    widest_name, *expected = json.loads(widest.stdout)
    for instruction_set in {"baseline", "avx2", "avx512"} - {widest_name}:
        result = run_with(instruction_set)
        if "must be one of" in result.stderr:
            continue  # not on this processor
        assert result.returncode == 0, result.stderr
        name, *results = json.loads(result.stdout)
        assert name == instruction_set and len(results) == 32
        for index, ((loss, gradient), (other, other_gradient)) in enumerate(zip(results, expected)):
            tolerance = 1e-5 if index % 16 < 8 else 1e-12
            assert loss == pytest.approx(other, rel=tolerance)
            torch.testing.assert_close(
                torch.tensor(gradient), torch.tensor(other_gradient), rtol=tolerance, atol=tolerance
            )


def test_operators_refuse_what_would_read_out_of_bounds():
    v, pairs = sample(4, 6, torch.float32)
    told = pairs.of_any_loss
    x, y, points = points_of(4, 6, 3, torch.float32, False, False)
    without = pairs._replace(row_group=None, column_group=None).of_any_loss

    def tables(quantities, rows=4, columns=6):
        return torch.zeros(quantities, rows), torch.zeros(quantities, columns)

    def over(**wrong):
        ops.hardest_statistics_(v, *told, *tables(5), *points._replace(**wrong)[:5])

    def chain(out, *gradients):
        out = v if out is None else torch.empty_like(out)
        ops.margin_contrastive_weights_(v, out, *told, 1.0, True, *tables(2), *points[:5], *gradients)

    for call, message in [
        (lambda: over(rows=x[:3]), "rows must have 4 rows, got 3"),
        (lambda: over(columns=None), "rows and columns go together"),
        (lambda: over(columns=y[:, :2]), "columns must have 3 columns, got 2"),
        (lambda: over(rows=x.double()), "rows must have the tile's dtype"),
        (lambda: over(rows=torch.zeros(3, 4).t()), "adjacent"),
        (lambda: over(row_squares=torch.zeros(3)), "row_squares must be .* 4"),
        (lambda: over(row_squares=None), "row_squares must be"),
        (lambda: over(column_squares=torch.zeros(12)[::2]), "contiguous"),
        (lambda: ops.hardest_statistics_(v, *pairs._replace(diagonal=True).of_any_loss, *tables(5)), "square"),
        (lambda: ops.hardest_statistics_(v.half(), *told, *tables(5)), "float32 or float64"),
        (lambda: chain(v), "row_points is needed"),
        (lambda: chain(v, False, x, x[:3]), "d_rows must have 4 rows, got 3"),
        (lambda: chain(v, False, x, x.clone()), "column_points is needed"),
        (lambda: chain(v, False, x, x.clone(), y), "d_columns is needed"),
        (lambda: chain(v, False, x, x.clone(), y, y[:, :2].clone()), "d_columns must have 3 columns, got 2"),
        (lambda: chain(None, False, x, x.clone(), y, y.clone()), "out must not be v"),
        (lambda: ops.hardest_statistics_(v, *without, *tables(5)), "groups are needed"),
        (lambda: ops.hardest_statistics_(v, *told, *tables(4)), "row_table must have 5 rows, got 4"),
        (lambda: ops.hardest_statistics_(v, *told, tables(5)[0], None), "off the diagonal needs a column_table"),
        (lambda: ops.hardest_statistics_(v, *told, *tables(5, columns=5)), "column_table must have 6 columns"),
        (lambda: ops.hardest_statistics_(v, *told[:3], pairs.row_group[:3], *told[4:], *tables(5)), "row_group"),
        (lambda: ops.margin_contrastive_statistics_(v, *without, 1.0, True, *tables(2)), "groups are needed"),
        (lambda: ops.margin_contrastive_statistics_(v, *told, 1.0, True, *tables(3)), "row_table must have 2 rows"),
        (lambda: ops.margin_contrastive_weights_(v, v[:, :5].clone(), *told, 1.0, True, *tables(2)), "out must have"),
        (lambda: ops.margin_contrastive_weights_(v, v.clone(), *told, 1.0, True, *tables(2, rows=3)), "row_table"),
        (lambda: ops.batch_all_statistics_(v, *without, 1.0, *tables(2)), "groups are needed"),
        (lambda: ops.batch_all_statistics_(v, *told, 1.0, *tables(3)), r"row_table must have 2 \+ 2 p rows"),
        (lambda: ops.batch_all_statistics_(v, *told, 1.0, *tables(4, columns=7)), "column_table must have 6 columns"),
        (lambda: ops.semi_hard_statistics_(v, *without, *tables(3)), "groups are needed"),
        (lambda: ops.semi_hard_statistics_(v, *told, *tables(5)), r"row_table must have 3 \+ 3 p rows"),
        (lambda: ops.semi_hard_statistics_(v, *told, *tables(6, columns=7)), "column_table must have 6 columns"),
        (lambda: ops.semi_hard_statistics_(v, *told, tables(6)[0], None), "off the diagonal needs a column_table"),
        (lambda: ops.batch_all_weights_(v, v, *told, 1.0, *tables(4)), "out must not be v"),
        (lambda: ops.batch_all_weights_(v, v.double(), *told, 1.0, *tables(4)), "out must have the tile's dtype"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


def test_lifted_takes_the_softmax_passes():
    """Its roles mask the row's own group, itself included."""
    v, pairs = sample(65, 65, torch.float64)
    objective = Lifted()
    ours, expected = (objective.new_statistics(65, 65, v)[0] for _ in "ab")
    ops.softmax_statistics_(v.clone(), *pairs.of_any_loss, *objective.roles, ours, None)
    objective.update_statistics(v, pairs, expected, None)
    torch.testing.assert_close(ours[:2], expected[:2], rtol=1e-13, atol=1e-13)
