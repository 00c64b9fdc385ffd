"""Triplet mining: which positives and negatives each row of a labelled batch is to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import mining as engine
from .engine import validation


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    *,
    mining: str = "semi_hard",
    margin: float = 0.2,
    distance: str = "euclidean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Triplets (anchor, positive, negative) of a labelled batch, without ever forming its N x N distances.

    A positive p of anchor a is another row of a's label, a negative n a row of another label. With D the distances:

        "batch_hard"            one per anchor that has both: p = argmax D_ap, n = argmin D_an
        "semi_hard"             one per pair (a, p): n = argmin D_an over D_an > D_ap; if no n is so far, argmax D_an
        "batch_all"             every (a, p, n) with D_an - D_ap < margin
        "batch_all_hard"        every (a, p, n) with D_an - D_ap <= 0
        "batch_all_semi_hard"   every (a, p, n) with 0 < D_an - D_ap < margin

    Of equal distances the lower index is taken. "semi_hard" and "batch_all_semi_hard" are the online selections of
    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", 2015 (arXiv:1503.03832), the
    first as one triplet per pair; "batch_hard" and "batch_all" are those of Hermans et al., "In Defense of the Triplet
    Loss for Person Re-Identification", 2017 (arXiv:1703.07737).

    Distances are sums of squared differences, in fp32 (fp64 for fp64 embeddings), so that near rows lose nothing to
    cancellation. "cpp" and "cuda" take every sum in the same order: they return the same triplets, index for index,
    whatever the number of threads. "torch" rounds as PyTorch's sums do. Time is O(N^2 d), and for the batch_all modes
    O(N) per positive pair; memory O(N) and less than 64 MB beside the result, which has 24 bytes per triplet.

    Args:
        embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides. They get no gradient: the choice of triplets has
            none.
        labels: integers ``[N]``, any values: -1 is a label as any other, and none is ignored.
        mining: which triplets, as above. Default "semi_hard".
        margin: at least 0; only the batch_all modes but "batch_all_hard" look at it. Default 0.2.
        distance: "euclidean" (default); "squared_euclidean"; or "cosine", 1 - cos, which is 1 from a row of zeros.
        backend: "auto", "cpp" (CPU), "cuda" (where the C++ kernels were built with CUDA) or "torch" (any device).

    Returns:
        ``(anchor, positive, negative)``, int64 ``[T]`` each on the embeddings' device, ordered by anchor, then
        positive, then negative. Empty where no anchor has a positive and a negative.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: wrong rank or shape, labels on another device, embeddings that are not finite, a margin that is
            negative, NaN or infinite, an unknown mining, distance or backend, or one that does not run on this device.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: inside a torch.func transform; embeddings on the meta device, where no triplets can be
            counted (outside of a FakeTensorMode).
    """
    validation.check_features("embeddings", embeddings)
    labels = validation.check_labels("labels", labels, embeddings.shape[0], embeddings)
    validation.check_choice("mining", mining, engine.MODES)
    validation.check_choice("distance", distance, engine.DISTANCES)
    margin = validation.check_margin(margin, torch.finfo(torch.float32).max)
    backend = engine.resolve_miner(backend, embeddings.device)
    return engine.mine(embeddings, labels, mining, margin, distance, backend, check=True)
