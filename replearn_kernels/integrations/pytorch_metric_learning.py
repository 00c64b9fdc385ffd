"""pytorch-metric-learning's losses and miners, computed by this library: the same classes, reducers and values.

::

    from pytorch_metric_learning import losses
    from replearn_kernels.integrations import pytorch_metric_learning as fused

    fused.apply()                                # losses and miners of pytorch_metric_learning are ours from here on
    loss = losses.NTXentLoss(temperature=0.07)   # or fused.NTXentLoss, without apply()
    loss(embeddings, labels, ref_emb=reference, ref_labels=reference_labels).backward()

Each is a subclass of theirs with its constructor: ``reducer``, ``distance``, ``embedding_regularizer``,
``SelfSupervisedLoss``, ``MultipleLosses`` and the like take it as they take theirs; ``backend``, ``memory_budget`` and
``strategy`` are ours. What cannot be computed without the matrix of all pairs, above all pairs that a miner has chosen,
is left to their code, and a warning says so once for each class and reason.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import functional as F
from ..functional.rows import unit_rows
from ..mining import mine_triplets
from ..pair_losses import pair_logsumexp
from ..pair_losses.circle import Circle
from ..pair_losses.multi_similarity import MultiSimilarity
from .labelled_pairs import (
    CircleOfReferences,
    Hinges,
    LabelledPairs,
    Lifted,
    MultiSimilarityOfReferences,
    Negatives,
    SupConOfReferences,
    as_integers,
)
from .options import TakesOptions, TakesPlace
from .replacing import Replacement
from .versions import require

require("pytorch-metric-learning", "2.4", "3")

from pytorch_metric_learning import losses as their_losses  # noqa: E402
from pytorch_metric_learning import miners as their_miners  # noqa: E402
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance  # noqa: E402
from pytorch_metric_learning.reducers import (  # noqa: E402
    AvgNonZeroReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
)
from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils  # noqa: E402


class _Fused(TakesOptions):
    """A loss of theirs with another ``compute_loss`` where that can do without the matrix.

    Raises:
        TypeError, ValueError: an option is not of its type or range.
    """

    entry = "compute_loss"
    not_called = ("_compute_loss", "mat_based_loss", "pair_based_loss", "get_per_pair_loss", "pos_calc", "neg_calc")
    distances: tuple[type, ...] = (CosineSimilarity, DotProductSimilarity)
    needs_both = False  # without a positive pair, or without a negative one, the loss is 0
    numbers: tuple[str, ...] = ()  # what is a constant of the kernels

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """What pytorch-metric-learning's reducers take."""
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        own = ref_emb is embeddings
        why = self._why_theirs(indices_tuple, own, ref_labels is None or ref_labels is labels)
        if why := why or _statistics(self) or _tensor(self, self.numbers):
            _tell(self, why)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        pairs = LabelledPairs(embeddings, labels, ref_emb, ref_labels, self.distance.normalize_embeddings)
        if max(pairs.counts) <= 1 or (self.needs_both and min(pairs.counts) == 0):  # theirs has 0 for one of each, too
            return self.zero_losses()
        return self._fused(pairs)

    def _why_theirs(self, indices_tuple, own: bool, same_labels: bool) -> str | None:
        """What of a call there is no fused loss for."""
        if indices_tuple is not None:
            return "an indices_tuple"
        if own != same_labels:
            return "one tensor of labels for embeddings and references"
        if getattr(self, "temperature", 1) <= 0:
            return "a temperature that is not positive"
        return _why_not(self.distance, self.distances, own)

    def _fused(self, pairs: LabelledPairs) -> dict:
        raise NotImplementedError


_told: set[str] = set()


def _tell(module, why: str) -> None:
    """Once for each class and reason."""
    text = f"{type(module).__name__} with {why} is computed by pytorch-metric-learning, which forms the matrix of pairs"
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=5)


def _statistics(module) -> str | None:
    """Whether a loss or miner, its distance or a reducer collects some: what is fused has none."""
    return "collect_stats" if any(getattr(part, "collect_stats", False) for part in module.modules()) else None


def _tensor(loss, names: tuple[str, ...]) -> str | None:
    """Which of a loss's numbers is a tensor, which may have to get a gradient."""
    return next((f"a tensor for {name}" for name in names if isinstance(getattr(loss, name), Tensor)), None)


def _why_not(distance, kinds: tuple[type, ...], own: bool) -> str | None:
    """What of a distance there is no fused loss for."""
    if type(distance) not in kinds:
        return f"the distance {type(distance).__name__}"
    if distance.p != 2 or distance.power != 1:
        return f"p={distance.p} and power={distance.power} of a distance"
    if type(distance) is LpDistance and not own:
        return "distances to references"
    return None


