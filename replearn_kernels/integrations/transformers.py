"""CLIP and SigLIP models of transformers, whose loss never forms the logits of a batch.

::

    from transformers import CLIPModel
    from replearn_kernels.integrations.transformers import apply_to_clip

    model = apply_to_clip(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"))
    model(**inputs, return_loss=True).loss.backward()      # in training: logits_per_image and logits_per_text are None
    model(**inputs).logits_per_image                       # without return_loss: the model's own forward, with logits
    model(**inputs, return_loss=True, return_logits=True)  # both

After ``model.eval()`` the logits are there, too, as what evaluates a model finds them by their place; there
``return_logits=False`` leaves them out. The same with a Trainer, Accelerate, torch.compile and DistributedDataParallel:
call it before they wrap the model. :func:`undo` takes it back. Loss and gradients are those of the model's own formula,
in fp32 where that is in the features' dtype.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .. import functional as F
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.world import World
from .options import checked_options
from .versions import require

require("transformers", "5.12", "6")

from transformers import PreTrainedModel  # noqa: E402
from transformers.utils import can_return_tuple  # noqa: E402


def _exponential(model) -> tuple[Tensor, ...]:
    return (model.logit_scale.exp(),)


def _inverse_temperature(model) -> tuple[Tensor, ...]:
    return (1 / model.temperature,)


def _exponential_and_bias(model) -> tuple[Tensor, ...]:
    return model.logit_scale.exp(), model.logit_bias


@dataclass(frozen=True)
class _Model:
    """What of a model's forward is its own: its output class, and what its logits are scaled by."""

    output: str
    scale_and_bias: Callable[[PreTrainedModel], tuple[Tensor, ...]] = _exponential
    label_smoothing: float = 0.0


CLIP_MODELS = {
    "CLIPModel": _Model("CLIPOutput"),
    "AlignModel": _Model("AlignOutput", _inverse_temperature, label_smoothing=0.1),
    "AltCLIPModel": _Model("AltCLIPOutput"),
    "BlipModel": _Model("BlipOutput"),
    "ChineseCLIPModel": _Model("ChineseCLIPOutput"),
    "CLIPSegModel": _Model("CLIPSegOutput"),
    "MetaClip2Model": _Model("MetaClip2Output"),
    "OwlViTModel": _Model("OwlViTOutput"),
    "Owlv2Model": _Model("Owlv2Output"),
    "VisionTextDualEncoderModel": _Model("CLIPOutput"),
}
"""The models that :func:`apply_to_clip` takes, by the name of their class."""

SIGLIP_MODELS = {
    "SiglipModel": _Model("SiglipOutput", _exponential_and_bias),
    "Siglip2Model": _Model("Siglip2Output", _exponential_and_bias),
}
"""The models that :func:`apply_to_siglip` takes, by the name of their class."""


