"""Whether two rows have one label: exact ROC curves of given pairs, and of all pairs of a labelled set."""

from .curve import Best, Curve, roc
from .labelled import roc_of_labels
from .pairs import Folds, k_fold, pair_similarities

__all__ = ["Best", "Curve", "Folds", "k_fold", "pair_similarities", "roc", "roc_of_labels"]
