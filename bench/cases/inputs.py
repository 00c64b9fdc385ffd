"""Inputs that several cases share, and the bare products under them."""

import torch
import torch.nn.functional as F

from bench.harness import Inputs, Step

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


def unit_rows(n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Random rows of length 1 that want a gradient."""
    rows = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)
    return rows.to(device=device, dtype=dtype).requires_grad_()
