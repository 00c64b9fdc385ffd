"""What the curve of all pairs rests on: cells, bins where a filter sees pairs, and what follows from their counts."""

import math

import pytest
import torch
from test_retrieval import SIMILARITIES
from test_retrieval_bounds import rows_of

from replearn_kernels.retrieval.bounds import Filter, Rows, Scores
from replearn_kernels.verification import counting
from replearn_kernels.verification.labelled import _Asked, _Seen

BINS, CELLS = counting.BINS, counting.CELLS


@pytest.mark.parametrize("longest", [1.0, 1.5, 3.0, 2.0**-500, 2.0**499, 0.0])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_cells(similarity, longest):
    cells = counting.Cells.of(similarity, longest, longest)
    largest = {"cosine": 1.0, "product": longest**2}.get(similarity, 0.0)
    least = -4 * longest**2 if "distance" in similarity else -largest
    scores = torch.tensor([least, largest, 0.37 * least + 0.63 * largest], dtype=torch.float64)
    cell = cells.of_scores(scores)
    assert (cells.score(cell) <= scores).all() and (scores < cells.score(cell + 1)).all()
    assert cell.min() >= 0 and cell.max() < BINS * CELLS
    assert math.frexp(cells.per_score)[0] == 0.5
    if longest > 1e-140:
        assert cell[1] - cell[0] >= (BINS - 1) * CELLS // 2  # at least half of the cells are in use


def test_of_the_longest_row_on_either_side():
    """A distance reaches as far from long queries."""
    for longest_query, longest in ((10.0, 1.0), (1.0, 10.0)):
        assert counting.Cells.of("product", longest_query, longest) == counting.Cells.of(
            "product", longest, longest_query
        )
    assert counting.Cells.of("distance", 10.0, 10.0).per_score < counting.Cells.of("distance", 1.0, 1.0).per_score / 50


def pairs_of(x, y, similarity, left_out=()):
    query, gallery = Rows.of(x), Rows.of(y)
    scores = Scores.of(query, gallery, similarity)
    longest = [float(rows.lengths.max()) for rows in (query, gallery)]
    cells = counting.Cells.of(similarity, longest[0], max(longest) if "distance" in similarity else longest[1])
    labels = torch.zeros(len(x)).int(), torch.zeros(len(y)).int()
    return counting.LabelledPairs(scores, labels, list(left_out), False, 0, cells, "torch")


KINDS = ["usual", "far from zero", "lengths", "one feature", "zeros"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS], ids="-".join)
def test_a_filter_sees_pairs_near_their_bins(similarity, kinds, dtype):
    g = torch.Generator().manual_seed(0)
    for d in (1, 3, 100, 1024):
        x, y = (rows_of(kind, n, d, g) for kind, n in zip(kinds, (19, 37)))
        if d == 1024:  # exact units, long sums
            x, y = x.sign(), y.sign()
        pairs = pairs_of(x, y, similarity)
        filter = Filter(pairs.scores, dtype)
        s = (filter.query.features @ filter.gallery.features.T).float()
        columns, (factor, shift) = filter.columns, pairs.to_bins[:, :, None].float()
        v = s * columns[0] * filter.row_factor[:, None] + columns[2]
        seen = (v * factor + shift).clamp(0, BINS - 1).long()
        row, column = (index.reshape(-1) for index in torch.meshgrid(torch.arange(19), torch.arange(37), indexing="ij"))
        bins = pairs.cells.of_scores(pairs.scores.listed(row, column)).view(19, 37) // CELLS
        assert ((seen - bins).abs() <= pairs.reach(filter)).all()


def test_rows_of_one_length_are_seen_well():
    """Of unit rows, d = 128: what says that pairs may be anywhere would be right, too."""
    x = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    pairs = pairs_of(x, x, "cosine")
    assert pairs.reach(pairs.fine) <= 2
    assert pairs.reach(Filter(pairs.scores, torch.bfloat16)) <= 200


def test_near():
    assert counting.near(torch.tensor([5]), 2).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert counting.near(torch.tensor([0, BINS - 1]), 1).nonzero().flatten().tolist() == [0, 1, BINS - 2, BINS - 1]
    assert counting.near(torch.tensor([9, 11, 11]), 1).nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert not counting.near(torch.empty(0).long(), 3).any()


def test_which_filter_counts_cells(monkeypatch):
    """bf16's where it leaves few pairs in doubt."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(counting, "first_filter", lambda scores: Filter(scores, torch.bfloat16))
    pairs = pairs_of(x, x, "cosine")
    reach = pairs.reach(pairs.first)
    seen = torch.zeros(BINS).long()
    seen[[1000, 1000 + reach]] = torch.tensor([960, 40])
    assert pairs.filter_for(torch.tensor([1000 + 2 * reach]), seen) is pairs.first  # 4 %
    assert pairs.filter_for(torch.tensor([1000 + reach]), seen) is pairs.fine
    monkeypatch.setattr(counting, "first_filter", lambda scores: Filter(scores, torch.float32))
    pairs = pairs_of(x, x, "cosine")
    assert pairs.filter_for(torch.tensor([1000 + reach]), seen) is pairs.fine is pairs.first


def seen_of(other, same, reach):
    histogram = torch.zeros(BINS, 2, dtype=torch.int64)
    for kind, bins in enumerate((other, same)):
        for where, pairs in bins.items():
            histogram[where, kind] = pairs
    return _Seen.of(histogram, reach)


@pytest.mark.parametrize(
    "apart, auc, bounds",
    [
        (0, 0.5, (0, 1)),
        (6, 1, (0, 1)),  # each may be 3 bins off: in the same one
        (7, 1, (1, 1)),
        (-6, 0, (0, 1)),
        (-7, 0, (0, 0)),
    ],
)
def test_bounds_of_the_area(apart, auc, bounds):
    assert seen_of({100: 5}, {100 + apart: 2}, 3).auc == (auc, bounds)


def test_area_of_more_pairs_than_an_integer_holds():
    assert seen_of({100: 18 * 10**9}, {200: 2 * 10**9}, 1).auc == (1, (1, 1))


@pytest.mark.parametrize("other_pairs, last", [(1, 1.0), (100, 0.01), (99, 10 ** (-39 / 20)), (1000, 1e-3)])
def test_fars_of_a_curve_to_draw(other_pairs, last):
    fars = list(seen_of({0: other_pairs}, {1: 1}, 1).all_fars)
    assert fars[0] == 1 and fars[-1] == last and len(fars) == 1 + round(-20 * math.log10(last))


def test_bins_about():
    """Of a point that is seen at 2,000: two bins off either way."""
    seen = seen_of({1000: 90, 2000: 9, 3000: 1}, {1500: 5, 3500: 6}, 2)
    assert seen.totals == (11, 100)

    def about(fars=(), best=()):
        bins = seen.bins_about(_Asked(fars, best, *seen.totals)).tolist()
        of_equal_errors = list(range(1498, 1503))
        assert [bin for bin in bins if bin in of_equal_errors] == of_equal_errors
        return [bin for bin in bins if bin not in of_equal_errors]

    assert about() == [] and about((1.0,)) == []
    assert about((0.0,)) == list(range(2998, 3003))
    assert about((0.01,)) == about((0.05, 0.09)) == list(range(1998, 2003))
    assert about((0.1, 0.5)) == list(range(998, 1003))
    assert about(best=("f1",)) == list(range(3498, 3503))  # 6 of 11, and none wrong
