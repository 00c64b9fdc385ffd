"""The figures of the examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from digits import NUM_CLASSES
from evaluate import verification_curve
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from sklearn.manifold import TSNE

if TYPE_CHECKING:
    from evaluate import Features
    from scaling import Figure
    from zero_shot import Evaluation

FUSED_COLOR, EAGER_COLOR, WRONG_COLOR = "#0b6e8a", "#d1731f", "#c8283c"
DIGIT_COLORS = plt.get_cmap("tab10")
COLORS = {"eager": EAGER_COLOR, "fused": FUSED_COLOR}
ROC_STYLES = {
    "trained": {"color": FUSED_COLOR},
    "untrained": {"color": EAGER_COLOR, "linestyle": "--"},
    "raw pixels": {"color": "0.45", "linestyle": ":"},
}
RETRIEVED_IMAGES = 8

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
)


def save_digits(
    evaluation: Evaluation, loss_name: str, losses: list[float], path: Path, floor: float | None = None
) -> None:
    """Loss curve, similarities, and the images that captions retrieve."""
    figure = plt.figure(figsize=(15, 7.2), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "retrieval"], ["similarity", "retrieval"]], width_ratios=(1, 0.92), height_ratios=(1, 1.4)
    )
    draw_loss(axes["loss"], loss_name, losses)
    if floor is not None:
        draw_floor(axes["loss"], floor, max(losses))
    draw_similarity(axes["similarity"], evaluation)
    draw_retrieval(axes["retrieval"], evaluation)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_loss(axes: Axes, name: str, losses: list[float]) -> None:
    """Loss of every step."""
    axes.plot(losses, color=FUSED_COLOR, linewidth=2)
    axes.set(title="Training loss", xlabel="step", ylabel=name, xlim=(0, len(losses)))


def draw_floor(axes: Axes, floor: float, top: float) -> None:
    """The loss that knowing only the digit allows."""
    axes.axhline(floor, color="0.45", linestyle="--", linewidth=1)
    axes.annotate(
        "floor: captions tell digits apart, not images of one digit",
        (1, floor),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.35",
        fontsize=9,
    )
    axes.set_ylim(bottom=floor - 0.12 * (top - floor))


def draw_similarity(axes: Axes, evaluation: Evaluation) -> None:
    """Cosine of every held-out image (columns, by class) with every unseen caption (rows)."""
    order = evaluation.gallery_labels.argsort(stable=True)
    similarity = evaluation.gallery_similarity[:, order].T.numpy()
    picture = axes.imshow(similarity, aspect="auto", cmap="viridis", interpolation="nearest")
    per_digit = len(evaluation.gallery) // NUM_CLASSES
    counts = evaluation.labels.bincount().numpy()
    starts = counts.cumsum() - counts
    axes.set_xticks(starts + counts / 2 - 0.5, range(NUM_CLASSES))
    axes.set_yticks([(digit + 0.5) * per_digit - 0.5 for digit in range(NUM_CLASSES)], range(NUM_CLASSES))
    axes.tick_params(length=0)
    for digit in range(1, NUM_CLASSES):
        axes.axvline(starts[digit] - 0.5, color="white", linewidth=0.5)
        axes.axhline(digit * per_digit - 0.5, color="white", linewidth=0.5)
    axes.spines[:].set_visible(False)
    axes.set(
        title="Cosine of held-out images and unseen captions",
        xlabel="images, by the digit they show",
        ylabel=f"captions, by digit ({per_digit} each)",
    )
    bar = axes.figure.colorbar(picture, ax=axes, pad=0.02)
    bar.outline.set_visible(False)


def draw_retrieval(axes: Axes, evaluation: Evaluation) -> None:
    """One unseen caption per digit and its nearest images, best first; a wrong digit gets a red frame."""
    per_digit = len(evaluation.gallery) // NUM_CLASSES
    digits = range(NUM_CLASSES)
    # An odd step through the captions of a digit takes its name and its symbol by turns.
    shown = [(3 * digit % per_digit) * NUM_CLASSES + digit for digit in digits]
    for digit, column in enumerate(shown):
        nearest = evaluation.gallery_similarity[:, column].topk(RETRIEVED_IMAGES).indices
        for rank, index in enumerate(nearest.tolist()):
            extent = (rank - 0.42, rank + 0.42, digit + 0.42, digit - 0.42)
            axes.imshow(evaluation.images[index, 0].numpy(), cmap="gray_r", extent=extent)
            if evaluation.labels[index] != digit:
                corner = (rank - 0.45, digit - 0.45)
                axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=WRONG_COLOR, linewidth=2))
    axes.set(xlim=(-0.6, RETRIEVED_IMAGES - 0.4), ylim=(NUM_CLASSES - 0.4, -0.6), xticks=[])
    axes.set_yticks(digits, [evaluation.gallery[column] for column in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Held-out images nearest to unseen captions")


def save_training(loss_name: str, losses: list[float], before: Features, after: Features, path: Path) -> None:
    """Loss curve, and t-SNE maps of the same images' features before and after training."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=(0.8, 1, 1))
    draw_loss(axes[0], loss_name, losses)
    draw_map(axes[1], before, "Untrained features, t-SNE")
    draw_map(axes[2], after, "Trained features, t-SNE")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_verification(loss_name: str, losses: list[list[float]], folds: list[dict[str, Features]], path: Path) -> None:
    """Loss curves of the folds, the mean ROC of every encoder, and maps of the last fold's raw pixels and features."""
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.6), layout="constrained", width_ratios=(0.8, 0.9, 1, 1))
    for fold_losses in sorted(losses, key=len):  # the longest sets the limits
        draw_loss(axes[0], loss_name, fold_losses)
    draw_roc(axes[1], folds)
    draw_map(axes[2], folds[-1]["raw pixels"], "Digits never seen: raw pixels, t-SNE")
    draw_map(axes[3], folds[-1]["trained"], "Digits never seen: trained features, t-SNE")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_roc(axes: Axes, folds: list[dict[str, Features]]) -> None:
    """True over false acceptances when a pair is accepted above a cosine: a mean over the folds, and chance."""
    false_rates = np.linspace(0, 1, 201)
    for name, style in ROC_STYLES.items():
        curves = [verification_curve(features[name]) for features in folds]
        true_rates = np.mean([np.interp(false_rates, curve.far, curve.tar) for curve in curves], axis=0)
        axes.plot(false_rates, true_rates, label=name, linewidth=2, **style)
    axes.plot([0, 1], [0, 1], label="chance", color="0.7", linewidth=1)
    axes.legend(frameon=False, loc="lower right")
    labels = {"xlabel": "pairs of two digits accepted", "ylabel": "pairs of one digit accepted"}
    axes.set(title="Verification of digits never seen", xlim=(0, 1), ylim=(0, 1), **labels)


