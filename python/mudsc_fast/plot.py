"""Pictures of a merge, drawn with matplotlib (the extra ``demo``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mudsc_fast._files import atomic_write


def plot_merges(
    path: str | os.PathLike[str],
    accuracies: Mapping[str, float],
    reference_accuracy: float,
    similarities: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Save one picture: accuracy by method, and the similarity of paired units before and after matching.

    Parameters
    ----------
    path
        Where the picture goes; its suffix names the format. An existing file is replaced once the new one is whole.
    accuracies
        For each method the mean accuracy over the tasks, in [0, 1].
    reference_accuracy
        Mean accuracy of the networks that were merged, each on its own task.
    similarities
        For each node the similarities [units] of equally numbered units, and of matched units.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])

    methods = list(accuracies)
    values = [100 * accuracies[method] for method in methods]
    colors = ["#9aa0a6" if m == "average" else "#1a73e8" if "dual" in m else "#669df6" for m in methods]
    bars = left.barh(methods, values, color=colors)
    left.bar_label(bars, fmt="%.1f", padding=-30, color="white", fontweight="bold")
    left.axvline(100 * reference_accuracy, color="#202124", linestyle="--", linewidth=1)
    left.annotate(
        f"unmerged networks {100 * reference_accuracy:.1f}",
        (100 * reference_accuracy, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    left.invert_yaxis()
    left.set_xlim(min(50, *values), 101)
    left.set_xlabel("mean accuracy of the two tasks on held-out images, %")

    shades = {"before": "#9aa0a6", "after": "#1a73e8"}
    for index, (node, pair) in enumerate(similarities.items()):
        for offset, (label, sample) in zip((-0.18, 0.18), zip(shades, pair, strict=True), strict=True):
            parts = right.violinplot([sample.numpy()], [index + offset], widths=0.34, showmeans=True)
            for part in (*parts["bodies"], parts["cmeans"], parts["cmins"], parts["cmaxes"], parts["cbars"]):
                part.set_color(shades[label])
        right.annotate(
            node,
            (index, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
        )
    right.set_xticks([])
    right.set_ylabel("correlation of paired units")
    right.legend(
        handles=[right.scatter([], [], color=color, label=f"{label} matching") for label, color in shades.items()],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)

    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format=Path(path).suffix.removeprefix(".") or "png")
