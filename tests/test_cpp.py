"""The C++ tile passes: the error of their exp, every instruction set, and operators that refuse bad arguments."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from replearn_kernels.engine import native
from replearn_kernels.engine.problem import Pairs
from replearn_kernels.objectives import MarginSoftmax, Sigmoid, Softmax, SupCon

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
ops = torch.ops.replearn_kernels


@pytest.mark.parametrize("dtype, lowest", [(torch.float32, -87.3), (torch.float64, -708.3)])
def test_exp_is_within_one_unit_in_the_last_place(dtype, lowest):
    x = torch.cat([torch.linspace(lowest, 0, 1_000_003), -torch.logspace(-10, 1, 100_003)]).to(dtype)
    error = ((ops.vector_exp(x).double() - x.double().exp()) / x.double().exp()).abs().max()
    assert error <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_is_within_two_units_in_the_last_place(dtype):
    x = torch.cat([torch.linspace(0, 1, 1_000_003), torch.logspace(-30, 0, 100_003)]).to(dtype)
    exact = x.double().log1p()
    error = ((ops.vector_log1p(x).double() - exact) / exact.clamp(min=1e-300)).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps


def test_exp_of_special_values():
    x = torch.tensor([0.0, -0.0, float("-inf"), -1e30, -88.0, float("nan")])
    result = ops.vector_exp(x)
    assert result[:5].tolist() == [1, 1, 0, 0, 0] and result[5].isnan()


SETS = """
import json, torch, replearn_kernels
torch.manual_seed(0)
q, k = torch.randn(67, 19), torch.randn(67, 19)
results = [torch.ops.replearn_kernels.instruction_set()]
for dtype in (torch.float32, torch.float64):
    for symmetric in (False, True):
        x = q.detach().to(dtype, copy=True).requires_grad_()
        loss = replearn_kernels.info_nce_loss(x, k.to(dtype), logit_scale=3.0, symmetric=symmetric, backend="cpp")
        loss.backward()
        results.append([loss.item(), x.grad.flatten().tolist()])
