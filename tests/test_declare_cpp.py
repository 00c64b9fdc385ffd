"""Declared losses in C++: what is printed, what its vectors compute, how it is compiled, kept and loaded.

That the losses are right on this backend too is tested with the others, in test_declared_losses.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from declared_cases import Contrastive, Everything, Graded, Imitation
from metric_cases import small_batch_tiles

import replearn_kernels as rk
from replearn_kernels.declare import (
    PairLoss,
    cpp_passes,
    exp,
    fuse,
    log,
    logsumexp,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    total,
    where,
)
from replearn_kernels.declare.cpp_source import source_of
from replearn_kernels.declare.objective import objective_of
from replearn_kernels.engine import native
from replearn_kernels.engine.backends import warn_without_passes
from replearn_kernels.engine.problem import Pairs
from replearn_kernels.pair_losses.circle import Circle

pytestmark = pytest.mark.skipif(not native.available(), reason=f"cpp backend: {native.why_missing()}")

DTYPES = [torch.float32, torch.float64]
PRINTED = """\
// {name}: printed from the declaration of Circle. role_0: margin, role_1: gamma.
#include "declared_head.inl"

namespace {{

template <typename T>
struct Loss {{
  static constexpr int kTerms = 2, kParameters = 2;
  static constexpr int kRowValues = 0, kColumnValues = 0;
  static constexpr bool kReadsGuide = false;
  static constexpr Kind kKind[] = {{kLogSumExp, kLogSumExp}};
  static constexpr bool kHasSlope[] = {{true, true}};
  static constexpr int kFirstMean[] = {{0, 0, 0}};  // of what terms average or read
  static constexpr bool kOneSweep = false, kHasSides = false;
  T sign[kTerms], steepness[kTerms];  // of the terms' factors
  T number_0;
  T number_1;
  T number_2;
  T number_3;

  explicit Loss(DeclaredNumbers numbers) {{
    const double scale = numbers.scale, *role = numbers.parameters;
    (void)scale, (void)role;
    number_0 = T((1.0 + role[0]));
    number_1 = T((1.0 - role[0]));
    number_2 = T(role[1]);
    number_3 = T(role[0]);
    set_factor(0, role[1]);
    set_factor(1, role[1]);
  }}

  void set_factor(int k, double factor) {{
    steepness[k] = steepness_of<T>(factor);
    sign[k] = T(steepness[k] == 0 ? 0 : (factor > 0) - (factor < 0));
    if (steepness[k] == 0) steepness[k] = 1;
  }}

  template <bool Slopes>
  void of(const Pairs<T, kRowValues, kColumnValues>& pair, Vec<T>* rest, Bits<T>* over, Vec<T>* slope,
          Vec<T>* mean) const {{
    const Vec<T> s = pair.s;
    (void)s;
    const auto x0 = relu<T>((number_0 - s));
    const auto x1 = relu<T>((s + number_3));
    rest[0] = (x0 * (number_1 - s));
    over[0] = pair.same;
    if (Slopes) slope[0] = (number_2 * (-x0));
    rest[1] = (x1 * (s - number_3));
    over[1] = pair.other;
    if (Slopes) slope[1] = (number_2 * x1);
  }}
}};

}}  // namespace

