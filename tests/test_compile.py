"""One graph for every batch size: torch.compile, torch.export, torch.jit.trace; and what a trace or an import meets."""

import importlib
import inspect
import io
import itertools
import pkgutil
import subprocess
import sys
import warnings

import pytest
import torch
from accuracy import unit_rows
from torch._dynamo.testing import CompileCounterWithBackend

import replearn_kernels
from replearn_kernels import (
    arcface_loss,
    circle_loss,
    clip_loss,
    contrastive_loss,
    cosface_loss,
    cosine_similarity_loss,
    decoupled_contrastive_loss,
    dino_head_loss,
    dino_loss,
    gist_loss,
    hard_negative_loss,
    info_nce_loss,
    lifted_structure_loss,
    mine_triplets,
    multi_positive_clip_loss,
    multi_similarity_loss,
    n_pair_loss,
    nt_xent_loss,
    pair_logsumexp,
    sampled_softmax_loss,
    siglip_loss,
    soft_target_loss,
    sup_con_loss,
    triplet_margin_loss,
    vse_loss,
)
from replearn_kernels.engine.backends import _interpreted
from replearn_kernels.engine.columns import blocks
from replearn_kernels.engine.plan import balanced_block, make_plan, visited_pairs

D, CLASSES = 4, 50
BUDGET = 2**18  # bytes: the similarities of 256 x 256, so that some sizes keep all and others not
WEIGHT = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(1))

# Of rows x and y, labels and a scale.
LOSSES = {
    "info_nce": lambda x, y, labels, s: info_nce_loss(x, y, logit_scale=s, memory_budget=BUDGET),
    "queue": lambda x, y, labels, s: info_nce_loss(x, y, negatives=WEIGHT, logit_scale=s, memory_budget=BUDGET),
    "own": lambda x, y, labels, s: info_nce_loss(x, y, negatives=torch.stack([y, x], 1), memory_budget=BUDGET),
    "symmetric": lambda x, y, labels, s: info_nce_loss(
        x, y, target=labels, symmetric=True, label_smoothing=0.1, logit_scale=s, memory_budget=BUDGET
    ),
    "clip": lambda x, y, labels, s: clip_loss(x, y, s, memory_budget=BUDGET),
    "siglip": lambda x, y, labels, s: siglip_loss(x, y, s, s - 1),
    "siglip by row": lambda x, y, labels, s: siglip_loss(
        x, y, s, query_group=labels, key_group=labels, reduction="none"
    ).square().mean(),
    "circle": lambda x, y, labels, s: circle_loss(x, labels, memory_budget=BUDGET),
    "multi_similarity": lambda x, y, labels, s: multi_similarity_loss(x, labels, memory_budget=BUDGET),
    "decoupled": lambda x, y, labels, s: decoupled_contrastive_loss(x, y, temperature=s, memory_budget=BUDGET),
    "hard_negative": lambda x, y, labels, s: hard_negative_loss(
        x, y, tau_plus=0.1, logit_scale=s, memory_budget=BUDGET
    ),
    "multi_positive": lambda x, y, labels, s: multi_positive_clip_loss(
        x, y, s, image_group=labels, memory_budget=BUDGET
    ),
    "soft_target": lambda x, y, labels, s: soft_target_loss(
        x, y, y.detach(), x.detach(), logit_scale=s, guide_scale=3.0, symmetric=True, memory_budget=BUDGET
    ),
    "vse": lambda x, y, labels, s: vse_loss(x, y, margin=0.5, image_group=labels, memory_budget=BUDGET),
    "log_sum_exp": lambda x, y, labels, s: pair_logsumexp(
        x, y, over="other", query_group=labels, key_group=labels, logit_scale=s, hardness=0.3, memory_budget=BUDGET
    ).square().mean(),
    "gist": lambda x, y, labels, s: gist_loss(
        x, y, y.detach(), x.detach(), logit_scale=s, margin=0.1, memory_budget=BUDGET
    ),
    "sampled_softmax": lambda x, y, labels, s: sampled_softmax_loss(
        x, y, key_group=labels, key_log_probability=-y.detach()[:, 0].exp(), logit_scale=s, memory_budget=BUDGET
    ),
    "n_pair": lambda x, y, labels, s: n_pair_loss(x, y, labels=labels, memory_budget=BUDGET),
    "nt_xent": lambda x, y, labels, s: nt_xent_loss(x, y, temperature=s, memory_budget=BUDGET),
    "sup_con": lambda x, y, labels, s: sup_con_loss(x, labels, temperature=s, memory_budget=BUDGET),
    "lifted": lambda x, y, labels, s: lifted_structure_loss(x, labels, memory_budget=BUDGET),
    "hard lifted": lambda x, y, labels, s: lifted_structure_loss(x, labels, smooth=False),
    "contrastive": lambda x, y, labels, s: contrastive_loss(x, labels, memory_budget=BUDGET),
    "batch_hard": lambda x, y, labels, s: triplet_margin_loss(x, labels, mining="batch_hard"),
    "batch_hard, soft": lambda x, y, labels, s: triplet_margin_loss(x, labels, mining="batch_hard", margin=None),
    "batch_all": lambda x, y, labels, s: triplet_margin_loss(x, labels, mining="batch_all"),
    "semi_hard": lambda x, y, labels, s: triplet_margin_loss(x, labels),
    "given triplets": lambda x, y, labels, s: triplet_margin_loss(
        x, triplets=(labels, labels.roll(1), labels.roll(2)), distance="cosine"
    ),
    "arcface": lambda x, y, labels, s: arcface_loss(x, WEIGHT * s, labels % CLASSES, memory_budget=BUDGET),
    "cosface": lambda x, y, labels, s: cosface_loss(x, WEIGHT * s, labels % CLASSES, memory_budget=BUDGET),
    "cosine": lambda x, y, labels, s: cosine_similarity_loss(x, labels),
    "dino": lambda x, y, labels, s: dino_loss(torch.stack([x, y]), torch.stack([y, x]).detach(), WEIGHT[0]),
    "dino_head": lambda x, y, labels, s: dino_head_loss(
        torch.stack([x, y]), torch.stack([y, x]).detach(), WEIGHT * s, WEIGHT, WEIGHT[:, 0]
    ),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)