def _compared(loss, pairs: LabelledPairs) -> dict:
    """What a declared loss compares: whether the rows of a batch, and by their distances or similarities."""
    return {"batch": pairs.own, "similarity": "distance" if type(loss.distance) is LpDistance else "product"}


def _elements(losses: Tensor) -> dict:
    """A reducer takes this dictionary: ``losses`` has one element for each row."""
    rows = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}


def _of_positives(losses: Tensor, pairs: LabelledPairs) -> dict:
    return {"loss": {"losses": losses, "indices": pairs.positives, "reduction_type": "pos_pair"}}


def _reduced(**losses: Tensor) -> dict:
    done = {"indices": None, "reduction_type": "already_reduced"}
    return {name: {"losses": loss, **done} for name, loss in losses.items()}


def _reducer(loss, name: str):
    """The reducer of one of a loss's parts."""
    if not isinstance(loss.reducer, MultipleReducers):
        return loss.reducer
    return loss.reducer.reducers[name] if name in loss.reducer.reducers else loss.reducer.default_reducer


def _reduction(loss, name: str) -> str | None:
    """Our name of it, if it is a reducer that needs no list of losses."""
    known = {AvgNonZeroReducer: "mean_nonzero", MeanReducer: "mean", SumReducer: "sum"}
    return known.get(type(_reducer(loss, name)))


def _lists(loss, *names: str) -> str | None:
    """Which reducer needs a list of losses."""
    kinds = [type(_reducer(loss, name)).__name__ for name in names if _reduction(loss, name) is None]
    return f"the reducer {kinds[0]}" if kinds else None


def _above_rounding(losses: Tensor) -> Tensor:
    """Theirs are logarithms of rounded probabilities: 0 below half a unit in the last place of 1, where some reducers
    count them."""
    return torch.where(losses > torch.finfo(losses.dtype).eps / 2, losses, losses * 0)


class NTXentLoss(_Fused, their_losses.NTXentLoss):
    """Every positive pair against the row's negatives; memory grows with the number of positive pairs."""

    needs_both = True

    def _fused(self, pairs: LabelledPairs) -> dict:
        row, column = pairs.positives
        scale = 1 / self.temperature
        negatives = pair_logsumexp(
            pairs.rows, pairs.columns, over="other", logit_scale=scale, **pairs.groups, **self.options
        )
        positive = scale * (pairs.rows[row].to(negatives.dtype) * pairs.columns[column]).sum(1)
        return _of_positives(_above_rounding(-logsigmoid(positive - negatives[row])), pairs)


class SupConLoss(_Fused, their_losses.SupConLoss):
    """:func:`~replearn_kernels.sup_con_loss`, also against references."""

    needs_both = True

    def _fused(self, pairs: LabelledPairs) -> dict:
        if pairs.own:
            how = {"temperature": self.temperature, "reduction": "none", "normalize": False, **self.options}
            losses = F.sup_con_loss(pairs.rows, pairs.labels, **how)
        else:
            losses = pairs.losses(SupConOfReferences(), self.options, logit_scale=1 / self.temperature)
        return _elements(_above_rounding(losses))


class CircleLoss(_Fused, their_losses.CircleLoss):
    """:func:`~replearn_kernels.circle_loss`, also against references."""

    numbers = ("m", "gamma")

    def _fused(self, pairs: LabelledPairs) -> dict:
        kind = Circle if pairs.own else CircleOfReferences
        return _elements(pairs.losses(kind(float(self.m), float(self.gamma)), self.options))


class MultiSimilarityLoss(_Fused, their_losses.MultiSimilarityLoss):
    """:func:`~replearn_kernels.multi_similarity_loss`, also against references."""

    numbers = ("alpha", "beta", "base")

    def _fused(self, pairs: LabelledPairs) -> dict:
        kind = MultiSimilarity if pairs.own else MultiSimilarityOfReferences
        loss = kind(float(self.alpha), float(self.beta), float(self.base))
        return _elements(pairs.losses(loss, self.options))


class ContrastiveLoss(_Fused, their_losses.ContrastiveLoss):
    """Hinges of positive pairs and of negative ones, each with a mean of its own.

    Fused with reducers that need no list of pairs: ``AvgNonZeroReducer``, the default, ``MeanReducer`` and
    ``SumReducer``.
    """

    distances = (LpDistance, CosineSimilarity, DotProductSimilarity)
    numbers = ("pos_margin", "neg_margin")

    def _why_theirs(self, *given) -> str | None:
        return super()._why_theirs(*given) or _lists(self, "pos_loss", "neg_loss")

    def _fused(self, pairs: LabelledPairs) -> dict:
        losses = {}
        for name, side, margin in (("pos_loss", "same", self.pos_margin), ("neg_loss", "other", self.neg_margin)):
            reduction = _reduction(self, name)
            loss = Hinges(side, reduction == "mean_nonzero", float(margin), **_compared(self, pairs))
            reduction = "sum" if reduction == "sum" else "mean"
            losses[name] = pairs.losses(loss, self.options, reduction=reduction)
        return _reduced(**losses)


