"""The declared losses: calls of each on shared inputs, and their formulas straight from the papers, row by row.

``CASES[name]``: how it is called and what its oracle says. Beside the shipped ones there are the toy losses of
declared_toys.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import hardest_toys as hardest
import learned_toys as toys
import torch
import torch.nn.functional as F
from declared_toys import (
    Clip,
    Contrastive,
    Everything,
    Filtered,
    Graded,
    Guided,
    Imitation,
    Margin,
    OwnMargins,
    Regression,
    Sampled,
    SigLip,
    Squares,
    guides_of,
    numbers_of,
    stacked,
)
from metric_oracle import distances, others
from torch import Tensor

import replearn_kernels as rk
from replearn_kernels.declare import PairLoss, fuse

Call = Callable[..., Tensor]


class Case(NamedTuple):
    """``call(x, y, labels, scale, **options)``, and ``oracle(x, y, labels, scale)``: the loss of every row, and what
    the mean is over. A loss of one batch leaves y alone; labels are of both. ``scaled``: the scale gets a gradient."""

    call: Call
    oracle: Call
    scaled: bool = False
    batch: bool = False


def _everything(x, y, labels, scale, target):
    losses, a, b = [], 0.3, -0.4
    for i in range(len(x)):
        v_of_row, w_of_row = [], []
        for j in range(len(y)):
            logit = scale * (x[i] * y[j]).sum()
            u = (logit / 4).clamp(b, a) + torch.minimum(logit, logit.new_tensor(a))
            u = u + torch.maximum(logit / 3, logit.new_tensor(b))
            v = (logit * logit + 1).sqrt() - logit.abs() + (1.5 + logit.sigmoid()).log() + u.exp().log1p()
            v = v - (b * u / 8).exp()
            if logit > b or j == target[i]:
                v_of_row.append(v.detach() * u - v**3 / 10)
            if not (j == target[i] and logit >= 0):
                same = labels[i] == labels[j] and logit <= a
                w_of_row.append(u if same else v)
        total_v = torch.stack(v_of_row).sum() if v_of_row else x.sum() * 0
        of_w = torch.stack(w_of_row) if w_of_row else x[i, :0]
        losses.append(total_v / 10 + of_w.logsumexp(0))
    return stacked(x, losses), len(x)


# -- oracles --------------------------------------------------------------------------------------------------------


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def circle(x, y, labels, scale, m=0.4, gamma=80.0):
    s, losses, counted = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t(), [], 0
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        p, n = s[i, positives], s[i, negatives]
        near = (gamma * (1 + m - p.detach()).clamp(min=0) * (1 - m - p)).exp().sum()
        far = (gamma * (n.detach() + m).clamp(min=0) * (n - m)).exp().sum()
        losses.append((near * far).log1p())
        counted += bool(positives and negatives)
    return stacked(x, losses), counted


def multi_similarity(x, y, labels, scale, alpha=2.0, beta=50.0, base=0.5):
    s, losses = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t(), []
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        near = (-alpha * (s[i, positives] - base)).exp().sum().log1p() / alpha
        losses.append(near + (beta * (s[i, negatives] - base)).exp().sum().log1p() / beta)
    return stacked(x, losses), len(x)


def log_sum_exp(x, y, labels, scale, counts, hardness=0.0):
    logits, losses = scale * (x @ y.t()), []
    for i in range(len(x)):
        own = logits[i, counts(labels == labels[i])]
        losses.append((own + hardness * own.detach()).exp().sum().log())
    return stacked(x, losses), len(x)


def hard_negatives(x, y, labels, scale, beta=1.0, tau_plus=0.0):
    """The loss of the authors' code: of exponentials, with the clamp that it has for debiasing alone."""
    losses = []
    for i in range(len(x)):
        logits = scale * (y @ x[i])
        positive, negative = logits[i].exp(), torch.cat([logits[:i], logits[i + 1 :]])
        count = len(negative)
        if not count:
            losses.append(positive * 0)
            continue
        importance = (beta * negative).exp()
        g = (importance * negative.exp()).sum() / importance.mean()
        if tau_plus:
            g = ((g - tau_plus * count * positive) / (1 - tau_plus)).clamp(min=count * (-scale).exp())
        losses.append(-(positive / (positive + g)).log())
    return stacked(x, losses), len(x)


def decoupled(x, y, labels, scale):
    z, n, losses = F.normalize(torch.cat([x, y]), dim=1), len(x), []
    logits = scale * z @ z.t()
    for i in range(2 * n):
        other = (i + n) % (2 * n)
        kept = [j for j in range(2 * n) if j not in (i, other)]
        losses.append(logits[i, kept].logsumexp(0) - logits[i, other])
    return stacked(torch.cat([x, y]), losses), 2 * n


