"""Random calls of the native operators of mining and retrieval, checked: for a build with sanitizers.

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


def exactly(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers: no order of summation rounds them."""
    return x.nan_to_num(0, 0, 0).clamp(-3, 3).round().to(random.choice((torch.float32, torch.float64)))


def check_retrieval(ops) -> None:
    """Products as a filter and as scores, tile by tile, some pairs left out; against all scores, sorted."""
    n, m, d = random.choice((0, 1, 3, 17)), random.choice((1, 2, 15, 33, 100, 300)), random.choice((0, 1, 3, 16, 40))
    gallery = exactly(random_rows(m, d))
    query = exactly(random_rows(n, d)).to(gallery.dtype)
    query, gallery = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (query, gallery))
    ones, zeros = torch.ones(max(n, m)).double(), torch.zeros(n).double()
    scores = (query, gallery, False, ones[:n].clone(), ones[:m].clone(), ones[:n].clone(), zeros)
    kinds = random.choice((0, 1, 2))
    row_ids, column_ids = (torch.randint(4, (kinds, count), dtype=torch.int32) for count in (n, m))
    left_out = (row_ids[:, :, None] == column_ids[:, None]).any(0)
    exact = (query.double() @ gallery.double().T).masked_fill(left_out, -torch.inf)
    error = random.choice((1e-6, 1.0, 100.0))  # of the filter, which may be as bad as it likes
    filter = torch.tensor([1.0, error, 1e-6, -1e-6])[:, None].repeat(1, m)
    k = random.choice((1, (m + 1) // 2, m))
    candidates = *torch.empty(2, n, 2 * k + 64), torch.empty(n, 2 * k + 64).long(), torch.zeros(n).long()
    threshold = torch.full((n,), -torch.inf)
    counts = torch.randint(0, m + 1, (n,))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    positives = torch.cat([torch.randperm(m)[:count] for count in counts] or [counts])
    if kinds:  # what is left out is no positive
        row = torch.arange(n).repeat_interleave(counts)
        kept = ~left_out[row, positives]
        offsets, positives = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[offsets], positives[kept]
    row = torch.arange(n).repeat_interleave(offsets.diff())
    of_positives, bounds = torch.empty(len(positives)).double(), torch.empty(2, len(positives))
    ops.listed_scores_(*scores, row, positives, of_positives)
    table = offsets, of_positives, positives, *bounds
    ops.sort_positives_(*scores, *table)
    cutoff, active, better = torch.full((n,), 2**62), offsets.diff(), torch.zeros(len(positives)).long()
    width = random.choice((1, 16, 50, m))
    for first in range(0, m, width):
        columns = slice(first, min(first + width, m))
        s = (query @ gallery[columns].T).to(random.choice((torch.float32, torch.bfloat16)))
        tile = filter[:, columns], torch.ones(n), 2.0**-7, row_ids, column_ids[:, columns], first
        ops.nearest_(s, *scores, *tile, k, *candidates, threshold)
        ops.place_(s, *scores, *tile, *table, cutoff, False, active, better)
    found = torch.empty(n, k).double(), torch.empty(n, k).long()
    ops.nearest_result_(*scores, *candidates, *found)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[0], values[:, :k])
    assert torch.equal(found[1], order[:, :k].masked_fill(values[:, :k] == -torch.inf, -1))
    for i in range(n):
        own = positives[offsets[i] : offsets[i + 1]]
        rank = {column: place for place, column in enumerate(order[i].tolist())}
        ranks = [rank[column] for column in own.tolist()]
        counted = better[offsets[i] : offsets[i + 1]].cumsum(0) + torch.arange(len(own))
        assert ranks == sorted(ranks) and counted.tolist() == ranks
    if n:
        candidates[2].fill_(random.choice((-1, m, 2**40)))
        candidates[3].fill_(1)
        try:
            ops.nearest_result_(*scores, *candidates, *found)
        except RuntimeError as error:
            assert "outside of the gallery" in str(error)
        else:
            raise AssertionError("a candidate out of range was taken")
        candidates[3].zero_()
        for first, room in ((2**63 - 1, k), (m, k), (-1, k), (0, 2**63 - 1)):
            try:
                ops.nearest_(s, *scores, *tile[:-1], first, room, *candidates, threshold)
            except RuntimeError as error:
                assert "beyond the gallery" in str(error) or "room" in str(error)
            else:
                raise AssertionError("columns beyond the gallery, or more than there is room for, were taken")


def check_counting(ops) -> None:
    """Pairs of one label and of others by cell: tile by tile, some left out, some or all bins not sure."""
    n, m, d = random.choice((0, 1, 3, 17)), random.choice((1, 2, 15, 33, 100, 300)), random.choice((0, 1, 3, 16, 40))
    gallery = exactly(random_rows(m, d)).contiguous()
    query = exactly(random_rows(n, d)).to(gallery.dtype).contiguous()
    ones = torch.ones(max(n, m)).double()
    scores = query, gallery, False, ones[:n].clone(), ones[:m].clone(), ones[:n].clone(), torch.zeros(n).double()
    row_ids, column_ids = (torch.randint(4, (1, count), dtype=torch.int32) for count in (n, m))
    row_labels, column_labels = (torch.randint(3, (count,), dtype=torch.int32) for count in (n, m))
    of_bin, bins = random.choice((1, 4, 8)), random.choice((1, 30, 200))
    per_score, first = random.choice((0.25, 1.0, 2.0)), random.choice((-5, 0, bins * of_bin // 2, 2**40))
    half, first_row = random.choice((False, True)), random.choice((0, 5, m, 2**60))
    filter = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None].repeat(1, m)
    slots = torch.full((bins,), random.choice((-2, -1)), dtype=torch.int16)
    wanted = torch.randperm(bins)[: random.choice((0, 1, bins))]
    slots[wanted] = torch.arange(len(wanted), dtype=torch.int16)
    to_bins = torch.tensor([[per_score / of_bin], [first / of_bin]]).float().repeat(1, n)
    histogram, cells = torch.zeros(bins, 2).long(), torch.zeros(len(wanted), of_bin, 2).long()
    table = row_labels, to_bins, per_score, first, slots, half, first_row, histogram, cells
    width = random.choice((1, 16, 50, m))
    for begin in range(0, m, width):
        columns = slice(begin, min(begin + width, m))
        s = query.float() @ gallery[columns].float().T
        if (slots > -2).all():  # of scores alone
            s = s.to(random.choice((torch.float32, torch.bfloat16)))
        tile = filter[:, columns], torch.ones(n), 0.0, row_ids, column_ids[:, columns], begin
        ops.count_pairs_(s, *scores, *tile, table[0], column_labels[columns].contiguous(), *table[1:])
    counted = row_ids[0, :, None] != column_ids[0]
    if half:
        counted &= torch.arange(m) > first_row + torch.arange(n)[:, None]
    same = (row_labels[:, None] == column_labels)[counted].long()
    cell = ((query.double() @ gallery.double().T)[counted] * per_score).floor() + first
    cell = cell.clamp(0, bins * of_bin - 1).long()
    expected = torch.zeros(bins * of_bin, 2).long()
    expected.index_put_((cell, same), torch.ones_like(cell), accumulate=True)
    expected = expected.view(bins, of_bin, 2)
    assert torch.equal(histogram, expected.sum(1)) and torch.equal(cells, expected[wanted])
    if m and d:
        gallery[random.randrange(m)] = torch.nan  # counted somewhere
        ops.count_pairs_(s, *scores, *tile, table[0], column_labels[columns].contiguous(), *table[1:])
    for name, wrong in (("first_column", m), ("first_column", -1), ("slots", None)):
        begin = tile[-1] if name == "slots" else wrong
        if name == "slots":
            slots[0] = len(wanted)
        try:
            ops.count_pairs_(s, *scores, *tile[:-1], begin, table[0], column_labels[columns].contiguous(), *table[1:])
        except RuntimeError as error:
            assert "beyond the gallery" in str(error) or "outside of cells" in str(error)
        else:
            raise AssertionError(f"{name} out of range was taken")


def main(library: str, seconds: float) -> None:
    torch.ops.load_library(library)
    end, calls = time.monotonic() + seconds, 0
    while time.monotonic() < end or calls < 50:
        random.seed(calls)
        torch.manual_seed(calls)
        check(torch.ops.replearn_kernels)
        check_retrieval(torch.ops.replearn_kernels)
        check_counting(torch.ops.replearn_kernels)
        calls += 1
    print(f"{calls} random problems")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
