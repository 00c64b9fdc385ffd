"""Every loss on a GPU, forward and backward, against the plain formula in fp64 on the same features; what a training
loop puts around a loss there: autocast, torch.compile, a CUDA graph, another stream; and that no matrix is formed.

Triton's interpreter rehearses the first of them on a CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuzz_losses import MOVED, moved
from loss_cases import CASES, value_and_gradients

pytest.importorskip("triton")

import dino_oracle
from triton_harness import gpu, interpreter, relative_error, tolerance

import replearn_kernels as rk
from replearn_kernels.engine.backends import why_no_triton

SCALE = 14.3
NONE_FOR_Y = ("sup_con", "lifted", "contrastive", "batch_", "semi_hard", "circle", "multi_similarity")
ON_A_GPU = ((257, 48), (600, 130), (300, 512))
"""N, d: rows that fit on chip, rows that need padding, rows that do neither; no N that blocks divide."""


def sample(n: int, d: int, dtype: torch.dtype, device: str) -> tuple:
    """Unit rows, of which y_i is nearer to x_i than to most, four of a class near each other."""
    generator = torch.Generator().manual_seed(n + d)
    x, y, centers = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.randperm(n, generator=generator) // 4
    x = F.normalize(x + 0.5 * centers[labels], dim=1)
    y = F.normalize(F.normalize(y, dim=1) + x, dim=1)
    return x.to(device, dtype), y.to(device, dtype), labels.to(device)


def check_against_fp64(name: str, n: int, d: int, dtype: torch.dtype, device: str, **options) -> None:
    if name.startswith("batch_all"):
        n = min(n, 150)  # its formula has N^3 triplets, and other tests run beside this one
    if name.startswith("semi_hard"):
        n = min(n, 100)  # no negative as near as a positive, as far as fp32 can tell: those are not taken (README)
    truth = compare_with_fp64(name, *sample(n, d, dtype, device), SCALE, **options)
    assert truth[1].any() and (truth[2].any() or name.startswith(NONE_FOR_Y))


def compare_with_fp64(name: str, x, y, labels, scale: float, **options) -> list[torch.Tensor]:
    """The error is at most the plain formula's in the same dtype, plus triton_harness.tolerance (where the positive
    takes nearly all of a softmax, in a similarity's last bits: of a gradient of order 1, as 1 - p loses them), plus
    MOVED times what the result moves by where every feature moves by half of fp32's unit in the last place.

    Returns the truth."""
    dtype, wide = x.dtype, (x.double(), y.double())
    truth = value_and_gradients(name, *wide, labels, scale, backend="eager", **options)
    nearby = value_and_gradients(name, *(moved(t, 2**-24) for t in wide), labels, scale, backend="eager", **options)
    eager = value_and_gradients(name, x, y, labels, scale, backend="eager", **options)
    ours = value_and_gradients(name, x, y, labels, scale, backend="triton", **options)
    for i, what in enumerate(("loss", "gradient of x", "gradient of y")):
        of_ours, of_eager, of_nearby = ((results[i] - truth[i]).norm().item() for results in (ours, eager, nearby))
        size = truth[i].norm().item()
        allowed = of_eager + tolerance(dtype, 0) * size + MOVED * of_nearby
        allowed += (tolerance(dtype, scale) - tolerance(dtype, 0)) * max(size, scale / len(x) ** 0.5)
        assert of_ours <= allowed, f"{what} of {size:.2e}: error {of_ours:.2e}, allowed {allowed:.2e}"
    return truth


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "device, n, d, dtype",
    [
        pytest.param("cpu", 33, 24, torch.float32, marks=interpreter),
        *(
            pytest.param("cuda", n, d, dtype, marks=gpu)
            for n, d in ON_A_GPU
            for dtype in (torch.float32, torch.bfloat16)
        ),
        pytest.param("cuda", 600, 130, torch.float16, marks=gpu),
    ],
)
def test_every_loss(name, device, n, d, dtype):
    check_against_fp64(name, n, d, dtype, device)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
class TestOnAGpu:
    @pytest.mark.parametrize("name", CASES)
    def test_default_backend_is_triton_and_gives_the_same_bits_again(self, name, mark):
        assert why_no_triton(torch.device("cuda"), torch.bfloat16) is None
        inputs = *sample(257, 48, torch.bfloat16, "cuda"), SCALE
        first, again, named = (value_and_gradients(name, *inputs, **k) for k in ({}, {}, {"backend": "triton"}))
        for a, b, c in zip(first, again, named):
            assert torch.equal(a, b) and torch.equal(a, c)

    @pytest.mark.parametrize("name", ["clip", "siglip", "nt_xent", "sup_con", "info_nce", "contrastive"])
    @pytest.mark.parametrize("n, d", [(5003, 512), (9001, 128)])
    def test_many_tiles(self, name, n, d, mark):
        """More rows than a tile has, and none of its sizes divides them."""
        check_against_fp64(name, n, d, torch.bfloat16, "cuda")

    @pytest.mark.parametrize("name", ["clip", "info_nce", "siglip", "nt_xent", "sup_con", "arcface",
                                      "contrastive", "batch_hard_euclidean"])  # fmt: skip
    def test_captured_in_a_graph(self, name, mark):
        """A replay over other features gives what a plain call gives: nothing waits for a value in between."""
        x, y, labels = sample(512, 64, torch.bfloat16, "cuda")
        leaves = [t.detach().clone().requires_grad_() for t in (x, y)]

        def step():
            loss = CASES[name](*leaves, labels, SCALE).sum()
            return loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        other_x, other_y, _ = sample(512, 64, torch.bfloat16, "cuda")
        with torch.no_grad():
            leaves[0].copy_(other_x.flip(0))
            leaves[1].copy_(other_y.flip(0))
        graph.replay()
        for replayed, expected in zip(captured, step()):
            assert torch.equal(replayed, expected)

    def test_forward_and_backward_in_graphs_of_their_own(self, mark):
        """As torch.cuda.make_graphed_callables has it, for steps that the host would take longer to launch."""
        x, y, _ = sample(512, 64, torch.bfloat16, "cuda")

        def leaves() -> list[torch.Tensor]:
            scale = torch.tensor(SCALE, device="cuda")
            return [t.detach().clone().requires_grad_() for t in (x, y, scale)]

        graphed = torch.cuda.make_graphed_callables(rk.ClipLoss(), tuple(leaves()))
        for _ in range(2):
            results = []
            for loss in (graphed, rk.ClipLoss()):
                given = leaves()
                value = loss(*given)
                value.backward()
                results.append((value.detach().clone(), *(t.grad.clone() for t in given)))
            assert all(torch.equal(a, b) for a, b in zip(*results))

    @pytest.mark.parametrize("name", ["clip", "siglip", "nt_xent", "sup_con", "contrastive", "batch_hard_euclidean"])
    def test_compiled_as_one_graph(self, name, mark):
        torch.compiler.reset()
        inputs = *sample(130, 48, torch.float32, "cuda"), SCALE
        compiled = torch.compile(CASES[name], fullgraph=True)
        leaves = [t.detach().clone().requires_grad_() for t in inputs[:2]]
        value = compiled(*leaves, *inputs[2:]).sum()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        for got, expected in zip((value, *gradients), value_and_gradients(name, *inputs)):
            assert relative_error(got.detach(), expected) < 1e-6

    def test_autocast_takes_half_precision_features_and_keeps_the_statistics(self, mark):
        x, y, _ = sample(300, 64, torch.float32, "cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = rk.clip_loss(x, y, 100.0)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, rk.clip_loss(x.bfloat16(), y.bfloat16(), 100.0))

    def test_on_another_stream(self, mark):
        x, y, labels = sample(700, 64, torch.bfloat16, "cuda")
        expected = value_and_gradients("clip", x, y, labels, SCALE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = value_and_gradients("clip", x, y, labels, SCALE)
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected))

    @pytest.mark.parametrize("name", ["clip", "siglip", "nt_xent"])
    def test_no_matrix_is_formed(self, name, mark):
        """A step of 32,768 rows takes less than a quarter of one matrix of their similarities in bf16."""
        n, d = 32768, 256
        x, y, labels = (t.to("cuda") for t in (torch.randn(n, d), torch.randn(n, d), torch.arange(n)))
        leaves = [F.normalize(t, dim=1).bfloat16().requires_grad_() for t in (x, y)]
        del x, y
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(CASES[name](*leaves, labels, SCALE), leaves)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < n * n * 2 / 4
        assert all(g.isfinite().all() for g in gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dino(self, dtype, mark):
        v, u, b, k, d = 4, 2, 9, 300, 48
        rng = torch.Generator().manual_seed(0)
        student, teacher, center = dino_oracle.logits(rng, v, u, b, k, dtype)
        features = dino_oracle.heads(rng, v, u, b, k, d, dtype)
        for loss, inputs, fixed in (
            (rk.dino_loss, [student], [teacher, center]),
            (dino_oracle.head_loss, features[:2], features[2:]),
        ):
            exact = dino_oracle.results(loss, [t.double() for t in inputs], fixed, backend="eager")
            plain = dino_oracle.results(loss, [t.cuda() for t in inputs], [t.cuda() for t in fixed], backend="eager")
            got = dino_oracle.results(loss, [t.cuda() for t in inputs], [t.cuda() for t in fixed])
            for a, b_, c in zip(got, plain, exact, strict=True):
                allowed = relative_error(b_.cpu(), c) + tolerance(dtype, 25.0)
                assert relative_error(a.cpu(), c) <= allowed

    def test_mining_finds_the_triplets_of_the_cpu(self, mark):
        x, _, labels = sample(300, 32, torch.float32, "cuda")
        for mining in ("batch_hard", "semi_hard", "batch_all"):
            got = rk.mine_triplets(x, labels, mining=mining)
            expected = rk.mine_triplets(x.cpu(), labels.cpu(), mining=mining)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected)), mining

    def test_given_triplets_and_cosines(self, mark):
        x, _, labels = sample(300, 32, torch.float32, "cuda")
        triplets = rk.mine_triplets(x, labels, mining="semi_hard")
        for loss in (
            lambda z: rk.triplet_margin_loss(z, triplets=tuple(t.to(z.device) for t in triplets)),
            lambda z: rk.cosine_similarity_loss(z, labels.to(z.device)),
        ):
            results = []
            for z in (x.double().cpu(), x):
                leaf = z.clone().requires_grad_()
                value = loss(leaf)
                results.append((value.detach(), *torch.autograd.grad(value, leaf)))
            for exact, got in zip(*results):
                assert relative_error(got.cpu(), exact) < 1e-5