def vse(x, y, labels, scale, margin=0.4, by_group=False):
    s, losses = x @ y.t(), []
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i and not (by_group and labels[i] == labels[j])]
        hinges = [(margin + of.max() - s[i, i]).clamp(min=0) for of in (s[i, rest], s[rest, i]) if rest]
        losses.append(sum(hinges) if hinges else s[i, i] * 0)
    return stacked(x, losses), len(x)


def multi_positive(x, y, labels, scale):
    logits, losses = scale * x @ y.t(), []
    for i in range(len(x)):
        same = [j for j in range(len(x)) if labels[j] == labels[i]]
        losses.append(
            (logits[i].logsumexp(0) - logits[i, same].mean() + logits[:, i].logsumexp(0) - logits[same, i].mean()) / 2
        )
    return stacked(x, losses), len(x)


def sampled_softmax(x, y, labels, scale):
    losses, (weight, surprise) = [], numbers_of(labels, 2)
    for i in range(len(x)):
        corrected = scale * (y @ x[i]) + surprise
        kept = [j for j in range(len(y)) if j == i or labels[j] != labels[i]]
        losses.append(weight[i] * (corrected[kept].logsumexp(0) - corrected[i]))
    return stacked(x, losses), weight.sum().item()


def soft_targets(x, y, labels, scale, symmetric=False):
    logits, (rows, columns) = scale * x @ y.t(), guides_of(labels)
    guide, losses = 2.5 * rows @ columns.t(), []
    for i in range(len(x)):
        loss = -(guide[i].softmax(0) * logits[i].log_softmax(0)).sum()
        of_column = -(guide[:, i].softmax(0) * logits[:, i].log_softmax(0)).sum()
        losses.append((loss + of_column) / 2 if symmetric else loss)
    return stacked(x, losses), len(x)


def gist(x, y, labels, scale, negatives=False):
    """sentence-transformers' formula."""
    (a, p), (ga, gp) = (F.normalize(t, dim=1) for t in (x, y)), (F.normalize(t, dim=1) for t in guides_of(labels))
    own, losses = (ga * gp).sum(1), []
    scores = [(a @ p.t(), ga @ gp.t()), (a @ a.t(), ga @ ga.t()), (p @ p.t(), gp @ gp.t())]
    if negatives:
        scores.append((a @ F.normalize(guides_of(labels, x.shape[1])[1], dim=1).t(), ga @ gp.flip(1).t()))
    for i in range(len(x)):
        limit = own[i] - 0.05 * (own[i].abs() if negatives else 1)
        kept = [
            similarity[i, j] * scale
            for kind, (similarity, guide) in enumerate(scores)
            for j in range(len(y))
            if (kind == 0 and j == i) or (not (kind in (1, 2) and j == i) and guide[i, j] <= limit)
        ]
        losses.append(torch.stack(kept).logsumexp(0) - scale * (a[i] @ p[i]))
    return stacked(x, losses), len(x)


def _clip(x, y, labels, scale):
    logits = scale * x @ y.t()
    rows = range(len(x))
    losses = [(logits[i].logsumexp(0) + logits[:, i].logsumexp(0)) / 2 - logits[i, i] for i in rows]
    return stacked(x, losses), len(x)


def _siglip(x, y, labels, scale, by_group=False):
    logits = scale * x @ y.t()
    losses = []
    for i in range(len(x)):
        signs = [-1.0 if (labels[j] == labels[i] if by_group else j == i) else 1.0 for j in range(len(y))]
        losses.append(_log1p_exp(torch.tensor(signs, dtype=x.dtype) * logits[i]).sum())
    return stacked(x, losses), len(x)


def _margin(x, y, labels, scale, margin=0.2):
    s, losses = x @ y.t(), []
    for i in range(len(x)):
        logits = scale * (s[i] - margin * torch.eye(len(y), dtype=x.dtype)[i])
        losses.append(logits.logsumexp(0) - logits[i])
    return stacked(x, losses), len(x)


def _contrastive(x, y, labels, scale, margin=1.3, squared=True):
    d, losses = distances(x), []
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        near, far = d[i, positives], (margin - d[i, negatives]).clamp(min=0)
        losses.append((near**2).sum() + (far**2).sum() if squared else near.sum() + far.sum())
    return stacked(x, losses), len(x)


