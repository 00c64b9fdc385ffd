"""Random calls of the native mining operators, results checked against each other: for a build with sanitizers.

    python fuzz_native.py LIBRARY SECONDS
"""

import random
import sys
import time

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DISTANCES = ("euclidean", "squared_euclidean", "cosine")
MODES = ("batch_hard", "semi_hard", "batch_all", "batch_all_hard", "batch_all_semi_hard")


def random_rows(n: int, d: int) -> torch.Tensor:
    """[n, d] of any dtype, strides and values, NaN and infinity among them."""
    dtype = random.choice(DTYPES)
    layout = random.choice(("plain", "transposed", "sliced", "expanded"))
    if layout == "transposed":
        x = torch.randn(d, n).to(dtype).t()
    elif layout == "sliced":
        x = torch.randn(2 * n + 1, 3 * d + 2).to(dtype)[1::2, 2::3][:n, :d]
    elif layout == "expanded":
        x = torch.randn(n, 1).to(dtype).expand(n, d)
    else:
        x = torch.randn(n, d).to(dtype)
    if layout != "expanded" and n and d:
        for _ in range(random.choice((0, 0, 3))):
            x[random.randrange(n), random.randrange(d)] = random.choice((float("nan"), float("inf"), -1e30, 0.0))
        if random.random() < 0.2:
            x[random.randrange(n)] = 0
        if random.random() < 0.3:
            x[torch.randint(n, (n // 2,))] = x[0].clone()
    return x


def random_labels(n: int) -> torch.Tensor:
    labels = random.choice(
        (
            lambda: torch.zeros(n, dtype=torch.int64),
            lambda: torch.randperm(n),
            lambda: torch.randint(max(n // 3, 1), (n,)),
            lambda: (torch.rand(n) < 0.3).long(),
            lambda: torch.randint(-(2**62), 2**62, (max(n // 4, 1),))[torch.randint(max(n // 4, 1), (n,))],
        )
    )()
    return labels if random.random() < 0.7 else labels.repeat_interleave(2)[::2]


def check(ops) -> None:
    n, d = random.choice((0, 1, 2, 7, 31, 33, 64, 65, 130, 200)), random.choice((0, 1, 3, 17, 40))
    x, labels, mode, distance = random_rows(n, d), random_labels(n), random.choice(MODES), random.choice(DISTANCES)
    torch.set_num_threads(random.choice((1, 2)))
    a, p, negative = ops.mine_triplets(x, labels, mode, random.choice((0.0, 0.2, 3.0)), distance)
    assert (labels[a] == labels[p]).all() and (labels[a] != labels[negative]).all() and (a != p).all()
    again = ops.mine_triplets(x, labels, mode, 0.2, distance)
    torch.set_num_threads(1)
    assert all(torch.equal(s, t) for s, t in zip(again, ops.mine_triplets(x, labels, mode, 0.2, distance)))

    rows = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    squares = ops.pair_squares(rows, a, p)
    assert squares.shape == (len(a),)
    gradient = torch.zeros_like(rows)
    ops.add_differences_(gradient, rows, a, p, torch.randint(2, squares.shape).to(rows.dtype))
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[torch.cat([a, p])] = False
    assert (gradient[untouched] == 0).all()
    if len(a):
        wrong = a.clone()
        wrong[random.randrange(len(a))] = random.choice((-1, n, 2**40))
        try:
            ops.pair_squares(rows, wrong, p)
        except RuntimeError as error:
            assert "indices of pairs" in str(error)
        else:
            raise AssertionError(f"an index out of range was taken: N = {n}")


def main(library: str, seconds: float) -> None:
    torch.ops.load_library(library)
    end, calls = time.monotonic() + seconds, 0
    while time.monotonic() < end or calls < 50:
        random.seed(calls)
        torch.manual_seed(calls)
        check(torch.ops.replearn_kernels)
        calls += 1
    print(f"{calls} random problems")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
