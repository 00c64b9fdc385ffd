"""The DINO losses written out: the oracle of their tests, and inputs for it."""

import torch
from accuracy import unit_rows, value_and_gradients
from torch import Tensor

from replearn_kernels import dino_head_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def naive(student, teacher, center, student_temp=0.1, teacher_temp=0.04, reduction="mean"):
    """The paper's loss, one pair of views and one sample at a time, in the dtype of the logits."""
    losses = []
    for b in range(student.shape[1]):
        pairs = [student[0, b].sum() * 0]
        for u in range(len(teacher)):
            for v in range(len(student)):
                if u != v:
                    p = torch.softmax((teacher[u, b] - center) / teacher_temp, 0)
                    pairs.append(-(p * torch.log_softmax(student[v, b] / student_temp, 0)).sum())
        losses.append(sum(pairs) / max(len(pairs) - 1, 1))
    losses = torch.stack(losses)
    return losses if reduction == "none" else getattr(losses, reduction)()


def naive_head(student, weight, teacher, teacher_weight, center, **kwargs):
    return naive(student @ weight.t(), teacher @ teacher_weight.t(), center, **kwargs)


def head_loss(student, weight, teacher, teacher_weight, center, **kwargs):
    """The loss under test, with the arguments in the order of :func:`heads`."""
    return dino_head_loss(student, teacher, weight, teacher_weight, center, **kwargs)


def logits(rng, v, u, b, k, dtype=torch.float64) -> list[Tensor]:
    """Student, teacher, center."""
    draw = [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((v, b, k), (u, b, k), (k,))]
    return [tensor.to(dtype) for tensor in draw]


def heads(rng, v, u, b, k, d, dtype=torch.float64) -> list[Tensor]:
    """Student, its weight, teacher, its weight, center; all rows of length 1, as a DINO head makes them."""
    draw = [unit_rows(rng, *shape, dtype=dtype) for shape in ((v, b, d), (k, d), (u, b, d), (k, d))]
    return [*draw, (torch.randn(k, generator=rng) / 10).to(dtype)]


def results(loss, inputs, fixed, upstream=1.0, **kwargs) -> list[Tensor]:
    """Value and gradients of ``loss(*inputs, *fixed)``, everything in the first input's dtype."""
    fixed = [tensor.to(inputs[0].dtype) for tensor in fixed]
    return value_and_gradients(lambda *leaves: (loss(*leaves, *fixed, **kwargs) * upstream).sum(), *inputs)