def _squares(x, y, labels, scale, weight=0.7):
    d, losses, counted = distances(x, "squared_euclidean"), [], 0
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        loss = (weight * (d[i, positives] - 1)).sum()
        losses.append(loss + (2 - weight * d[i, negatives]).logsumexp(0) if negatives else loss)
        counted += len(positives)
    return stacked(x, losses), counted


def _graded(x, y, labels, scale, gamma=3.0):
    s, losses = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t(), []
    grade, weight = numbers_of(labels, 2)
    for i in range(len(x)):
        near = [j for j in range(len(x)) if j != i and abs(grade[i] - grade[j]) < 0.6]
        far = [j for j in range(len(x)) if j != i and j not in near]
        above = [j for j in near if grade[i] > grade[j]]
        both = x.new_zeros(())
        if near:
            both = both + (gamma * (weight[near] - s[i, near])).logsumexp(0)
        if far:
            both = both + (gamma * s[i, far] + grade[i] / 4).logsumexp(0)
        losses.append(weight[i] * _log1p_exp(both) + (s[i, above] ** 2 * weight[above]).sum())
    return stacked(x, losses), weight.sum().item()


def _own_margins(x, y, labels, scale):
    d, losses, (margin,) = distances(x), [], numbers_of(labels, 1)
    for i in range(len(x)):
        positives, negatives = others(labels.tolist(), i)
        near, far = d[i, positives] * margin[positives], (margin[i] - d[i, negatives]).clamp(min=0)
        losses.append(near.sum() + (far**2).sum())
    return stacked(x, losses), len(x)


def _regression(x, y, labels, scale):
    logits, losses, (grade,) = scale * x @ x.t(), [], numbers_of(labels, 1)
    for i in range(len(x)):
        kept = [j for j in range(len(x)) if j != i]
        losses.append(((logits[i, kept] - (-(grade[i] - grade[kept]).abs()).exp()) ** 2).sum())
    return stacked(x, losses), len(x)


def _sampled(x, y, labels, scale):
    logits, losses = scale * x @ y.t(), []
    weight, skipped, log_q, column_weight = _sampled_numbers(labels)
    everyone = range(len(x))
    for i in everyone:
        of_row = [logits[i, j] - (0 if j == i else log_q[j]) for j in everyone if j == i or not skipped[i]]
        of_column = [logits[j, i] - (0 if j == i else log_q[i]) for j in everyone if j == i or not skipped[j]]
        row, column = (torch.stack(v).logsumexp(0) - logits[i, i] for v in (of_row, of_column))
        losses.append(weight[i] * row + column_weight[i] * column)
    return stacked(x, losses), (weight > 1.2).sum().item()


def _sampled_numbers(labels: Tensor) -> tuple[Tensor, ...]:
    weight, skipped, log_q, column_weight = numbers_of(labels, 4)
    return weight, skipped > 1.4, log_q, column_weight


def _filtered(x, y, labels, scale):
    logits, losses, (threshold,) = scale * x @ y.t(), [], numbers_of(labels, 1)
    threshold = threshold - 1
    rows, columns = (F.normalize(t, dim=1) for t in guides_of(labels))
    guide = rows @ columns.t()
    for i in range(len(x)):
        kept = [j for j in range(len(y)) if j == i or guide[i, j] < threshold[i]]
        of_column = [j for j in range(len(x)) if j == i or guide[j, i] < threshold[j]]
        row = (logits[i, kept] + guide[i, kept] / 2).logsumexp(0)
        column = (logits[of_column, i] + guide[of_column, i] / 2).logsumexp(0)
        losses.append((row + column) / 2 - logits[i, i] * guide[i, i].exp())
    return stacked(x, losses), len(x)


def _guided(x, y, labels, scale):
    d, losses, (weight,), guide = distances(x), [], numbers_of(labels, 1), guides_of(labels)[0]
    guide = guide @ guide.t()
    for i in range(len(x)):
        positives, _ = others(labels.tolist(), i)
        kept = [j for j in range(len(x)) if j != i and guide[i, j] > -0.5]
        loss = (d[i, positives] ** 2 * guide[i, positives] * weight[i]).sum()
        losses.append(loss + (-d[i, kept] * (1 + guide[i, kept] ** 2)).logsumexp(0) if kept else loss)
    return stacked(x, losses), len(x)


def _imitation(x, y, labels, scale):
    guide = guides_of(labels)[0]
    errors = (x @ x.t() - guide @ guide.t()) ** 2
    return stacked(x, [errors[i].sum() - errors[i, i] for i in range(len(x))]), len(x)


# -- the table ------------------------------------------------------------------------------------------------------


