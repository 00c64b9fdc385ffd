"""Declared losses as modules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps

from torch import Tensor, nn

from ..engine import validation
from ..engine.plan import DEFAULT_MEMORY_BUDGET
from ..functional.call import in_group, takes_logit_scale
from ..losses import _Loss
from . import cpp_source, torch_source, triton_source
from .checks import check_formulas, check_parameter
from .compute import batch_loss, pair_loss
from .definition import fields_of, with_fields
from .objective import objective_of
from .pair_loss import PairLoss

_NOTATIONS = {"triton": triton_source, "cpp": cpp_source, "torch": torch_source}


def fuse(
    loss: PairLoss,
    *,
    reduction: str = "mean",
    normalize: bool | None = None,
    backend: str = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    group=None,
    strategy: str = "auto",
) -> FusedBatchLoss | FusedPairLoss:
    """A declared loss, fused: a module whose calls never form the N x N matrix, forward or backward.

    ::

        circle = fuse(Circle(margin=0.3))
        circle(embeddings, labels).backward()

    Args:
        loss: an instance of a :class:`PairLoss`. Other values of its float fields need no new kernels. Those that are
            ``nn.Parameter`` become parameters of the module: ``fused.learned["margin"]``.
        reduction: "mean" over the rows (or ``sum(loss) / sum(counted)``), "sum", or "none": ``[N]``.
        normalize: L2-normalise the features first. Default: True for ``similarity = "cosine"``, else False.
        backend: "auto", "triton" (GPU), "cpp" (CPU: compiled by the first call, where there is a C++ compiler), "torch"
            (any device), or "eager": the plain formula on the full matrix, which can be differentiated twice. "auto"
            takes triton on a GPU (except for fp64), cpp on a CPU, and torch elsewhere.
        memory_budget: bytes of similarities that may be kept for the backward pass instead of computed again.
            Default 256 MiB; 0 keeps none.
        group: a torch.distributed process group, each of whose ranks passes its shard of the batch
            (docs/design.md, "Many ranks"). Default: this process alone.
        strategy: "ring", "gather" or "auto", as in :func:`~replearn_kernels.info_nce_loss`.

    Returns:
        A :class:`FusedBatchLoss` for a loss with ``batch = True``, else a :class:`FusedPairLoss`.

    Raises:
        TypeError, ValueError, AttributeError: the loss cannot be declared so, or an option is not as above; the
            message says what to write instead.
    """
    if not isinstance(loss, PairLoss):
        hint = f": call fuse({loss.__name__}())" if isinstance(loss, type) else ""
        raise TypeError(f"fuse takes an instance of a PairLoss, got {loss!r}{hint}")
    of_kind = FusedBatchLoss if loss.batch else FusedPairLoss
    return of_kind(
        loss, reduction=reduction, normalize=normalize, backend=backend, memory_budget=memory_budget, group=group,
        strategy=strategy,
    )  # fmt: skip


class _FusedLoss(_Loss):
    """Holds a declared loss, ``loss``, and the options of its calls."""

    def __init__(
        self,
        loss: PairLoss,
        *,
        reduction: str = "mean",
        normalize: bool | None = None,
        backend: str = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        group=None,
        strategy: str = "auto",
    ):
        normalize = loss.similarity == "cosine" if normalize is None else normalize
        super().__init__(
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            memory_budget=memory_budget,
            group=group,
            strategy=strategy,
        )
        check_formulas(loss)
        self.loss = loss

    @property
    def loss(self) -> PairLoss:
        """The declared loss; of its fields that are ``nn.Parameter``, what ``learned`` holds."""
        return self._loss if self.learned is None else with_fields(self._loss, self.learned)

    @loss.setter
    def loss(self, loss: PairLoss) -> None:
        for name in fields_of(type(loss))[0]:
            check_parameter(f"{type(loss).__name__}.{name}", getattr(loss, name))
        objective_of(loss)  # its name has to be there when a graph is traced
        parameters = {name: value for name, value in vars(loss).items() if isinstance(value, nn.Parameter)}
        for name in parameters:
            if hasattr(nn.ParameterDict, name) or name == "training":
                raise ValueError(
                    f"{type(loss).__name__}.{name}: torch's modules have another {name!r}, so that a field which holds "
                    "an nn.Parameter needs another name"
                )
        self._loss, self.learned = loss, nn.ParameterDict(parameters) if parameters else None

    def __setattr__(self, name: str, value) -> None:
        known = vars(self)
        if "_loss" in known and name in vars(known["_loss"]) and name not in known:  # nobody would read it
            raise AttributeError(
                f"{name} is a field of the loss: write module.loss = dataclasses.replace(module.loss, {name}=...)"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state):
        super().__setstate__(state)
        objective_of(self.loss)

    def source(self, backend: str) -> str:
        """The text that is derived for a backend: "triton", "cpp" or "torch"."""
        validation.check_choice("backend", backend, tuple(_NOTATIONS))
        return _NOTATIONS[backend].source_of(objective_of(self.loss).definition)

    def _call(self, function, *tensors: Tensor | None, **keywords) -> Tensor:
        """Calls the function with the options; in a group, ranks know the call by the name of the loss."""
        loss = self.loss
        if self.options["group"] is None:
            return function(loss, *tensors, **keywords, **self.options)

        @wraps(function)
        def call(*arguments, **keywords):
            return function(*arguments, **keywords)

        call.__name__ = type(loss).__name__
        return in_group(call)(loss, *tensors, **keywords, **self.options)


class FusedBatchLoss(_FusedLoss):
    """A declared loss whose rows are compared with each other; made by :func:`fuse`."""

    @takes_logit_scale
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
        *,
        row_values: Mapping[str, Tensor] | None = None,
        row_guide: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
            labels: integers ``[N]``, any values: ``pair.same`` are pairs of equal labels. Needed if the loss has
                ``pair.same`` or ``pair.other``.
            logit_scale: of a loss with ``scaled = True``: the inverse temperature, a float, or a tensor of one
                element, which gets a gradient.
            row_values: of a loss that names ``row_values``: by those names tensors ``[N]``, floating-point or bool, on
                the features' device. They are read in fp32 (fp64 for fp64 embeddings), and get no gradient.
            row_guide: of a loss with a ``guide``: ``[N, g]``, any floating dtype; it gets no gradient.

        Returns:
            The loss, in fp32 (fp64 for fp64 embeddings). Without rows 0, with zero gradients.

        Raises:
            TypeError, ValueError: an argument is not as above.
            RuntimeError: the backend asked for is not available here.
        """
        keywords = {
            "logit_scale": _scale(self.loss, logit_scale), "row_values": row_values, "row_guide": row_guide
        }  # fmt: skip
        return self._call(batch_loss, embeddings, labels, **keywords)


