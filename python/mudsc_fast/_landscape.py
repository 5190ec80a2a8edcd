"""Loss landscapes: a quantity on a plane through networks.

Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, for planes through three
networks; Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, for planes by principal components.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mudsc_fast._copy import copy_module
from mudsc_fast._files import atomic_write
from mudsc_fast._progress import progress_bar
from mudsc_fast.batch_norm import reset_batch_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Returns the values of a network by name: one per task, usually losses.
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Landscape:
    """Values on a grid in a plane through networks.

    Attributes
    ----------
    horizontal, vertical
        Coordinates of the grid's columns [W] and rows [H], as Euclidean distances in the space of all parameters.
    values
        For each name that `evaluate` returned, the values [H, W].
    positions
        Coordinates of the networks, [num_models, 2].
    distances
        How far each network is from the plane, [num_models]; 0 for planes through three networks.
    """

    horizontal: NDArray[np.float64]
    vertical: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    positions: NDArray[np.float64]
    distances: NDArray[np.float64]

    def plot(self, labels: Sequence[str] | None = None, *, levels: int = 20) -> list[Axes]:
        """Draw the contours of each value, and of their mean if there are several, with the networks marked.

        Parameters
        ----------
        labels
            A name for each network; by default its index.
        levels
            Number of contour levels.

        Returns
        -------
        list of matplotlib.axes.Axes
            The panels of one figure, from left to right.

        Raises
        ------
        ImportError
            If matplotlib is not installed (the extra ``plot``).
        ValueError
            If `labels` does not name every network.
        """
        names = list(labels) if labels is not None else [str(index) for index in range(len(self.positions))]
        if len(names) != len(self.positions):
            raise ValueError(f"labels must name all {len(self.positions)} models, got {len(names)}")
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install matplotlib") from error
        panels = dict(self.values)
        if len(panels) > 1:
            panels["mean"] = np.mean(list(self.values.values()), axis=0)
        figure, grid = pyplot.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False
        )
        for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
            contours = axes.contourf(self.horizontal, self.vertical, values, levels=levels, cmap="viridis")
            axes.scatter(*self.positions.T, color="white", edgecolors="black", zorder=4)
            for name, position, above in zip(names, self.positions, _above_neighbor(self.positions), strict=True):
                axes.annotate(
                    name,
                    position,
                    textcoords="offset points",
                    xytext=(0, 6 if above else -6),
                    ha="center",
                    va="bottom" if above else "top",
                    fontsize=8,
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
                )
            axes.set_title(title)
            axes.set_aspect("equal")
            figure.colorbar(contours, ax=axes)
        return list(grid[0])


def landscape(
    models: Sequence[nn.Module],
    evaluate: Evaluate,
    *,
    steps: int = 15,
    margin: float = 0.25,
    batch_norm_data: Iterable[Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Landscape:
    """Evaluate networks on a grid in the plane through the given ones.

    Three networks span the plane exactly, the first at the origin and the second on the horizontal axis. More networks
    are projected onto the plane of their first two principal components. Networks must be in one order of units to be
    compared: pass merged or permuted networks of one matching.

    Parameters
    ----------
    models
        Three or more networks with equal tensors. Not modified.
    evaluate
        Returns values by name, e.g. the loss of each task.
    steps
        Points along the longer side of the grid.
    margin
        How far the grid extends beyond the networks on each side, as a share of their extent.
    batch_norm_data
        Batches on which the running statistics are recomputed at every point. Required if the networks have BatchNorm:
        statistics of one point are wrong at another. It must be possible to read it repeatedly.
    cache
        A ``.npz`` file that keeps the values found so far. A call with the same networks and grid continues from it.
    progress
        Whether to show a progress bar; by default only in a terminal.

    Raises
    ------
    ValueError
        If there are fewer than three networks, they differ in tensors or shapes, lie on a line, have BatchNorm but no
        `batch_norm_data` is given, or `cache` belongs to other networks or another grid.
    """
    if len(models) < 3:
        raise ValueError(f"models must hold at least three networks to span a plane, got {len(models)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if batch_norm_data is None and _has_batch_norm(models[0]):
        raise ValueError("batch_norm_data must be given for networks with BatchNorm, got None")
    vectors = _parameter_vectors(models)
    origin, directions = _plane(vectors)
    offsets = [vector.double() - origin for vector in vectors]
    positions = np.array([[float(offset @ direction) for direction in directions] for offset in offsets])
    distances = np.array(
        [
            float((offset - position[0] * directions[0] - position[1] * directions[1]).norm())
            for offset, position in zip(offsets, positions, strict=True)
        ]
    )
    horizontal, vertical = _grid(positions, steps, margin)
    digest = hashlib.sha256(b"".join(axis.tobytes() for axis in (horizontal, vertical, positions))).hexdigest()
    found = _read_cache(cache, digest)
    point = copy_module(models[0])
    total = len(horizontal) * len(vertical)
    with progress_bar(description="landscape", progress=progress, total=total) as bar:
        for row, y in enumerate(vertical):
            for column, x in enumerate(horizontal):
                if (row, column) not in found:
                    _set_parameters(point, (origin + x * directions[0] + y * directions[1]).to(vectors[0].dtype))
                    if batch_norm_data is not None:
                        reset_batch_norm(point, batch_norm_data, progress=False)
                    found[row, column] = {name: float(value) for name, value in evaluate(point).items()}
                bar.update()
            _write_cache(cache, digest, found)
    rows, columns = range(len(vertical)), range(len(horizontal))
    values = {
        name: np.array([[found[row, column][name] for column in columns] for row in rows]) for name in found[0, 0]
    }
    return Landscape(horizontal, vertical, values, positions, distances)


def _above_neighbor(positions: NDArray[np.float64]) -> list[bool]:
    """Return for each point whether it lies above the nearest other one, so that names do not cover each other."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return [bool(y >= positions[near, 1]) for y, near in zip(positions[:, 1], distances.argmin(1), strict=True)]


