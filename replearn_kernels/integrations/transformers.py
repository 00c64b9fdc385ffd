"""CLIP and SigLIP models of transformers, whose loss never forms the logits of a batch.

::

    from transformers import CLIPModel
    from replearn_kernels.integrations.transformers import apply_to_clip

    model = apply_to_clip(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"))
    model(**inputs, return_loss=True).loss.backward()      # logits_per_image and logits_per_text are None
    model(**inputs).logits_per_image                       # without return_loss: the model's own forward, with logits
    model(**inputs, return_loss=True, return_logits=True)  # both

The same with a Trainer, Accelerate, torch.compile and DistributedDataParallel: call it before they wrap the model.
``del model.forward`` takes it back. Loss and gradients are those of the model's own formula, in fp32 where that is in
the features' dtype.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

from torch import Tensor

from .. import functional as F
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..engine.world import World
from .options import checked_options
from .versions import require

require("transformers", "5.0", "6")

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
        model: an instance of a class of :data:`CLIP_MODELS`, or of a subclass that keeps its forward. It is changed.
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

    def loss(kind: _Model, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return F.clip_loss(text, image, logit_scale, label_smoothing=kind.label_smoothing, **options)

    options = _options(backend, memory_budget, group, strategy)
    return _apply(model, CLIP_MODELS, loss)


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

    def loss(kind: _Model, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return F.siglip_loss(text, image, logit_scale, logit_bias, **options)

    options = _options(backend, memory_budget, group, strategy)
    return _apply(model, SIGLIP_MODELS, loss)


def _options(backend: str, memory_budget: int, group, strategy: str) -> dict:
    World.of(group)
    return {"group": group, **checked_options(backend, memory_budget, strategy)}


def _apply(model: PreTrainedModel, kinds: dict[str, _Model], loss: Callable) -> PreTrainedModel:
    cls = next((cls for cls in type(model).__mro__ if cls.__name__ in kinds), None)
    if cls is None or type(model).forward is not cls.forward:
        raise TypeError(
            f"model must be one of {', '.join(kinds)}, with the forward of its class and before another module wraps "
            f"it, got {type(model).__name__}"
        )
    model.forward = MethodType(_forward(cls, kinds[cls.__name__], loss), model)
    return model


def _forward(cls: type, kind: _Model, loss: Callable) -> Callable:
    """A forward for ``cls`` that forms the logits only where they are asked for.

    It refers to no instance, so that copies of a model are whole.
    """
    signature = inspect.signature(cls.forward)
    names = [one.name for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    of_image = set(inspect.signature(cls.get_image_features).parameters)
    of_text = set(inspect.signature(cls.get_text_features).parameters)
    output = getattr(sys.modules[cls.__module__], kind.output)

    @can_return_tuple
    def forward(self, *args, return_logits: bool = False, **kwargs):
        given = {**dict(zip(names, args)), **kwargs}
        if not given.get("return_loss"):
            return cls.forward(self, **given)
        del given["return_loss"]
        image_outputs = self.get_image_features(**{k: v for k, v in given.items() if k not in of_text - of_image})
        text_outputs = self.get_text_features(**{k: v for k, v in given.items() if k not in of_image - of_text})
        text = _unit_rows(text_outputs.pooler_output)
        image = _unit_rows(image_outputs.pooler_output).to(text.device, text.dtype)
        scale, *bias = (scalar.to(text.device) for scalar in kind.scale_and_bias(self))
        logits = sum(bias, text @ image.T * scale) if return_logits else None
        return output(
            loss=loss(kind, image, text, scale, *bias),
            logits_per_image=logits.T if return_logits else None,
            logits_per_text=logits,
            text_embeds=text,
            image_embeds=image,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    del forward.__wrapped__  # Accelerate's unwrapping would go on to what is inside
    asked = inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = list(signature.parameters.values())
    place = next((i for i, one in enumerate(parameters) if one.kind is one.VAR_KEYWORD), len(parameters))
    # Trainer reads from it which columns of a data set the model takes.
    forward.__signature__ = signature.replace(parameters=[*parameters[:place], asked, *parameters[place:]])
    return forward


def _unit_rows(embeds: Tensor) -> Tensor:
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)