class LiftedStructureLoss(_Fused, their_losses.LiftedStructureLoss):
    """Every positive pair against the negatives of both its rows; memory grows with the number of positive pairs."""

    distances = (LpDistance, CosineSimilarity, DotProductSimilarity)
    numbers = ("pos_margin", "neg_margin")
    needs_both = True

    def _why_theirs(self, indices_tuple, own: bool, same_labels: bool) -> str | None:
        return super()._why_theirs(indices_tuple, own, same_labels) or (None if own else "references")

    def _fused(self, pairs: LabelledPairs) -> dict:
        compared = _compared(self, pairs)
        negatives = pairs.losses(Negatives(float(self.neg_margin), **compared), self.options)
        row, column = pairs.positives
        one, other = pairs.rows[row].to(negatives.dtype), pairs.rows[column].to(negatives.dtype)
        if compared["similarity"] == "distance":
            positive = torch.linalg.vector_norm(one - other, dim=1) - self.pos_margin
        else:
            positive = self.pos_margin - (one * other).sum(1)
        soft_maximum = torch.logaddexp(negatives[row], negatives[column])
        return _of_positives((soft_maximum + positive).relu().square() / 2, pairs)


class GeneralizedLiftedStructureLoss(_Fused, their_losses.GeneralizedLiftedStructureLoss):
    """The soft maxima of a row's positive pairs and of its negative ones."""

    distances = (LpDistance, CosineSimilarity, DotProductSimilarity)
    numbers = ("pos_margin", "neg_margin")

    def _fused(self, pairs: LabelledPairs) -> dict:
        loss = Lifted(float(self.pos_margin), float(self.neg_margin), **_compared(self, pairs))
        return _elements(pairs.losses(loss, self.options))


class TripletMarginLoss(_Fused, their_losses.TripletMarginLoss):
    """All triplets of a batch, without a list of them, or those that a miner has chosen.

    All of them with ``AvgNonZeroReducer`` (the default), ``MeanReducer`` or ``SumReducer``; chosen ones with any.
    """

    distances = (LpDistance, CosineSimilarity)
    numbers = ("margin",)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """What pytorch-metric-learning's reducers take."""
        chosen = ref_emb is embeddings and _are_triplets(indices_tuple)
        why = _why_not(self.distance, self.distances, own=True) or _statistics(self)
        if not chosen or why or self._why_not_fused():
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if len(indices_tuple[0]) == 0:
            return self.zero_losses()
        losses = self._loss(embeddings, triplets=tuple(indices_tuple), reduction="none")
        return {"loss": {"losses": losses, "indices": indices_tuple, "reduction_type": "triplet"}}

    def _why_not_fused(self) -> str | None:
        why = next((name for name in ("swap", "smooth_loss") if getattr(self, name)), None)
        why = why or _tensor(self, self.numbers)
        return why or (None if self.margin >= 0 else "a negative margin")

    def _why_theirs(self, indices_tuple, own: bool, same_labels: bool) -> str | None:
        why = super()._why_theirs(indices_tuple, own, same_labels) or self._why_not_fused()
        if not (why or own):
            return "references"
        if not why and self.triplets_per_anchor != "all":
            return "triplets_per_anchor"
        return why or _lists(self, "loss")

    def _fused(self, pairs: LabelledPairs) -> dict:
        reduction = _reduction(self, "loss")
        how = {"mining": "batch_all", "normalize": False, "reduction": reduction}  # pairs.rows are normalised
        return _reduced(loss=self._loss(pairs.rows, pairs.labels, **how))

    def _loss(self, rows: Tensor, labels: Tensor | None = None, **how) -> Tensor:
        distance = "euclidean" if type(self.distance) is LpDistance else "cosine"
        how = {"normalize": self.distance.normalize_embeddings, **how, **self.options}
        return F.triplet_margin_loss(rows, labels, margin=self.margin, distance=distance, **how)


def _are_triplets(indices) -> bool:
    """Of numbers of rows, as our miners and theirs return them."""
    return indices is not None and len(indices) == 3 and all(
        isinstance(each, Tensor) and each.dtype == torch.int64 for each in indices
    )  # fmt: skip


