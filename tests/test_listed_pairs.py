"""Listed pairs: which there are, and native code against plain PyTorch."""

import pytest
import torch

from replearn_kernels.engine import listed_pairs, native


@pytest.mark.parametrize("most", [2**22, 40, 1])
@pytest.mark.parametrize("n", [0, 1, 2, 29])
def test_every_positive_pair_once(most, n, monkeypatch):
    monkeypatch.setattr(listed_pairs, "BLOCK_ELEMENTS", most)
    for classes in (1, 2, 9, 40):
        group = torch.randint(classes, (n,))
        found = [(int(a), int(b)) for i, j in listed_pairs.positive_pairs(group, 2) for a, b in zip(i, j)]
        expected = {(a, b) for a in range(n) for b in range(a + 1, n) if group[a] == group[b]}
        assert len(found) == len(expected) and {tuple(sorted(pair)) for pair in found} == expected


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
@pytest.mark.parametrize("n, d, count", [(1, 3, 4), (50, 1, 400), (50, 100, 0), (300, 17, 2000)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_native_equals_plain(n, d, count, dtype, tolerance):
    x, a = torch.randn(n, d + 1, dtype=dtype)[:, :d], torch.randn(count, dtype=dtype)  # strided
    i, j = torch.randint(n, (2, count))
    a[::3] = 0
    squares, gradients = [], []
    for plain in (False, True):
        squares.append(listed_pairs.pair_squares(x, i, j, plain=plain))
        gradients.append(torch.ones(n, d, dtype=dtype))
        listed_pairs.add_differences_(gradients[-1], x, i, j, a, plain=plain)
    torch.testing.assert_close(*squares, rtol=tolerance, atol=0)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=10 * tolerance)
