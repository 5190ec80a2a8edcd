"""The other assignment solvers that are installed, with one signature: from costs to columns.

The distributions lap and lapx share the module name `lap`. The one that was installed last is measured, under its own
name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Read when the libraries are loaded, which happens in `installed`.
for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

Cost = NDArray[np.float32]
Columns = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Peer:
    """A solver: `solve` takes an [n, n] cost to minimize and returns the [n] columns of its rows."""

    name: str
    version: str
    solve: Callable[[Cost], Columns]


@dataclass(frozen=True)
class BatchPeer:
    """A solver of batches: `solve` takes [batch, n, n] costs and a number of threads, returns [batch, n] columns."""

    name: str
    version: str
    solve: Callable[[Cost, int], Columns]


def _by_mapping(function: Callable[..., Any], **options: Any) -> Callable[[Cost], Columns]:
    """Wrap a function whose result begins with the column of each row."""
    return lambda cost: function(cost, **options)[0]


def _by_indices(function: Callable[..., Any], **options: Any) -> Callable[[Cost], Columns]:
    """Wrap a function that returns row indices and, aligned with them, column indices."""

    def solve(cost: Cost) -> Columns:
        rows, columns = function(cost, **options)
        by_row: Columns = np.empty_like(columns)
        by_row[rows] = columns
        return by_row

    return solve


def _by_batch(function: Callable[..., Any]) -> Callable[[Cost, int], Columns]:
    """Wrap a function that returns lists of ascending row indices and of column indices."""
    return lambda costs, threads: np.stack(function(costs, return_cost=False, n_threads=threads)[1])


def _solvers() -> dict[str, dict[str, Callable[[Any], Callable[[Cost], Columns]]]]:
    """Return, by module and name of its function, how the function is wrapped."""
    return {
        "scipy.optimize": {"linear_sum_assignment": _by_indices},
        "lap": {
            "lapjv": lambda function: _by_mapping(function, return_cost=False),
            "lapjvs": lambda function: _by_mapping(function, return_cost=False, jvx_like=False),
            "lapjvh": lambda function: _by_indices(function, return_cost=False),
            "lapjvr": lambda function: _by_indices(function, return_cost=False),
        },
        "lapjv": {"lapjv": _by_mapping},
        "fastlap": {"lapjv": lambda function: _by_mapping(function, return_cost=False)},
        "lapcpp": {"lapjv": lambda function: _by_indices(function, return_cost=False)},
        "laprust": {"lapjv": lambda function: _by_indices(function, return_cost=False)},
        "lapsolver": {"solve_dense": _by_indices},
        "torch_linear_assignment": {
            "batch_linear_assignment": lambda function: lambda cost: function(torch.from_numpy(cost)[None])[0].numpy()
        },
    }


def _batch_solvers() -> dict[str, dict[str, Callable[[Any], Callable[[Cost, int], Columns]]]]:
    return {
        "lap": {"lapjvr_batch": _by_batch, "lapjvs_batch": _by_batch},
        "fastlap": {"lapjvx_batch": _by_batch},
        "lapcpp": {"lapjv_batch": _by_batch},
        "laprust": {"lapjv_batch": _by_batch},
        "torch_linear_assignment": {
            "batch_linear_assignment": lambda function: lambda costs, _: function(torch.from_numpy(costs)).numpy()
        },
    }


def _distribution(module: ModuleType, distributions: Mapping[str, list[str]]) -> tuple[str, str]:
    """Return name and version of the distribution of a module: of several, the one whose version the module bears."""
    package = module.__name__.partition(".")[0]
    versions = {name: metadata.version(name) for name in distributions.get(package, [])}
    own_version = getattr(module, "__version__", None)
    if not versions:  # built from source beside the installed packages
        return package, own_version or "unknown version"
    return next((item for item in versions.items() if item[1] == own_version), next(iter(versions.items())))


def _found(solvers: dict[str, dict[str, Callable[[Any], Any]]]) -> list[tuple[str, str, Any]]:
    """Return name, version and solver of what can be imported."""
    distributions = metadata.packages_distributions()
    found = []
    for module_name, functions in solvers.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        distribution, version = _distribution(module, distributions)
        for function, wrap in functions.items():
            if hasattr(module, function):
                name = distribution if len(functions) == 1 else f"{distribution}.{function}"
                found.append((name, version, wrap(getattr(module, function))))
    return found


def installed() -> list[Peer]:
    """Return the solvers that can be imported; scipy's is the first."""
    return [Peer(*peer) for peer in _found(_solvers())]


def installed_for_batches() -> list[BatchPeer]:
    """Return the solvers of batches that can be imported."""
    return [BatchPeer(*peer) for peer in _found(_batch_solvers())]
