"""The dispatcher's operators: one forward and one backward for every loss over pairs.

``pair_loss`` returns the loss and what its backward needs; ``pair_loss_backward`` returns the gradients.
Each has a schema, a fake kernel and an autograd rule, so that torch.compile, opcheck and FakeTensor see one
opaque node. In plain eager mode :func:`pair_loss` goes round the dispatcher to an autograd.Function with the same
rule: operators written in Python cost 0.3 ms forward and backward, more than the whole loss of 64 rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..objectives import objective_class
from . import schedules
from .problem import Inputs
from .schedules import Config
from .validation import check_values

_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor? own, Tensor? target, Tensor? row_group, Tensor? column_group, "
    "Tensor logit_scale, Tensor? logit_bias, Tensor? row_values, Tensor? column_values, "
    "Tensor? row_guide, Tensor? column_guide, Tensor? learned"
)
_CONFIG = (  # needs_grad is a list of bools, which torch.jit.trace cannot record
    "str objective, float[] parameters, str reduction, str backend, int memory_budget, int[] needs_grad, bool any_size"
)
_COUNT = len(Inputs._fields)
_PLAIN = (Tensor, torch.nn.Parameter)


def _split(arguments) -> tuple[Inputs, Config]:
    """The operator's flat arguments as the schedules take them."""
    config = Config(*arguments[_COUNT:])
    return Inputs(*arguments[:_COUNT]), config._replace(needs_grad=[bool(needs) for needs in config.needs_grad])


def _forward_with(function):
    return lambda *arguments: function(*_split(arguments))[:2]


def _backward_with(function):
    return lambda grad_loss, saved, *arguments: function(grad_loss, saved, *_split(arguments))


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(f"pair_loss({_INPUTS}, {_CONFIG}) -> (Tensor, Tensor[])")
_library.define(f"pair_loss_backward(Tensor grad_loss, Tensor[] saved, {_INPUTS}, {_CONFIG}) -> Tensor[]")
_library.impl("pair_loss", _forward_with(schedules.forward), "CompositeExplicitAutograd")
_library.impl("pair_loss_backward", _backward_with(schedules.backward), "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::pair_loss", _forward_with(schedules.fake_forward))
torch.library.register_fake("replearn_kernels::pair_loss_backward", _backward_with(schedules.fake_backward))


def checked_rows(inputs: Inputs, objective) -> Tensor:
    """The rows, once the values of all inputs were checked: for a traced formula, whose nodes cannot raise by value.

    Not ``torch._assert_async``: in a compiled CPU loop, its exception ends the process.
    """
    return torch.ops.replearn_kernels.checked_rows(*inputs, objective.name)


def _checked_rows(*arguments) -> Tensor:
    *inputs, objective = arguments
    inputs = Inputs(*inputs)
    check_values(inputs, objective_class(objective))
    return inputs.query.clone()


def pair_loss(inputs: Inputs, config: Config, of_group=None) -> Tensor:
    """The loss of every row against its columns, differentiable once.

    ``of_group``: what takes the place of :mod:`.schedules` where the batch is that of several ranks.

    Raises:
        NotImplementedError: inside a torch.func transform.
    """
    refuse_transforms()
    if of_group is None and needs_dispatcher(*inputs.differentiable):
        return torch.ops.replearn_kernels.pair_loss(*inputs, *config._replace(any_size=_has_symbols(inputs)))[0]
    return _PairLoss.apply(of_group or schedules, config, _Form.of(inputs), inputs, *_flat(inputs))


def refuse_upstream(grad: Tensor | None) -> None:
    """In a backward call: many gradients at once, or one with a tangent."""
    refuse_transforms(grad)
    if grad is not None:
        refuse_forward_mode(grad)