#include "declared_kernels.inl"
"""


def test_the_text_of_a_loss():
    definition = objective_of(Circle(0.4, 80.0)).definition
    assert source_of(definition) == PRINTED.format(name=definition.name)


# -- values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Functions(PairLoss):
    """A total for every function, of numbers of any size; and what all pairs share, as far as it is no number."""

    a: float = 0.5

    def terms(self, s, pair):
        a = self.a
        of_a = {
            "exp": exp(a), "log": log(a), "sqrt": sqrt(a), "absolute": abs(a), "relu": relu(a), "softplus": softplus(a),
            "sigmoid": sigmoid(a), "minimum": minimum(a, 0.7), "maximum": maximum(a, 0.7), "divide": 3 / (a - 2),
            "greater": where(a > 0.7, 2, a), "less": where(~(a <= 0.7), 2, a),
        }  # fmt: skip
        values = {
            "exp": exp(s), "log": log(s), "sqrt": sqrt(s), "absolute": abs(s), "relu": relu(s), "softplus": softplus(s),
            "sigmoid": sigmoid(s), "minimum": minimum(s, self.a), "maximum": maximum(self.a, s), "divide": self.a / s,
            "where": where((s > self.a) | ~(s >= -1), s, -self.a),
            **{f"{name}_of_a": value * s for name, value in of_a.items()},
        }  # fmt: skip
        return {name: total(value) for name, value in values.items()}

    def loss(self, row):
        return sum(vars(row).values())


FUNCTIONS = list(objective_of(Functions()).definition.terms)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 88.5, 100.0, 710.0, -88.5, -710.0, 1e30, -1e30, 1e-30, 5e-39]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", [0.5, -3.0, 2.0, 40.0, math.nan])
def test_functions_of_any_number(dtype, a):
    """One similarity each: a pair's value is its row's total. To two units in the last place of torch's."""
    ordinary = torch.linspace(-20, 20, 101, dtype=torch.float64).tolist()
    s = torch.tensor([*ordinary, *SPECIAL], dtype=dtype)
    objective = objective_of(Functions())(False, [a])
    tables = [objective.new_statistics(len(s), 1, s) for _ in range(2)]
    pairs = Pairs(1.0, 0.0, None, None, None, 0, False)
    objective.update_statistics(s.unsqueeze(1), pairs, *tables[0])
    roles = objective.native_roles(dtype, pairs)
    torch.ops.replearn_kernels.declared_statistics_(s.unsqueeze(1), *pairs.of_any_loss, *roles, *tables[1])
    smallest = torch.finfo(dtype).smallest_normal
    for term, of_torch, ours in zip(FUNCTIONS, tables[0][0], tables[1][0]):
        of_torch = torch.where(of_torch.abs() < smallest, 0, of_torch)  # which vectors take for 0
        ours = torch.where(ours.abs() < smallest, 0, ours)
        torch.testing.assert_close(
            ours, of_torch, rtol=4 * torch.finfo(dtype).eps, atol=smallest, equal_nan=True,
            msg=lambda message, name=term.name: f"{name}: {message}",
        )  # fmt: skip


def everything(x, y, labels, backend, scale=3.0, **options):
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(scale, dtype=x.dtype)]
    leaves[2].requires_grad_()
    fused = fuse(Everything(), backend=backend, **options)
    value = fused(*leaves, query_group=labels[: len(x)], key_group=labels[: len(y)], target=labels[: len(x)] % len(y))
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_columns(dtype):
    """Whole vectors and every part of one, in the columns and in the rows."""
    generator = torch.Generator().manual_seed(0)
    for n, m in [*((5, m) for m in range(2, 40)), *((n, 19) for n in range(1, 12)), (70, 131), (129, 66)]:
        x, y = (torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (n, m))
        labels = torch.randint(0, 4, (max(n, m),), generator=generator)
        exact = everything(x, y, labels, "eager")
        ours = everything(x.to(dtype), y.to(dtype), labels, "cpp")
        plain = everything(x.to(dtype), y.to(dtype), labels, "torch")
        for truth, a, b in zip(exact, ours, plain):
            size = truth.norm().item()
            slack = (1e-12 if dtype == torch.float64 else 3e-6) * max(size, 1e-3)
            assert (a.double() - truth).norm() <= 1.5 * (b.double() - truth).norm() + slack, (n, m)


