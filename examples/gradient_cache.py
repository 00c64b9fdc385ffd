"""A batch whose activations do not fit: the encoders run over one chunk of it at a time.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021 (arXiv:2101.06983). The loss
needs the features of all rows at once, which are small; the activations, which are not, live for one chunk. The
encoders run twice: they must do the same both times, so no dropout without its seed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn


def cached_backward(model: nn.Module, loss: Callable[..., Tensor], chunks: Sequence[tuple]) -> Tensor:
    """The loss of all chunks as one batch; its gradients are added to the model's parameters.

    Args:
        model: ``model(*chunk)`` returns features, one row per sample, and what does not depend on the chunk: 0-d
            tensors, such as the logit scale, or None. A DistributedDataParallel averages the gradients once, with the
            last chunk.
        loss: of the features of all rows, and the scalars.
    """
    if len(chunks) == 1:
        value = loss(*model(*chunks[0]))
        value.backward()
        return value.detach()
    with torch.no_grad():
        outputs = list(zip(*(model(*chunk) for chunk in chunks)))
    leaves = [whole(parts) for parts in outputs]
    value = loss(*leaves)
    value.backward()
    sizes = [len(part) for part in outputs[0]]
    for k, chunk in enumerate(chunks):
        last = k == len(chunks) - 1
        waits = isinstance(model, nn.parallel.DistributedDataParallel) and not last
        with model.no_sync() if waits else nullcontext():
            results, shares = [], []
            for result, leaf in zip(model(*chunk), leaves):
                if leaf is not None and leaf.grad is not None:
                    results.append(result)
                    # Every chunk returns the same scalars: one of them takes their gradient.
                    shares.append(leaf.grad.split(sizes)[k] if leaf.ndim else leaf.grad * last)
            torch.autograd.backward(results, shares)
    return value.detach()


def whole(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """One output of the model for all chunks, as a leaf that gets the loss's gradient."""
    if parts[0] is None:
        return None
    return (torch.cat(parts) if parts[0].ndim else parts[0].clone()).requires_grad_()
