"""mine_triplets against its definition in O(N^3), index for index: every mode, distance, dtype and backend."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from brute_force_mining import DISTANCES, MODES, brute_force_triplets, distances, mine
from hypothesis import given, settings
from hypothesis import strategies as st

from replearn_kernels import mine_triplets
from replearn_kernels.engine import mining as engine
from replearn_kernels.engine import native

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def table(triplets):
    assert all(index.dtype == torch.int64 and index.ndim == 1 for index in triplets)
    return torch.stack(triplets, dim=1)


def rows(triplets):
    return table(triplets).tolist()


def mined(embeddings, labels, mining, distance, backend, margin=0.2):
    triplets = mine_triplets(embeddings, labels, mining=mining, margin=margin, distance=distance, backend=backend)
    return rows(triplets)


def as_lists(triplets):
    return [list(triplet) for triplet in triplets]


def grid(n, d, dtype=torch.float32):
    """Points of a small grid: duplicates and equal distances everywhere, and no rounding of their squares."""
    return torch.randint(-2, 3, (n, d)).to(dtype)


LABELS = {
    "few": lambda n: torch.randint(3, (n,)),
    "many": lambda n: torch.randint(max(n, 1), (n,)),
    "one": lambda n: torch.zeros(n, dtype=torch.int64),
    "distinct": lambda n: torch.randperm(n) - 5,
    "large": lambda n: torch.tensor([-(2**63), 2**63 - 1, 0])[torch.randint(3, (n,))],
    "all_but_one": lambda n: (torch.arange(n) == n // 2).long(),
}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 33, 63, 65])
def test_equals_the_definition(distance, dtype, n):
    """On a grid, where no backend's sums have a rounding; of cosines, whose sums have, where no two meet."""
    d = 5 if dtype != torch.float64 else 3
    for kind, make in LABELS.items():
        x, labels = torch.randn(n, d).to(dtype) if distance == "cosine" else grid(n, d, dtype), make(n)
        all_distances = distances(x, distance)
        for mining in MODES:
            expected = np.array(mine(all_distances, labels, mining, 0.25), dtype=np.int64).reshape(-1, 3)
            options = dict(mining=mining, margin=0.25, distance=distance)
            for backend in ("torch", "cpp") if native.available() else ("torch",):
                triplets = torch.stack(mine_triplets(x, labels, backend=backend, **options), dim=1)
                assert np.array_equal(triplets.numpy(), expected), (kind, mining, backend)


needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))


@needs_native
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    "dtype, d", [(torch.float32, 100), (torch.bfloat16, 48), (torch.float32, 0), (torch.float64, 7)]
)
def test_native_rounds_as_promised(distance, dtype, d):
    """Random rows and near ones: every bit of every distance decides here and there."""
    n = 65 if dtype == torch.float64 else 257
    x = torch.randn(n, d).to(dtype)
    x[n // 2 :] = x[: n - n // 2] + 1e-3 * torch.randn(n - n // 2, d).to(dtype)
    x[3] = x[n // 2 + 5] = 0
    labels = torch.randint(n, (n,))
    all_distances = distances(x, distance)
    for mining in MODES:
        expected = mine(all_distances, labels, mining, 0.01)
        assert mined(x, labels, mining, distance, "cpp", margin=0.01) == as_lists(expected), mining


@needs_native
def test_many_positives_are_sorted_and_searched():
    """More than 64 positives take another way to the same result: with ties, duplicates, NaN and infinity."""
    for values in (grid(130, 2), torch.randn(130, 3), torch.randn(130, 3) * 1e25):
        labels = (torch.rand(130) < 0.4).long()
        values[11:14] = values[10]
        expected = brute_force_triplets(values, labels, "semi_hard", 0.2, "euclidean")
        assert mined(values, labels, "semi_hard", "euclidean", "cpp") == as_lists(expected)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_small_batch(data):
    n, d = data.draw(st.integers(0, 14)), data.draw(st.integers(0, 3))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=n * d, max_size=n * d))
    labels = torch.tensor(data.draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n)), dtype=torch.int64)
    x = torch.tensor(values, dtype=data.draw(st.sampled_from(DTYPES))).reshape(n, d)
    mining, distance = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(DISTANCES))
    margin = data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    expected = as_lists(brute_force_triplets(x, labels, mining, margin, distance))
    if native.available():
        assert mined(x, labels, mining, distance, "cpp", margin) == expected
    if distance != "cosine":
        assert mined(x, labels, mining, distance, "torch", margin) == expected


