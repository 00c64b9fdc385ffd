"""A batch against itself: NT-Xent, SupCon."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.cases.inputs import unit_rows
from bench.harness import Case, Inputs, Step
from replearn_kernels import nt_xent_loss, sup_con_loss

TEMPERATURE = 0.1
ROWS_PER_CLASS = 8


def bare_products(inputs: Inputs) -> Step:
    """Z Z^T and W Z, into preallocated outputs: what is left of three products where half of S tells all."""
    z = torch.cat([x.detach() for x in inputs.values() if x.is_floating_point()])
    similarity, gradient = z @ z.T, torch.empty_like(z)

    def step() -> None:
        torch.mm(z, z.T, out=similarity)
        torch.mm(similarity, z, out=gradient)

    return step


def without_self(logits, value):
    return torch.where(torch.eye(len(logits), device=logits.device, dtype=torch.bool), value, logits)


# --- NT-Xent ---------------------------------------------------------------------------------------------------------


def two_views(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """N rows in all: N / 2 samples, two views of each."""
    return {name: unit_rows(n // 2, d, dtype, device, seed) for seed, name in enumerate(("z_i", "z_j"))}


def nt_xent_cross_entropy(z_i, z_j):
    """As SimCLR writes it: cross entropy over the matrix without its diagonal."""
    z, n = torch.cat([z_i, z_j]), len(z_i)
    logits = without_self(z @ z.T / TEMPERATURE, float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def nt_xent_logsumexp_where(z_i, z_j):
    z = torch.cat([z_i, z_j])
    lse = without_self(z @ z.T / TEMPERATURE, -1e9).logsumexp(dim=1)
    return lse.mean() - (z_i * z_j).sum(dim=1).mean() / TEMPERATURE


def nt_xent_subtracted_self(z_i, z_j):
    """The sum of exponentials over all rows, less the row's own; no maximum is needed for unit rows."""
    z = torch.cat([z_i, z_j]) / TEMPERATURE**0.5
    bound = 1 / TEMPERATURE
    total = (z @ z.T - bound).exp().sum(dim=1) - ((z * z).sum(dim=1) - bound).exp()
    return total.log().mean() + bound - (z_i * z_j).sum(dim=1).mean() / TEMPERATURE


nt_xent = partial(nt_xent_loss, temperature=TEMPERATURE, normalize=False)

NT_XENT = Case(
    name="nt_xent",
    title="NT-Xent loss",
    make_inputs=two_views,
    ours={"ours": nt_xent, "ours_budget_0": partial(nt_xent, memory_budget=0)},
    dense={
        "cross_entropy": nt_xent_cross_entropy,
        "logsumexp_where": nt_xent_logsumexp_where,
        "subtracted_self": nt_xent_subtracted_self,
    },
    products={"products_2": bare_products},
)


# --- SupCon ----------------------------------------------------------------------------------------------------------


def labelled_rows(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    labels = torch.arange(n, device=device) % max(n // ROWS_PER_CLASS, 1)
    return {"features": unit_rows(n, d, dtype, device), "labels": labels}


def positives_of(labels):
    return without_self(labels[:, None] == labels, False)


def sup_con_log_softmax(features, labels):
    """As the paper's code: the log of the softmax, times a mask of positives."""
    logits = without_self(features @ features.T / TEMPERATURE, -1e9)
    positive = positives_of(labels)
    return -((logits.log_softmax(dim=1) * positive).sum(dim=1) / positive.sum(dim=1)).mean()


def sup_con_logsumexp_where(features, labels):
    logits = features @ features.T / TEMPERATURE
    positive = positives_of(labels)
    mean = torch.where(positive, logits, 0).sum(dim=1) / positive.sum(dim=1)
    return (without_self(logits, -1e9).logsumexp(dim=1) - mean).mean()


def sup_con_class_sums(features, labels):
    """The positives' mean from sums over classes, in O(N d)."""
    lse = without_self(features @ features.T / TEMPERATURE, -1e9).logsumexp(dim=1)
    classes = features.new_zeros(len(features), features.shape[1]).index_add(0, labels, features)
    counts = torch.bincount(labels, minlength=len(features))[labels]
    others = (features * classes[labels]).sum(dim=1) - (features * features).sum(dim=1)
    return (lse - others / (counts - 1) / TEMPERATURE).mean()


sup_con = partial(sup_con_loss, temperature=TEMPERATURE, normalize=False)

SUP_CON = Case(
    name="sup_con",
    title="SupCon loss",
    make_inputs=labelled_rows,
    ours={"ours": sup_con, "ours_budget_0": partial(sup_con, memory_budget=0)},
    dense={
        "log_softmax": sup_con_log_softmax,
        "logsumexp_where": sup_con_logsumexp_where,
        "class_sums": sup_con_class_sums,
    },
    products={"products_2": bare_products},
)
