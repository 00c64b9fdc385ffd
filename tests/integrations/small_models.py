"""A small one of each model of transformers that has an integration, and a batch for it."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

_TOWER = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
_VISION = dict(_TOWER, image_size=16, patch_size=8)
_TEXT = dict(_TOWER, vocab_size=99, max_position_embeddings=16)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_SPECIAL_TOKENS = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)


def _two_towers(name: str, text: dict | None = None, vision: dict | None = None, **options) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")
    towers = dict(text_config={**_TEXT, **_SPECIAL_TOKENS, **(text or {})}, vision_config={**_VISION, **(vision or {})})
    return getattr(transformers, f"{name}Model")(config(**towers, **options))


def _align() -> PreTrainedModel:
    vision = dict(
        image_size=32, width_coefficient=1.0, depth_coefficient=0.1, kernel_sizes=[3], in_channels=[32],
        out_channels=[16], strides=[1], num_block_repeats=[1], expand_ratios=[1], hidden_dim=16, pooling_type="mean",
        dropout_rate=0.0, drop_connect_rate=0.0, hidden_act="swish", depthwise_padding=[],
    )  # fmt: skip
    config = transformers.AlignConfig(text_config=dict(_TEXT, **_NO_DROPOUT), vision_config=vision, projection_dim=16)
    return transformers.AlignModel(config)


def _dual_encoder() -> PreTrainedModel:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**_VISION, **_NO_DROPOUT), transformers.BertConfig(**_TEXT, **_NO_DROPOUT),
        projection_dim=24,
    )  # fmt: skip
    return transformers.VisionTextDualEncoderModel(config)


MODELS = {
    "CLIPModel": lambda: _two_towers("CLIP", projection_dim=24),
    "AlignModel": _align,
    "AltCLIPModel": lambda: _two_towers("AltCLIP", dict(project_dim=32), projection_dim=24),
    "BlipModel": lambda: _two_towers("Blip", dict(encoder_hidden_size=32), projection_dim=24),
    "ChineseCLIPModel": lambda: _two_towers("ChineseCLIP", _NO_DROPOUT, projection_dim=24),
    "CLIPSegModel": lambda: _two_towers("CLIPSeg", projection_dim=24),
    "MetaClip2Model": lambda: _two_towers("MetaClip2", projection_dim=24),
    "OwlViTModel": lambda: _two_towers("OwlViT", projection_dim=24),
    "Owlv2Model": lambda: _two_towers("Owlv2", projection_dim=24),
    "VisionTextDualEncoderModel": _dual_encoder,
    "SiglipModel": lambda: _two_towers("Siglip"),
    "Siglip2Model": lambda: _two_towers("Siglip2", vision=dict(num_patches=4)),
}


def small_model(name: str, dtype=torch.float64) -> PreTrainedModel:
    """In training mode, but without dropout: two calls give the same."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model, "logit_bias"):  # both are 0 in a new one
        with torch.no_grad():
            model.logit_scale.fill_(1.3), model.logit_bias.fill_(-2.0)
    return model.train()


def batch_for(model: PreTrainedModel, n: int = 9) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    words = torch.randint(3, 99, (n, 7), generator=rng)
    words[:, -1] = 2  # the end of a text
    batch = dict(input_ids=words, attention_mask=torch.ones_like(words))
    if type(model).__name__ == "Siglip2Model":
        pixels = torch.randn(n, 4, 8 * 8 * 3, generator=rng)
        batch["pixel_attention_mask"] = torch.ones(n, 4, dtype=torch.int64)
        batch["spatial_shapes"] = torch.full((n, 2), 2)
    else:
        size = model.config.vision_config.image_size
        pixels = torch.randn(n, 3, size, size, generator=rng)
    return dict(batch, pixel_values=pixels.to(model.dtype))
