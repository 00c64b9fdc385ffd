"""A softmax's statistics by one exponential an entry (triton_kernels/sums.py), in Triton's interpreter, against fp64.

What is looked at are the tables: ``max + log(sum) / rate`` of every row and column, whether it was formed again against
its maximum, and the reference that W's exponentials share.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import value_and_gradients
from triton_harness import few_programs, interpreter, tolerance

from replearn_kernels import info_nce_loss
from replearn_kernels.objectives.base import empty_table
from replearn_kernels.triton_kernels import (
    SOFTMAX,
    SUP_CON,
    TileInputs,
    begin_sums,
    form_weights,
    shared_reference,
    update_by_sums,
)
from replearn_kernels.triton_kernels.configs import Config, use_config

pytestmark = interpreter

BLOCK = 32
BLOCKS = Config(BLOCK, BLOCK, 16, warps=4, stages=2, parts=2)
NOWHERE = 2**30
LARGEST_BOUND = 220 * math.log(2)  # of a logit, for which the sums are tried


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    few_programs(monkeypatch)


def unit_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def tables_of(x, y, scale: float, diagonal: int = 0, groups=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(max, sum, positive) of the rows and (max, sum) of the columns; with ``groups`` of the rows alone."""
    epilogue = SOFTMAX if groups is None else SUP_CON
    own = 0 if groups is None and diagonal == 0 else None
    of_rows, of_columns = (None, None) if groups is None else groups
    in_batch = groups is not None and diagonal == 0
    shape, scale = (len(x), len(y)), torch.tensor(scale)
    inputs = TileInputs.of(shape, scale, 0.0, None, of_rows, of_columns, diagonal=in_batch, own=own)
    row_table = empty_table(3, len(x), x.float())
    column_table = empty_table(2, len(y), x.float()) if groups is None else None
    with use_config(BLOCKS):
        update_by_sums(epilogue, x, y, inputs, begin_sums(epilogue, x, y), diagonal, row_table, column_table)
    return row_table, column_table


def logits_of(x, y, scale: float) -> torch.Tensor:
    return scale * x.double() @ y.double().t()


def bound_of(x, y, scale: float) -> float:
    return abs(scale) * x.double().norm(dim=1).max().item() * y.double().norm(dim=1).max().item()


def check_sums(table, logits, scale: float, bound: float) -> None:
    """To two units in the last place of the largest logit that rows of these lengths could have."""
    got = table[0].double() * abs(scale) + table[1].double().log()
    assert (got - logits.logsumexp(1)).abs().max() <= 2e-6 + bound * 2**-22


def check_tables(x, y, scale: float, diagonal: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = tables_of(x, y, scale, diagonal)
    logits, bound = logits_of(x, y, scale), bound_of(x, y, scale)
    check_sums(rows, logits, scale, bound)
    check_sums(columns, logits.t(), scale, bound)
    if diagonal == 0:
        own = logits.diagonal().sign() * logits.diagonal().abs() if scale else torch.zeros(len(x))
        assert (rows[2].double() * abs(scale) - own).abs().max() <= 1e-6 + bound * 2**-22
    return rows, columns


def formed_again(table: torch.Tensor) -> torch.Tensor:
    """Against its own maximum a sum of many is more than 1; the sums leave one of 1, to a rounding, where no positive
    is near."""
    return (table[1] - 1).abs() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-3, 14.3, 69.0, 100.0, 110.0, 300.0, 1000.0, -14.3, -100.0, -1000.0])
