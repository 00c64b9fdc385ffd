"""The largest and the smallest of a row's pairs: which pair it is, and what comes of ties, NaN and single rows.

Values and gradients are those of the cases in declared_cases.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from declared_cases import inputs_of
from hardest_toys import Among, Scaled, Shifted, Triplets, Violation
from metric_cases import LABELS, small_batch_tiles
from torch import Tensor

from replearn_kernels import count_work
from replearn_kernels.declare import PairLoss, fuse, largest, smallest, total
from replearn_kernels.declare.given import _numbers
from replearn_kernels.declare.objective import objective_of

BACKENDS = ["eager", "torch", "cpp"]


@dataclass(frozen=True)
class Extremes(PairLoss):
    """Both, of pairs that are told apart by a number of theirs."""

    column_values = ("weight",)

    def terms(self, s, pair):
        x = s * pair.column.weight
        return {"most": largest(x), "least": smallest(x)}

    def loss(self, row):
        return row.most + 2 * row.least


def gradients(x: Tensor, y: Tensor, weight: Tensor, backend: str, **options) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    loss = fuse(Extremes(), backend=backend, **options)(*leaves, column_values={"weight": weight})
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 1, 15, 16, 17, 63, 64, 511, 512, 1023, 1024, 1300])
def test_a_pair_in_every_lane_and_tile(place, dtype, backend):
    """One key is the largest and its neighbour the smallest of all, wherever they stand."""
    x, y = torch.ones(3, 1, dtype=dtype), torch.rand(1302, 1, dtype=dtype)
    y[place], y[place + 1] = 5, -5
    _, _, of_keys = gradients(x, y, torch.ones(1302), backend, reduction="sum")
    expected = torch.zeros_like(y)
    expected[place], expected[place + 1] = 3, 6
    assert torch.equal(of_keys, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_budget", [0, 2**28])
def test_of_equal_pairs_the_first_has_the_gradient(memory_budget, backend):
    y = torch.arange(6.0).repeat(300).unsqueeze(1)  # 5 at 5, 11, ..., 0 at 0, 6, ...
    x = torch.ones(40, 1)
    _, _, of_keys = gradients(x, y, torch.ones(1800), backend, reduction="sum", memory_budget=memory_budget)
    assert of_keys.nonzero()[:, 0].tolist() == [0, 5]
    assert of_keys[[0, 5], 0].tolist() == [80, 40]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_pairs_of_a_batch_the_first_has_the_gradient(backend):
    """A row meets those before it in other rows' tiles: the order of the tiles does not tell."""
    x, labels = torch.eye(2).repeat_interleave(20, 0).requires_grad_(), torch.arange(40) // 20
    loss = fuse(_Nearest(), backend=backend, reduction="none")
    for tiles in (8, 64):
        with small_batch_tiles(tiles):
            (gradient,) = torch.autograd.grad(loss(x, labels)[25], x)
        assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == [20, 25]


@dataclass(frozen=True)
class _Nearest(PairLoss):
    batch = True

    def terms(self, s, pair):
        return {"nearest": largest(s + s**2, where=pair.same)}

    def loss(self, row):
        return row.nearest * 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_no_pair(backend):
    """Values -inf and inf, and no gradient, whatever the loss makes of them."""
    seen = {}

    @dataclass(frozen=True)
    class Nothing(PairLoss):
        def terms(self, s, pair):
            far = pair.every & (s > 100)
            return {"most": largest(s, where=far), "least": smallest(s, where=far), "own": total(s, where=pair.target)}

        def loss(self, row):
            seen.update(most=row.most.detach(), least=row.least.detach())
            return row.own + row.most.clamp(min=-1) + row.least.clamp(max=1)

    x = torch.randn(5, 4, requires_grad=True)
    fuse(Nothing(), backend=backend)(x, x.detach()).backward()
    assert (seen["most"] == -math.inf).all()
    assert (seen["least"] == math.inf).all()
    torch.testing.assert_close(x.grad, x.detach() / 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 7, 20])
def test_a_nan_is_the_largest(place, backend):
    """In value and gradients, for all rows that meet it."""
    x, y, weight = torch.ones(3, 2), torch.rand(21, 2), torch.ones(21)
    y[place, 1] = math.nan
    value, of_rows, _ = gradients(x, y, weight, backend)
    assert value.isnan()
    assert of_rows.isnan().any(1).all()


