"""Plots of matchings, merges and loss landscapes, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mudsc_fast._landscape import Evaluate, Landscape, landscape
from mudsc_fast.matching.node import NodeMatching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Evaluate",
    "Landscape",
    "interpolation_curves",
    "landscape",
    "new_axes",
    "plot_accuracies",
    "plot_curves",
    "plot_similarities",
]

_GRAY, _BLUE, _BLACK = "#9aa0a6", "#1a73e8", "#202124"
_COLORS = (_BLUE, "#e8710a", "#188038", "#9334e6")
#: With more nodes, their names are rotated.
_MAX_LEVEL_NAMES = 6


def new_axes() -> Axes:
    """Return the Axes of a new figure.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(layout="constrained")[1]


def plot_similarities(nodes: Mapping[str, NodeMatching], axes: Axes | None = None) -> Axes:
    """Draw for each node the mean similarity of paired units, before and after matching.

    Parameters
    ----------
    nodes
        The matching of each node.
    axes
        Where to draw; by default in a new figure.
    """
    axes = new_axes() if axes is None else axes
    places = range(len(nodes))
    before = [matched.similarity_before for matched in nodes.values()]
    after = [matched.similarity for matched in nodes.values()]
    axes.bar([place - 0.2 for place in places], before, 0.4, color=_GRAY, label="before matching")
    axes.bar([place + 0.2 for place in places], after, 0.4, color=_BLUE, label="after matching")
    axes.set_xticks(list(places), list(nodes), rotation=0 if len(nodes) <= _MAX_LEVEL_NAMES else 90)
    axes.axhline(0, color=_BLACK, linewidth=0.8)
    axes.set_ylabel("mean similarity of paired units")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_curves(shares: Sequence[float], curves: Mapping[str, Sequence[float]], axes: Axes | None = None) -> Axes:
    """Draw values along the line between two models.

    Parameters
    ----------
    shares
        The share of the second model at each point, from 0 to 1.
    curves
        For each name the values. Names that begin with ``"unmatched"`` are drawn dashed in gray.
    axes
        Where to draw; by default in a new figure.
    """
    axes = new_axes() if axes is None else axes
    colors = iter(_COLORS * len(curves))
    for name, values in curves.items():
        style: dict[str, Any] = {"color": _GRAY, "linestyle": "--"} if name.startswith("unmatched") else {}
        axes.plot(shares, values, label=name, marker=".", **{"color": style.get("color") or next(colors), **style})
    axes.set_xlabel("share of the second model")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_accuracies(
    accuracies: Mapping[str, float], reference_accuracy: float, axes: Axes | None = None, *, highlight: str = "dual"
) -> Axes:
    """Draw the accuracy of merged networks by method.

    Parameters
    ----------
    accuracies
        For each method the mean accuracy over the tasks, in [0, 1].
    reference_accuracy
        Mean accuracy of the networks that were merged, each on its own task.
    axes
        Where to draw; by default in a new figure.
    highlight
        Methods whose names contain this text are highlighted.
    """
    axes = new_axes() if axes is None else axes
    methods = list(accuracies)
    values = [100 * accuracies[method] for method in methods]
    colors = [_GRAY if m == "average" else _BLUE if highlight in m else "#669df6" for m in methods]
    bars = axes.barh(methods, values, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=-30, color="white", fontweight="bold")
    axes.axvline(100 * reference_accuracy, color=_BLACK, linestyle="--", linewidth=1)
    axes.annotate(
        f"unmerged networks {100 * reference_accuracy:.1f}",
        (100 * reference_accuracy, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    axes.invert_yaxis()
    axes.set_xlim(min(50, *values), 101)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def interpolation_curves(
    evaluate: Callable[[Any], float | Mapping[str, float]], models: Iterable[Any], prefix: str = ""
) -> dict[str, list[float]]:
    """Return the values of models by name, one curve for each name that `evaluate` returns."""
    curves: dict[str, list[float]] = {}
    for model in models:
        values = evaluate(model)
        by_name = values if isinstance(values, Mapping) else {"": values}
        for name, value in by_name.items():
            curves.setdefault(" ".join(filter(None, (prefix, name))), []).append(float(value))
    return curves