def apply_to_clip(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> PreTrainedModel:
    """Make :func:`~replearn_kernels.clip_loss` the loss of a model with transformers' CLIP loss.

    Args:
        model: an instance of a class of :data:`CLIP_MODELS`, or of a subclass that keeps its forward. It becomes one of
            a subclass with the same name and another forward.
        backend, memory_budget, strategy: as :func:`~replearn_kernels.clip_loss` takes them.
        group: a torch.distributed process group, whose ranks' batches are one. Default: each process compares the
            images and texts of its own batch, as transformers does.

    Returns:
        The model.

    Raises:
        TypeError: the model is of no such class, or an option is not of its type.
        ValueError: an option is not of its range.

    Example::

        model = apply_to_clip(CLIPModel(CLIPConfig()))
        Trainer(model, args, data_collator=collate, train_dataset=dataset).train()  # collate sets return_loss=True
    """
    options = _options(backend, memory_budget, group, strategy)
    return _apply(model, CLIP_MODELS, partial(_clip_loss, options))


def apply_to_siglip(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> PreTrainedModel:
    """Make :func:`~replearn_kernels.siglip_loss` the loss of a model with transformers' SigLIP loss.

    The arguments, the result and the exceptions are those of :func:`apply_to_clip`, with :data:`SIGLIP_MODELS`.
    """
    options = _options(backend, memory_budget, group, strategy)
    return _apply(model, SIGLIP_MODELS, partial(_siglip_loss, options))


def _clip_loss(options: dict, kind: _Model, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    return F.clip_loss(text, image, logit_scale, label_smoothing=kind.label_smoothing, **options)


def _siglip_loss(options: dict, kind: _Model, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor):
    return F.siglip_loss(text, image, logit_scale, logit_bias, **options)


def _options(backend: str, memory_budget: int, group, strategy: str) -> dict:
    World.of(group)
    return {"group": group, **checked_options(backend, memory_budget, strategy)}


def _apply(model: PreTrainedModel, kinds: dict[str, _Model], loss: Callable) -> PreTrainedModel:
    own = model.own_class if isinstance(model, FusedLoss) else type(model)
    kind = _kind_of(own, kinds)
    if not isinstance(model, torch.nn.Module) or kind is None:
        raise TypeError(_what_is_expected(model, kinds))
    if own.forward is not kind.forward:
        raise TypeError(
            f"{own.__name__} has a forward of its own, which may not be {kind.__name__}'s: compute the loss there, by "
            "replearn_kernels.clip_loss or siglip_loss of the normalised embeddings"
        )
    model.__class__ = _fused_class(own)
    model.fused_loss = loss
    return model


def _what_is_expected(model, kinds: dict[str, _Model]) -> str:
    other = CLIP_MODELS if kinds is SIGLIP_MODELS else SIGLIP_MODELS
    if type(model).__name__ in other:
        apply = "apply_to_clip" if other is CLIP_MODELS else "apply_to_siglip"
        return f"{type(model).__name__} has the other loss: use {apply}"
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    return f"model must be an instance of {', '.join(kinds)}, before another module wraps it, got {got}"


def undo(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model the forward of its class back, whose loss forms the logits.

    Raises:
        TypeError: it has it.
    """
    if not isinstance(model, FusedLoss) or type(model).__bases__[0] is not FusedLoss:
        raise TypeError(
            "model must be what apply_to_clip or apply_to_siglip returned, and nothing else may have changed its class "
            f"since, got {type(model).__name__}"
        )
    model.__class__ = model.own_class
    vars(model).pop("fused_loss", None)
    return model


class FusedLoss:
    """Comes before a model's class among the bases of a class of the same name, which has another forward."""

    own_class: type[PreTrainedModel]

    def __reduce_ex__(self, protocol):
        """Copies and pickles are made of the model's own class, which others can import, and made so again."""
        _, (_, *arguments), *rest = super().__reduce_ex__(protocol)
        return _new, (self.own_class, *arguments), *rest


def _new(own: type, *arguments) -> PreTrainedModel:
    fused = _fused_class(own)
    return fused.__new__(fused, *arguments)


def _kind_of(own: type, kinds: dict[str, _Model]) -> type | None:
    """The class of transformers among ``kinds`` that ``own`` is, or is derived from."""
    return next((cls for cls in own.__mro__ if cls.__name__ in kinds), None)


@cache
def _fused_class(own: type) -> type:
    """A subclass of ``own`` by its name, which checkpoints record, with another forward."""
    kinds = CLIP_MODELS | SIGLIP_MODELS
    kind = _kind_of(own, kinds)
    loss = _clip_loss if kind.__name__ in CLIP_MODELS else _siglip_loss
    forward = _forward(kind, kinds[kind.__name__])
    members = {"own_class": own, "forward": forward, "fused_loss": staticmethod(partial(loss, {}))}
    return type(own.__name__, (FusedLoss, own), {**members, "__module__": own.__module__})


def _forward(cls: type, kind: _Model) -> Callable:
    """A forward for ``cls`` that forms the logits only where they are asked for."""
    signature = inspect.signature(cls.forward)
    names = [one.name for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    of_image = set(inspect.signature(cls.get_image_features).parameters)
    of_text = set(inspect.signature(cls.get_text_features).parameters)
    output = getattr(sys.modules[cls.__module__], kind.output)

    @can_return_tuple
    def forward(self, *args, return_logits: bool | None = None, **kwargs):
        given = {**dict(zip(names, args)), **kwargs}
        if not given.pop("return_loss", None):
            return cls.forward(self, **given)
        given["return_dict"] = True
        image_outputs = self.get_image_features(**{k: v for k, v in given.items() if k not in of_text - of_image})
        text_outputs = self.get_text_features(**{k: v for k, v in given.items() if k not in of_image - of_text})
        text = _unit_rows(text_outputs.pooler_output)
        image = _unit_rows(image_outputs.pooler_output).to(text.device, text.dtype)
        scale, *bias = (scalar.to(text.device) for scalar in kind.scale_and_bias(self))
        needs_logits = not self.training if return_logits is None else return_logits
        logits = sum(bias, text @ image.T * scale) if needs_logits else None
        return output(
            loss=self.fused_loss(kind, image, text, scale, *bias),
            logits_per_image=logits.T if needs_logits else None,
            logits_per_text=logits,
            text_embeds=text,
            image_embeds=image,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    del forward.__wrapped__  # Accelerate's unwrapping would go on to what is inside
    asked = inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    place = next((i for i, one in enumerate(parameters) if one.kind is one.VAR_KEYWORD), len(parameters))
    # Trainer reads from it which columns of a data set the model takes.
    forward.__signature__ = signature.replace(parameters=[*parameters[:place], asked, *parameters[place:]])
    return forward


def _unit_rows(embeds: Tensor) -> Tensor:
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)
