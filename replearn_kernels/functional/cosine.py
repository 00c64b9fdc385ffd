"""The cosine similarity loss over labelled rows, in O(N d): sums over classes stand for all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..engine import validation
from ..engine.operators import refuse_transforms
from ..engine.problem import statistics_dtype
from .rows import unit_rows

COSINE_BACKENDS = ("auto", "torch", "eager")


def cosine_similarity_loss(
    embeddings: Tensor, labels: Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Pull rows of the same label together and push others apart, by their mean cosines, without forming a pair.

    With ``x_i = embeddings_i / |embeddings_i|``, ``P_i`` the other rows of row i's label and ``N_i`` the rows of other
    labels:

        L_i = - 1 / |P_i| * sum_{j in P_i} <x_i, x_j> + 1 / |N_i| * sum_{j in N_i} <x_i, x_j>

    A row without positives has no first term, one without negatives no second. Being linear in the similarities, as
    the contrastive losses analysed by Ji et al., "The Power of Contrast for Feature Learning", 2021 (arXiv:2110.02473),
    it needs no pairs: the sum of the ``x_j`` of every class and of all take O(N d), plus a sort of the labels.

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides. They are normalised here;
            a row of zeros has cosine 0 with all others, and gradient 0.
        labels: ``[N]``, any integer dtype, any values: -1 is a label as any other, and none is ignored.
        reduction: "mean" over the N rows, "sum", or "none": ``[N]``.
        backend: "auto" and "torch" (any device with fp64) are the closed form, "eager" the plain formula on the N x N
            matrix of cosines. Both can be differentiated any number of times.

    Returns:
        The loss, in fp32 (fp64 for fp64 embeddings), also under autocast. With N = 0 or N = 1 it is 0, with zero
        gradients.

    Raises:
        TypeError: embeddings or labels are not tensors of the dtypes above.
        ValueError: wrong rank or length, labels on another device, an unknown reduction or backend.
        NotImplementedError: the closed form inside a torch.func transform.
    """
    validation.check_features("embeddings", embeddings)
    labels = validation.check_labels("labels", labels, embeddings.shape[0], embeddings)
    validation.check_reduction(reduction)
    validation.check_backend_name(backend, COSINE_BACKENDS)
    if backend != "eager":
        refuse_transforms()
    dtype = statistics_dtype(embeddings.dtype)
    # In fp64, also for fp32: the sum over all rows less the sum over the own class can be smaller than either by a
    # factor of N. A pass over N x d numbers costs little beside the encoder; autocast leaves fp64 alone.
    rows = unit_rows(embeddings.to(dtype)).double()
    formula = reference.cosine_similarities if backend == "eager" else _closed_form
    return reference.reduce(formula(rows, labels.contiguous()), reduction).to(dtype)


def _closed_form(rows: Tensor, labels: Tensor) -> Tensor:
    """``[N]``, from <x_i, S_class(i)> (the positives and i itself) and <x_i, T> (all rows)."""
    ordered = labels.sort().values
    first = torch.searchsorted(ordered, labels)  # where the class begins in sorted order: its number, in [0, N)
    size = torch.searchsorted(ordered, labels, right=True) - first
    per_positive, per_negative = _one_over(size - 1), _one_over(rows.shape[0] - size)
    itself = (rows * rows).sum(1)
    same_label = (rows * torch.ops.replearn_kernels.class_sums(rows, first)).sum(1)
    everything = rows @ rows.sum(0)
    return per_negative * (everything - same_label) - per_positive * (same_label - itself)


def _one_over(count: Tensor) -> Tensor:
    """1 / count, and 0 where there is nothing to average."""
    return torch.where(count > 0, count.double().reciprocal(), 0.0)


def _class_sums(rows: Tensor, classes: Tensor) -> Tensor:
    """``[N, d]``: row i is the sum of all rows of row i's class, for classes in [0, N).

    Linear and its own transpose, therefore its own derivative. In fp64 it is deterministic: ``index_put_`` sorts the
    indices on a GPU and runs in one thread on a CPU. ``index_add_`` on a GPU, ``index_put_`` in fp32 on a CPU, and the
    code that inductor would generate for either, add atomically, in any order; inductor leaves an operator alone.
    """
    sums = rows.new_zeros(rows.shape).index_put_((classes,), rows, accumulate=True)
    return sums.index_select(0, classes)


def _class_sums_backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    (classes,) = ctx.saved_tensors
    return torch.ops.replearn_kernels.class_sums(gradient, classes), None


_library = torch.library.Library("replearn_kernels", "FRAGMENT")
_library.define("class_sums(Tensor rows, Tensor classes) -> Tensor")
_library.impl("class_sums", _class_sums, "CompositeExplicitAutograd")
torch.library.register_fake("replearn_kernels::class_sums", lambda rows, classes: rows.new_empty(rows.shape))
torch.library.register_autograd(
    "replearn_kernels::class_sums",
    _class_sums_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    lib=_library,
)