def refuse_transforms(grad: Tensor | None = None) -> None:
    """``grad``: an upstream gradient, which autograd may map over."""
    if in_transform(grad):
        raise NotImplementedError(
            "replearn_kernels losses have no rule for torch.func transforms (grad, vmap, jvp, ...), nor for "
            "is_grads_batched=True; use torch.autograd for one gradient at a time, or backend='eager'."
        )


def in_transform(grad: Tensor | None = None) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def refuse_wrapped(*tensors: Tensor) -> None:
    """With a group."""
    if needs_dispatcher(*tensors):
        raise NotImplementedError("a loss with group= takes plain tensors: their data goes to other ranks")


def refuse_forward_mode(tensor: Tensor) -> None:
    """For operators whose autograd rule is registered: PyTorch would drop the tangent without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            "replearn_kernels losses have no rule for forward-mode differentiation; use backend='eager'."
        )


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether somebody traces or wraps these tensors, so that only a registered operator will do."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing():
        return True
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return True
    return False


def _has_symbols(inputs: Inputs) -> bool:
    """Whether a size of the features is a symbol, of a graph that serves many sizes."""
    sizes = [size for features in inputs.features for size in features.shape]
    if not torch.compiler.is_compiling():
        return any(isinstance(size, torch.SymInt) for size in sizes)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # dynamo says of a symbol that it is an int

    return not all([has_static_value(size) for size in sizes])


class _Form(NamedTuple):
    """Which of the inputs there are. Autograd is given those alone: each argument takes it a microsecond or two."""

    keys: int
    own: bool
    bias: bool
    learned: bool
    target: bool
    row_group: bool
    column_group: bool
    row_values: bool
    column_values: bool
    row_guide: bool
    column_guide: bool

    @classmethod
    def of(cls, inputs: Inputs) -> _Form:
        _, keys, own, target, row_group, column_group, _, bias, *given, learned = inputs
        there = (tensor is not None for tensor in (own, bias, learned, target, row_group, column_group, *given))
        return cls(len(keys), *there)

    def split(self, tensors) -> tuple[Inputs, list[Tensor]]:
        """The inverse of :func:`_flat`, and what comes after."""
        left = iter(tensors)
        query, keys = next(left), [next(left) for _ in range(self.keys)]
        own = next(left) if self.own else None
        scale, bias = next(left), next(left) if self.bias else None
        learned = next(left) if self.learned else None
        target, row_group, column_group, *given = (next(left) if there else None for there in self.of_others)
        return Inputs(query, keys, own, target, row_group, column_group, scale, bias, *given, learned), list(left)

    @property
    def of_others(self) -> tuple[bool, ...]:
        """Of the inputs that get no gradient."""
        return self[4:]


def _flat(inputs: Inputs) -> list[Tensor]:
    """The tensors in a row: those that may get a gradient, then the others."""
    _, _, _, target, row_group, column_group, _, _, *given, _ = inputs
    others = target, row_group, column_group, *given
    return [*inputs.differentiable, *(tensor for tensor in others if tensor is not None)]


class _PairLoss(torch.autograd.Function):
    """The eager route: the rule of the operators, without the dispatcher. ``route``: whose forward and backward.
    ``inputs`` and ``tensors`` are the same: autograd sees tensors that are arguments themselves.

    Gradients that came with the forward call are handed over to the first backward call, which scales them in place:
    keeping them for a second would double the memory. Should it come (retain_graph=True), they are computed again.
    """

    @staticmethod
    def forward(ctx, route, config, form, inputs, *tensors):
        loss, saved, ctx.gradients_in_forward = route.forward(inputs, config)
        ctx.route, ctx.gradients = route, None
        if ctx.gradients_in_forward:
            ctx.gradients, saved = saved, []
        _save(ctx, config, form, tensors, saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_upstream(grad_loss)
        if ctx.gradients and ctx.route is schedules and not torch.is_grad_enabled():
            gradients, ctx.gradients = ctx.gradients, None
            return _arranged(ctx, schedules.scaled(gradients, grad_loss, ctx.config, in_place=True))
        inputs, saved = _load(ctx)
        if ctx.route is not schedules:
            ctx.route.layout.world.meet_again("backward")
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if ctx.gradients_in_forward:
                saved = ctx.gradients or ctx.route.forward(inputs, ctx.config)[1]
                ctx.gradients = None
            gradients = ctx.route.backward(grad_loss, saved, inputs, ctx.config, in_place=True)
        if torch.is_grad_enabled():
            gradients = differentiable_once([grad_loss, *inputs.differentiable], gradients)
        return _arranged(ctx, gradients)


def _arranged(ctx, gradients) -> tuple[Tensor | None, ...]:
    """Gradients, an empty tensor for each that is not due, for the arguments of ``_PairLoss.forward``."""
    due = (gradient if needs else None for gradient, needs in zip(gradients, ctx.config.needs_grad))
    return None, None, None, None, *due, *(None for there in ctx.form.of_others if there)


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
    _save(ctx, config, _Form.of(arguments), _flat(arguments), output[1])


def _dispatched_backward(ctx, grad_loss, _):
    refuse_upstream(grad_loss)
    inputs, saved = _load(ctx)
    if any(tensor.requires_grad and not needs for tensor, needs in zip(inputs.differentiable, ctx.config.needs_grad)):
        raise RuntimeError(
            "this loss was traced with features, a scale, a bias or parameters that required no gradient, and now "
            "require one: "
            "trace or export it with inputs that do"
        )
    gradients = torch.ops.replearn_kernels.pair_loss_backward(grad_loss, saved, *inputs, *ctx.config)
    # An empty list of parameters passes for a list of no tensors, whose gradients are an empty list.
    return *_placed(gradients, inputs, ctx.config), *([] if option == [] else None for option in ctx.config)


torch.library.register_autograd(
    "replearn_kernels::pair_loss", _dispatched_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("replearn_kernels::pair_loss_backward", refuse_second_derivative, lib=_library)


def _count_keys(ctx, inputs, output):
    ctx.keys = len(inputs[1])


def _pass_on(ctx, grad_rows):
    return grad_rows, [None] * ctx.keys, *(None,) * (_COUNT - 1)


_library.define(f"checked_rows({_INPUTS}, str objective) -> Tensor")
_library.impl("checked_rows", _checked_rows, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::checked_rows", lambda query, *others: torch.empty_like(query))
torch.library.register_autograd("replearn_kernels::checked_rows", _pass_on, setup_context=_count_keys, lib=_library)


def _save(ctx, config: Config, form: _Form, tensors, saved: list[Tensor]) -> None:
    ctx.config, ctx.form = config, form
    save_for_backward(ctx, *tensors, *saved)


def save_for_backward(ctx, *tensors: Tensor | None) -> None:
    """Of a tensor made under ``torch.inference_mode()``, which autograd refuses to save, a copy."""
    for tensor in tensors:  # a loop, for the microseconds of a small batch: there is hardly ever one
        if tensor is not None and tensor.is_inference() and any(ctx.needs_input_grad):
            tensors = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
            break
    ctx.save_for_backward(*tensors)


def _load(ctx) -> tuple[Inputs, list[Tensor]]:
    return ctx.form.split(ctx.saved_tensors)  # read once: checkpointing allows no more


def _placed(gradients: list[Tensor], inputs: Inputs, config: Config) -> Inputs:
    """The list of gradients, an empty tensor for each that is not due, in the places of the inputs; None elsewhere."""
    due = iter([g if needs else None for g, needs in zip(gradients, config.needs_grad)])
    return Inputs(
        query=next(due), keys=[next(due) for _ in inputs.keys], own=None if inputs.own is None else next(due),
        target=None, row_group=None, column_group=None,
        logit_scale=next(due), logit_bias=None if inputs.logit_bias is None else next(due),
        learned=None if inputs.learned is None else next(due),
    )  # fmt: skip
