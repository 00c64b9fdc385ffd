"""Every kernel that the engine launches, and a launch of each on tensors without data: for compiling without a GPU.

A variant is an epilogue with what one kind of tile tells it; the launchers are the library's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from replearn_kernels.declare import PairLoss
from replearn_kernels.declare.algebra import walk
from replearn_kernels.declare.objective import objective_of
from replearn_kernels.declare.triton_source import epilogue_of
from replearn_kernels.pair_losses.circle import Circle
from replearn_kernels.pair_losses.decoupled import Decoupled
from replearn_kernels.pair_losses.gist import GistAmong, GistBetween
from replearn_kernels.pair_losses.hard_negatives import HardNegatives
from replearn_kernels.pair_losses.multi_positive import MultiPositiveClip
from replearn_kernels.pair_losses.multi_similarity import MultiSimilarity
from replearn_kernels.pair_losses.sampled_softmax import SampledSoftmax
from replearn_kernels.pair_losses.soft_targets import SoftTargets, SymmetricSoftTargets
from replearn_kernels.pair_losses.vse import Vse
from replearn_kernels.triton_kernels import (
    EPILOGUES,
    Epilogue,
    Points,
    Side,
    TileInputs,
    accumulate_gradient,
    begin_sums,
    combine_losses,
    combine_statistics,
    finish_gradients,
    form_shares,
    form_weights,
    group_ranges,
    launch_gradient,
    launch_weights,
    shared_reference,
    update_by_sums,
    update_statistics,
)
from replearn_kernels.triton_kernels.configs import default, ring_of
from replearn_kernels.triton_kernels.groups import STEP
from replearn_kernels.triton_kernels.statistics import merge

# name: (dtype, torch.set_float32_matmul_precision)
PRODUCTS = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
}
KIND = {"fp16": "half", "bf16": "half", "tf32": "tf32", "fp32": "ieee"}  # in configs.py

# Whose configs a target takes.
ARCHITECTURE = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 80}

# Kernels of tables alone: the same for every kind of product. And those that form no products.
OF_TABLES = ("merge", "add", "combine", "total", "reference", "shares", "ranges")
NO_PRODUCTS = (*OF_TABLES, "begin", "outputs")


@dataclass(frozen=True)
class Variant:
    """An epilogue with what one kind of tile tells it: every combination that the engine launches."""

    epilogue: str
    target: str = ""  # "own": row i's positive is column i; "given": any
    groups: bool = False
    columns: bool = False  # the tile has tables of columns, too
    diagonal: bool = False
    fused: bool = False  # the gradient kernel can take the products
    one_sweep: bool = False  # the weights kernel folds the row statistics
    distance: str = ""  # "distance" or its "square", where similarities are no products
    quantities: int = 3  # of the statistics of rows; of columns too where these are rows elsewhere
    gradients: bool = True  # there is a sweep of gradients
    told_apart: bool = False  # where TMA moves W, blocks off the diagonal are told from those on it
    first: bool = True  # of its epilogue's variants: kernels that know nothing of tiles are listed once
    loss: PairLoss | None = None  # a declared one, whose kernels are printed; its epilogue is named for its block sizes

    @property
    def functions(self) -> Epilogue:
        return EPILOGUES[self.epilogue] if self.loss is None else epilogue_of(objective_of(self.loss).definition)

    @property
    def roles(self) -> tuple[float | torch.Tensor, ...]:
        if self.loss is None:
            return ROLES.get(self.epilogue, ())
        objective = objective_of(self.loss)
        return objective(False, [0.5] * len(objective.definition.parameters)).roles

    @property
    def weighs_similarities(self) -> bool:
        """Whether W depends on them. Where it does not, as of pairs with a constant slope, the compiler leaves their
        product out of the kernel that forms W."""
        if self.loss is None:
            return True
        terms = [term for term in objective_of(self.loss).definition.terms if term.slope is not None]
        read = {e.op for term in terms for e in walk([term.slope, term.over])}
        return any(term.kind == "logsumexp" for term in terms) or not read.isdisjoint(("s", "logit"))

    def given(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...] | None:
        """What calls of a declared loss give for rows and columns: values, and features of the guide."""
        if not self.functions.takes_given:
            return None
        definition = objective_of(self.loss).definition
        counts = (len(definition.row_values), rows), (len(definition.column_values), columns)
        values = (torch.empty(shape) if shape[0] else None for shape in counts)
        has_guide = bool(definition.settings.guide)
        guides = (torch.empty(size, 384, dtype=dtype) if has_guide else None for size in (rows, columns))
        return *values, *guides

    def kernels(self, product: str, target: str) -> list[str]:
        """Those that a GPU has a config for. "weights apart": the weights kernel that tells blocks apart."""
        names = ["statistics", "weights"] if self.gradients else ["statistics"]
        names += ["gradient", "gradient transposed"] * self.fused + self._of_tables() * self.first
        if not self.told_apart:
            return names
        sums, weights = (
            default(kernel, self.epilogue, KIND[product], ARCHITECTURE[target]) for kernel in ("sums", "weights")
        )
        names += ["weights apart"] * (weights.parts > 0)
        if sums is None or not self.functions.by_sums:
            return names
        names += [*["begin"] * self.first, "sums", "finish", *["reference"] * self.first]
        return names + self._in_gluon() * (target == "sm_90" and KIND[product] == "half")

    def _in_gluon(self) -> list[str]:
        """Of sm_90. The diagonal and positives are no constants there: some variants are one to them."""
        if not (self.groups or self.target):
            return []
        if self.diagonal:
            return ["gluon sums"]
        names = ["gluon sums", "gluon finish", "gluon weights", "gluon gradient", "gluon gradient transposed"]
        return names + ["shares"] * self.first + ["ranges"] * (self.first and self.groups)

    def _of_tables(self) -> list[str]:
        epilogue = self.functions
        names = ["add rows" if epilogue.additive else "merge rows"]
        if self.columns and not self.diagonal:
            names.append("merge columns")
        if epilogue.combine is not None:
            names.append("total" if self.one_sweep else "combine")
        return names


OF_PAIRS = {"groups": True, "columns": True}
CONTRASTIVE = {"one_sweep": True, "distance": "distance", "quantities": 2}
HARDEST = {"distance": "square", "quantities": 5, "gradients": False}
SEMI_HARD = {"distance": "square", "quantities": 3 + 3 * EPILOGUES["semi_hard"].per_part, "gradients": False}
BATCH_ALL = {"one_sweep": True, "quantities": 2 + 2 * EPILOGUES["batch_all"].per_part}

VARIANTS = {
    "softmax symmetric": Variant("softmax", target="own", columns=True, fused=True, told_apart=True),
    "softmax": Variant("softmax", target="own", fused=True, told_apart=True, first=False),
    "softmax target": Variant("softmax", target="given", fused=True, first=False),
    "softmax queue": Variant("softmax", fused=True, told_apart=True, first=False),
    "softmax groups": Variant("softmax", target="own", groups=True, fused=True, first=False),
    "sup_con": Variant("sup_con", groups=True, columns=True, told_apart=True),
    "sup_con diagonal": Variant("sup_con", groups=True, columns=True, diagonal=True, told_apart=True, first=False),
    "margin_softmax": Variant("margin_softmax", target="given", fused=True),
    "sigmoid": Variant("sigmoid", target="own", one_sweep=True, told_apart=True),
    "sigmoid groups": Variant("sigmoid", groups=True, one_sweep=True, first=False),
    "lifted": Variant("lifted", **OF_PAIRS, distance="distance"),
    "lifted diagonal": Variant("lifted", first=False, **OF_PAIRS, diagonal=True, distance="distance"),
    "margin_contrastive": Variant("margin_contrastive", **OF_PAIRS, **CONTRASTIVE),
    "margin_contrastive diagonal": Variant("margin_contrastive", first=False, **OF_PAIRS, diagonal=True, **CONTRASTIVE),
    "hardest": Variant("hardest", **OF_PAIRS, **HARDEST),
    "hardest diagonal": Variant("hardest", first=False, **OF_PAIRS, diagonal=True, **HARDEST),
    "semi_hard": Variant("semi_hard", **OF_PAIRS, **SEMI_HARD),
    "semi_hard diagonal": Variant("semi_hard", first=False, **OF_PAIRS, diagonal=True, **SEMI_HARD),
    "batch_all": Variant("batch_all", **OF_PAIRS, **BATCH_ALL, distance="distance"),
    "batch_all diagonal": Variant(
        "batch_all", first=False, **OF_PAIRS, diagonal=True, **BATCH_ALL, distance="distance"
    ),
    "batch_all squared": Variant("batch_all", first=False, **OF_PAIRS, **BATCH_ALL, distance="square"),
    "circle": Variant("declared_large", **OF_PAIRS, quantities=4, loss=Circle(0.4, 80.0)),
    "circle diagonal": Variant(
        "declared_large", **OF_PAIRS, quantities=4, diagonal=True, first=False, loss=Circle(0.4, 80.0)
    ),
    "multi_similarity": Variant("declared_large", **OF_PAIRS, quantities=4, loss=MultiSimilarity(2.0, 50.0, 0.5)),
    "decoupled": Variant("declared", **OF_PAIRS, loss=Decoupled()),
    "hard_negatives": Variant("declared_large", target="own", fused=True, quantities=6, loss=HardNegatives(1.0, 0.1)),
    "sampled_softmax": Variant("declared_large", target="own", groups=True, fused=True, loss=SampledSoftmax()),
    "soft_targets": Variant("declared_guided", loss=SoftTargets()),
    "soft_targets symmetric": Variant("declared_guided", columns=True, quantities=4, loss=SymmetricSoftTargets()),
    "gist": Variant("declared_guided", target="own", loss=GistBetween()),
    "gist among": Variant("declared_guided", **OF_PAIRS, loss=GistAmong(True, True, True)),
    "gist among diagonal": Variant(
        "declared_guided", **OF_PAIRS, diagonal=True, first=False, loss=GistAmong(True, True, True)
    ),
    "multi_positive": Variant("declared_large", **OF_PAIRS, fused=True, quantities=4, loss=MultiPositiveClip()),
    "vse": Variant("declared_large", **OF_PAIRS, target="own", fused=True, loss=Vse(0.2)),
}


OUTPUTS = ("outputs", "outputs of three", "outputs normalised")

# -- the launches -------------------------------------------------------------------------------------------------

ROLES = {"margin_contrastive": (0.5, True), "batch_all": (0.5,)}

# Rows and columns: the code depends on whether they are divisible by 16.
EVEN, RAGGED = (2048, 4096), (2047, 4095)


def launch(variant: Variant | None, kernel: str, dtype: torch.dtype, d: int | None = None) -> None:
    """Without ``d``, gradients at 128, the widest that the fused kernels are used for, and all else at 512, but sums by
    TMA beyond the features for which they are in Gluon.

    The launch that the kernel is named for is the first, but that its sums come before what finishes them. Outputs are
    of no variant.
    """
    sizes = RAGGED if kernel.endswith(" ragged") else EVEN
    kernel = kernel.removesuffix(" ragged")
    d = d or (128 if "gradient" in kernel else 768 if kernel in ("sums", "finish") else 512)
    query, key = (torch.empty(size, d, dtype=dtype) for size in sizes)
    if kernel in ("statistics", "merge rows", "merge columns", "add rows"):
        _launch_statistics(variant, kernel, query, key)
    elif kernel.removeprefix("gluon ") in ("begin", "sums", "finish", "combine", "total"):
        _launch_sums(variant, kernel, query, key)
    elif kernel in OUTPUTS:
        _launch_outputs(kernel, query, key)
    elif kernel == "ranges":
        group_ranges(torch.empty(len(query), dtype=torch.int32))
    elif kernel.startswith("gluon"):
        _launch_in_gluon(variant, kernel, query, key)
    else:
        _launch_gradients(variant, kernel, query, key)


def _launch_statistics(variant: Variant, kernel: str, query, key) -> None:
    epilogue, row_table, column_table = variant.functions, torch.empty(variant.quantities, len(query)), None
    if variant.columns and not variant.diagonal:
        column_table = torch.empty(variant.quantities if variant.groups or variant.loss else 2, len(key))
    read = (row_table, row_table if column_table is None else column_table) if epilogue.reads_tables else ()
    inputs = _inputs(variant, query, key, *read)
    if kernel == "statistics":
        update_statistics(epilogue, query, key, inputs, *_points(variant, query, key), row_table, column_table)
    else:
        table = column_table if kernel == "merge columns" else row_table
        merge(epilogue, torch.empty(4, *table.shape), inputs, table)


def _launch_sums(variant: Variant, kernel: str, query, key) -> None:
    """By TMA a tile's mirror image has sums of its own: with groups, of rows alone."""
    epilogue, row_table, column_table = variant.functions, torch.empty(variant.quantities, len(query)), None
    if variant.columns and not variant.diagonal and (not variant.groups or kernel.startswith("gluon")):
        column_table = torch.empty(variant.quantities if variant.groups else 2, len(key))
    inputs = _inputs(variant, query, key, row_table, column_table, torch.int32)
    if kernel == "begin":
        begin_sums(epilogue, query, key, row_table, column_table)
    elif kernel == "combine":
        combine_statistics(epilogue, inputs, torch.empty(len(query), dtype=torch.int64) if variant.groups else 0, True)
    elif kernel == "total":
        combine_losses(epilogue, inputs, True)
    else:
        inputs = _inputs(variant, query, key, group_dtype=torch.int32)
        ranges = _ranges(variant, query, key) if kernel.startswith("gluon") else (None, None)
        key = query if variant.diagonal else key
        update_by_sums(epilogue, query, key, inputs, torch.empty(2, 128), 0, row_table, column_table, ranges)


