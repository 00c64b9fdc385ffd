"""The cases: for each loss its inputs, our calls, and the formulas it has to beat.

To add a loss, write its formulas and one `Case`; speed, memory, reports and the GPU run come with it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.harness import Case, Inputs, Step
from replearn_kernels import clip_loss, info_nce_loss

CHUNK_ROWS = 1024
INITIAL_LOGIT_SCALE = 1 / 0.07


def paired_features(names: tuple[str, str], n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Two unit-norm feature matrices and a learnable logit_scale, as an encoder would hand them over."""
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in names]
    inputs = {name: x.to(device=device, dtype=dtype) for name, x in zip(names, features, strict=True)}
    inputs["logit_scale"] = torch.tensor(INITIAL_LOGIT_SCALE, device=device)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def bare_products(similarity_products: int, inputs: Inputs) -> Step:
    """S = X Yᵀ as often as given, then W Y and Wᵀ X, all into preallocated outputs (S stands in for W)."""
    query, key = (features.detach() for features in list(inputs.values())[:2])
    similarity = query @ key.T
    d_query, d_key = torch.empty_like(query), torch.empty_like(key)

    def step() -> None:
        for _ in range(similarity_products):
            torch.mm(query, key.T, out=similarity)
        torch.mm(similarity, key, out=d_query)
        torch.mm(similarity.T, query, out=d_key)

    return step


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

CASES = {case.name: case for case in (CLIP, INFO_NCE)}