@needs_native
@pytest.mark.parametrize("mining", MODES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_threads_do_not_matter(mining, distance):
    """Compared as tensors: up to 400,000 triplets, whose lists would take far longer than finding them."""
    options = dict(mining=mining, margin=0.2, distance=distance, backend="cpp")
    x, labels = torch.randn(600, 20), torch.randint(300, (600,))
    x[::7] = x[0]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(table(mine_triplets(x, labels, **options)))
    finally:
        torch.set_num_threads(threads)
    assert len(results[0]) and all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mining", MODES)
def test_strides(mining, backend):
    x, labels = torch.randn(6, 50), torch.randint(4, (100,))
    expected = mined(x.t().contiguous(), labels[::2].clone(), mining, "euclidean", backend)
    assert mined(x.t(), labels[::2], mining, "euclidean", backend) == expected
    wide = torch.randn(50, 13)
    wide[:, 1::2] = x.t()
    assert mined(wide[:, 1::2], labels[::2].int(), mining, "euclidean", backend) == expected
    assert mined(x[:, :1].t().expand(50, 6), labels[::2], mining, "euclidean", backend) == mined(
        x[:, :1].t().repeat(50, 1), labels[::2], mining, "euclidean", backend
    )


def python(code, **environment):
    """Runs code in a process of its own, which finds what this one finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


SETS = """
import torch, replearn_kernels
from brute_force_mining import DISTANCES, MODES, distances, mine
torch.manual_seed(0)
for dtype, n in ((torch.float32, 80), (torch.float64, 40)):
    x, labels = torch.randn(n, 9).to(dtype), torch.randint(20, (n,))
    for distance in DISTANCES:
        d = distances(x, distance)
        for mode in MODES:
            ours = torch.ops.replearn_kernels.mine_triplets(x, labels, mode, 0.2, distance)
            assert list(zip(*(t.tolist() for t in ours))) == mine(d, labels, mode, 0.2), (dtype, distance, mode)
    labels = (torch.rand(n) < 0.1).long()
    wide = torch.cat([x, x])
    ours = torch.ops.replearn_kernels.mine_triplets(wide, labels.repeat(2), "semi_hard", 0.2, "euclidean")
    expected = mine(distances(wide, "euclidean"), labels.repeat(2), "semi_hard", 0.2)
    assert list(zip(*(t.tolist() for t in ours))) == expected, dtype
"""


@needs_native
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(instruction_set):
    result = python(SETS, REPLEARN_KERNELS_INSTRUCTION_SET=instruction_set)
    if "must be one of" in result.stderr:
        pytest.skip(f"{instruction_set} does not run on this processor")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mining", MODES)
def test_infinite_distances(mining, backend):
    """Finite rows whose squared distance overflows: the definition holds, with infinity as a distance."""
    x = torch.tensor([[0.0], [1.0], [1e30], [-1e30], [2.0], [3e38]])
    labels = torch.tensor([0, 0, 1, 1, 2, 0])
    expected = brute_force_triplets(x, labels, mining, 0.2, "euclidean")
    if mining == "batch_hard":  # where all negatives are infinitely far, the lowest of them
        pairs = [triplet[:2] for triplet in mined(x, labels, mining, "euclidean", backend)]
        assert pairs == [[0, 5], [1, 5], [2, 3], [3, 2], [5, 0]]
    else:
        assert mined(x, labels, mining, "euclidean", backend) == as_lists(expected)


@pytest.mark.parametrize("mining", MODES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_without_the_check_nan_wins_nothing(mining, distance, backend):
    x, labels = torch.randn(100, 5), torch.randint(25, (100,))
    labels[50:54] = labels[7] = labels[90] = 1  # so that every anchor has finite positives too
    clean = rows(engine.mine(x, labels, mining, 0.2, distance, backend))
    x[7], x[50, 2], x[90] = float("nan"), float("inf"), float("nan")
    triplets = rows(engine.mine(x, labels, mining, 0.2, distance, backend))
    labels = labels.tolist()
    for a, p, n in triplets:
        assert a != p and labels[a] == labels[p] != labels[n]
        if mining != "semi_hard" and a not in (7, 50, 90):
            assert p not in (7, 90) and n not in (7, 90)
    if mining in ("batch_hard", "semi_hard"):  # their number depends on the labels alone
        assert len(triplets) == len(clean)
    all_nan = engine.mine(torch.full_like(x, float("nan")), torch.tensor(labels), mining, 0.2, distance, backend)
    for a, p, n in rows(all_nan):
        assert a != p and labels[a] == labels[p] != labels[n]


def test_cosine_at_any_magnitude(backend):
    x, labels = torch.randn(40, 6), torch.randint(5, (40,))
    expected = mined(x, labels, "batch_hard", "cosine", backend)
    for scale in (2.0**-120, 2.0**100):
        assert mined(x * scale, labels, "batch_hard", "cosine", backend) == expected


def test_under_autograd(backend):
    x, labels = torch.randn(20, 4, requires_grad=True), torch.randint(4, (20,))
    triplets = mine_triplets(x * 2, labels, backend=backend)
    assert not any(index.requires_grad for index in triplets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows(mine_triplets(x * 2, labels, backend=backend)) == rows(triplets)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"embeddings": [1.0]}, TypeError, "embeddings must be a torch.Tensor, got list"),
        ({"embeddings": torch.zeros(4)}, ValueError, "embeddings must have 2 dimensions"),
        ({"embeddings": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "embeddings must be fp16, bf16, fp32"),
        ({"embeddings": torch.tensor([[1.0, float("nan")]] * 4)}, ValueError, "embeddings must be finite"),
        ({"embeddings": torch.tensor([[1.0, float("inf")]] * 4)}, ValueError, "embeddings must be finite"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have shape \(4,\)"),
        ({"labels": [0, 1, 0, 1]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels must be on the features'"),
        ({"margin": -0.1}, ValueError, "margin must be in .* got -0.1"),
        ({"margin": float("nan")}, ValueError, "margin must be in .* got nan"),
        ({"margin": "0.1"}, TypeError, "margin must be a float, got str"),
        ({"mining": "hardest"}, ValueError, "mining must be one of batch_hard, .* got 'hardest'"),
        ({"distance": "manhattan"}, ValueError, "distance must be one of euclidean, .* got 'manhattan'"),
        ({"backend": "triton"}, ValueError, "backend must be one of auto, cpp, cuda, torch, got 'triton'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' runs on CUDA tensors, got tensors on cpu"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"embeddings": torch.zeros(4, 2), "labels": torch.tensor([0, 0, 1, 1])} | change
    with pytest.raises(error, match=message):
        mine_triplets(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)


def test_refused_by_functional_transforms(backend):
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda x: x.sum() + mine_triplets(x, labels, backend=backend)[0].sum())(torch.randn(3, 2))


@needs_native
def test_the_operator_refuses_what_would_read_out_of_bounds():
    x, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    operator = torch.ops.replearn_kernels.mine_triplets
    for arguments, message in [
        ((x[0], labels, "batch_hard", 0.2, "cosine"), "embeddings must be a CPU tensor"),
        ((x, labels[:4], "batch_hard", 0.2, "cosine"), "labels must be an int64 CPU tensor with one entry per row"),
        ((x, labels.int(), "batch_hard", 0.2, "cosine"), "labels must be an int64"),
        ((x, labels, "batch", 0.2, "cosine"), "mining must be batch_hard, .* got batch"),
        ((x, labels, "batch_hard", 0.2, "l1"), "distance must be euclidean, .* got l1"),
        ((x.int(), labels + torch.arange(5) // 2, "batch_hard", 0.2, "cosine"), "embeddings must be fp16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_opcheck(backend):
    x, labels = torch.randn(9, 3), torch.randint(3, (9,))
    torch.library.opcheck(
        torch.ops.replearn_kernels.mine.default, (x, labels, "semi_hard", 0.2, "euclidean", backend, True)
    )
    if backend == "cpp":
        torch.library.opcheck(
            torch.ops.replearn_kernels.mine_triplets.default, (x, labels, "batch_all", 0.2, "cosine")
        )


@pytest.mark.parametrize("mining", MODES)
def test_compile(mining, backend):
    torch._dynamo.reset()
    labels = torch.randint(5, (30,))

    def spread(x):
        anchor, positive, negative = mine_triplets(x, labels, mining=mining, backend=backend)
        return (x[anchor] - x[positive]).abs().sum() - (x[anchor] - x[negative]).abs().sum()

    x = torch.randn(30, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(spread, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), spread(x))
        with pytest.raises(ValueError, match="embeddings must be finite"):
            compiled(x / 0)


@needs_native
@pytest.mark.parametrize("mining, classes", [("batch_hard", 2), ("semi_hard", 4096), ("batch_all_hard", 4096)])
def test_memory_does_not_grow_with_pairs(mining, classes):
    """N = 8,192: the matrix of distances would be 268 MB. Classes are so far apart that few triplets are hard."""
    done = python(f"""
import torch
from bench.memory import host_peak
from replearn_kernels import mine_triplets
labels = torch.arange(8192) % {classes}
x = 100 * torch.randn({classes}, 8)[labels] + 0.01 * torch.randn(8192, 8)
mine_triplets(x[:64], torch.arange(64) // 2, mining="{mining}")
triplets = []
peak, _ = host_peak(lambda: triplets.extend(mine_triplets(x, labels, mining="{mining}")))
print(peak - sum(t.nbytes for t in triplets))
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16e6