# More than one tile of cpp's 1024 rows (nt_xent has twice as many), and more pairs than BUDGET holds.
TWELVE_SIZES = (3, 4, 7, 12, 33, 64, 100, 130, 257, 300, 513, 600)


def batch(n: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Rows, rows, labels of three rows each, and a scale."""
    return [*(unit_rows(rng, n, D) for _ in range(2)), torch.arange(n) % max(n // 3, 1), torch.tensor(0.7)]


def value_and_gradients(function, tensors: list[torch.Tensor], marked: bool = False) -> list[torch.Tensor]:
    """``marked``: the batch's dimension of every tensor as dynamic."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    for leaf in leaves:
        if marked and leaf.ndim:
            torch._dynamo.mark_dynamic(leaf, 0)
    loss = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, gradients))]


def assert_same(function, loss, tensors: list[torch.Tensor], marked: bool = False) -> None:
    """In value and gradients; tiles of other heights round otherwise."""
    for ours, expected in zip(value_and_gradients(function, tensors, marked), value_and_gradients(loss, tensors)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def assert_graphs(name: str, graphs: int, rng: torch.Generator, marked: bool) -> None:
    """That so many serve twelve sizes. (test_operators.py compiles with inductor.)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counter)
    for n in TWELVE_SIZES:
        assert_same(compiled, LOSSES[name], batch(n, rng), marked)
    assert counter.frame_count == graphs


@EVERY_LOSS
def test_twelve_batch_sizes_in_one_graph(name, rng):
    """mark_dynamic is an error where a graph is tied to a size."""
    assert_graphs(name, 1, rng, marked=True)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "batch_hard"])
def test_twelve_batch_sizes_in_two_graphs(name, rng):
    """As compiled without a mark: one of the first size, one of all others."""
    assert_graphs(name, 2, rng, marked=False)


class Module(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, y, labels, s):
        return self.loss(x, y, labels, s)


def exported(loss, tensors: list[torch.Tensor]):
    rows = {0: torch.export.Dim("batch", min=2, max=4096)}
    return torch.export.export(Module(loss), tuple(tensors), dynamic_shapes=(rows, rows, rows, None))


@EVERY_LOSS
def test_one_exported_program_for_a_range_of_sizes(name, rng):
    given = [t.requires_grad_(t.is_floating_point()) for t in batch(7, rng)]
    program = exported(LOSSES[name], given).module()
    for n in (2, 33, 600):
        assert_same(program, LOSSES[name], batch(n, rng))


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard", "batch_all"])
def test_mining_in_one_exported_program(mining, rng):
    def mine(x, y, labels, s):
        return mine_triplets(x, labels, mining=mining)

    program = exported(mine, batch(7, rng)).module()
    for n in (2, 33, 600):
        given = batch(n, rng)
        assert all(torch.equal(a, b) for a, b in zip(program(*given), mine(*given)))


def traced(function, tensors: list[torch.Tensor]):
    """By torch.jit.trace, stored and loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; checks of shapes become constants
        program = torch.jit.trace(function, tuple(tensors), check_trace=False)
        stored = io.BytesIO()
        torch.jit.save(program, stored)
        stored.seek(0)
        return torch.jit.load(stored)


@EVERY_LOSS
def test_jit_trace_records_the_loss_and_not_its_value(name, rng):
    given = [t.requires_grad_(t.is_floating_point()) for t in batch(7, rng)]
    program = traced(LOSSES[name], given)
    for n in (7, 33, 600):
        assert_same(program, LOSSES[name], batch(n, rng))


def test_jit_trace_of_mining(rng):
    program = traced(lambda x, labels: mine_triplets(x, labels), [batch(7, rng)[0], batch(7, rng)[2]])
    for n in (7, 33):
        x, _, labels, _ = batch(n, rng)
        assert all(torch.equal(a, b) for a, b in zip(program(x, labels), mine_triplets(x, labels)))


@pytest.mark.parametrize("trace", [traced, lambda loss, tensors: exported(loss, tensors).module()])
def test_a_program_traced_without_gradients_refuses_them(trace, rng):
    """One that would come out as None, without a word."""
    x, y, labels, s = batch(7, rng)
    program = trace(LOSSES["clip"], [x.requires_grad_(), y, labels, s])
    assert torch.isfinite(torch.autograd.grad(program(x, y, labels, s), x)[0]).all()
    loss = program(x, y.requires_grad_(), labels, s)
    with pytest.raises(RuntimeError, match="required no gradient, and now require one"):
        loss.backward()


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_visited_pairs_are_those_of_a_walk_over_the_tiles():
    for rows, block in itertools.product((0, 1, 2, 15, 16, 17, 512, 513, 1024, 1600, 4097), (1, 16, 48, 512, 1024)):
        walk = sum((part.stop - part.start) * (rows - part.start) for part in blocks(rows, block))
        assert visited_pairs(rows, rows, block, is_batch=True) == walk
    assert visited_pairs(7, 11, 2, is_batch=False) == 77


@pytest.mark.parametrize("is_batch", [False, True])
def test_any_size_keeps_what_its_tiles_take_within_the_budget(is_batch):
    options = dict(
        itemsize=4, tile_shapes=((512, 512), (512, 512)), needs_grad=True, one_gradient=True, needs_columns=False,
        is_batch=is_batch, any_size=True,
    )  # fmt: skip
    for rows, budget in itertools.product((0, 1, 511, 513, 1025, 5000), (0, 2**20, 2**30)):
        plan = make_plan(rows, (rows,), 64, memory_budget=budget, **options)
        assert plan.schedule == "two_sweeps"
        assert plan.statistics_tile.rows == balanced_block(rows, 512)
        wanted = visited_pairs(rows, rows, plan.statistics_tile.rows, is_batch)
        assert min(wanted, budget // 4) <= plan.kept_elements <= min(rows * rows, budget // 4)


# -- what a trace, and an import, meet ---------------------------------------------------------------------------------


def functions_of_the_package():
    """(qualified name, function) of every function and method, those that dataclasses make included."""
    for module in pkgutil.walk_packages(replearn_kernels.__path__, "replearn_kernels."):
        if module.name.rpartition(".")[2].startswith("_"):
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # the Triton kernels, without Triton
            continue
        for name, member in members.items():
            if getattr(member, "__module__", None) != module.name:
                continue
            for key, function in vars(member).items() if inspect.isclass(member) else [(name, member)]:
                function = inspect.unwrap(getattr(function, "__func__", function))
                if inspect.isfunction(function):
                    yield f"{module.name}.{name}.{key}", function


def test_defaults_are_of_builtin_types():
    """Dynamo has no source from which to rebuild another object: torch 2.11 fails at such a default of a dataclass."""
    checked = dict(functions_of_the_package())
    assert "replearn_kernels.functional.triplet.triplet_margin_loss.triplet_margin_loss" in checked
    assert any(name.endswith("BatchHard.__init__") for name in checked)
    for name, function in checked.items():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty:
                assert type(parameter.default).__module__ == "builtins", f"{name}: {parameter}"


def test_import_does_not_load_the_compiler():
    heavy = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy", "triton")
    code = f"import sys, torch, replearn_kernels; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_mark_of_a_constant_is_that_of_torch():
    """It is set by hand, because PyTorch's function that sets it imports dynamo."""
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked).items() <= vars(_interpreted).items()