def _of_batch(loss: PairLoss) -> Call:
    return lambda x, y, labels, scale, **k: fuse(loss, **k)(x, labels)


def _of_pairs(loss: PairLoss, by_group: bool = False) -> Call:
    def call(x, y, labels, scale, **k):
        groups = {"query_group": labels, "key_group": labels} if by_group else {}
        return fuse(loss, **k)(x, y, scale, **groups)

    return call


def _withnumbers_of(loss: PairLoss) -> Call:
    names = loss.row_values
    return lambda x, y, labels, scale, **k: fuse(loss, **k)(
        x, labels, *[scale] * loss.scaled, row_values=dict(zip(names, numbers_of(labels, len(names))))
    )


def _call_sampled(x, y, labels, scale, **k):
    weight, skipped, log_q, column_weight = _sampled_numbers(labels)
    rows, columns = {"weight": weight, "skipped": skipped}, {"log_q": log_q, "weight": column_weight}
    return fuse(Sampled(), **k)(x, y, scale, row_values=rows, column_values=columns)


def _call_soft_targets(x, y, labels, scale, **k):
    return rk.soft_target_loss(x, y, *guides_of(labels), logit_scale=scale, guide_scale=2.5, **k)


def _call_gist(x, y, labels, scale, negatives=False, **k):
    rows, columns = guides_of(labels)
    k |= {"margin": 0.05}
    if negatives:
        negative = guides_of(labels, x.shape[1])[1].to(x.dtype)
        k |= {"negative": negative, "negative_guide": columns.flip(1), "relative_margin": True}
    return rk.gist_loss(x, y, rows, columns, logit_scale=scale, **k)


def _call_filtered(x, y, labels, scale, **k):
    (threshold,), (rows, columns) = numbers_of(labels, 1), guides_of(labels)
    loss = fuse(Filtered(), **k)
    return loss(x, y, scale, row_values={"threshold": threshold - 1}, row_guide=rows, column_guide=columns)


