"""The triplet loss over given triplets: distances by direct differences, in O(T d) time and O(N d + T) memory.

``triplet_losses`` returns the losses and the distances, which ``triplet_losses_backward`` needs. Each has a schema, a
fake kernel and an autograd rule. The losses are differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.triplet_distance import gradient_of_gap, loss_of_gap
from . import native, validation
from .listed_pairs import add_differences_, pair_squares
from .operators import (
    refuse_forward_mode,
    refuse_second_derivative,
    refuse_transforms,
    refuse_upstream,
    save_for_backward,
)
from .problem import statistics_dtype
from .schedules import on_device_of


def triplet_loss_at(
    embeddings: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float | None,
    distance: str,
    backend: str = "auto",
) -> Tensor:
    """``max(0, D_ap - D_an + margin)`` of every triplet, ``[T]``, in fp32 (fp64 for fp64 embeddings); without a margin
    ``log(1 + exp(D_ap - D_an))``.

    The gradient of a distance of 0 is 0, and so is that of a loss of 0.

    Args:
        embeddings: ``[N, d]``; for "cosine" rows of length 1 or 0, whose distance is 0.5 |u - v|^2, or 1 from a row of
            zeros. It gets a gradient in its own dtype.
        anchor, positive, negative: int64 ``[T]``, rows of embeddings.
        margin: any number, or None.
        distance: "euclidean", "squared_euclidean" or "cosine".
        backend: "cpp" (CPU), "torch" (any device), or "auto".

    Raises:
        NotImplementedError: inside a torch.func transform, in forward mode; in backward: differentiated twice.
        ValueError: an index out of range.
    """
    refuse_transforms()
    refuse_forward_mode(embeddings)
    rows = embeddings.to(statistics_dtype(embeddings.dtype)).contiguous()
    if backend == "auto":
        backend = "cpp" if rows.device.type == "cpu" and native.available() else "torch"
    indices = [index.contiguous() for index in (anchor, positive, negative)]
    return torch.ops.replearn_kernels.triplet_losses(rows, *indices, margin, distance, backend)[0]


def _forward(rows, anchor, positive, negative, margin, distance, backend) -> tuple[Tensor, Tensor]:
    with on_device_of(rows):
        plain = backend == "torch"
        for index in (anchor, positive, negative):
            validation.check_inside("triplets", index, rows.shape[0])
        squares = torch.stack([pair_squares(rows, anchor, other, plain=plain) for other in (positive, negative)])
        distances = to_distances_(squares, distance, _from_zero(rows, anchor, positive, negative, distance))
        return losses_of(distances, margin), distances


def _backward(grad, distances, rows, anchor, positive, negative, margin, distance, backend) -> Tensor:
    with on_device_of(rows):
        from_zero = _from_zero(rows, anchor, positive, negative, distance)
        weight = pair_weights(grad, distances, margin, distance, from_zero)
        gradient, plain = new_sums(rows, backend), backend == "torch"
        pairs = anchor.repeat(2), torch.cat([positive, negative]), weight.flatten()
        add_differences_(gradient, rows, *pairs, plain=plain)
        gradient.add_(rows, alpha=0)  # NaN for a row that is not finite, though no triplet may have been mined with it
        return gradient.to(rows.dtype)


def to_distances_(squares: Tensor, distance: str, from_zero: Tensor | None) -> Tensor:
    """Of squares ``[2, T]``, to positives and to negatives, in place; ``from_zero``: for "cosine", those of zeros."""
    if distance == "euclidean":
        squares.sqrt_()
    elif distance == "cosine":
        squares.mul_(0.5).masked_fill_(from_zero, 1)
    return squares


def losses_of(distances: Tensor, margin: float | None) -> Tensor:
    return loss_of_gap(distances[0] - distances[1], margin)


def pair_weights(
    grad: Tensor, distances: Tensor, margin: float | None, distance: str, from_zero: Tensor | None
) -> Tensor:
    """What the difference of each pair's rows is multiplied by in the gradient, ``[2, T]``."""
    to_positive, to_negative = distances
    grad = gradient_of_gap(grad, to_positive - to_negative, margin)
    weight = torch.stack([grad, -grad])
    if distance == "euclidean":
        return weight.div_(distances).masked_fill_(distances == 0, 0)
    return weight.mul_(2) if distance == "squared_euclidean" else weight.masked_fill_(from_zero, 0)


def new_sums(rows: Tensor, backend: str) -> Tensor:
    """Zeros for the gradient of ``rows``: of few or of millions of terms, which PyTorch adds one by one, so in fp64."""
    return torch.zeros_like(rows, dtype=torch.float64 if backend == "torch" else rows.dtype)


def pairs_from_zero(rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which of the pairs have a row of zeros."""
    zero = (rows == 0).all(dim=1)
    return zero[i] | zero[j]


def _from_zero(rows: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, distance: str) -> Tensor | None:
    """For "cosine": which distances ``[2, T]`` are from a row of zeros."""
    if distance != "cosine":
        return None
    return pairs_from_zero(rows, anchor, torch.stack([positive, negative]))


def _fake_forward(rows, anchor, *others) -> tuple[Tensor, Tensor]:
    return rows.new_empty(anchor.shape), rows.new_empty(2, anchor.shape[0])


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.margin, ctx.distance, ctx.backend = inputs
    save_for_backward(ctx, output[1], *tensors)


def _differentiate(ctx, grad_loss, _):
    refuse_upstream(grad_loss)
    if grad_loss is None:
        return (None,) * 7
    backward = torch.ops.replearn_kernels.triplet_losses_backward
    gradient = backward(grad_loss, *ctx.saved_tensors, ctx.margin, ctx.distance, ctx.backend)
    return gradient, *(None,) * 6


_INPUTS = "Tensor rows, Tensor anchor, Tensor positive, Tensor negative, float? margin, str distance, str backend"
_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define(f"triplet_losses({_INPUTS}) -> (Tensor loss, Tensor distances)")
_library.define(f"triplet_losses_backward(Tensor grad_loss, Tensor distances, {_INPUTS}) -> Tensor")
_library.impl("triplet_losses", _forward, "CompositeExplicitAutograd")
_library.impl("triplet_losses_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::triplet_losses", _fake_forward, lib=_library)
torch.library.register_fake(
    "replearn_kernels::triplet_losses_backward",
    lambda grad_loss, distances, rows, *others: torch.empty_like(rows),
    lib=_library,
)
torch.library.register_autograd("replearn_kernels::triplet_losses", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("replearn_kernels::triplet_losses_backward", refuse_second_derivative, lib=_library)