class FusedPairLoss(_FusedLoss):
    """A declared loss of queries and keys; made by :func:`fuse`."""

    @takes_logit_scale
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        logit_scale: float | Tensor = 1.0,
        *,
        target: Tensor | None = None,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
        row_values: Mapping[str, Tensor] | None = None,
        column_values: Mapping[str, Tensor] | None = None,
        row_guide: Tensor | None = None,
        column_guide: Tensor | None = None,
    ) -> Tensor:
        """The loss of queries against keys.

        Args:
            query: ``[N, d]``, fp16, bf16, fp32 or fp64, any strides.
            key: ``[M, d]``, of the same dtype and device.
            logit_scale: of a loss with ``scaled = True``: the inverse temperature, a float, or a tensor of one
                element, which gets a gradient.
            target: int64 ``[N]``, the row of ``key`` that is each query's own, in ``[0, M)``. Default: query i's is
                key i, which needs M >= N.
            query_group, key_group: integers ``[N]`` and ``[M]``, any values: ``pair.same`` are pairs of equal groups.
                Default: those of a query and its target.
            row_values, column_values: of a loss that names ``row_values``, ``column_values``: by those names tensors
                ``[N]`` of the queries, and ``[M]`` of the keys, floating-point or bool, on the features' device. They
                are read in fp32 (fp64 for fp64 features), and get no gradient.
            row_guide, column_guide: of a loss with a ``guide``: ``[N, g]`` and ``[M, g]``, of one floating dtype; they
                get no gradient.

        Returns:
            The loss, in fp32 (fp64 for fp64 features). Without queries 0, with zero gradients.

        Raises:
            TypeError, ValueError: an argument is not as above.
            RuntimeError: the backend asked for is not available here.
        """
        keywords = {
            "target": target, "query_group": query_group, "key_group": key_group, "row_values": row_values,
            "column_values": column_values, "row_guide": row_guide, "column_guide": column_guide,
        }  # fmt: skip
        return self._call(pair_loss, query, key, **keywords, logit_scale=_scale(self.loss, logit_scale))


def _scale(loss: PairLoss, logit_scale: float | Tensor) -> float | Tensor:
    if not loss.scaled and (isinstance(logit_scale, Tensor) or logit_scale != 1):
        raise ValueError(f"{type(loss).__name__} takes no logit_scale: its terms are of similarities (scaled = False)")
    return logit_scale
