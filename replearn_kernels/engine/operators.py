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

from . import schedules

_CONFIG = (
    "str objective, float[] parameters, str reduction, str backend, int memory_budget, bool[] needs_grad"
)
_INPUTS = "Tensor query, Tensor[] keys, Tensor? own, Tensor? target, Tensor logit_scale"

_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(f"pair_loss({_INPUTS}, {_CONFIG}) -> (Tensor, Tensor[])")
_library.define(f"pair_loss_backward(Tensor grad_loss, Tensor[] saved, {_INPUTS}, {_CONFIG}) -> Tensor[]")
_library.impl("pair_loss", schedules.forward, "CompositeExplicitAutograd")
_library.impl("pair_loss_backward", schedules.backward, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::pair_loss", schedules.fake_forward)
torch.library.register_fake("replearn_kernels::pair_loss_backward", schedules.fake_backward)


def pair_loss(query, keys, own, target, logit_scale, *config) -> Tensor:
    """The loss of ``query`` against the columns of ``keys`` and ``own``, differentiable once.

    ``config``: objective's name and parameters, reduction, backend, memory_budget, and which of
    (query, *keys, own, logit_scale) need a gradient.

    Raises:
        NotImplementedError: inside a torch.func transform.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "replearn_kernels losses have no rule for torch.func transforms (grad, vmap, jvp, ...); "
            "use torch.autograd, or backend='eager'."
        )
    if _needs_dispatcher(query, *keys, logit_scale):
        return torch.ops.replearn_kernels.pair_loss(query, keys, own, target, logit_scale, *config)[0]
    return _PairLoss.apply(config, query, own, target, logit_scale, *keys)


def _needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether somebody traces or wraps these tensors, so that only a registered operator will do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors)
    )


class _PairLoss(torch.autograd.Function):
    """The eager route: the rule of the operators, without the dispatcher."""

    @staticmethod
    def forward(ctx, config, query, own, target, logit_scale, *keys):
        loss, saved = schedules.forward(query, keys, own, target, logit_scale, *config)
        _save(ctx, config, query, own, target, logit_scale, keys, saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (query, own, target, logit_scale), keys, saved = _load(ctx)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            gradients = schedules.backward(grad_loss, saved, query, keys, own, target, logit_scale, *ctx.config)
        d_query, d_keys, d_own, d_scale = _unpack(ctx, gradients)
        if torch.is_grad_enabled():  # create_graph=True: the gradients must not look like constants
            inputs = [t for t in (grad_loss, query, *keys, own, logit_scale) if t is not None]
            d_query, d_own, d_scale, *d_keys = _RefuseSecondDerivative.apply(
                len(inputs), *inputs, d_query, d_own, d_scale, *d_keys
            )
        return None, d_query, d_own, None, d_scale, *d_keys


class _RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients on as functions of all ``inputs``: differentiating them is an error, not a silent zero."""

    @staticmethod
    def forward(ctx, inputs, *tensors):
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[inputs:])

    @staticmethod
    def backward(ctx, *grads):
        _refuse_second_derivative()


def _refuse_second_derivative(*args):
    raise NotImplementedError(
        "replearn_kernels losses are differentiable once: their backward pass has no derivative. "
        "For second derivatives (gradient penalties, Hessians) use backend='eager'."
    )


def _setup_context(ctx, inputs, output):
    query, keys, own, target, logit_scale, *config = inputs
    _, saved = output
    ctx.set_materialize_grads(False)
    _save(ctx, config, query, own, target, logit_scale, keys, saved)


def _dispatched_backward(ctx, grad_loss, _):
    (query, own, target, logit_scale), keys, saved = _load(ctx)
    gradients = torch.ops.replearn_kernels.pair_loss_backward(
        grad_loss, saved, query, keys, own, target, logit_scale, *ctx.config
    )
    d_query, d_keys, d_own, d_scale = _unpack(ctx, gradients)
    return d_query, d_keys, d_own, None, d_scale, *[None] * len(ctx.config)


torch.library.register_autograd(
    "replearn_kernels::pair_loss", _dispatched_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "replearn_kernels::pair_loss_backward", _refuse_second_derivative, lib=_library
)


def _save(ctx, config, query, own, target, logit_scale, keys, saved) -> None:
    ctx.config, ctx.key_count, ctx.has_own = config, len(keys), own is not None
    ctx.save_for_backward(query, own, target, logit_scale, *keys, *saved)


def _load(ctx) -> tuple[tuple, list[Tensor], list[Tensor]]:
    query, own, target, logit_scale, *rest = ctx.saved_tensors  # read once: checkpointing allows no more
    return (query, own, target, logit_scale), rest[: ctx.key_count], rest[ctx.key_count :]


def _unpack(ctx, gradients: list[Tensor]):
    """The operator's list of gradients, an empty tensor for each that is not due, as autograd wants them."""
    due = [g if needs else None for g, needs in zip(gradients, ctx.config[-1])]
    d_query, d_keys, rest = due[0], due[1 : 1 + ctx.key_count], due[1 + ctx.key_count :]
    return d_query, d_keys, rest[0] if ctx.has_own else None, rest[-1]