@pytest.mark.parametrize("n, m, d", [(33, 65, 48)])
def test_scales(scale, n, m, d):
    """Up to 69 nothing can underflow; beyond 152 the sums are not tried."""
    check_tables(unit_rows(n, d), unit_rows(m, d, 1), scale)
    rows, columns = check_tables(unit_rows(n, d), unit_rows(m, d, 1), scale, NOWHERE)
    if 0 < abs(scale) <= 69:  # a sum's maximum at a scale of 0 is any
        assert not formed_again(rows).any() and not formed_again(columns).any()
    if abs(scale) > LARGEST_BOUND:
        largest = (logits_of(unit_rows(n, d), unit_rows(m, d, 1), scale) / abs(scale)).amax(1)
        assert (rows[0] - largest).abs().max() <= 2**-22


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (1, 40, 3), (2, 2, 16), (32, 32, 16), (31, 97, 100)])
def test_sizes(n, m, d):
    check_tables(unit_rows(n, d), unit_rows(m, d, 1), 14.3)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, -100.0])
def test_a_row_that_knows_its_positive_loses_no_digits(scale):
    """Its loss is the difference of two near numbers, which each are right to some 2^-24 of the largest logit only."""
    x = unit_rows(40, 48)
    y = x if scale > 0 else -x
    rows, columns = check_tables(x, y, scale)
    logits = logits_of(x, y, scale)
    exact = (logits - logits.diagonal().unsqueeze(1)).logsumexp(1)
    for table in (rows, columns):
        loss = (table[0].double() - rows[2].double()) * abs(scale) + table[1].double().log()
        assert (loss - exact).abs().max() <= 2**-22 * max(exact.max(), 1)


def test_a_queue_has_no_positives():
    rows, _ = check_tables(unit_rows(40, 16), unit_rows(70, 16, 1), 14.3, NOWHERE)
    assert not rows[2].any()


def far_apart(n: int, far: int) -> torch.Tensor:
    """Unit rows around one direction, but row ``far`` opposite to it."""
    x = torch.zeros(n, 16)
    x[:, 0] = 1
    x[:, 1:] = 0.05 * torch.randn(n, 15, generator=torch.Generator().manual_seed(n))
    x[far, 0] = -1
    return F.normalize(x, dim=1)


