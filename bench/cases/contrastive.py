"""Queries against keys: CLIP, InfoNCE, SigLIP."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.cases.inputs import bare_products, paired_features
from bench.harness import Case
from replearn_kernels import clip_loss, info_nce_loss, siglip_loss

CHUNK_ROWS = 1024


# --- CLIP: rows and columns ------------------------------------------------------------------------------------------


def clip_open_clip(image_features, text_features, logit_scale):
    """As open_clip writes it: both logit matrices, each by its own product."""
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(image_features), device=image_features.device)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def clip_one_product(image_features, text_features, logit_scale):
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_logsumexp_diagonal(image_features, text_features, logit_scale):
    logits = logit_scale * image_features @ text_features.T
    lse = (logits.logsumexp(dim=1).mean() + logits.logsumexp(dim=0).mean()) / 2
    return lse - logits.diagonal().mean()


def clip_logsumexp_dot(image_features, text_features, logit_scale):
    scaled = logit_scale * image_features
    logits = scaled @ text_features.T
    lse = (logits.logsumexp(dim=1).mean() + logits.logsumexp(dim=0).mean()) / 2
    return lse - (scaled * text_features).sum(dim=1).mean()


def chunk_logsumexp(rows, text_features):
    """Row lse of a chunk, and the lse of its part of every column."""
    logits = rows @ text_features.T
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def clip_chunked(image_features, text_features, logit_scale):
    """Row chunks under torch.utils.checkpoint: one chunk of logits is alive at a time."""
    scaled = logit_scale * image_features
    chunks = scaled.split(CHUNK_ROWS)
    stats = [checkpoint(chunk_logsumexp, rows, text_features, use_reentrant=False) for rows in chunks]
    row_lse, column_lse = zip(*stats, strict=True)
    lse = (torch.cat(row_lse).mean() + torch.stack(column_lse).logsumexp(dim=0).mean()) / 2
    return lse - (scaled * text_features).sum(dim=1).mean()


CLIP = Case(
    name="clip",
    title="CLIP loss",
    make_inputs=partial(paired_features, ("image_features", "text_features")),
    ours={"ours": clip_loss, "ours_budget_0": partial(clip_loss, memory_budget=0)},
    dense={
        "open_clip": clip_open_clip,
        "one_product": clip_one_product,
        "logsumexp_diagonal": clip_logsumexp_diagonal,
        "logsumexp_dot": clip_logsumexp_dot,
    },
    chunked={"chunked_checkpoint": clip_chunked},
    products={"products_4": partial(bare_products, 2), "products_3": partial(bare_products, 1)},
)


# --- InfoNCE: rows only ----------------------------------------------------------------------------------------------


def info_nce_cross_entropy(query, key, logit_scale):
    logits = logit_scale * query @ key.T
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def info_nce_logsumexp_dot(query, key, logit_scale):
    scaled = logit_scale * query
    return ((scaled @ key.T).logsumexp(dim=1) - (scaled * key).sum(dim=1)).mean()


def info_nce_chunked(query, key, logit_scale):
    """Row chunks under torch.utils.checkpoint: one chunk of logits is alive at a time."""
    labels = torch.arange(len(query), device=query.device)
    chunks = zip((logit_scale * query).split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
    return sum(checkpoint(chunk_cross_entropy, *chunk, key, use_reentrant=False) for chunk in chunks) / len(query)


def chunk_cross_entropy(rows, labels, key):
    return F.cross_entropy(rows @ key.T, labels, reduction="sum")


INFO_NCE = Case(
    name="info_nce",
    title="InfoNCE loss",
    make_inputs=partial(paired_features, ("query", "key")),
    ours={"ours": info_nce_loss, "ours_budget_0": partial(info_nce_loss, memory_budget=0)},
    dense={"cross_entropy": info_nce_cross_entropy, "logsumexp_dot": info_nce_logsumexp_dot},
    chunked={"chunked_checkpoint": info_nce_chunked},
    products={"products_3": partial(bare_products, 1)},
)


# --- SigLIP: every pair on its own -----------------------------------------------------------------------------------


def siglip_inputs(n, d, dtype, device):
    """As training starts: scale 10, bias -10."""
    inputs = paired_features(("image_features", "text_features"), n, d, dtype, device)
    for name, value in (("logit_scale", 10.0), ("logit_bias", -10.0)):
        inputs[name] = torch.tensor(value, device=device).requires_grad_()
    return inputs


def siglip_open_clip(image_features, text_features, logit_scale, logit_bias):
    """As open_clip writes it: a matrix of labels, 1 on the diagonal and -1 off it."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    n = len(image_features)
    labels = 2 * torch.eye(n, device=logits.device, dtype=logits.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / n


def siglip_softplus(image_features, text_features, logit_scale, logit_bias):
    """softplus(-l) = softplus(l) - l: all pairs as negatives, less the diagonal's logits."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(image_features)


def siglip_softplus_dot(image_features, text_features, logit_scale, logit_bias):
    scaled = logit_scale * image_features
    positive = (scaled * text_features).sum() + logit_bias * len(image_features)
    return (F.softplus(scaled @ text_features.T + logit_bias).sum() - positive) / len(image_features)


def siglip_chunked(image_features, text_features, logit_scale, logit_bias):
    """Row chunks under torch.utils.checkpoint: one chunk of logits is alive at a time."""
    scaled = logit_scale * image_features
    chunks = [
        checkpoint(chunk_softplus, rows, text_features, logit_bias, use_reentrant=False)
        for rows in scaled.split(CHUNK_ROWS)
    ]
    positive = (scaled * text_features).sum() + logit_bias * len(image_features)
    return (sum(chunks) - positive) / len(image_features)


def chunk_softplus(rows, text_features, logit_bias):
    return F.softplus(rows @ text_features.T + logit_bias).sum()


SIGLIP = Case(
    name="siglip",
    title="SigLIP loss",
    make_inputs=siglip_inputs,
    ours={"ours": siglip_loss, "ours_budget_0": partial(siglip_loss, memory_budget=0)},
    dense={"open_clip": siglip_open_clip, "softplus": siglip_softplus, "softplus_dot": siglip_softplus_dot},
    chunked={"chunked_checkpoint": siglip_chunked},
    products={"products_3": partial(bare_products, 1)},
)