def _has_batch_norm(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats for module in model.modules()
    )


def _parameter_vectors(models: Sequence[nn.Module]) -> list[Tensor]:
    shapes = [{name: tuple(value.shape) for name, value in model.named_parameters()} for model in models]
    for index, other in enumerate(shapes[1:], start=1):
        if other != shapes[0]:
            different = sorted(set(shapes[0].items()) ^ set(other.items()))[0][0]
            raise ValueError(f"models[{index}] must have the parameters of models[0], but {different!r} differs")
    return [torch.cat([value.detach().flatten().cpu().float() for value in model.parameters()]) for model in models]


def _plane(vectors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a point of the plane and two orthonormal directions, all in float64."""
    origin = vectors[0].double()
    if len(vectors) == 3:
        spanning = [vectors[1].double() - origin, vectors[2].double() - origin]
    else:
        origin = torch.stack(list(vectors)).double().mean(0)
        centered = torch.stack([vector.double() - origin for vector in vectors])
        # Principal components by the small Gram matrix: there are few networks and many parameters.
        _, eigenvectors = torch.linalg.eigh(centered @ centered.T)
        spanning = [eigenvectors[:, -1] @ centered, eigenvectors[:, -2] @ centered]
    first = spanning[0] / spanning[0].norm()
    second = spanning[1] - (spanning[1] @ first) * first
    if not bool(second.norm() > 1e-6 * spanning[0].norm()):
        raise ValueError("models must span a plane, but all of them lie on one line")
    return origin, [first, second / second.norm()]


def _grid(positions: NDArray[np.float64], steps: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coordinates of columns and rows, equally spaced in both directions."""
    low, high = positions.min(0), positions.max(0)
    reach = margin * (high - low).max()
    low, high = low - reach, high + reach
    spacing = (high - low).max() / (steps - 1)
    columns, rows = (max(2, round((high[axis] - low[axis]) / spacing) + 1) for axis in (0, 1))
    return low[0] + spacing * np.arange(columns), low[1] + spacing * np.arange(rows)


def _set_parameters(model: nn.Module, vector: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(vector[start : start + value.numel()].view_as(value))
            start += value.numel()


_Points = dict[tuple[int, int], dict[str, float]]


def _read_cache(path: str | os.PathLike[str] | None, digest: str) -> _Points:
    if path is None or not Path(path).exists():
        return {}
    with np.load(path) as file:
        if str(file["digest"]) != digest:
            raise ValueError(f"cache {os.fspath(path)!r} belongs to other networks or another grid: remove it")
        return {
            (int(row), int(column)): dict(zip(file["names"].tolist(), values.tolist(), strict=True))
            for (row, column), values in zip(file["points"], file["values"], strict=True)
        }


def _write_cache(path: str | os.PathLike[str] | None, digest: str, found: _Points) -> None:
    if path is None:
        return
    names = list(next(iter(found.values())))
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            digest=digest,
            names=names,
            points=list(found),
            values=[[values[name] for name in names] for values in found.values()],
        )