CASES = {
    "circle": Case(lambda x, y, labels, scale, **k: rk.circle_loss(x, labels, **k), circle, batch=True),
    "multi_similarity": Case(
        lambda x, y, labels, scale, **k: rk.multi_similarity_loss(x, labels, **k), multi_similarity, batch=True
    ),
    "hard_negative": Case(
        lambda x, y, labels, scale, **k: rk.hard_negative_loss(x, y, logit_scale=scale, **k), hard_negatives, True
    ),
    "debiased": Case(
        lambda x, y, labels, scale, **k: rk.hard_negative_loss(x, y, beta=0.5, tau_plus=0.1, logit_scale=scale, **k),
        lambda *inputs: hard_negatives(*inputs, beta=0.5, tau_plus=0.1), True,
    ),
    "decoupled": Case(
        lambda x, y, labels, scale, **k: rk.decoupled_contrastive_loss(x, y, temperature=1 / scale, **k),
        decoupled, True,
    ),
    "multi_positive": Case(
        lambda x, y, labels, scale, **k: rk.multi_positive_clip_loss(x, y, scale, image_group=labels, **k),
        multi_positive, True,
    ),
    "sampled_softmax": Case(
        lambda x, y, labels, scale, **k: rk.sampled_softmax_loss(
            x, y, key_group=labels, key_log_probability=-numbers_of(labels, 2)[1],
            query_weight=numbers_of(labels, 1)[0], logit_scale=scale, **k,
        ),
        sampled_softmax, True,
    ),
    "soft_target": Case(_call_soft_targets, soft_targets, True),
    "soft_target, symmetric": Case(
        lambda *inputs, **k: _call_soft_targets(*inputs, symmetric=True, **k),
        lambda *inputs: soft_targets(*inputs, symmetric=True), True,
    ),
    "gist": Case(_call_gist, gist, True),
    "gist, negatives": Case(
        lambda *inputs, **k: _call_gist(*inputs, negatives=True, **k),
        lambda *inputs: gist(*inputs, negatives=True), True,
    ),
    "log_sum_exp": Case(
        lambda x, y, labels, scale, **k: rk.pair_logsumexp(x, y, logit_scale=scale, **{"reduction": "mean", **k}),
        lambda *inputs: log_sum_exp(*inputs, counts=lambda same: same | ~same), True,
    ),
    "log_sum_exp, by hardness": Case(
        lambda x, y, labels, scale, **k: rk.pair_logsumexp(
            x, y, over="same", query_group=labels, key_group=labels, logit_scale=scale, hardness=0.3,
            **{"reduction": "mean", **k},
        ),
        lambda *inputs: log_sum_exp(*inputs, counts=lambda same: same, hardness=0.3), True,
    ),
    "vse": Case(lambda x, y, labels, scale, **k: rk.vse_loss(x, y, margin=0.4, **k), vse),
    "vse, by group": Case(
        lambda x, y, labels, scale, **k: rk.vse_loss(x, y, margin=0.4, image_group=labels, **k),
        lambda *inputs: vse(*inputs, by_group=True),
    ),
    "toy clip": Case(_of_pairs(Clip()), _clip, True),
    "toy siglip": Case(_of_pairs(SigLip()), _siglip, True),
    "toy siglip by group": Case(
        _of_pairs(SigLip(), by_group=True), lambda *inputs: _siglip(*inputs, by_group=True), True
    ),
    "toy margin": Case(_of_pairs(Margin()), _margin, True),
    "toy contrastive": Case(_of_batch(Contrastive(1.3)), _contrastive, batch=True),
    "toy contrastive, plain": Case(
        _of_batch(Contrastive(1.3, squared=False)), lambda *inputs: _contrastive(*inputs, squared=False), batch=True
    ),
    "toy squares": Case(_of_batch(Squares()), _squares, batch=True),
    "toy graded": Case(_withnumbers_of(Graded()), _graded, batch=True),
    "toy own margins": Case(_withnumbers_of(OwnMargins()), _own_margins, batch=True),
    "toy regression": Case(_withnumbers_of(Regression()), _regression, True, batch=True),
    "toy sampled": Case(_call_sampled, _sampled, True),
    "toy filtered": Case(_call_filtered, _filtered, True),
    "toy guided": Case(
        lambda x, y, labels, scale, **k: fuse(Guided(), **k)(
            x, labels, row_values={"weight": numbers_of(labels, 1)[0]}, row_guide=guides_of(labels)[0]
        ),
        _guided, batch=True,
    ),
    "toy imitation": Case(
        lambda x, y, labels, scale, **k: fuse(Imitation(), **k)(x, row_guide=guides_of(labels)[0]),
        _imitation, batch=True,
    ),
    "toy hard triplets": Case(_of_batch(hardest.Triplets()), hardest.triplets, batch=True),
    "toy hardest of both sides": Case(hardest.call_violation, hardest.violation, True),
    "toy hardest by group": Case(hardest.call_among, hardest.among, True),
    "toy hardest by grade": Case(hardest.call_graded, hardest.graded, True, batch=True),
    "toy learned bias": Case(toys.call_bias, toys.bias, True),
    "toy learned steepness": Case(toys.call_steep, toys.steep, True, batch=True),
    "toy learned columns": Case(toys.call_columns, toys.columns, True),
    "toy learned sides": Case(toys.call_sides, toys.sides, True, batch=True),
    "toy learned totals": Case(toys.call_totals, toys.totals, True, batch=True),
    "toy learned distance": Case(toys.call_contrastive, toys.contrastive, True, batch=True),
    "toy everything": Case(
        _of_pairs(Everything(), by_group=True), lambda x, *rest: _everything(x, *rest, range(len(x))), True
    ),
}  # fmt: skip
SHIPPED = [name for name in CASES if not name.startswith("toy")]


def inputs_of(n: int, d: int, labels: Tensor, scale: float = 3.0, dtype=torch.float64, near: float = 0.5):
    """(x, y, labels, scale): unit rows, y's near x's."""
    generator = torch.Generator().manual_seed(n + d)
    x, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = (F.normalize(t, dim=1).to(dtype) for t in (x, noise + near * x))
    return x, y, labels, torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def leaves_of(inputs, case: Case) -> list[Tensor]:
    """Copies that require a gradient where the loss has one for them."""
    x, y, labels, scale = inputs
    kinds = (True, not case.batch, False, case.scaled)
    return [t.detach().clone().requires_grad_(needs) for t, needs in zip((x, y, labels, scale), kinds)]


def value_and_gradients(call: Call, inputs, case: Case, **options) -> list[Tensor]:
    """The loss, under an upstream gradient that differs between rows, and what the leaves get."""
    leaves = leaves_of(inputs, case)
    value = call(*leaves, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, upstream)]


def by_oracle(case: Case, inputs, reduction: str = "mean") -> list[Tensor]:
    """The same of the oracle."""

    def call(*leaves, **options):
        losses, counted = case.oracle(*leaves)
        return losses if reduction == "none" else losses.sum() / (max(counted, 1) if reduction == "mean" else 1)

    return value_and_gradients(call, inputs, case)