@pytest.mark.parametrize("loss", [rk.CircleLoss, lambda **k: fuse(Contrastive(), **k)])
def test_slabs_of_rows_with_themselves(loss):
    """Tiles of three slabs, on the diagonal and off it."""
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(300, 6, generator=generator, dtype=torch.float64), torch.arange(300) // 4
    results = []
    with small_batch_tiles(144):
        for backend in ("cpp", "eager"):
            leaf = x.clone().requires_grad_()
            value = loss(backend=backend)(leaf, labels)
            results.append([value.detach(), *torch.autograd.grad(value, leaf)])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@dataclass(frozen=True)
class Steep(PairLoss):
    factor: float

    def terms(self, s, pair):
        return {"all": logsumexp(self.factor * s), "own": logsumexp(self.factor * s, where=pair.target)}

    def loss(self, row):
        return row.all - row.own


@pytest.mark.parametrize("factor", [5e-324, 1e-46, 1e-38, 0.0, -0.0, 1e30, 1e39, -1e39])
def test_factors_beyond_fp32(factor):
    x = torch.eye(5).requires_grad_()
    y = 0.1 * torch.eye(5) + torch.ones(5, 5) / 40
    loss = fuse(Steep(factor), backend="cpp")(x, y)
    loss.backward()
    expected = math.log(5) if abs(factor) < 1 else 0.0 if factor > 0 else math.inf
    assert loss.item() == pytest.approx(expected) or (math.isinf(expected) and loss > 1e30)
    assert x.grad.isfinite().all() or abs(factor) > 1e38  # by which a gradient is multiplied


@pytest.mark.parametrize("scale", [0.0, -7.0, 1000.0])
def test_scales(scale):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.nn.functional.normalize(torch.randn(33, 6, generator=generator), dim=1).double() for _ in range(2))
    labels = torch.arange(33) // 3

    def step(backend):
        leaf, logit_scale = x.clone().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        loss = rk.multi_positive_clip_loss(leaf, y, logit_scale, image_group=labels, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, [leaf, logit_scale])]

    with small_batch_tiles(16):
        for ours, exact in zip(step("cpp"), step("eager")):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_the_same_bits_whatever_the_threads():
    x, labels, threads, results = torch.randn(600, 16), torch.arange(600) // 5, torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = rk.circle_loss(leaf, labels, backend="cpp")
            results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


SETS = """
import json, torch, replearn_kernels as rk
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(50, 12, generator=generator, dtype=torch.float64) for _ in range(2))
labels = torch.arange(50) // 3
results = []
for dtype in (torch.float32, torch.float64):
    leaf = x.to(dtype).requires_grad_()
    loss = rk.multi_similarity_loss(leaf, labels, backend="cpp")
    loss = loss + rk.hard_negative_loss(leaf, y.to(dtype), normalize=True, logit_scale=5.0, backend="cpp")
    loss.backward()
    results += [loss.item(), leaf.grad.tolist()]
print(json.dumps([torch.ops.replearn_kernels.instruction_set(), *results]))
"""


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set):
    import json

    environment = {**os.environ, "REPLEARN_KERNELS_INSTRUCTION_SET": instruction_set}
    done = subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True)
    if "must be one of" in done.stderr:
        pytest.skip(f"{instruction_set} does not run on this processor")
    assert done.returncode == 0, done.stderr
    name, *results = json.loads(done.stdout)
    assert name == instruction_set
    here = subprocess.run([sys.executable, "-c", SETS], capture_output=True, text=True, check=True)
    for ours, others, tolerance in zip(results, json.loads(here.stdout)[1:], (1e-5, 1e-5, 1e-12, 1e-12)):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(others), rtol=tolerance, atol=tolerance)


def test_compiled_as_one_graph():
    x, labels = torch.randn(40, 8, requires_grad=True), torch.arange(40) // 4
    for size in (40, 24, 33):
        given = x.detach()[:size].requires_grad_(), labels[:size]
        for backend in ("auto", "cpp"):
            loss = torch.compile(
                lambda x, labels, backend=backend: rk.circle_loss(x, labels, backend=backend), fullgraph=True,
                backend="aot_eager",
            )(*given)  # fmt: skip
            assert torch.equal(loss, rk.circle_loss(*given, backend="cpp"))


