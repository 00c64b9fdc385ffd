"""Two training runs of the same formula, step by step."""

from collections.abc import Callable

import torch


def assert_same_training(ours: Callable, theirs: Callable) -> None:
    """Two functions of a dtype that return a run's losses: equal to 1e-9 in fp64. In fp32, where both part from that
    run by their rounding, which training enlarges, ours is no further from it than theirs plus 1e-6."""
    exact = theirs(torch.float64)
    assert len(exact) >= 15 and exact[-1] < exact[0]
    torch.testing.assert_close(ours(torch.float64), exact, rtol=1e-9, atol=1e-9)
    errors = [max(abs(a - b) for a, b in zip(run(torch.float32), exact)) for run in (ours, theirs)]
    assert errors[0] <= errors[1] + 1e-6, errors
