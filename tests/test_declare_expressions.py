"""Expressions of one pair: their simple forms, their derivatives, and random losses made of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from declared_cases import inputs_of
from metric_cases import LABELS, assert_same

from replearn_kernels.declare import (
    PairLoss,
    clamp,
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
    torch_source,
    total,
    where,
)
from replearn_kernels.declare.algebra import affine, factored, slope
from replearn_kernels.declare.definition import definition_of
from replearn_kernels.declare.expressions import Expr
from replearn_kernels.declare.printing import Writer, function

S, LOGIT, SCALE, A = Expr("s"), Expr("logit"), Expr("scale"), Expr("parameter", "a")

def test_equal_expressions_are_one_object():
    assert exp(S * A + 1) is exp(S * A + 1)
    assert exp(S) is not exp(LOGIT)
    assert Expr("constant", 0.0) is not Expr("constant", -0.0)


@pytest.mark.parametrize(
    ("ours", "simple"),
    [
        (S + 0, S), (0 + S, S), (S - 0, S), (0 - S, -S), (S * 1, S), (1 * S, S), (S * -1, -S), (S / 1, S),
        (-1 * (S * -1), S),
        (S * 0, Expr("constant", 0.0)), (S**1, S), (S**2, S * S), (S**3, S * S * S), (S**0.5, sqrt(S)),
        (where(S > 0, S, S), S), (~(~(S > 0)), S > 0), (Expr("constant", 2.0) * 3, Expr("constant", 6.0)),
        (torch.exp(S), exp(S)), (torch.nn.functional.softplus(S), softplus(S)), (abs(S), torch.abs(S)),
        (np.float32(0.5) * S, 0.5 * S), (torch.where(S > 0, S, A), where(S > 0, S, A)),
    ],
)  # fmt: skip
def test_simple_forms(ours, simple):
    assert ours is simple


@pytest.mark.parametrize(
    ("e", "parts"),
    [
        (LOGIT, (SCALE, S, 0)),
        (3 * LOGIT, (3 * SCALE, S, 0)),
        (-LOGIT / 2, (-SCALE / 2, S, 0)),
        ((1 + A) * LOGIT, ((1 + A) * SCALE, S, 0)),
        (-A * (S - 0.5), (-A, S, -A * -0.5)),
        (2 - A * S, (-A, S, 2)),
        (A * exp(S) + 1, (A, exp(S), 1)),
        (LOGIT * LOGIT, (SCALE * SCALE, S * S, 0)),
        (S * LOGIT - A, (SCALE, S * S, -A)),
        (LOGIT + S, (1, LOGIT + S, 0)),
    ],
)
def test_what_all_pairs_share_is_taken_out(e, parts):
    factor, rest, offset = affine(e)
    expected = tuple(p if isinstance(p, Expr) else Expr("constant", float(p)) for p in parts)
    assert repr((factor, rest, offset)) == repr(expected)
    assert factored(3 * LOGIT) == (3 * SCALE, S)


class RandomExpressions:
    """Expressions that are finite where s is: of a seed always the same."""

    def __init__(self, seed: int, *leaves: Expr):
        self.random, self.leaves = random.Random(seed), leaves

    def value(self, depth: int) -> Expr:
        if depth == 0:
            return self.random.choice([*self.leaves, *self.leaves, Expr("constant", self.random.uniform(-2, 2))])
        x, y = self.value(depth - 1), self.value(depth - 1)
        return self.random.choice([
            lambda: x + y, lambda: x - y, lambda: x * clamp(y, -2, 2), lambda: x / (1 + y * y), lambda: -x,
            lambda: exp(clamp(x, -4, 3)), lambda: log(1 + x * x), lambda: sqrt(x * x + 0.1), lambda: relu(x),
            lambda: softplus(x), lambda: sigmoid(x) * y, lambda: minimum(x, y), lambda: maximum(x, y),
            lambda: abs(x - y), lambda: where(self.condition(depth - 1), x, y), lambda: x.detach() * y,
            lambda: clamp(x, min=self.random.uniform(-1, 0), max=self.random.uniform(0, 1)), lambda: x**3 / 8,
        ])()  # fmt: skip

    def condition(self, depth: int) -> Expr:
        x, y = self.value(depth) + self.leaves[0], self.value(depth)
        condition = self.random.choice([lambda: x > y, lambda: x <= y, lambda: ~(x < 0.3), lambda: (x >= y) & (x < 1)])
        return condition()


@dataclass(frozen=True)
class Random(PairLoss):
    """A loss of random terms of queries and keys."""

    seed: int
    a: float = 0.3
    b: float = -0.6

    scaled = True

    def terms(self, logit, pair):
        make = RandomExpressions(self.seed, logit, self.a, self.b)
        masks = [pair.every, pair.target, pair.same, pair.other, ~pair.target & make.condition(1)]
        return {
            "t": total(make.value(3), where=make.random.choice(masks)),
            "u": logsumexp(make.random.choice([1, self.a, self.b]) * (make.value(2) + logit / 2) + self.b),
            "v": logsumexp(clamp(make.value(2), -9, 9), where=make.random.choice(masks)),
        }

    def loss(self, row):
        return row.t / 20 + row.u + torch.where(row.v > -math.inf, row.v, 0)


def computed(e: Expr, s: torch.Tensor, a: float) -> torch.Tensor:
    """The value of an expression of s and one parameter, by its text."""
    writer, names = Writer(definition_of(Random, (0,)), [e], torch_source.NOTATION, "role_{}"), {}
    result = writer.text(e)
    exec(function("value(s, role_0)", [*writer.lines, f"return {result}"]), vars(torch_source), names)
    value = names["value"](s, a)
    return value if isinstance(value, torch.Tensor) else s.new_full((), value).expand_as(s)


@pytest.mark.parametrize("seed", range(60))
def test_random_slopes_are_autograd_s(seed):
    e = RandomExpressions(seed, S, A).value(4)
    s = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    value = computed(e, s, 0.4) + 0 * s
    (exact,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(computed(slope(e, S), s.detach(), 0.4), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("seed", "backend"), [*((seed, "torch") for seed in range(40)), *((seed, "cpp") for seed in range(6))]
)
def test_random_losses_are_those_of_eager(seed, backend):
    x, y, labels, scale = inputs_of(23, 6, LABELS["pairs"](23))
    results = []
    for by in ("eager", backend):
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
        fused = fuse(Random(seed), backend=by, memory_budget=0)
        value = fused(*leaves[:2], leaves[2], query_group=labels, key_group=labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert_same(results[1], results[0], rtol=1e-10, atol=1e-10)