def draw_map(axes: Axes, features: Features, title: str) -> None:
    """Every image as its digit, where t-SNE puts its features."""
    points = TSNE(metric="cosine", max_iter=500, random_state=0).fit_transform(features.vectors)
    for digit in np.unique(features.labels):
        x, y = points[features.labels == digit].T
        axes.scatter(x, y, s=36, marker=f"${digit}$", color=DIGIT_COLORS(digit), linewidth=0.2)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save_scaling(figures: list[Figure], path: Path) -> None:
    """Time and peak memory of a step over the batch size, estimates hollow and dashed."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_cost(time_axes, figures, lambda item: item.seconds)
    draw_cost(memory_axes, figures, lambda item: item.peak_bytes / 1e6)
    time_axes.set(title="Time of a CLIP step, forward + backward", ylabel="seconds")
    memory_axes.set(title="Peak memory the step adds", ylabel="MB")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_cost(axes: Axes, figures: list[Figure], cost: Callable[[Figure], float]) -> None:
    """One log-log line per implementation."""
    for implementation, color in COLORS.items():
        points = [item for item in figures if item.implementation == implementation]
        measured = [item for item in points if not item.estimated]
        estimated = [item for item in points if item.estimated]
        lines = {implementation: (measured, {})}
        if estimated:
            hollow = {"linestyle": "--", "markerfacecolor": "white", "zorder": 1}
            lines[f"{implementation}, estimated"] = ([measured[-1], *estimated], hollow)
        for label, (items, style) in lines.items():
            sizes, costs = [item.n for item in items], [cost(item) for item in items]
            axes.plot(sizes, costs, label=label, color=color, marker="o", linewidth=2, **style)
    axes.legend(frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="pairs in the batch, N")
    axes.set_xticks(sorted({item.n for item in figures}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", color="0.9")