@pytest.mark.parametrize("tiles", [8, 64])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_pair_that_is_nan_alone_is_the_one_with_the_gradient(tiles, backend):
    """Of several the first, as torch's max has it; the parameter's gradient is that pair's, too."""
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(24, 3, generator=generator, dtype=torch.float64), torch.arange(24) % 3
    shift = {"shift": torch.zeros(24).index_fill(0, torch.tensor([4, 19]), math.nan)}
    results = []
    for name in (backend, "eager"):
        leaf, power = x.clone().requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        with small_batch_tiles(tiles):
            loss = fuse(Shifted(power), backend=name, reduction="none")(leaf, labels, row_values=shift)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (leaf, power))))
    assert results[0][0].isnan().any()
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [0.0, -0.0, -1.0])
def test_a_factor_of_0_leaves_ties(power, backend):
    """All values are alike then, and of these the first has the gradient."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0], [4.0]])
    learned = torch.tensor(power, requires_grad=True)
    fuse(Scaled(learned), backend=backend, reduction="sum")(x, y).backward()
    assert learned.grad == 18


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_threads_do_not_tell(backend):
    x, _, labels, _ = inputs_of(700, 8, LABELS["eights"](700), dtype=torch.float32)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        loss = fuse(Triplets(), backend=backend)(leaf, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_two_sweeps_of_work():
    x, y, labels, scale = inputs_of(64, 16, torch.arange(64) % 9, dtype=torch.float32)
    for call, units in (
        (lambda: fuse(Among(), memory_budget=0)(x.requires_grad_(), y, scale, query_group=labels, key_group=labels), 2),
        (lambda: fuse(Violation(), memory_budget=0)(x.requires_grad_(), y, scale), 3),
    ):
        with count_work() as work:
            call().backward()
        assert work.units(64, 64, 16) == units


def test_numbers_are_those_of_all_ranks():
    """They rise from rank to rank, and a rank that has too many says so."""

    class OfRank:
        def __init__(self, rank: int, size: int):
            self.rank, self.size = rank, size

    cpu = torch.device("cpu")
    assert _numbers(3, torch.float32, cpu, None).tolist() == [0, 1, 2]
    assert _numbers(2, torch.float32, cpu, OfRank(3, 4)).tolist() == [3 * 2**22, 3 * 2**22 + 1]
    full = _numbers(2**22, torch.float32, cpu, OfRank(3, 4))
    assert full[-1] == 2**24 - 1
    assert full.unique().numel() == 2**22
    with pytest.raises(ValueError, match="at most 4,194,304 others on each rank in torch.float32, got 4,194,305"):
        _numbers(2**22 + 1, torch.float32, cpu, OfRank(0, 4))
    assert _numbers(2, torch.float64, cpu, OfRank(1, 2)).tolist() == [2**52, 2**52 + 1]


def test_numbers_are_there_where_they_are_needed():
    assert objective_of(Among()).definition.row_values == ()
    assert objective_of(Among()).definition.column_values == ("_number",)
    assert objective_of(Triplets()).definition.row_values == objective_of(Triplets()).definition.column_values
    assert objective_of(Violation()).definition.row_values == ("_number",)
    assert not objective_of(Triplets()).definition.has_sides


def test_the_smallest_is_told_from_the_largest_of_the_negative():
    names = set()
    for term in (lambda s: smallest(s), lambda s: largest(-s)):
        members = {"terms": lambda self, s, pair, term=term: {"t": term(s)}, "loss": lambda self, row: row.t * 1.0}
        names.add(objective_of(dataclass(frozen=True)(type("One", (PairLoss,), members))()).name)
    assert len(names) == 2


def test_one_graph_for_all_sizes():
    compiled = torch.compile(fuse(Violation()), fullgraph=True, dynamic=True)
    for n in (12, 15, 9):
        x, y, _, scale = inputs_of(n, 4, torch.arange(n), dtype=torch.float32)
        x.requires_grad_()
        ours, plain = (torch.autograd.grad(loss(x, y, scale), x) for loss in (compiled, fuse(Violation())))
        torch.testing.assert_close(ours, plain)
