"""What a representation is worth: exact nearest neighbours and retrieval metrics, never the N x M similarities."""

from .metrics import evaluate, map_at_r, mean_average_precision, mrr, precision_at_k, r_precision, recall_at_k
from .search import Neighbours, knn_accuracy, knn_predict, topk

__all__ = [
    "Neighbours",
    "evaluate",
    "knn_accuracy",
    "knn_predict",
    "map_at_r",
    "mean_average_precision",
    "mrr",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "topk",
]
