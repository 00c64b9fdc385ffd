"""Losses over views and prototypes: where the logits come from, the two sweeps over them, and the operators.

The objective (:mod:`replearn_kernels.objectives.dino`) sees tiles of logits, ``[b, V, C]`` of the student and
``[b, U, C]`` of the teacher. A source makes them and takes the gradients of the student's:

    Logits    given; a tile is some samples' whole rows
    Heads     features times prototypes; a tile is all samples' logits of some prototypes, the only ones that exist

The forward call sweeps once for the statistics, the backward call once more for the gradients, which are then all that
it holds besides a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..objectives.dino import Dino, Statistics
from .columns import blocks
from .counters import count_product
from .operators import (
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_transforms,
    refuse_upstream,
    save_for_backward,
)
from .problem import statistics_dtype
from .products import addmm_, mm_
from .schedules import on_device_of

# Logits of a tile: on a CPU what its cache holds, elsewhere enough to fill the device. A tile has at least
# SMALLEST_WIDTH prototypes, however many rows there are: narrower products would be slow.
CPU_TILE, DEVICE_TILE, SMALLEST_WIDTH = 2**19, 2**22, 64

LogitTile = tuple[slice, slice, Tensor, Tensor]  # samples, prototypes, student's logits, teacher's centered logits


class Logits:
    """Logits ``[V, B, K]`` and ``[U, B, K]``, in any memory layout."""

    student_inputs = ("student_logits",)
    teacher_inputs = ("teacher_logits",)

    def __init__(self, student: Tensor, teacher: Tensor, center: Tensor):
        self.dtype = statistics_dtype(student.dtype)
        self.student, self.teacher = student.transpose(0, 1), teacher.transpose(0, 1)
        self.center = center.to(self.dtype)
        self.prototypes = student.shape[2]

    def tiles(self) -> Iterator[LogitTile]:
        views = self.student.shape[1] + self.teacher.shape[1]
        samples = max(tile_size(self.center) // (views * self.prototypes), 1)
        for rows in blocks(len(self.student), samples):
            teacher = self.teacher[rows].to(self.dtype) - self.center
            yield rows, slice(0, self.prototypes), self.student[rows].to(self.dtype), teacher

    def prepare_gradients(self, needs_grad: list[bool]) -> None:
        self.d_logits = self.student.new_empty(self.student.transpose(0, 1).shape)

    def add_gradients(self, rows: slice, columns: slice, w: Tensor) -> None:
        self.d_logits[:, rows] = w.transpose(0, 1)

    def gradients(self) -> list[Tensor]:
        return [self.d_logits]


class Heads:
    """Features ``[V, B, d]`` and ``[U, B, d]`` with each side's prototypes ``[K, d]``."""

    student_inputs = ("student_features", "student_weight")
    teacher_inputs = ("teacher_features", "teacher_weight")

    def __init__(self, student, student_weight, teacher, teacher_weight, center):
        self.dtype, self.factors = statistics_dtype(student.dtype), factors_dtype(student)
        self.views, self.batch, self.width = student.shape
        self.teacher_views = teacher.shape[0]
        self.student, self.teacher = self._rows(student), self._rows(teacher)
        self.student_weight, self.teacher_weight, self.center = student_weight, teacher_weight, center

    def _rows(self, features: Tensor) -> Tensor:
        """A sample's views side by side, as the objective wants its logits: ``[B V, d]``."""
        return features.transpose(0, 1).flatten(0, 1).to(self.factors).contiguous()

    def tiles(self) -> Iterator[LogitTile]:
        rows = len(self.student) + len(self.teacher)
        width = max(tile_size(self.center) // max(rows, 1), SMALLEST_WIDTH)
        for columns in blocks(len(self.student_weight), width):
            teacher = self._product(self.teacher, self.teacher_weight[columns], self.teacher_views)
            student = self._product(self.student, self.student_weight[columns], self.views)
            yield slice(0, self.batch), columns, student, teacher.sub_(self.center[columns])

    def _product(self, rows: Tensor, weight: Tensor, views: int) -> Tensor:
        count_product(rows, len(weight))
        logits = rows.new_empty(len(rows), len(weight), dtype=self.dtype)
        mm_(logits, rows, weight.to(self.factors).t())
        return logits.view(self.batch, views, len(weight))

    def prepare_gradients(self, needs_grad: list[bool]) -> None:
        self.needs_grad = needs_grad
        features, weight = self.student, self.student_weight
        self.d_features = torch.zeros_like(features, dtype=self.dtype) if needs_grad[0] else features.new_empty(0)
        # A tile has all rows, so that it gives its prototypes' gradients whole: no fp32 sums are kept.
        self.d_weight = weight.new_empty(weight.shape if needs_grad[1] else 0)

    def add_gradients(self, rows: slice, columns: slice, w: Tensor) -> None:
        w = w.flatten(0, 1).to(self.factors)
        if self.needs_grad[0]:
            count_product(self.student, w.shape[1])
            addmm_(self.d_features, w, self.student_weight[columns].to(self.factors))
        if self.needs_grad[1]:
            count_product(self.student, w.shape[1])
            self.d_weight[columns] = w.t() @ self.student

    def gradients(self) -> list[Tensor]:
        if self.needs_grad[0]:
            self.d_features = self.d_features.view(self.batch, self.views, self.width).transpose(0, 1).contiguous()
        return [self.d_features.to(self.student_weight.dtype), self.d_weight]


def factors_dtype(features: Tensor) -> torch.dtype:
    """In which features, prototypes and W enter the products, whose sums are in fp32.

    On a GPU bf16 stays: its matrix instructions are 15 times as fast as fp32's. fp16 does not: an entry of W is some
    1 / (B K), 2e-7 for 64 samples and 65,536 prototypes, and fp16's digits end at 6e-8.
    """
    return torch.bfloat16 if features.is_cuda and features.dtype == torch.bfloat16 else statistics_dtype(features.dtype)


def tile_size(like: Tensor) -> int:
    return CPU_TILE if like.device.type == "cpu" else DEVICE_TILE


def forward(source_type, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the tables of student and teacher that :func:`backward` needs."""
    *tensors, student_temp, teacher_temp, reduction = arguments
    with on_device_of(tensors[0]):
        source, objective = source_type(*tensors), Dino(student_temp, teacher_temp)
        statistics = sweep_statistics(source, objective, *_shape(source_type, tensors))
        losses = objective.losses(statistics)
        loss = losses if reduction == "none" else losses.sum() * _share(len(losses), reduction)
        return loss, statistics.student, statistics.teacher


def sweep_statistics(source: Logits | Heads, objective: Dino, views: int, teacher_views: int, batch: int) -> Statistics:
    statistics = objective.new_statistics(batch, views, teacher_views, source.center.new_empty((), dtype=source.dtype))
    for rows, _, student, teacher in source.tiles():
        objective.update_statistics(student, teacher, statistics.of_rows(rows))
    return statistics


def backward(source_type, grad_loss, student_table, teacher_table, *arguments) -> list[Tensor]:
    """Gradients of the student's inputs; an empty tensor where none is due."""
    *tensors, student_temp, teacher_temp, reduction, needs_grad = arguments
    with on_device_of(tensors[0]):
        source, objective = source_type(*tensors), Dino(student_temp, teacher_temp)
        batch = student_table.shape[1]
        grad_rows = (grad_loss * _share(batch, reduction)).expand(batch)
        coefficients = objective.coefficients(student_table, teacher_table, grad_rows)
        maxima = student_table[0], teacher_table[0]
        source.prepare_gradients(needs_grad)
        for rows, columns, student, teacher in source.tiles():
            of_rows = [[table[rows] for table in tables] for tables in (maxima, coefficients)]
            source.add_gradients(rows, columns, objective.weights(student, teacher, *of_rows))
        return source.gradients()


def fake_forward(source_type, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`forward` returns, without the data."""
    *tensors, _, _, reduction = arguments
    views, teacher_views, batch = _shape(source_type, tensors)
    new_empty = partial(tensors[0].new_empty, dtype=statistics_dtype(tensors[0].dtype))
    loss = new_empty((batch,) if reduction == "none" else ())
    return loss, new_empty(2, batch, views), new_empty(2, batch, teacher_views)


def fake_backward(source_type, grad_loss, student_table, teacher_table, *arguments) -> list[Tensor]:
    """What :func:`backward` returns, without the data."""
    *tensors, _, _, _, needs_grad = arguments
    return [t.new_empty(t.shape if needs else 0) for t, needs in zip(tensors, needs_grad)]


def _shape(source_type, tensors: list[Tensor]) -> tuple[int, int, int]:
    """(V, U, B)."""
    student, teacher = tensors[0], tensors[len(source_type.student_inputs)]
    return student.shape[0], teacher.shape[0], student.shape[1]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, ctx.reduction = inputs
    save_for_backward(ctx, *output[1:], *tensors)


def _differentiate(source_type, operator, ctx, grad_loss, *_):
    refuse_upstream(grad_loss)
    needs_grad = ctx.needs_input_grad[: len(source_type.student_inputs)]
    config = ctx.student_temp, ctx.teacher_temp, ctx.reduction, list(needs_grad)
    gradients = operator(grad_loss, *ctx.saved_tensors, *config)
    due = [gradient if needs else None for gradient, needs in zip(gradients, needs_grad)]
    return *due, *[None] * (len(ctx.needs_input_grad) - len(due))


_library = torch.library.Library("replearn_kernels", "FRAGMENT")


def _register(name: str, source_type) -> None:
    """The operators ``name`` and ``name_backward``: schema, kernels, fakes and autograd."""
    names = (*source_type.student_inputs, *source_type.teacher_inputs, "center")
    inputs = ", ".join(f"Tensor {name}" for name in names) + ", float student_temp, float teacher_temp, str reduction"
    _library.define(f"{name}({inputs}) -> (Tensor, Tensor, Tensor)")
    _library.define(
        f"{name}_backward(Tensor grad_loss, Tensor student_table, Tensor teacher_table, {inputs}, bool[] needs_grad)"
        " -> Tensor[]"
    )
    kernels = {name: (forward, fake_forward), f"{name}_backward": (backward, fake_backward)}
    for operator, (kernel, fake) in kernels.items():
        _library.impl(operator, partial(kernel, source_type), "CompositeExplicitAutograd")
        torch.library.register_fake(f"replearn_kernels::{operator}", partial(fake, source_type), lib=_library)
    rule = partial(_differentiate, source_type, getattr(torch.ops.replearn_kernels, f"{name}_backward"))
    torch.library.register_autograd(f"replearn_kernels::{name}", rule, setup_context=_save, lib=_library)
    torch.library.register_autograd(
        f"replearn_kernels::{name}_backward", refuse_second_derivative, lib=_library
    )


_register("dino_loss", Logits)
_register("dino_head_loss", Heads)


def dino_loss(*arguments) -> Tensor:
    """Of (student_logits, teacher_logits, center, student_temp, teacher_temp, reduction), differentiable once."""
    refuse_transforms()
    refuse_forward_mode(arguments[0])
    return torch.ops.replearn_kernels.dino_loss(*arguments)[0]


def dino_head_loss(*arguments) -> Tensor:
    """The same from features, each followed by its weight, in place of logits."""
    refuse_transforms()
    for tensor in arguments[:2]:
        refuse_forward_mode(tensor)
    return torch.ops.replearn_kernels.dino_head_loss(*arguments)[0]


def _share(batch: int, reduction: str) -> float:
    """Of a sample in the loss."""
    return 1 / batch if reduction == "mean" and batch else 1.0