def _launch_outputs(kernel: str, query, key) -> None:
    normalised = kernel == "outputs normalised"
    sides = [
        Side.of(torch.empty(x.shape), torch.empty_like(x), x, torch.empty(len(x))) if normalised or x is query
        else Side.of(torch.empty(x.shape), torch.empty_like(x))
        for x in (query, key)
    ]  # fmt: skip
    if not normalised:
        sides[0] = sides[0]._replace(inverse_norms=None)
    if kernel == "outputs of three":
        sides.append(sides[1])
    of_scale = None if normalised else torch.empty(())
    finish_gradients(sides, torch.empty(()), (torch.empty(()), torch.empty(())), of_scale, counter=torch.empty(1))


def _launch_gradients(variant: Variant, kernel: str, query, key) -> None:
    epilogue, (rows, columns) = variant.functions, (len(query), len(key))
    row_table = torch.empty(variant.quantities if variant.one_sweep else 5, rows)
    column_table = torch.empty(len(row_table), columns) if variant.columns else None
    group_dtype = torch.int32 if kernel == "weights apart" else torch.int64
    inputs = _inputs(variant, query, key, row_table, column_table, group_dtype)
    if kernel == "reference":
        shared_reference(inputs)
    elif kernel == "shares":
        form_shares(inputs._replace(reference=torch.empty(2)))
    elif kernel in ("weights", "weights apart"):
        folded = row_table if variant.one_sweep else None
        of_columns = column_table if epilogue.folds_columns and not variant.diagonal else None
        out = torch.empty(rows, -(-columns // 16) * 16, dtype=query.dtype)[:, :columns]  # as the engine pads its rows
        diagonal = None
        if kernel == "weights apart":
            diagonal, reference = 0, torch.empty(2) if epilogue.by_reference else None
            inputs = inputs._replace(reference=reference)
        form_weights(epilogue, query, key, inputs, *_points(variant, query, key), out, folded, of_columns, diagonal)
    else:
        transposed = kernel == "gradient transposed"
        own, other = (key, query) if transposed else (query, key)
        accumulate_gradient(epilogue, own, other, inputs, torch.empty(own.shape), transposed=transposed)


def _launch_in_gluon(variant: Variant, kernel: str, query, key) -> None:
    epilogue, (rows, columns) = variant.functions, (len(query), len(key))
    column_table = torch.empty(5, columns) if variant.columns else None
    inputs = _inputs(variant, query, key, torch.empty(5, rows), column_table, torch.int32)
    inputs = inputs._replace(reference=torch.empty(2))
    shares = torch.empty(1, rows), None if column_table is None else torch.empty(1, columns)
    of_tile = inputs, _ranges(variant, query, key), shares, True, 0
    ring = ring_of(kernel.split()[1], epilogue.name, query.dtype, query.shape[1])
    if kernel == "gluon weights":
        out = torch.empty(rows, -(-columns // 16) * 16, dtype=query.dtype)[:, :columns]
        launch_weights(query, key, *of_tile, out, ring)
    else:
        transposed = kernel == "gluon gradient transposed"
        own, other = (key, query) if transposed else (query, key)
        launch_gradient(own, other, *of_tile, torch.empty(own.shape), ring, transposed=transposed)


def _ranges(variant: Variant, query, key) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not variant.groups:
        return None, None
    return tuple(torch.empty(-(-len(x) // STEP), 2, dtype=torch.int32) for x in (query, key))


def _inputs(variant: Variant, query, key, row_table=None, column_table=None, group_dtype=torch.int64) -> TileInputs:
    def ids(given: bool, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.empty(size, dtype=dtype) if given else None

    rows, columns = len(query), len(key)
    return TileInputs.of(
        (rows, columns), torch.empty(()), torch.empty(()) if variant.epilogue == "sigmoid" else 0.0,
        ids(variant.target == "given", rows, torch.int64), ids(variant.groups, rows, group_dtype),
        ids(variant.groups, columns, group_dtype),
        16, variant.diagonal, row_table, column_table, variant.roles,
        own=16 if variant.target == "own" else None, given=variant.given(rows, columns, query.dtype),
    )  # fmt: skip


def _points(variant: Variant, query, key) -> tuple[Points | None, bool]:
    if not variant.distance:
        return None, False
    return Points.of(query, key, torch.empty(len(query)), torch.empty(len(key))), variant.distance == "square"
