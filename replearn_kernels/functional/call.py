"""From a checked call of a loss function to the operator, or to the plain formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..engine import distributed, validation
from ..engine.backends import resolve_backend
from ..engine.operators import checked_rows, pair_loss, refuse_forward_mode, refuse_transforms, refuse_wrapped
from ..engine.problem import Inputs
from ..engine.schedules import Config, on_device_of
from ..engine.shards import meet
from ..engine.world import World, telling
from ..objectives import Objective

P = ParamSpec("P")
R = TypeVar("R")


class Options(NamedTuple):
    """What every loss takes, checked; ``world`` and ``strategy``, what every loss over pairs takes."""

    reduction: str
    backend: str
    memory_budget: int
    world: World | None = None
    strategy: str = "auto"

    @classmethod
    def of(
        cls,
        reduction: str,
        backend: str,
        memory_budget: int,
        features: Tensor,
        world: World | None = None,
        strategy: str = "auto",
        why_no_passes: Callable[[], str | None] | None = None,
    ) -> Options:
        """``why_no_passes``: of a declared loss, as :func:`~..engine.backends.resolve_backend` takes it."""
        validation.check_reduction(reduction)
        memory_budget = validation.check_memory_budget(memory_budget)
        validation.check_strategy(strategy)
        name = resolve_backend(backend, features.device, features.dtype, why_no_passes)
        if world is not None:
            refuse_eager(name)
        return cls(reduction, name, memory_budget, world, strategy)


def refuse_eager(backend: str) -> None:
    """With a group."""
    if backend == "eager":
        raise ValueError("backend='eager' is the formula for the batch of one process: it takes no group")


def takes_logit_scale(function: Callable[P, R]) -> Callable[P, R]:
    """For functions, constructors and calls of modules: who gives a temperature is told what to give instead."""
    name = function.__qualname__.removesuffix(".__init__").removesuffix(".forward")

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        if "temperature" in keywords:
            raise TypeError(f"{name} takes no temperature: call it with logit_scale = 1 / temperature")
        return function(*args, **keywords)

    return call


def in_group(function: Callable[P, R]) -> Callable[P, R]:
    """For a loss function that takes ``group``: what fails on one rank before all have met is told to the others.

    The function gets its :class:`World` in the group's place, or None. torch.compile leaves it out of its graphs: what
    comes from other ranks has sizes that no graph knows.
    """

    @wraps(function)
    def call(*args, group=None, **keywords):
        if group is None:
            return function(*args, **keywords)
        return _in_group(function, group, args, keywords)

    return call


@torch._disable_dynamo
def _in_group(function, group, args, keywords):
    world = World.of(group, function.__name__)
    if world is None:
        return function(*args, group=None, **keywords)
    with telling(world):
        world.keywords = _described(function, args, keywords)
        tensors = [value for value in (*args, *keywords.values()) if isinstance(value, Tensor)]
        world.device = tensors[0].device if tensors else None
        refuse_transforms()
        refuse_wrapped(*tensors)
        for tensor in tensors:
            refuse_forward_mode(tensor)
        return function(*args, group=world, **keywords)


def _described(function, args, keywords) -> dict:
    """The arguments as every rank must have them: all but what each is free to choose."""
    try:
        bound = inspect.signature(function).bind(*args, group=None, **keywords)
    except TypeError:  # the call itself will tell
        return {}
    bound.apply_defaults()
    own = ("backend", "memory_budget", "group")
    return {name: _described_value(value) for name, value in bound.arguments.items() if name not in own}


def _described_value(value):
    """Numbers and words by what they are, where 1 and 1.0 are the same; others by their kind."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if validation.is_number(value):
        with suppress(OverflowError):  # an int beyond any float: the function will say what it expects
            return float(value)
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def run(inputs: Inputs, objective: Objective, options: Options, eager: Callable[[Inputs], Tensor]) -> Tensor:
    """The fused loss, or with ``backend="eager"`` the formula ``eager(inputs)``."""
    if options.backend == "eager":
        if torch.compiler.is_compiling():
            inputs = inputs._replace(query=checked_rows(inputs, objective))
        else:
            validation.check_values(inputs, objective)
        with on_device_of(inputs.query):
            return eager(inputs)
    config = config_of(inputs, objective, options)
    if options.world is None:
        return pair_loss(inputs, config)
    alike = {"reduction": options.reduction, "requires_grad": config.needs_grad}
    layout = meet(options.world, inputs, objective, alike, options.strategy)
    return pair_loss(inputs, config, distributed.Schedules(layout))


def config_of(inputs: Inputs, objective: Objective, options: Options) -> Config:
    enabled = torch.is_grad_enabled()
    needs_grad = [enabled and tensor.requires_grad for tensor in inputs.differentiable]
    how = options.reduction, options.backend, options.memory_budget
    return Config(objective.name, objective.parameters, *how, needs_grad)


def autocast(*features: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, features enter the products in its dtype, as in any matrix product; logits stay fp32."""
    if not torch._C._is_any_autocast_enabled():
        return features
    device = features[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return features
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in features)


def check_pair(features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two feature matrices that can be compared, given under the caller's names; cast under autocast."""
    (name, query), (other_name, key) = features.items()
    validation.check_features(name, query)
    validation.check_features(other_name, key)
    query, key = autocast(query, key)
    validation.check_alike(other_name, key, name, query)
    return query, key


def check_groups(groups: dict[str, Tensor | None], query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Groups of queries and keys, given under the caller's names: both or neither."""
    (name, of_queries), (other_name, of_keys) = groups.items()
    if (of_queries is None) != (of_keys is None):
        raise ValueError(f"{name} and {other_name} must be given together, got only one of them")
    if of_queries is None:
        return None, None
    of_queries = validation.check_labels(name, of_queries, query.shape[0], query)
    return of_queries, validation.check_labels(other_name, of_keys, key.shape[0], query)
