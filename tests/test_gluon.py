"""The kernels in Gluon (triton_kernels/hopper), interpreted on a CPU in random orders of events: against fp64, and with
mutations that have to be caught. gluon_interpreter.py tells what is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gluon_harness import interpreted, unwritten_is_nan
from gluon_interpreter import KernelError, schedule

from replearn_kernels.triton_kernels import TileInputs
from replearn_kernels.triton_kernels.configs import Ring

LOG2_E = 1 / math.log(2)
HEADROOM, LARGEST_SHIFT = 100.0, 120.0
SMALL = Ring(128, 64, 3)  # so few stages that a ring goes round often
ORDERS = 2
launchers = interpreted()


@dataclass
class Problem:
    """A tile: unit rows, groups if asked, tables of coefficients, and its W in fp64."""

    n: int
    m: int
    d: int
    scale: float = 10.0
    diagonal: int = 0
    groups: str = ""  # "any", or "sorted"
    columns: bool = True  # have statistics
    shared: bool = True  # rows and columns share an exponential
    uniform: bool = True  # rows of a group have the same positive weight
    dtype: torch.dtype = torch.bfloat16
    opposite: bool = False  # all similarities are near -1
    itself: bool = False  # the columns are the rows

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.n + 3 * self.m + 5 * self.d)
        query, key = (torch.randn(n, self.d, generator=generator) for n in (self.n, self.m))
        if self.opposite:
            query[:, 0] += 1000
            key[:, 0] -= 1000
        key = query if self.itself else key
        self.query, self.key = (F.normalize(x, dim=1).to(self.dtype) for x in (query, key))
        self.row_group = self.column_group = None
        self.columns = self.columns or bool(self.groups)
        if self.groups:
            self.row_group, self.column_group = (
                torch.arange(n, dtype=torch.int32) // 3 if self.groups == "sorted"
                else torch.randint(7, (n,), generator=generator, dtype=torch.int32)
                for n in (self.n, self.m)
            )  # fmt: skip
            self.column_group = self.row_group if self.itself else self.column_group
        self.row_table = self._table(self.n, self.v.amax(1), self.row_group, generator)
        self.column_table = self._table(self.m, self.v.amax(0), self.column_group, generator) if self.columns else None

    def _table(self, n: int, top: Tensor, group: Tensor | None, generator) -> Tensor:
        table = torch.rand(5, n, generator=generator)
        table[0] = top
        if group is not None and self.uniform:
            table[3] = (1 + group.float()).reciprocal()
        return table

    @cached_property
    def s(self) -> Tensor:
        return self.query.double() @ self.key.double().t()

    @property
    def v(self) -> Tensor:
        return self.s if self.scale >= 0 else -self.s

    @property
    def here(self) -> Tensor:
        """Entries of a row with its own number."""
        return torch.arange(self.m) == torch.arange(self.n).unsqueeze(1) + self.diagonal

    @property
    def same(self) -> Tensor:
        return (self.row_group.unsqueeze(1) == self.column_group) & ~self.here

    def _share(self, table: Tensor, v: Tensor) -> Tensor:
        return ((v - table[0].double()) * abs(self.scale)).exp() * (table[2] * (-table[1]).exp()).double()

    @property
    def w(self) -> Tensor:
        w = self._share(self.row_table, self.v.t()).t()
        if self.columns:
            w = w + self._share(self.column_table, self.v)
        if not self.groups:
            return torch.where(self.here, w - self.row_table[3].double().unsqueeze(1), w)
        positive = self.row_table[3].double().unsqueeze(1) + self.column_table[3].double()
        return torch.where(self.same, w - positive, w).masked_fill(self.here, 0)

    @property
    def reference(self) -> float:
        return (-1 if self.opposite else 0.4) * abs(self.scale) * LOG2_E

    @property
    def inputs(self) -> TileInputs:
        return TileInputs.of(
            (self.n, self.m), torch.tensor(self.scale), row_group=self.row_group, column_group=self.column_group,
            row_table=self.row_table, column_table=self.column_table,
            reference=torch.tensor([self.reference, float(self.shared)]), diagonal=self.itself,
        )  # fmt: skip

    @property
    def shares(self) -> tuple[Tensor, Tensor | None]:
        """NaN where nobody may read them."""

        def share(table: Tensor | None) -> Tensor | None:
            if table is None or not self.shared:
                return None if table is None else torch.full_like(table[:1], math.nan)
            exponent = table[0] * abs(self.scale) * LOG2_E - self.reference + table[1] * LOG2_E
            return (table[2] * torch.exp2(-exponent)).unsqueeze(0)

        return share(self.row_table), share(self.column_table)

    @property
    def ranges(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.groups:
            return None, None
        return tuple(
            torch.stack([torch.stack(group[start : start + 128].aminmax()) for start in range(0, len(group), 16)])
            for group in (self.row_group, self.column_group)
        )


def check_sums(problem: Problem, ring: Ring = SMALL, module=launchers) -> Tensor:
    """Returns the shift."""
    p = problem
    largest = torch.zeros(2, 4)
    largest[0, 1], largest[1, 2] = (x.double().square().sum(1).max() for x in (p.query, p.key))
    with unwritten_is_nan():
        of_rows, of_columns, shift = module.launch_sums(
            p.query, p.key, p.inputs, p.ranges, largest, p.diagonal, p.columns, ring, HEADROOM, LARGEST_SHIFT
        )
    if shift > LARGEST_SHIFT:  # not tried: there is nothing to read
        return shift
    bound = abs(p.scale) * LOG2_E * largest.amax(1).sqrt().prod()
    assert shift == max(math.ceil(bound - HEADROOM), 0)
    e = torch.exp2(p.s * p.scale * LOG2_E - shift.double())
    e = e.masked_fill(p.here, 0) if p.groups else e
    rounding = 1e-6 + bound * 2**-23
    assert (of_columns is not None) == (p.columns and not p.inputs.diagonal)
    for axis, found in ((1, of_rows), (0, of_columns)):
        if found is None:
            continue
        sums = e.sum(axis)
        assert ((found.sums.double().sum(0) - sums).abs() <= rounding * sums).all(), f"sums, {axis=}"
        positives, own = found.positives.double(), p.v.masked_fill(~p.here, 0).sum(1)
        if p.groups:
            error = positives.sum(0) - p.v.masked_fill(~p.same, 0).sum(axis)
        else:
            error = (positives - own)[p.here.any(1)]
        assert (error.abs() <= 1e-5).all(), f"positives, {axis=}"
    return shift


def check_weights(problem: Problem, ring: Ring = SMALL, module=launchers) -> None:
    p = problem
    whole = torch.full((p.n, p.m + 24 - p.m % 8), math.nan, dtype=p.dtype)
    out = whole[:, : p.m]
    module.launch_weights(p.query, p.key, p.inputs, p.ranges, p.shares, p.uniform, p.diagonal, out, ring)
    assert whole[:, p.m :].isnan().all(), "beyond a row's end"
    unit, logits = torch.finfo(p.dtype).eps / 2, 1e-5 + abs(p.scale) * 2**-22  # W is rounded once, logits to fp32
    error = (out.double() - p.w).abs()
    assert (error <= (1.02 * unit + logits) * p.w.abs() + logits * p.w.abs().max()).all(), "W"


def check_gradients(problem: Problem, ring: Ring = SMALL, module=launchers) -> None:
    p = problem
    for own, other, w, transposed in ((p.query, p.key, p.w, False), (p.key, p.query, p.w.t(), True)):
        gradient = torch.ones(len(own), p.d)
        module.launch_gradient(
            own, other, p.inputs, p.ranges, p.shares, p.uniform, p.diagonal, gradient, ring, transposed=transposed
        )
        error = (gradient.double() - 1 - w @ other.double()).abs()
        unit = torch.finfo(p.dtype).eps / 2
        assert (error <= unit * (w.abs() @ other.double().abs()) + 1e-5).all(), f"{transposed=}"


KERNELS = {"sums": check_sums, "weights": check_weights, "gradients": check_gradients}
PROBLEMS = {
    "one row": Problem(1, 1, 16),
    "ragged": Problem(65, 257, 48),
    "several regions": Problem(700, 130, 64),
    "negative scale": Problem(257, 130, 112, scale=-10.0),
    "one direction": Problem(130, 70, 16, columns=False),
    "no diagonal": Problem(140, 140, 32, diagonal=2**30),
    "diagonal ahead": Problem(200, 330, 64, diagonal=129),
    "diagonal behind": Problem(330, 200, 64, diagonal=-129),
    "not shared": Problem(200, 140, 64, shared=False),
    "one direction, not shared": Problem(130, 70, 16, columns=False, shared=False),
    "batch": Problem(300, 300, 48, groups="any"),
    "batch in order": Problem(400, 400, 64, groups="sorted"),
    "batch, any weights": Problem(300, 300, 128, groups="any", uniform=False),
    "batch, not shared": Problem(150, 150, 48, groups="any", shared=False),
    "above a batch's diagonal": Problem(160, 224, 48, groups="sorted", diagonal=-160, uniform=False),
    "one block with itself": Problem(65, 65, 48, groups="any", itself=True),
    "two blocks with themselves": Problem(190, 190, 64, groups="sorted", itself=True),
    "three blocks with themselves": Problem(300, 300, 48, groups="any", itself=True),
    "six blocks with themselves": Problem(700, 700, 16, groups="sorted", itself=True),
    "a batch in order, negative scale": Problem(300, 300, 48, groups="sorted", itself=True, scale=-10.0),
    "a column too few": Problem(130, 127, 48),
    "half precision": Problem(130, 200, 128, dtype=torch.float16),
    "scale of 300": Problem(70, 70, 32, scale=300.0, shared=False),
    "opposite": Problem(130, 200, 64, scale=300.0, opposite=True),
    "wide": Problem(130, 140, 320),
    "widest": Problem(140, 130, 512),
}


@pytest.mark.parametrize("order", range(ORDERS))
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel, problem, order):
    if kernel == "gradients" and problem.d > 128:
        pytest.skip("rows of so many features do not fit")
    with schedule(order):
        KERNELS[kernel](problem)


@pytest.mark.parametrize("kernel, ring", [
    ("sums", Ring(128, 64, 8)), ("sums", Ring(128, 64, 2)), ("sums", Ring(64, 128, 3)), ("sums", Ring(256, 64, 4)),
    ("weights", Ring(128, 64, 8)), ("weights", Ring(64, 128, 3)),
    ("gradients", Ring(128, 128, 4)), ("gradients", Ring(128, 64, 8)), ("gradients", Ring(128, 128, 2)),
])  # fmt: skip
def test_rings(kernel, ring):
    with schedule(1):
        KERNELS[kernel](Problem(400, 600, 128), ring)


@pytest.mark.parametrize("kernel, ring", [("sums", Ring(256, 64, 3)), ("weights", Ring(256, 64, 3))])
def test_blocks_of_two_spans(kernel, ring):
    """Of which groups have ranges."""
    with schedule(2):
        KERNELS[kernel](Problem(400, 400, 32, groups="sorted"), ring)


@pytest.mark.parametrize("n, ring, programs", [(700, Ring(128, 64, 3), 18), (1150, Ring(128, 128, 2), 27)])
def test_half_in_uneven_regions(n, ring, programs):
    """Of as many programs as one has visits the last region has fewer."""
    module = interpreted([("launch", "resident_programs(ring, device)", str(programs))])
    with schedule(3):
        check_sums(Problem(n, n, 16, groups="sorted", itself=True), ring, module)


def test_a_shift_too_large():
    """Nothing is even loaded: the interpreter would miss that it is read."""
    with schedule(0):
        assert check_sums(Problem(70, 70, 32, scale=1000.0)) > LARGEST_SHIFT


STATISTICS = "sums", Problem(700, 130, 128)
ITSELF = "sums", Problem(190, 190, 64, groups="sorted", itself=True)
W = "weights", Problem(440, 300, 128, diagonal=5)
BATCH = "weights", Problem(400, 400, 64, groups="sorted")
NARROW = "gradients", Problem(300, 700, 64, diagonal=5)
OPPOSITE = "gradients", Problem(130, 200, 64, scale=300.0, opposite=True)
NARROW_BATCH = "gradients", Problem(400, 400, 64, groups="sorted")
TURN = "    mbarrier.wait(turn.index(CONSUMER), ((visit // 2) & 1) ^ (1 - CONSUMER))\n"
PASS = "            mbarrier.arrive(turn.index(1 - CONSUMER), count=1)\n"
RELEASE = "            mbarrier.arrive(empty.index((chunk + k - 1) % STAGES), count=1)\n"
WAIT = "    s = warpgroup_mma_wait(0, deps=(s,))\n"
LAST = "    mbarrier.arrive(empty.index((chunk + CHUNKS - 1) % STAGES), count=1)\n"
SECOND = "            sums = warpgroup_mma_wait(0, deps=(running,))\n"
AFTER = "            mbarrier.arrive(empty.index(before), count=1)\n"
STORE = "        store_block(w, buffer, into, start, own_start)\n"
MUTATIONS = {
    "no turns": (STATISTICS, "ring", TURN, ""),
    "a turn never passed on": (STATISTICS, "ring", PASS, "            pass\n"),
    "a turn's parity wrong": (STATISTICS, "ring", "^ (1 - CONSUMER))", "^ CONSUMER)"),
    "a visit's last chunk not released": (STATISTICS, "ring", LAST, ""),
    "a chunk released one product early": (STATISTICS, "ring", RELEASE, RELEASE.replace("k - 1", "k")),
    "the last chunk released before its products are over": (STATISTICS, "ring", WAIT + LAST, LAST + WAIT),
    "full not awaited": (
        STATISTICS, "ring", "mbarrier.wait(full.index(stage), ((chunk + k) // STAGES) & 1)", "pass"
    ),
    "empty not awaited": (STATISTICS, "ring", "mbarrier.wait(empty.index(stage), ((chunk // STAGES) & 1) ^ 1)", "pass"),
    "empty's parity wrong": (STATISTICS, "ring", "((chunk // STAGES) & 1) ^ 1)", "(chunk // STAGES) & 1)"),
    "own block not awaited": (STATISTICS, "sums", "        mbarrier.wait(arrived, 0)\n", "        pass\n"),
    "half of the bytes expected": (STATISTICS, "ring", "other_rows.block_type", "0 * other_rows.block_type"),
    "column sums of both consumers in one place": (
        STATISTICS, "sums", "of_columns_too = of_columns + columns", "of_columns_too = of_columns"
    ),
    "row sums of all column blocks in one place": (
        STATISTICS, "sums", "part.to(gl.int64) * rows + row", "row"
    ),
    "rows past the edge in the columns' sums": (
        STATISTICS, "sums", "gl.where(row < rows, shift, BEYOND)", "gl.where(row < rows, shift, shift)"
    ),
    "columns past the edge in the rows' sums": (STATISTICS, "sums", "if last < BLOCK_N:", "if last < 0:"),
    "a block with itself in the columns' sums": (ITSELF, "sums", "(part > 0) & ", ""),
    "blocks visited by each other in the columns' sums": (ITSELF, "sums", "2 * part <", "2 * part <="),
    "no way from the last block to the first": (ITSELF, "sums", "first, blocks, first * 0,", "first, blocks, first,"),
    "a block too few": (ITSELF, "sums", "// BLOCK_N // 2 + 1)", "// BLOCK_N // 2)"),
    "columns' positives of both consumers in one place": (
        ITSELF, "sums", "of_positives_too = of_positives + columns", "of_positives_too = of_positives"
    ),
    "second visits by the wrong consumer": (W, "weights", "(blocks + CONSUMER) % 2", "CONSUMER"),
    "second visits to other blocks": (W, "ring", "second + visit - blocks)", "first + visit - blocks)"),
    "the diagonal's blocks one short": (W, "ring", "start + OWN, 0) + OTHER - 1", "start + OWN, 0)"),
    "blocks on the diagonal stored twice": (
        W, "weights", "if is_on_diagonal(start, own_start, diagonal, BLOCK_M, BLOCK_N) == 0:", "if start >= 0:"
    ),
    "a buffer filled before its store is over": (
        W, "weights", "    tma.store_wait(0)  # what left the buffer before\n", ""
    ),
    "one buffer for both": (W, "weights", "written.index(CONSUMER)", "written.index(0)"),
    "no wait for the last store": (W, "weights", STORE + "    tma.store_wait(0)\n\n", STORE + "\n"),
    "no positives": (W, "weights", "gl.where(here, w - column_of(positive), w)", "w"),
    "ranges of groups that never meet": (
        BATCH, "ring", "(least <= other_largest) & (other_least <= largest)", "(least < 0)"
    ),
    "the range of other rows": (BATCH, "ring", "* RANGES[1]) // RANGES[0]", "* RANGES[1]) // RANGES[0] + 8"),
    "a row is its own positive": (BATCH, "weights", "w = gl.where(here, 0.0, w)", "pass"),
    "a stage is empty when one has read it": (NARROW, "ring", "count=READERS", "count=1"),
    "a stage released before its products are over": (NARROW, "gradients", SECOND + AFTER, AFTER + SECOND),
    "the last stage of the first loop not released": (
        NARROW, "gradients", "        mbarrier.arrive(empty.index(final), count=1)\n", ""
    ),
    "products with the next block": (NARROW, "gradients", "(w, other.index(before)", "(w, other.index(stage)"),
    "the diagonal in both loops": (NARROW, "gradients", "gl.where(on_diagonal, BEYOND, reference)", "reference"),
    "the diagonal of the other consumer too": (
        NARROW, "gradients", "all_of_it | is_on_diagonal", "(start >= 0) | is_on_diagonal"
    ),
    "the last block in the first loop": (
        OPPOSITE, "gradients", "gl.minimum(there, other_count // BLOCK_N - first)", "there"
    ),
    "the last block left out": (NARROW, "gradients", "more += 1", "more += 0"),
    "the last block twice": (NARROW, "gradients", "& ((near == 0) | (second + near <= last))", ""),
    "the last block for nothing": (NARROW, "gradients", " | (start + BLOCK_N > other_count)", ""),
    "both consumers write the same rows": (NARROW, "gradients", "block_start + CONSUMER * BLOCK_M", "block_start"),
    "positives of the diagonal in the first loop": (NARROW_BATCH, "gradients", " & (on_diagonal == 0)", ""),
}


@pytest.mark.parametrize("case, file, old, new", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_mutations(case, file, old, new):
    """Each of these is a fault that some order of events shows, or all do."""
    kernel, problem = case
    module = interpreted([(file, old, new)])
    for order in range(20):
        try:
            with schedule(order):
                KERNELS[kernel](problem, module=module)
        except (KernelError, AssertionError):
            return
    pytest.fail("not caught")
