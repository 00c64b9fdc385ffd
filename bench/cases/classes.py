"""Features against many classes or prototypes: ArcFace, DINO's head. N is the number of classes, or of samples."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from bench.cases.inputs import unit_rows
from bench.harness import Case, Inputs
from replearn_kernels import arcface_loss, dino_head_loss

BATCH = 256
MARGIN, SCALE = 0.5, 64.0


def faces(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """256 embeddings, and the centres of N classes."""
    labels = torch.randint(n, (BATCH,), generator=torch.Generator().manual_seed(2)).to(device)
    return {
        "embeddings": unit_rows(BATCH, d, dtype, device),
        "weight": unit_rows(n, d, dtype, device, seed=1),
        "labels": labels,
    }


def arcface_scatter(embeddings, weight, labels):
    """As in common use: all cosines, the true one replaced, cross entropy."""
    cosine = F.normalize(embeddings) @ F.normalize(weight).T
    true = cosine.gather(1, labels[:, None])
    sine = (1 - true * true).clamp(min=1e-7).sqrt()
    phi = torch.where(
        true > -math.cos(MARGIN), true * math.cos(MARGIN) - sine * math.sin(MARGIN), true - MARGIN * math.sin(MARGIN)
    )
    return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], phi), labels)


arcface = partial(arcface_loss, margin=MARGIN, scale=SCALE)

ARCFACE = Case(
    name="arcface",
    title=f"ArcFace loss, B = {BATCH}, N classes",
    make_inputs=faces,
    ours={"ours": arcface, "ours_budget_0": partial(arcface, memory_budget=0)},
    dense={"scatter": arcface_scatter},
    sizes=(10_000, 100_000),
)

PROTOTYPES, STUDENT_VIEWS, TEACHER_VIEWS = 65536, 12, 2


def prototypes(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """N samples in 2 global and 10 local views, and 65,536 prototypes."""
    student, teacher = (
        unit_rows(views * n, d, dtype, device, views).detach().unflatten(0, (views, n))
        for views in (STUDENT_VIEWS, TEACHER_VIEWS)
    )
    weight = unit_rows(PROTOTYPES, d, dtype, device, 3)
    return {
        "student_features": student.requires_grad_(),
        "teacher_features": teacher,
        "student_weight": weight,
        "teacher_weight": weight.detach().clone(),
        "center": torch.zeros(PROTOTYPES, device=device),
    }


def dino_naive(student_features, teacher_features, student_weight, teacher_weight, center):
    """As in the paper's code: a cross entropy for every pair of different views."""
    students = (student_features @ student_weight.T / 0.1).log_softmax(-1)
    teachers = ((teacher_features @ teacher_weight.T - center) / 0.04).softmax(-1)
    pairs = [(u, v) for u in range(len(teachers)) for v in range(len(students)) if u != v]
    return sum(-(teachers[u] * students[v]).sum(-1).mean() for u, v in pairs) / len(pairs)


DINO_HEAD = Case(
    name="dino_head",
    title=f"DINO head loss, {PROTOTYPES:,} prototypes, N samples",
    make_inputs=prototypes,
    ours={"ours": dino_head_loss},
    dense={"naive": dino_naive},
    backends=("auto", "eager"),
    sizes=(16, 64),
)
