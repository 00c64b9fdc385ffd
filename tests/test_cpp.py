"""The C++ tile passes: the error of their exp, every instruction set, and operators that refuse bad arguments."""

import json
import os
import subprocess
import sys

import pytest
import torch

from replearn_kernels.engine.backends import native
from replearn_kernels.objectives.softmax import Softmax

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
ops = torch.ops.replearn_kernels


@pytest.mark.parametrize("dtype, lowest", [(torch.float32, -87.3), (torch.float64, -708.3)])
def test_exp_is_within_one_unit_in_the_last_place(dtype, lowest):
    x = torch.cat([torch.linspace(lowest, 0, 1_000_003), -torch.logspace(-10, 1, 100_003)]).to(dtype)
    error = ((ops.vector_exp(x).double() - x.double().exp()) / x.double().exp()).abs().max()
    assert error <= torch.finfo(dtype).eps


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


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 15), (4, 16), (65, 17), (130, 100), (64, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [7.0, -7.0])
@pytest.mark.parametrize("with_columns", [False, True])
def test_passes_equal_the_plain_pytorch_ones(rows, columns, dtype, scale, with_columns):
    """Two tiles folded into the same tables, targets inside and outside, an unaligned and padded tile."""
    objective = Softmax(symmetric=with_columns)
    like = torch.empty((), dtype=dtype)
    target = torch.randint(-3, columns + 5, (rows,))
    ours, expected = (objective.new_statistics(rows, columns, like) for _ in range(2))
    for _ in range(2):
        s = torch.randn(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]
        objective.update_statistics(s, scale, target, 2, *expected)
        ops.softmax_statistics_(s, scale, target, 2, *ours)
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-13, atol=1e-13)
    for a, b in zip(ours, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **close)

    rows_table = torch.rand(5, rows, dtype=dtype)
    rows_table[0] = expected[0][0]
    columns_table = torch.rand(4, columns, dtype=dtype)
    columns_table[0] = s.amax() + 1
    columns_table = columns_table if with_columns else None
    a, b = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=dtype)
    ops.softmax_weights_(s, a, scale, target, 2, rows_table, columns_table)
    objective.weights(s, b, scale, target, 2, rows_table, columns_table)
    torch.testing.assert_close(a, b, **close)
    in_place = s.clone()
    ops.softmax_weights_(in_place, in_place, scale, target, 2, rows_table, columns_table)
    assert torch.equal(in_place, a)


def test_operators_refuse_what_would_read_out_of_bounds():
    s, rows, columns = torch.randn(4, 6), torch.zeros(3, 4), torch.zeros(2, 6)
    target = torch.zeros(4, dtype=torch.int64)
    for arguments, message in [
        ((s.half(), 1.0, None, 0, rows, None), "float32 or float64"),
        ((s[0], 1.0, None, 0, rows, None), "2 dimensions"),
        ((s.t(), 1.0, None, 0, rows, None), "adjacent columns"),
        ((s, 1.0, target[:3], 0, rows, None), "one entry per row"),
        ((s, 1.0, target.int(), 0, rows, None), "int64"),
        ((s, 1.0, target, 0, rows[:2], None), "row_table must have 3 rows"),
        ((s, 1.0, target, 0, rows[:, :3], None), "row_table must have 4 columns"),
        ((s, 1.0, target, 0, rows.double(), None), "row_table must have the tile's dtype"),
        ((s, 1.0, target, 0, rows, columns[:, :5]), "column_table must have 6 columns"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.softmax_statistics_(*arguments)
    with pytest.raises(RuntimeError, match="out must have 4 rows"):
        ops.softmax_weights_(s, s[:3], 1.0, None, 0, torch.zeros(5, 4), None)
    with pytest.raises(RuntimeError, match="row_coefficients must have 5 rows"):
        ops.softmax_weights_(s, s, 1.0, None, 0, rows, None)
