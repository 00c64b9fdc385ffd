"""A batch against itself by distances: lifted structure, margin contrastive."""

from functools import partial

import torch

from bench.cases.batch import bare_products, labelled_rows, without_self
from bench.harness import Case, Inputs
from replearn_kernels import contrastive_loss, lifted_structure_loss

MARGIN = 1.0
TINY = 1e-12  # keeps the slope of the square root finite


def labelled_embeddings(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Unit rows, 8 of every class."""
    rows = labelled_rows(n, d, dtype, device)
    return {"embeddings": rows["features"], "labels": rows["labels"]}


def squares_by_products(x):
    """Squared distances [N, N], from norms and one product."""
    norms = (x * x).sum(dim=1)
    return (norms[:, None] + norms - 2 * x @ x.T).clamp(min=TINY)


def distances_by_products(x):
    return squares_by_products(x).sqrt()


def distances_by_cdist(x):
    return torch.cdist(x, x)


@torch.compiler.disable  # its shape depends on the labels: the graphs begin behind it
def class_members(labels):
    """The rows of every row's class, [N, K] with K the largest class, and which entries are other rows: [N, K]."""
    n = len(labels)
    order, sizes = labels.argsort(stable=True), labels.bincount()
    starts = sizes.cumsum(0) - sizes
    slots = torch.arange(int(sizes.max()), device=labels.device)
    members = order[(starts[labels][:, None] + slots).clamp(max=n - 1)]
    own = torch.arange(n, device=labels.device)[:, None]
    return members, (slots < sizes[labels][:, None]) & (members != own)


def distances_to(x, members):
    """[N, K], each from the difference of its two rows."""
    return (x[:, None] - x[members]).norm(dim=2)


# --- Lifted structure, smooth ----------------------------------------------------------------------------------------


def lifted_dense(distances, embeddings, labels):
    """The formula as it reads, on whole matrices."""
    distance, same = distances(embeddings), labels[:, None] == labels
    r = torch.where(same, float("-inf"), MARGIN - distance).logsumexp(dim=1)
    j = torch.logaddexp(r[:, None], r) + distance
    positive = without_self(same, False)
    return torch.where(positive, j.relu().square(), 0).sum() / (2 * positive.sum())


def mean_of_lifted_pairs(r, distance, members, positive):
    """From the rows' log-sums over negatives, and the distances [N, K] within classes."""
    j = torch.logaddexp(r[:, None], r[members]) + distance
    return torch.where(positive, j.relu().square(), 0).sum() / (2 * positive.sum())


def lifted_gathered(distances, embeddings, labels):
    """Whole matrices for the negatives only; the positives are gathered, class by class."""
    members, positive = class_members(labels)
    negatives = torch.where(labels[:, None] == labels, float("-inf"), MARGIN - distances(embeddings))
    return mean_of_lifted_pairs(negatives.logsumexp(dim=1), distances_to(embeddings, members), members, positive)


def lifted_subtracted(embeddings, labels):
    """No mask: the sum over all rows, less the row's own class. No maximum is needed for unit rows."""
    members, positive = class_members(labels)
    distance = distances_to(embeddings, members)
    own_class = torch.where(positive, (MARGIN - distance).exp(), 0).sum(dim=1)
    everything = (MARGIN - distances_by_products(embeddings)).exp()
    r = (everything.sum(dim=1) - everything.diagonal() - own_class).log()
    return mean_of_lifted_pairs(r, distance, members, positive)


lifted = partial(lifted_structure_loss, margin=MARGIN)

LIFTED = Case(
    name="lifted",
    title="Lifted structured loss",
    make_inputs=labelled_embeddings,
    ours={"ours": lifted, "ours_budget_0": partial(lifted, memory_budget=0)},
    dense={
        "cdist": partial(lifted_dense, distances_by_cdist),
        "products": partial(lifted_dense, distances_by_products),
        "cdist_gathered": partial(lifted_gathered, distances_by_cdist),
        "products_gathered": partial(lifted_gathered, distances_by_products),
        "subtracted": lifted_subtracted,
    },
    products={"products_2": bare_products},
)


# --- Margin contrastive, squared -------------------------------------------------------------------------------------


def contrastive_cdist(embeddings, labels):
    """The formula as it reads, on whole matrices."""
    distance, n = torch.cdist(embeddings, embeddings), len(embeddings)
    same = labels[:, None] == labels
    return torch.where(same, distance.square(), (MARGIN - distance).relu().square()).sum() / (n * (n - 1))


def contrastive_products(embeddings, labels):
    squares, n = squares_by_products(embeddings), len(embeddings)
    same = labels[:, None] == labels
    return torch.where(same, squares, (MARGIN - squares.sqrt()).relu().square()).sum() / (n * (n - 1))


def contrastive_gathered(embeddings, labels):
    """Every pair as a negative, without a mask; the pairs within classes, gathered, put that right."""
    n, (members, positive) = len(embeddings), class_members(labels)
    hinges = (MARGIN - distances_by_products(embeddings)).relu().square()
    distance = distances_to(embeddings, members)
    correction = torch.where(positive, distance.square() - (MARGIN - distance).relu().square(), 0)
    return (hinges.sum() - hinges.diagonal().sum() + correction.sum()) / (n * (n - 1))


contrastive = partial(contrastive_loss, margin=MARGIN)

CONTRASTIVE = Case(
    name="contrastive",
    title="Margin contrastive loss",
    make_inputs=labelled_embeddings,
    ours={"ours": contrastive, "ours_budget_0": partial(contrastive, memory_budget=0)},
    dense={
        "cdist": contrastive_cdist,
        "products": contrastive_products,
        "gathered": contrastive_gathered,
    },
    products={"products_2": bare_products},
)
