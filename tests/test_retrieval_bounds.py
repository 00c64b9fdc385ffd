"""That a filter's bounds hold: of every pair the score lies within them, for rows as adversarial as they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replearn_kernels.retrieval.bounds import SIMILARITIES, Filter, Rows, Scores
from replearn_kernels.retrieval.walk import Alike, Tile


def rows_of(kind, n, d, g):
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if kind == "far from zero":
        x = x * 1e-3 + 7
    elif kind == "lengths":
        x *= 10.0 ** torch.linspace(-25, 12, n)[:, None].double()
    elif kind == "one feature":  # half of a unit in bf16's last place off
        x = torch.zeros(n, d).double()
        x[:, 0], x[:, -1] = 1, 2.0**-8 * (1 + torch.arange(n).double() / n)
    elif kind == "zeros":
        x[::2] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(*[st.sampled_from(["usual", "far from zero", "lengths", "one feature", "zeros"])] * 2),
    d=st.sampled_from([1, 2, 3, 48, 100, 640, 1152]),
    of_fp64=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_scores_lie_within_bounds(dtype, similarity, kinds, d, of_fp64, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (rows_of(kind, n, d, g) for kind, n in zip(kinds, (19, 37)))
    if not of_fp64:
        x, y = x.float(), y.float()
    scores = Scores.of(Rows.of(x), Rows.of(y), similarity)
    filter = Filter(scores, dtype)
    s = filter.query.features @ filter.gallery.features.T
    tile = Tile(s, filter, slice(0, 19), slice(0, 37), Alike.of([], scores))
    lower, upper = tile.lower, tile.upper
    row, column = (index.reshape(-1) for index in torch.meshgrid(torch.arange(19), torch.arange(37), indexing="ij"))
    low, high = scores.bounds(row, scores.listed(row, column))
    assert (low <= high).all() and (high - low <= 5e-7 * torch.maximum(low.abs(), high.abs()) + 1e-10).all()
    torch.testing.assert_close(tile.lower_at(row, column).view(19, 37), lower, rtol=1e-6, atol=1e-6)
    assert (low.view(19, 37) <= upper).all() and (high.view(19, 37) >= lower).all()


@pytest.mark.parametrize("dtype, width", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_bounds_are_near(dtype, width):
    """Of unit rows, d = 128: a filter that says nothing would be right, too."""
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    scores = Scores.of(Rows.of(x), Rows.of(x), "cosine")
    filter = Filter(scores, dtype)
    s = filter.query.features @ filter.gallery.features.T
    tile = Tile(s, filter, slice(0, 200), slice(0, 200), Alike.of([], scores))
    assert (tile.upper - tile.lower).max() < width
    assert filter.gallery.residuals.max() > 0
