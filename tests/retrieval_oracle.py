"""Retrieval by its definition: all N x M scores in fp64, sorted."""

import numpy as np
import torch

METRICS = (
    "recall@1",
    "recall@5",
    "precision@3",
    "precision@40",
    "r_precision",
    "map@r",
    "map",
    "mrr",
    "mean_rank",
    "median_rank",
)


def scores(query, gallery, similarity, left_out=None):
    """fp64 [N, M], larger is nearer; -inf where a pair is left out."""
    x, y = query.double().numpy(), gallery.double().numpy()
    products = np.array([[float(np.dot(a, b)) for b in y] for a in x]).reshape(len(x), len(y))
    if similarity == "cosine":
        with np.errstate(divide="ignore"):
            of_x, of_y = (1 / np.sqrt((rows * rows).sum(1)) for rows in (x, y))
        of_x[np.isinf(of_x)], of_y[np.isinf(of_y)] = 0, 0
        products = products * of_x[:, None] * of_y
    elif similarity != "product":
        products = -np.array([[float(np.dot(a - b, a - b)) for b in y] for a in x]).reshape(len(x), len(y))
    return products if left_out is None else np.where(left_out, -np.inf, products)


def order(of_pairs):
    """Columns, the best first, of equal ones the lowest."""
    return np.argsort(-of_pairs, axis=1, kind="stable")


def topk(of_pairs, k):
    """(scores, columns) [N, k]; -inf and -1 for pairs that are left out."""
    columns = order(of_pairs)[:, :k]
    values = np.take_along_axis(of_pairs, columns, 1)
    return values, np.where(np.isinf(values), -1, columns)


def metrics(of_pairs, positive):
    """{metric: [N]} with NaN of queries without a positive."""
    found = {name: np.full(len(of_pairs), np.nan) for name in METRICS}
    for i, columns in enumerate(order(of_pairs)):
        columns = columns[~np.isinf(of_pairs[i, columns])]
        hits = positive[i, columns]
        if not hits.any():
            continue
        at = np.flatnonzero(hits) + 1  # ranks of the positives
        number, r = np.arange(1, len(at) + 1), len(at)
        values = {
            "recall@1": hits[:1].any(),
            "recall@5": hits[:5].any(),
            "precision@3": hits[:3].sum() / 3,
            "precision@40": hits[:40].sum() / 40,
            "r_precision": hits[:r].mean(),
            "map@r": (number / at)[at <= r].sum() / r,
            "map": (number / at).mean(),
            "mrr": 1 / at[0],
            "mean_rank": at[0],
            "median_rank": at[0],
        }
        for name, value in values.items():
            found[name][i] = value
    return found


def whole_numbers(n, m, d, seed=0, most=2):
    """Rows of small whole numbers, whose products and distances no rounding touches, many of them equal."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-most, most + 1, (rows, d), generator=g).float() for rows in (n, m))