class Module(torch.nn.Module):
    def __init__(self, backend="auto"):
        super().__init__()
        self.loss = fuse(Small(), backend=backend)

    def forward(self, x):
        return self.loss(x, x, 2.0)


def test_a_first_call_inside_of_a_trace(folder):
    """No library's path in the program; and what runs elsewhere needs no compiler."""
    x = torch.eye(5)
    for backend in ("auto", "cpp"):
        for strict in (True, False):
            cpp_passes._found.cache_clear()
            exported = torch.export.export(Module(backend), (x,), strict=strict)
            calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
            assert not any("load_declared" in call or "instruction_set" in call for call in calls)
            (config,) = [node.args for node in exported.graph.nodes if "pair_loss" in str(node.target)]
            assert ("torch" if backend == "auto" else "cpp") in config
            assert exported.module()(x).item() == pytest.approx(EXPECTED)
    cpp_passes._found.cache_clear()
    assert torch.jit.trace(Module("cpp"), x)(x).item() == pytest.approx(EXPECTED)
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)


# -- compiled, kept and loaded --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small(PairLoss):
    """Quick to compile."""

    scaled = True

    def terms(self, logit, pair):
        return {"all": logsumexp(logit), "own": total(logit, where=pair.target)}

    def loss(self, row):
        return row.all - row.own


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and nothing found yet."""
    monkeypatch.setenv("REPLEARN_KERNELS_CACHE", str(tmp_path / "cache"))
    for known in (cpp_passes._found, cpp_passes._version, warn_without_passes):
        known.cache_clear()
    yield tmp_path / "cache"
    cpp_passes._found.cache_clear()


def small(x=torch.eye(5), **options) -> torch.Tensor:  # noqa: B008
    return fuse(Small(), **options)(x, x, 2.0)


EXPECTED = -2 + math.log(4 + math.exp(2))


def test_compiled_once_for_all_processes(folder, monkeypatch):
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)
    (library,) = folder.iterdir()
    assert library.name.startswith("Small-fp32-") and library.suffix == ".so"
    assert folder.stat().st_mode & 0o077 == 0
    cpp_passes._found.cache_clear()
    run = cpp_passes._run

    def without_compiling(command):
        assert command[-1] == "--version", "compiled again"
        return run(command)

    monkeypatch.setattr(cpp_passes, "_run", without_compiling)
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)


def test_another_compiler_makes_another_library(folder, monkeypatch):
    small(backend="cpp")
    cpp_passes._found.cache_clear()
    monkeypatch.setattr(cpp_passes, "_version", lambda compiler: "another")
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)
    assert len(list(folder.iterdir())) == 2


def test_without_a_compiler_torch_takes_its_place_and_says_so_once(folder, monkeypatch):
    monkeypatch.setenv("REPLEARN_KERNELS_CXX", "none")
    told = "Small could not be compiled: REPLEARN_KERNELS_CXX is none; on a CPU the slower"
    with pytest.warns(UserWarning, match=told):
        assert small().item() == pytest.approx(EXPECTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small().item() == pytest.approx(EXPECTED)
        assert small(backend="torch").item() == small(backend="eager").item() == pytest.approx(EXPECTED)
    with pytest.raises(RuntimeError, match="backend='cpp' is not available: the C.. of Small could not be compiled"):
        small(backend="cpp")


@pytest.mark.parametrize("compiler, message", [
    ("no-such-compiler", "there is no no-such-compiler, which REPLEARN_KERNELS_CXX or CXX asks for"),
    ("false", r"false --version failed \(1\)"),
    (f"{sys.executable} -c 'import sys; sys.exit(\"--version\" not in sys.argv)'", r"failed \(1\)"),
    ("c++ 'x", "No closing quotation"),
])  # fmt: skip
def test_a_compiler_that_does_not_work(compiler, message, folder, monkeypatch):
    monkeypatch.setenv("REPLEARN_KERNELS_CXX", compiler)
    with pytest.raises(RuntimeError, match=message):
        small(backend="cpp")
    assert not folder.exists() or not list(folder.iterdir())  # nothing is left of the attempt


@pytest.fixture
def compiler(folder, monkeypatch, tmp_path):
    """Makes one that does these lines of a shell in place of writing a library to $last."""

    def make(lines: str) -> None:
        script = tmp_path / "compiler"
        script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exit 0;; esac\nfor last; do :; done\n{lines}\n')
        script.chmod(0o700)
        monkeypatch.setenv("REPLEARN_KERNELS_CXX", str(script))

    return make


def test_a_killed_compiler_leaves_nothing_that_is_loaded(folder, compiler, monkeypatch):
    compiler("echo half > $last; kill -9 $$")
    with pytest.raises(RuntimeError, match=r"failed \(-9\)"):
        small(backend="cpp")
    assert not list(folder.iterdir())
    monkeypatch.delenv("REPLEARN_KERNELS_CXX")
    cpp_passes._found.cache_clear()
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)


def test_flags_that_hide_a_nan_are_not_taken(folder, monkeypatch):
    monkeypatch.setenv("REPLEARN_KERNELS_CXX", "c++ -ffast-math -Ofast")
    x = torch.eye(5)
    x[0, 0] = math.nan
    assert small(x, backend="cpp").isnan()
    assert torch.tensor(1e-30) * 1e-10 > 0  # nor does the library change how this thread rounds


def test_a_formula_of_rows_compiles_nothing(folder):
    small(backend="cpp")

    @dataclass(frozen=True)
    class Small(PairLoss):
        scaled = True

        def terms(self, logit, pair):
            return {"all": logsumexp(logit), "own": total(logit, where=pair.target)}

        def loss(self, row):
            return 2 * (row.all - row.own)

    assert fuse(Small(), backend="cpp")(torch.eye(5), torch.eye(5), 2.0).item() == pytest.approx(2 * EXPECTED)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("place, message", [
    ("relative/folder", "relative/folder is no absolute path; set REPLEARN_KERNELS_CACHE to a folder of yours"),
    ("/proc/nothing/here", "; set REPLEARN_KERNELS_CACHE to a folder of yours"),
])  # fmt: skip
def test_a_folder_that_cannot_be(place, message, folder, monkeypatch):
    monkeypatch.setenv("REPLEARN_KERNELS_CACHE", place)
    with pytest.raises(RuntimeError, match=message):
        small(backend="cpp")
    monkeypatch.setenv("REPLEARN_KERNELS_CACHE", "~/cache")
    monkeypatch.setenv("HOME", str(folder.parent))
    cpp_passes._found.cache_clear()
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)
    assert list(folder.iterdir())


@pytest.mark.parametrize("does, message", [("true", "wrote no library"), ("echo half > $last", "could not load")])
def test_a_compiler_that_lies(does, message, folder, compiler):
    compiler(does)
    with pytest.raises(RuntimeError, match=message):
        small(backend="cpp")
    assert not list(folder.iterdir())


def test_a_folder_that_others_may_write_to_is_refused(folder):
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="others may write to it"):
        small(backend="cpp")


def test_a_library_that_is_broken(folder):
    small(backend="cpp")
    (library,) = folder.iterdir()
    contents = library.read_bytes()
    library.unlink()  # this process has it in its memory
    library.write_bytes(contents[:1000])
    cpp_passes._found.cache_clear()
    assert small(backend="cpp").item() == pytest.approx(EXPECTED)  # compiled again


def test_two_processes_at_once(folder):
    code = "from test_declare_cpp import small; print(small(backend='cpp').item())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        assert float(process.communicate()[0]) == pytest.approx(EXPECTED)
    assert len(list(folder.iterdir())) == 1


def test_threads(folder):
    results = []
    threads = [threading.Thread(target=lambda: results.append(small(backend="cpp").item())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [pytest.approx(EXPECTED)] * 4


class TestOperators:
    """Nobody is meant to call them, and nothing segfaults."""

    ops = torch.ops.replearn_kernels
    pairs = (1.0, 0.0, None, None, None, 0, False)

    def test_of_no_passes(self):
        tables = torch.zeros(3, 4), None
        with pytest.raises(RuntimeError, match="there are no passes 123456"):
            parameters = torch.zeros(0, dtype=torch.float64)
            self.ops.declared_statistics_(torch.zeros(4, 4), *self.pairs, 123456, parameters, None, None, None, *tables)

    def test_of_another_dtype_or_shape(self):
        number, parameters = self.roles_of(Small())
        with pytest.raises(RuntimeError, match="of another dtype"):
            s = torch.zeros(4, 4, dtype=torch.float64)
            self.ops.declared_statistics_(s, *self.pairs, number, parameters, None, None, None, s, None)
        s, table = torch.zeros(4, 4), torch.zeros(3, 4)
        with pytest.raises(RuntimeError, match="row_table must have 3 rows, got 2"):
            self.ops.declared_statistics_(s, *self.pairs, number, parameters, None, None, None, table[:2], None)
        with pytest.raises(RuntimeError, match="parameters must be a contiguous float64 CPU tensor with 0 entries"):
            one = torch.zeros(1, dtype=torch.float64)
            self.ops.declared_statistics_(s, *self.pairs, number, one, None, None, None, table, None)

    def roles_of(self, loss):
        pairs = Pairs(*self.pairs)
        return objective_of(loss)(False, list(vars(loss).values())).native_roles(torch.float32, pairs)[:2]

    @pytest.mark.parametrize(
        ("rows", "columns", "message"),
        [
            (None, torch.zeros(2, 3), "row_values must be a tensor$"),
            (torch.zeros(2, 4), None, "column_values must be a tensor$"),
            (torch.zeros(1, 4), torch.zeros(2, 3), "row_values must have 2 rows, got 1"),
            (torch.zeros(2, 4), torch.zeros(2, 4), "column_values must have 3 columns, got 4"),
            (torch.zeros(2, 4), torch.zeros(2, 3).double(), "column_values must have the tile's dtype"),
        ],
    )
    def test_of_other_values(self, rows, columns, message):
        number, parameters = self.roles_of(Graded())
        s, tables = torch.zeros(4, 3), (torch.zeros(5, 4), None)
        with pytest.raises(RuntimeError, match=message):
            self.ops.declared_statistics_(s, *self.pairs, number, parameters, rows, columns, None, *tables)
        with pytest.raises(RuntimeError, match=message):
            self.ops.declared_weights_(s, s, *self.pairs, number, parameters, rows, columns, None, *tables)

    @pytest.mark.parametrize(
        ("loss", "guide", "message"),
        [
            (Imitation(), None, "guide must be a tensor$"),
            (Imitation(), torch.zeros(3, 4), "guide must have 4 rows, got 3"),
            (Imitation(), torch.zeros(4, 4).double(), "guide must have the tile's dtype"),
            (Small(), torch.zeros(4, 4), "guide must be none: the loss reads none"),
        ],
    )
    def test_of_another_guide(self, loss, guide, message):
        number, parameters = self.roles_of(loss)
        s, tables = torch.zeros(4, 4), (torch.zeros(2 if isinstance(loss, Imitation) else 3, 4), None)
        with pytest.raises(RuntimeError, match=message):
            self.ops.declared_statistics_(s, *self.pairs, number, parameters, None, None, guide, *tables)

    def test_of_no_library(self, tmp_path):
        with pytest.raises(RuntimeError, match="could not load"):
            self.ops.load_declared_passes(str(tmp_path / "none.so"), False)
