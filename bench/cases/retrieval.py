"""Retrieval: calls without a gradient, held against torch.topk on strips of the similarities and against faiss."""

import torch
from torch import Tensor

from bench.cases.inputs import unit_rows
from bench.cases.mining import grid_rows
from bench.harness import Case, Inputs
from replearn_kernels import retrieval

FAISS = "faiss"
K = 10
STRIP = 2**25  # similarities of a strip: 128 MiB


ROWS_PER_CLASS = 8


class Found:
    """Neighbours, or a metric, as the harness compares them: by a number that has to be the same."""

    def __init__(self, number: float, *tensors: Tensor):
        self.number, self.nbytes = number, sum(tensor.nbytes for tensor in tensors)

    def item(self) -> float:
        return self.number


def clustered_rows(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """Rows of length 1 about their label's, from which they lie at 45 degrees."""
    labels = torch.arange(n, device=device) % max(n // ROWS_PER_CLASS, 1)
    centres, noise = (unit_rows(n, d, dtype, device, seed).detach() for seed in (0, 1))
    return {"embeddings": torch.nn.functional.normalize(centres[labels] + noise), "labels": labels}


def strips(rows: Tensor):
    """(numbers of some rows, their similarities with all others)"""
    for some in torch.arange(len(rows), device=rows.device).split(max(STRIP // len(rows), 1)):
        similarities = rows[some] @ rows.T
        yield some, similarities.scatter_(1, some[:, None], -torch.inf)


def topk(embeddings, labels, backend):
    values, indices = retrieval.topk(embeddings, k=K, similarity="product", backend=backend)
    return Found(values.double().mean().item(), values, indices)


def torch_topk(embeddings, labels):
    found = [similarities.topk(K) for _, similarities in strips(embeddings)]
    values, indices = (torch.cat(parts) for parts in zip(*found))
    return Found(values.double().mean().item(), values, indices)


def faiss_search(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Its k nearest of every row but itself, which comes among them, and first but for equal rows."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    values, indices = (torch.from_numpy(found) for found in index.search(rows.numpy(), k + 1))
    others = indices != torch.arange(len(rows))[:, None]
    others[others.all(1), -1] = False
    return values[others].view(-1, k), indices[others].view(-1, k)


def faiss_topk(embeddings, labels):
    values, indices = faiss_search(embeddings, K)
    return Found(values.double().mean().item(), values, indices)


def map_at_r(embeddings, labels, backend):
    value = retrieval.map_at_r(embeddings, query_labels=labels, similarity="product", backend=backend)
    return Found(round(value, 4))  # of fp32 products, other rows may be nearest where two are nearly as near


def of_neighbours(indices: Tensor, labels: Tensor) -> Found:
    """MAP@R where every row has as many positives as it has neighbours."""
    hits = (labels[indices] == labels[:, None]).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    return Found(round((precision * hits).mean().item(), 4))


def positives_of_each(labels: Tensor) -> int:
    counts = labels.bincount()
    return int(counts[counts > 0].unique()) - 1  # one value, as all labels have as many rows


def torch_map_at_r(embeddings, labels):
    r = positives_of_each(labels)
    return of_neighbours(torch.cat([similarities.topk(r).indices for _, similarities in strips(embeddings)]), labels)


def faiss_map_at_r(embeddings, labels):
    return of_neighbours(faiss_search(embeddings, positives_of_each(labels))[1], labels)


TOPK = Case(
    name="topk",
    title=f"The {K} nearest neighbours of every row (a call without a gradient)",
    make_inputs=grid_rows,
    ours={"ours": topk},
    dense={"torch_topk": torch_topk, FAISS: faiss_topk},
    backends=("auto", "cpp", "torch"),
    sizes=(8192, 50000),
    training=False,
)
MAP_AT_R = Case(
    name="map_at_r",
    title="MAP@R of rows with 7 positives each (a call without a gradient)",
    make_inputs=clustered_rows,
    ours={"ours": map_at_r},
    dense={"torch_topk": torch_map_at_r, FAISS: faiss_map_at_r},
    backends=("auto", "cpp", "torch"),
    sizes=(8192, 50000),
    training=False,
)
