"""The dispatcher's operators: one forward and one backward for every loss over pairs.

``pair_loss`` returns the loss and what its backward needs; ``pair_loss_backward`` returns the gradients.
Each has a schema, a fake kernel and an autograd rule, so that torch.compile, opcheck and FakeTensor see one
opaque node. In plain eager mode :func:`pair_loss` goes round the dispatcher to an autograd.Function with the same
rule: operators written in Python cost 0.3 ms forward and backward, more than the whole loss of 64 rows.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import schedules
from .problem import Inputs
from .schedules import Config

_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor? own, Tensor? target, Tensor? row_group, Tensor? column_group, "
    "Tensor logit_scale, Tensor? logit_bias"
)
_CONFIG = "str objective, float[] parameters, str reduction, str backend, int memory_budget, bool[] needs_grad"
_COUNT = len(Inputs._fields)


def _split(arguments) -> tuple[Inputs, Config]:
    """The operator's flat arguments as the schedules take them."""
    return Inputs(*arguments[:_COUNT]), Config(*arguments[_COUNT:])


def _forward_with(function):
    return lambda *arguments: function(*_split(arguments))


def _backward_with(function):
    return lambda grad_loss, saved, *arguments: function(grad_loss, saved, *_split(arguments))


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(f"pair_loss({_INPUTS}, {_CONFIG}) -> (Tensor, Tensor[])")
_library.define(f"pair_loss_backward(Tensor grad_loss, Tensor[] saved, {_INPUTS}, {_CONFIG}) -> Tensor[]")
_library.impl("pair_loss", _forward_with(schedules.forward), "CompositeExplicitAutograd")
_library.impl("pair_loss_backward", _backward_with(schedules.backward), "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::pair_loss", _forward_with(schedules.fake_forward))
torch.library.register_fake("replearn_kernels::pair_loss_backward", _backward_with(schedules.fake_backward))


def pair_loss(inputs: Inputs, config: Config, of_group=None) -> Tensor:
    """The loss of every row against its columns, differentiable once.

    ``of_group``: what takes the place of :mod:`.schedules` where the batch is that of several ranks.

    Raises:
        NotImplementedError: inside a torch.func transform.
    """
    refuse_transforms()
    if of_group is not None:
        return _PairLoss.apply(of_group, config, len(inputs.keys), *_flat(inputs))
    if needs_dispatcher(*inputs.differentiable):
        return torch.ops.replearn_kernels.pair_loss(*inputs, *config)[0]
    return _PairLoss.apply(schedules, config, len(inputs.keys), *_flat(inputs))


def refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "replearn_kernels losses have no rule for torch.func transforms (grad, vmap, jvp, ...); "
            "use torch.autograd, or backend='eager'."
        )


def refuse_wrapped(*tensors: Tensor) -> None:
    """With a group."""
    if needs_dispatcher(*tensors):
        raise NotImplementedError("a loss with group= takes plain tensors: their data goes to other ranks")


def refuse_forward_mode(rows: Tensor) -> None:
    """For operators whose autograd rule is registered: PyTorch would drop the tangent without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(rows).tangent is not None:
        raise NotImplementedError(
            "replearn_kernels losses have no rule for forward-mode differentiation; use backend='eager'."
        )


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether somebody traces or wraps these tensors, so that only a registered operator will do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors)
    )


def _flat(inputs: Inputs) -> list[Tensor | None]:
    """All tensors in a row, as autograd takes them: those that are no keys, then the keys."""
    query, keys, *rest = inputs
    return [query, *rest, *keys]


def _unflat(tensors, key_count: int) -> tuple[Inputs, list[Tensor]]:
    """The inverse of :func:`_flat`, and what comes after the keys."""
    query, *rest = tensors[: _COUNT - 1]
    keys, others = tensors[_COUNT - 1 :][:key_count], tensors[_COUNT - 1 + key_count :]
    return Inputs(query, list(keys), *rest), list(others)


class _PairLoss(torch.autograd.Function):
    """The eager route: the rule of the operators, without the dispatcher. ``route``: whose forward and backward.

    Gradients that came with the forward call are handed over to the first backward call, which scales them in place:
    keeping them for a second would double the memory. Should it come (retain_graph=True), they are computed again.
    """

    @staticmethod
    def forward(ctx, route, config, key_count, *tensors):
        inputs, _ = _unflat(tensors, key_count)
        loss, saved = route.forward(inputs, config)
        ctx.route, ctx.gradients = route, None
        if route.gradients_in_forward(inputs, config):
            ctx.gradients, saved = saved, []
        _save(ctx, config, inputs, saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        inputs, saved = _load(ctx)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if ctx.route.gradients_in_forward(inputs, ctx.config):
                saved = ctx.gradients or ctx.route.forward(inputs, ctx.config)[1]
                ctx.gradients = None
            gradients = ctx.route.backward(grad_loss, saved, inputs, ctx.config, in_place=True)
            gradients = _placed(gradients, inputs, ctx.config)
        if torch.is_grad_enabled():
            marked = differentiable_once([grad_loss, *inputs.differentiable], _flat(gradients))
            gradients, _ = _unflat(marked, ctx.key_count)
        return None, None, None, *_flat(gradients)


def differentiable_once(sources: list[Tensor], gradients) -> tuple[Tensor | None, ...]:
    """Gradients that were computed without a graph; under create_graph=True they must not look like constants."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return _RefuseSecondDerivative.apply(len(sources), *sources, *gradients)


class _RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients on as functions of all ``inputs``: differentiating them is an error, not a silent zero."""

    @staticmethod
    def forward(ctx, inputs, *tensors):
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[inputs:])

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivative()


def refuse_second_derivative(*args):
    raise NotImplementedError(
        "replearn_kernels losses are differentiable once: their backward pass has no derivative. "
        "For second derivatives (gradient penalties, Hessians) use backend='eager'."
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    arguments, config = _split(inputs)
    _save(ctx, config, arguments, output[1])


def _dispatched_backward(ctx, grad_loss, _):
    inputs, saved = _load(ctx)
    gradients = torch.ops.replearn_kernels.pair_loss_backward(grad_loss, saved, *inputs, *ctx.config)
    # An empty list of parameters passes for a list of no tensors, whose gradients are an empty list.
    return *_placed(gradients, inputs, ctx.config), *([] if option == [] else None for option in ctx.config)


torch.library.register_autograd(
    "replearn_kernels::pair_loss", _dispatched_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("replearn_kernels::pair_loss_backward", refuse_second_derivative, lib=_library)


def _save(ctx, config: Config, inputs: Inputs, saved: list[Tensor]) -> None:
    ctx.config, ctx.key_count = config, len(inputs.keys)
    ctx.save_for_backward(*_flat(inputs), *saved)


def _load(ctx) -> tuple[Inputs, list[Tensor]]:
    return _unflat(ctx.saved_tensors, ctx.key_count)  # read once: checkpointing allows no more


def _placed(gradients: list[Tensor], inputs: Inputs, config: Config) -> Inputs:
    """The list of gradients, an empty tensor for each that is not due, in the places of the inputs; None elsewhere."""
    due = iter([g if needs else None for g, needs in zip(gradients, config.needs_grad)])
    return Inputs(
        query=next(due), keys=[next(due) for _ in inputs.keys], own=None if inputs.own is None else next(due),
        target=None, row_group=None, column_group=None,
        logit_scale=next(due), logit_bias=None if inputs.logit_bias is None else next(due),
    )  # fmt: skip