@pytest.mark.parametrize("far_row, far_column", [(40, 5), (0, 69), (69, 33)])
def test_only_blocks_that_need_it_are_formed_again(far_row, far_column):
    """A row far from every column but one that is far too: its sum is that one's, and needs no other."""
    x, y = far_apart(70, far_row), far_apart(70, 0)
    y[0] = y[1]  # none is near the far row
    rows, columns = check_tables(x, y, 110.0, NOWHERE)
    block = torch.arange(70) // BLOCK
    assert torch.equal(formed_again(rows), block == far_row // BLOCK)
    assert not formed_again(columns).any()
    rows, columns = check_tables(y, far_apart(70, far_column), 110.0, NOWHERE)
    assert not formed_again(rows).any()
    assert torch.equal(formed_again(columns), block == far_column // BLOCK)


@pytest.mark.parametrize("cosine, again", [(-0.1, False), (-0.4, True)])
def test_formed_again_where_digits_may_be_lost(cosine, again):
    """At -0.4 the entries of a row are some 2^-122: there is a sum, but of what a GPU takes for 0 from 2^-126 on."""
    x, y = far_apart(70, 40), far_apart(70, 0)
    x[40], y[0] = 0, y[1]
    x[40, 0], x[40, 15] = cosine, (1 - cosine**2) ** 0.5
    y[:, 15] = 0
    rows, _ = check_tables(x, F.normalize(y, dim=1), 110.0, NOWHERE)
    assert formed_again(rows)[40] == again


def test_no_row_is_formed_again_for_a_far_one_that_has_a_near_column():
    rows, columns = check_tables(far_apart(70, 40), far_apart(70, 3), 110.0, NOWHERE)
    assert not formed_again(rows).any() and not formed_again(columns).any()


@pytest.mark.parametrize(
    "name, scale",
    [("lengths", 1e-4), ("lengths", 14.3), ("huge row", 14.3), ("huge column", 0.05), ("zeros", 14.3), ("two", 100.0)],
)
def test_lengths(name, scale):
    """The bound is of the longest rows: sums of short ones lie far below it."""
    x, y = unit_rows(40, 32), unit_rows(70, 32, 1)
    if name == "lengths":
        x, y = x * torch.logspace(-3, 3, 40).unsqueeze(1), y * torch.logspace(1, -1, 70).unsqueeze(1)
    elif name == "huge row":
        x[7] *= 1e6
    elif name == "huge column":
        y[69] *= 3e3
    elif name == "zeros":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    else:
        x[3], y[65] = 0, 0
    rows, _ = check_tables(x, y, scale)
    if name == "huge row":
        assert formed_again(rows)[8:32].any() and formed_again(rows)[32:].any()  # far beyond what is tried


def test_half_precision():
    x, y = unit_rows(40, 48).bfloat16(), unit_rows(70, 48, 1).bfloat16()
    check_tables(x, y, 100.0)


def test_tiles_fold_into_one_table():
    """Of a queue of 70 in tiles of 40 and 30, at scales with and without underflow."""
    x, y = far_apart(40, 7), far_apart(70, 0)
    for scale in (14.3, 110.0):
        table = empty_table(3, 40, x)
        for part in (y[:40], y[40:]):
            inputs = TileInputs.of((40, len(part)), torch.tensor(scale))
            with use_config(BLOCKS):
                update_by_sums(SOFTMAX, x, part, inputs, begin_sums(SOFTMAX, x, y), NOWHERE, table, None)
        check_sums(table, logits_of(x, y, scale), scale, bound_of(x, y, scale))


@pytest.mark.parametrize("scale", [14.3, 110.0, 1000.0, -14.3])
@pytest.mark.parametrize("columns, diagonal", [(40, 0), (50, -100), (50, 100)])
def test_groups(scale, columns, diagonal):
    """Rows with others of their groups: a tile holds all rows' pairs with themselves, which are none, or no row's."""
    x, y = far_apart(40, 35), far_apart(columns, 5)
    groups = [torch.randint(6, (n,), dtype=torch.int32) for n in (40, columns)]
    table, _ = tables_of(x, y, scale, diagonal, groups)
    v = math.copysign(1, scale) * x.double() @ y.double().t()
    own = torch.arange(40).unsqueeze(1) + diagonal == torch.arange(columns)
    check_sums(table, (v * abs(scale)).masked_fill(own, -torch.inf), scale, bound_of(x, y, scale))
    positives = torch.where((groups[0].unsqueeze(1) == groups[1]) & ~own, v, 0).sum(1)
    assert (table[2] - positives).abs().max() <= 40 * 2**-22


# -- the exponential that rows and columns share --------------------------------------------------------------------


def weights_at(apart: float, broken: float | None = None) -> tuple[torch.Tensor, ...]:
    """The reference, W, its exact values and the logits: the largest sum is 2^apart times the least.

    Row 0 meets every column at ``top``, row 1 at ``low``, and the others somewhere between.
    """
    n, scale = 70, 3.0
    top, low = apart / scale / math.log2(math.e), 0.0
    x = torch.zeros(n, 16, dtype=torch.float64)
    x[:, 0] = torch.linspace(0.4, 0.6, n) * top
    x[0, 0], x[1, 0] = top, low
    y = torch.zeros(n, 16, dtype=torch.float64)
    y[:, 0], y[:, 1] = 1, torch.linspace(-1, 1, n)
    x, y = x.float(), y.float()
    logits = logits_of(x, y, scale)
    tables = []
    for of, seed in ((logits, 0), (logits.t(), 1)):
        weight = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5
        maximum = of.amax(1)
        log_sum = (of - maximum.unsqueeze(1)).logsumexp(1)
        zero = torch.zeros(n)
        tables.append(torch.stack([(maximum / scale).float(), log_sum.float(), weight, zero, zero]))
    if broken is not None:
        tables[0][1, 9] = broken
    of_both = dict(zip(("row_table", "column_table"), tables))
    inputs = TileInputs.of((n, n), torch.tensor(scale), 0.0, torch.arange(n), **of_both)
    reference, w = shared_reference(inputs), torch.empty(n, 80)[:, :n]
    with use_config(BLOCKS):
        form_weights(SOFTMAX, x, y, inputs._replace(reference=reference), None, False, w, diagonal=0)
    lse, weight = ([t[k].double() for t in tables] for k in (0, 2))
    lse = [top.double() * scale + t[1].double() for top, t in zip(lse, tables)]
    exact = (logits - lse[0].unsqueeze(1)).exp() * weight[0].unsqueeze(1) + (logits - lse[1]).exp() * weight[1]
    return reference, w, exact, logits


@pytest.mark.parametrize("apart, shared", [(10.0, 1), (100.0, 1), (119.0, 1), (121.0, 0), (600.0, 0)])
def test_reference(apart, shared):
    """Sums up to 2^120 apart share it. W is right on either side, to the last digit of the largest logit."""
    reference, w, exact, logits = weights_at(apart)
    assert reference[1] == shared
    allowed = tolerance(torch.float32, logits.abs().max().item())
    assert ((w - exact).abs() <= allowed * exact.clamp(min=2**-100)).all()


@pytest.mark.parametrize("size, shared", [(4000.0, 1), (4200.0, 0), (3e9, 0)])
def test_no_reference_for_sums_whose_logarithms_have_too_few_digits(size, shared):
    """A GPU takes an exact product less the reference: the reference has to be as exact, to fractions of 1."""
    top = torch.full((3, 5), size / math.log2(math.e))
    top[1:] = 0
    inputs = TileInputs.of((5, 5), torch.tensor(1.0), row_table=top, column_table=top.clone())
    assert shared_reference(inputs)[1] == shared


def test_no_digits_are_lost_at_the_reference():
    """Sums that lie close together share an exponent near them: a tile's exponentials keep all digits."""
    _, w, exact, _ = weights_at(1.0)
    assert (w / exact - 1).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_reference_of_what_is_not_finite(value):
    reference, w, exact, _ = weights_at(10.0, broken=value)
    assert reference[1] == 0
    others = torch.arange(70) != 9
    assert (w / exact - 1)[others].abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-12, 14.3])
