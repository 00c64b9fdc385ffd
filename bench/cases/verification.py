"""Verification: calls without a gradient, held against histograms of strips of the similarities."""

import torch

from bench.cases.retrieval import STRIP, Found, clustered_rows
from bench.harness import Case
from replearn_kernels import verification

FARS = (1e-2, 1e-3, 1e-4, 1e-5)
BINS = 2**16  # what torch's histogram tells apart: cosines 3e-5 from each other. Ours tells 1.5e-8


def roc_of_labels(embeddings, labels, backend):
    curve = verification.roc_of_labels(embeddings, query_labels=labels, far=FARS, backend=backend)
    return Found(round(sum(curve.tar_at_far(FARS)), 3), curve.thresholds, curve.same, curve.other)


def torch_histogram(embeddings, labels):
    """Of all pairs i < j, and of those of one label: rows of unit length."""
    of_all, of_same = torch.zeros(2, BINS, dtype=torch.float64, device=embeddings.device)
    rows = max(STRIP // len(embeddings), 1)
    for first in range(0, len(embeddings), rows):
        some = embeddings[first : first + rows]
        similarities = some @ embeddings[first:].T
        square = similarities[:, : len(some)]
        square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), -2)  # beyond what is counted
        of_all += similarities.histc(BINS, -1, 1).double()
        same = labels[first : first + rows, None] == labels[first:]
        of_same += similarities[same].histc(BINS, -1, 1).double()
    accepted = [counts.flip(0).cumsum(0) for counts in (of_same, of_all - of_same)]
    tar, far = (counts / counts[-1] for counts in accepted)
    return Found(round(sum(float(tar[far <= each].max()) for each in FARS), 3), tar, far)


VERIFICATION = Case(
    name="verification",
    title="TAR at four FARs, of all pairs of rows with 7 positives each (a call without a gradient)",
    make_inputs=clustered_rows,
    ours={"ours": roc_of_labels},
    dense={"torch_histogram": torch_histogram},
    backends=("auto", "cpp", "torch"),
    sizes=(8192, 50000),
    training=False,
)