class _Classifier(TakesOptions):
    """A loss of rows and the weights of classes; what a miner has chosen weights the rows, as there."""

    entry = "compute_loss"
    not_called = ("get_cosine", "get_angles", "get_target_mask", "modify_cosine_of_target_classes", "scale_logits")

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        """What pytorch-metric-learning's reducers take."""
        why = _why_not(self.distance, (CosineSimilarity,), True) or _statistics(self)
        if why := why or _tensor(self, ("margin", "scale")) or self._why_not_margin():
            _tell(self, why)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        how = {name: self.options[name] for name in ("backend", "memory_budget")}
        how |= {"margin": float(self.margin), "scale": float(self.scale), "reduction": "none"}
        losses = self._loss(embeddings, self.W.t(), labels, **how)
        weights = loss_and_miner_utils.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype)
        found = _elements(losses * weights)
        self.add_weight_regularization_to_loss_dict(found, self.W.t())
        return found


class ArcFaceLoss(_Classifier, their_losses.ArcFaceLoss):
    """:func:`~replearn_kernels.arcface_loss`; ``margin`` in degrees, the weight ``[d, C]``, as there."""

    _loss = staticmethod(F.arcface_loss)

    def _why_not_margin(self) -> str | None:
        """Past 133 degrees, 2.33, ours and theirs go on by other formulas where angle and margin exceed 180."""
        return None if 0 <= self.margin <= 2.33 else "a margin outside of 0 to 133 degrees"


class CosFaceLoss(_Classifier, their_losses.CosFaceLoss):
    """:func:`~replearn_kernels.cosface_loss`; the weight ``[d, C]``, as there."""

    _loss = staticmethod(F.cosface_loss)

    def _why_not_margin(self) -> str | None:
        return None if 0 <= self.margin <= 2 else "a margin outside of 0 to 2"


class _Miner(TakesPlace):
    """A miner of theirs with another ``mine`` where that can do without the matrix.

    Args:
        backend: as :func:`~replearn_kernels.mine_triplets` takes it.
    """

    entry = "mine"

    def __init__(self, *args, backend: str = "auto", **keywords):
        super().__init__(*args, **keywords)
        self.backend = backend

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        """Triplets of rows by their numbers."""
        own = ref_emb is embeddings
        why = self._why_theirs() or _why_not(self.distance, (LpDistance, CosineSimilarity), own)
        if why := why or (None if own else "references"):
            _tell(self, why)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        how = {"distance": "cosine", "backend": self.backend}
        if type(self.distance) is LpDistance:
            how["distance"] = "euclidean"
            embeddings = unit_rows(embeddings) if self.distance.normalize_embeddings else embeddings
        return self._mined(embeddings, as_integers(labels), how)

    def _why_theirs(self) -> str | None:
        return _statistics(self)


class BatchHardMiner(_Miner, their_miners.BatchHardMiner):
    """Every anchor's farthest positive and nearest negative."""

    def _why_theirs(self) -> str | None:
        ranges = self.allowed_pos_range is not None or self.allowed_neg_range is not None
        return super()._why_theirs() or ("a range of distances" if ranges else None)

    def _mined(self, rows: Tensor, labels: Tensor, how: dict) -> tuple[Tensor, Tensor, Tensor]:
        return mine_triplets(rows, labels, mining="batch_hard", **how)


class TripletMarginMiner(_Miner, their_miners.TripletMarginMiner):
    """All triplets within a margin, the hard ones of them, or the semi-hard ones."""

    _modes = {"all": "batch_all", "hard": "batch_all_hard", "semihard": "batch_all_semi_hard"}

    def _why_theirs(self) -> str | None:
        if why := super()._why_theirs():
            return why
        if self.type_of_triplets not in self._modes:
            return "easy triplets"
        return None if 0 <= self.margin < torch.inf else "a margin that is negative or infinite"

    def _mined(self, rows: Tensor, labels: Tensor, how: dict) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        # Theirs takes what is at the margin, too.
        beyond = torch.tensor(float(self.margin), dtype=dtype).nextafter(torch.tensor(torch.inf, dtype=dtype)).item()
        return mine_triplets(rows, labels, mining=self._modes[self.type_of_triplets], margin=beyond, **how)


_classes = [
    Replacement(("pytorch_metric_learning",), their_losses, (
        ArcFaceLoss, CircleLoss, ContrastiveLoss, CosFaceLoss, GeneralizedLiftedStructureLoss, LiftedStructureLoss,
        MultiSimilarityLoss, NTXentLoss, SupConLoss, TripletMarginLoss,
    )),
    Replacement(("pytorch_metric_learning",), their_miners, (BatchHardMiner, TripletMarginMiner)),
]  # fmt: skip


def apply() -> None:
    """Put these classes in the place of pytorch-metric-learning's, in its ``losses`` and ``miners``.

    A name that a module of another package has imported before stays what it was. :func:`undo` takes it back.
    """
    for classes in _classes:
        classes.apply()


def undo() -> None:
    """Put pytorch-metric-learning's own classes back."""
    for classes in _classes:
        classes.undo()