print(json.dumps(results))
"""


@cache
def run_with(instruction_set: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": instruction_set}
    return subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(instruction_set):
    result = run_with(instruction_set)
    if "must be one of" in result.stderr:
        pytest.skip(f"{instruction_set} does not run on this processor")
    assert result.returncode == 0, result.stderr
    name, *results = json.loads(result.stdout)
    assert name == instruction_set
    _, *others = json.loads(run_with("").stdout)
    for (loss, grad), (other_loss, other_grad), tolerance in zip(results, others, (1e-5, 1e-5, 1e-13, 1e-13)):
        assert loss == pytest.approx(other_loss, rel=tolerance)
        torch.testing.assert_close(torch.tensor(grad), torch.tensor(other_grad), rtol=tolerance, atol=tolerance)


def test_unknown_instruction_set_is_refused():
    result = run_with("mmx")
    assert result.returncode != 0 and "must be one of" in result.stderr and "got mmx" in result.stderr


SIZES = [(1, 1), (3, 15), (4, 16), (65, 17), (130, 100), (64, 513)]
CLOSE = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.float64: dict(rtol=1e-13, atol=1e-13)}


def sample_pairs(rows, columns, dtype, scale, kind):
    """What a pass may know of its pairs: targets inside and outside, or groups of few members."""
    narrow = torch.int32 if dtype == torch.float32 else torch.int64
    target = torch.randint(-3, columns + 5, (rows,)) if kind != "groups" else None
    groups = (None, None)
    if kind != "target":
        groups = tuple(torch.randint(-2, 5, (size,)).to(narrow) for size in (rows, columns))
    return Pairs(scale, -1.5, target, *groups, 2, kind == "groups" and rows == columns)


def strided_tile(rows, columns, dtype):
    return torch.randn(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]


@pytest.mark.parametrize("rows, columns", [*SIZES, (65, 65)])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("scale", [7.0, -7.0, 0.0, 0.3])
@pytest.mark.parametrize(
    "objective, kind",
    [
        (Softmax(), "target"),
        (Softmax(symmetric=True), "target"),
        (Softmax(groups_ignored=True), "both"),
        (SupCon(), "groups"),
        (MarginSoftmax(0.5, angular=True), "target"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_softmax_passes_equal_the_plain_pytorch_ones(rows, columns, dtype, scale, objective, kind):
    """Two tiles folded into the same tables, of an unaligned and padded tile; scales near and far (ColumnExp)."""
    if objective.name == "margin_softmax":
        scale = abs(scale) + 0.5
    pairs, like = sample_pairs(rows, columns, dtype, scale, kind), torch.empty((), dtype=dtype)
    ours, expected = (list(objective.new_statistics(rows, columns, like)) for _ in range(2))
    if kind == "groups" and not pairs.diagonal:  # the columns are rows elsewhere
        ours[1], expected[1] = (objective.new_statistics(columns, columns, like)[0] for _ in range(2))
    for _ in range(2):
        s = strided_tile(rows, columns, dtype)
        objective.update_statistics(s.clone(), pairs, *expected)
        ops.softmax_statistics_(s.clone(), *pairs.of_any_loss, *objective.roles, *ours)
    for a, b in zip(ours, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **CLOSE[dtype])

    row_table, column_table = torch.rand(5, rows, dtype=dtype), None
    row_table[0] = expected[0][0]
    if objective.needs_columns:
        column_table = torch.rand(5, columns, dtype=dtype)
        column_table[0] = s.amax() + 1
    if not isinstance(objective, Softmax):
        row_table[4] = 0  # no label smoothing
    if isinstance(objective, SupCon):
        column_table[4] = 0
    if pairs.diagonal:
        column_table = row_table
    a, b = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=dtype)
    ops.softmax_weights_(s.clone(), a, *pairs.of_any_loss, *objective.roles, row_table, column_table)
    objective.weights(s.clone(), b, pairs, row_table, column_table)
    torch.testing.assert_close(a, b, **CLOSE[dtype])
    in_place = s.clone()
    ops.softmax_weights_(in_place, in_place, *pairs.of_any_loss, *objective.roles, row_table, column_table)
    assert torch.equal(in_place, a)


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("scale", [7.0, -1000.0, 0.0])
@pytest.mark.parametrize("kind", ["target", "groups"])
def test_sigmoid_pass_equals_the_plain_pytorch_one(rows, columns, dtype, scale, kind):
    objective = Sigmoid(by_group=kind == "groups")
    pairs = sample_pairs(rows, columns, dtype, scale, kind)._replace(diagonal=False)
    s = strided_tile(rows, columns, dtype)
    tables = [objective.new_statistics(rows, columns, s)[0] for _ in range(3)]
    for table in tables:
        table[2] = torch.linspace(-1, 2, rows, dtype=dtype)
    ours, expected = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=dtype)
    ops.sigmoid_statistics_(s, *pairs.of_any_loss, tables[0], None)
    ops.sigmoid_weights_(s, ours, *pairs.of_any_loss, tables[1], None)
    objective.weights(s, expected, pairs, tables[2], None)
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    torch.testing.assert_close(tables[0], tables[2], **CLOSE[dtype])
    assert torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 33, 100])
def test_mirror(n, dtype):
    """Of a part of a matrix, whose other elements stay."""
    whole = torch.randn(n + 3, n + 5, dtype=dtype)
    expected = whole.clone()
    square = expected[1 : n + 1, 2 : n + 2]
    square.copy_(square.triu() + square.triu(1).t())
    ops.mirror_(whole[1 : n + 1, 2 : n + 2])
    assert torch.equal(whole, expected)
    with pytest.raises(RuntimeError, match="as many columns as rows"):
        ops.mirror_(whole)


def test_operators_refuse_what_would_read_out_of_bounds():
    s, rows, columns = torch.randn(4, 6), torch.zeros(3, 4), torch.zeros(2, 6)
    target, groups = torch.zeros(4, dtype=torch.int64), [torch.zeros(n, dtype=torch.int32) for n in (4, 6)]

    def call(s, target, row_group, column_group, diagonal, rows, columns):
        ops.softmax_statistics_(s, 1.0, 0.0, target, row_group, column_group, 0, diagonal, False, False, rows, columns)

    for arguments, message in [
        ((s.half(), None, None, None, False, rows, None), "float32 or float64"),
        ((s[0], None, None, None, False, rows, None), "2 dimensions"),
        ((s.t(), None, None, None, False, rows, None), "adjacent columns"),
        ((s, target[:3], None, None, False, rows, None), "target must be a contiguous int64 .* per row"),
        ((s, target.int(), None, None, False, rows, None), "int64"),
        ((s, None, groups[0], None, False, rows, None), "go together"),
        ((s, None, groups[1], groups[1], False, rows, None), "row_group must be a contiguous int32 .* per row"),
        ((s, None, groups[0], groups[0], False, rows, None), "column_group must be .* per column"),
        ((s, None, groups[0].long(), groups[1], False, rows, None), "int32"),
        ((s, None, None, None, True, rows, None), "square"),
        ((s, None, None, None, False, rows[:2], None), "row_table must have 3 rows"),
        ((s, None, None, None, False, rows[:, :3], None), "row_table must have 4 columns"),
        ((s, None, None, None, False, rows.double(), None), "row_table must have the tile's dtype"),
        ((s, None, None, None, False, rows, columns[:, :5]), "column_table must have 6 columns"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
    pairs = (1.0, 0.0, None, None, None, 0, False)
    with pytest.raises(RuntimeError, match="out must have 4 rows"):
        ops.softmax_weights_(s, s[:3], *pairs, False, False, torch.zeros(5, 4), None)
    with pytest.raises(RuntimeError, match="row_coefficients must have 5 rows"):
        ops.softmax_weights_(s, s, *pairs, False, False, rows, None)
    with pytest.raises(RuntimeError, match="row_table must have 4 columns"):
        ops.sigmoid_weights_(s, s, *pairs, torch.zeros(3, 5), None)