@pytest.mark.parametrize("shape, with_batch", [((5, 40, 48), True), ((40, 48), False), ((40, 48), True)])
def test_sums_meet_statistics_of_other_sources(shape, with_batch, scale):
    """Own negatives, and MoCo's own positives, come from PyTorch's passes, whose max is 0 at a scale of 0."""

    def loss(dtype: torch.dtype, backend: str) -> float:
        x, y, z = (t.to(dtype) for t in (unit_rows(5, 48), unit_rows(5, 48, 1), negatives))
        options = {"logit_scale": scale, "batch_negatives": with_batch, "backend": backend}
        with use_config(BLOCKS):
            return info_nce_loss(x, y, negatives=z, **options).item()

    negatives = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert loss(torch.float32, "triton") == pytest.approx(loss(torch.float64, "eager"), rel=2e-6)


@pytest.mark.parametrize("loss", ["clip", "sup_con", "siglip"])
def test_no_features(loss):
    x, labels = torch.zeros(5, 0), torch.arange(5) // 2
    with use_config(BLOCKS):
        results = [value_and_gradients(loss, x, x, labels, 10.0, backend=name) for name in ("eager", "triton")]
    for expected, got in zip(*results):
        assert torch.allclose(got, expected)


def test_a_nan_hides_no_length():
    """Of a program's rows the longest decides of the shift, though another is NaN: its sum must not overflow."""
    x, y = unit_rows(200, 48).bfloat16(), unit_rows(200, 48, 1).bfloat16()
    x[138] *= 40
    expected = info_nce_loss(x, y, logit_scale=9, reduction="none", backend="eager")
    x[10, 0] = math.nan
    with use_config(BLOCKS):
        loss = info_nce_loss(x, y, logit_scale=9, reduction="none", backend="triton")
    assert loss[10].isnan()
    others = torch.arange(200) != 10
    assert (loss - expected)[others].abs().max() <= 9 * 40 * 2**-7
