"""What is found out about a loss by running its formulas, before anything is computed with it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from ..engine.validation import check_scale, is_number
from .definition import Definition, Given, check_rows, definition_of, fields_of, instance_of, kind_of
from .pair_loss import PairLoss

_OPTIONS = {"bool": bool, "int": int, "str": str}


def check_formulas(loss: PairLoss) -> None:
    """Run the author's formulas on made-up terms of three rows.

    Raises:
        TypeError, ValueError, AttributeError: they are not as :class:`PairLoss` says.
    """
    cls = type(loss)
    parameters, options = fields_of(cls)
    values = {name: _value_of(f"{cls.__name__}.{name}", getattr(loss, name)) for name in parameters}
    kinds = {field.name: kind_of(field) for field in fields(cls)}
    for name in options:
        value, kind = getattr(loss, name), kinds[name]
        if type(value) is not _OPTIONS[kind]:
            raise TypeError(f"{cls.__name__}.{name} must be {kind}, got {value!r}")
    definition = definition_of(cls, tuple(getattr(loss, name) for name in options))
    loss = instance_of(cls, values | {name: getattr(loss, name) for name in options})
    definition.count(loss, _made_up(definition), _leaf(1.3), _given(definition))
    if cls.loss is not PairLoss.loss:
        _check_signature(loss)
        _check_losses(loss, definition)


def _value_of(name: str, parameter: float | Tensor) -> float | Tensor:
    """A parameter's value; of a tensor, what stands for it in a formula."""
    check_parameter(name, parameter)
    is_tensor = isinstance(parameter, Tensor)
    if is_tensor and not parameter.is_cpu:
        return _leaf(0.7)  # read from no GPU
    value = check_finite_parameter(name, parameter)
    return _leaf(value) if is_tensor else value


def check_finite_parameter(name: str, parameter: float | Tensor) -> float:
    """Its value; that of a tensor is read."""
    value = parameter.item() if isinstance(parameter, Tensor) else float(parameter)
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_parameter(name: str, parameter: float | Tensor) -> None:
    """Raise TypeError or ValueError if it is no number, and no tensor that can be one."""
    if isinstance(parameter, Tensor):
        check_scale(name, parameter, parameter)
    elif not is_number(parameter):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {type(parameter).__name__}")


def _check_signature(loss: PairLoss) -> None:
    taken = len(inspect.signature(loss.loss).parameters)
    if taken != 1 + loss.symmetric:
        wanted = "loss(self, row, column)" if loss.symmetric else "loss(self, row)"
        raise TypeError(f"{type(loss).__name__}.symmetric is {loss.symmetric}: define {wanted}")


def _check_losses(loss: PairLoss, definition: Definition) -> None:
    """One differentiable value for each of three rows, of that row's terms alone."""
    name = f"{type(loss).__name__}.loss"
    row, column = _made_up(definition), _made_up(definition) if loss.symmetric else []
    leaves, scale, given = [*row, *column], _leaf(1.3), _given(definition)
    learned = [value for value in vars(loss).values() if isinstance(value, Tensor)]
    with torch.enable_grad():
        losses = definition.row_losses(loss, row, column, scale, given)
    check_rows(name, losses, 3)
    if not losses.dtype.is_floating_point:
        raise TypeError(f"{name} must return floating-point losses, got {losses.dtype}")
    if not losses.requires_grad:
        raise ValueError(f"{name} has no gradient in any term: it detaches all of them, or leaves torch")
    if any(all(leaf is not known for known in (*leaves, scale, *learned)) for leaf in _leaves_of(losses)):
        raise TypeError(
            f"{name} reads a tensor that requires a gradient and is none of its terms, which would get none: "
            "what a declared loss learns is logit_scale, and its float fields"
        )
    for i in range(3):
        with torch.no_grad():
            alone = [leaf[i : i + 1] for leaf in leaves]
            given_alone = Given(*(values[:, i : i + 1] for values in given))
            of_row = definition.row_losses(loss, alone[: len(row)], alone[len(row) :], scale, given_alone)
        if of_row.shape != (1,) or not torch.allclose(of_row, losses[i : i + 1].to(of_row.dtype), equal_nan=True):
            raise ValueError(f"{name} mixes rows or is random: a row's loss may depend on that row's terms alone")


def _made_up(definition: Definition) -> list[Tensor]:
    """Makes up values of all terms, ``[3]`` each, in no order."""
    return [_leaf(_start() + place / 8) for place in range(len(definition.terms))]


def _given(definition: Definition) -> Given:
    """Makes up what a call gives for three rows, and for their targets' columns."""
    counts = len(definition.cls.row_values), len(definition.column_values)
    steps = (torch.arange(count, device="cpu").unsqueeze(1) / 16 for count in counts)
    return Given(*(_start() + 0.05 + step for step in steps))


def _start() -> Tensor:
    return torch.tensor([0.6, 0.9, 0.2], dtype=torch.float64, device="cpu")


def _leaf(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").clone().requires_grad_()


def _leaves_of(result: Tensor) -> Iterator[Tensor]:
    """Yields the tensors that a backward call on the result would give a gradient to."""
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]
