"""Matchings in files: clusters are tensors of a .safetensors file, everything else is JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write
from mudsc_fast.matching.node import Mode, NodeMatching
from mudsc_fast.spec.permutation_spec import PermutationSpec

PathLike = str | os.PathLike[str]

#: The fields of a matching that are written as JSON, besides its spec and its nodes.
FIELDS = ("mode", "space", "balance", "weights", "objectives", "timings", "shapes", "task_heads", "fingerprints")

_FORMAT = "mudsc_fast matching 1"


def save(path: PathLike, spec: PermutationSpec, nodes: Mapping[str, NodeMatching], fields: Mapping[str, Any]) -> None:
    """Write a matching to a file; a file that cannot be written completely is left as it was.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If its name does not end in ``.safetensors``.
    """
    from safetensors.torch import save_file  # imported only if files are used

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, the format of the file, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{path}: the directory {str(path.absolute().parent)!r} does not exist: create it first"
        )
    figures = {
        node: {
            "num_clusters": matched.num_clusters,
            "similarity_before": matched.similarity_before,
            "similarity": matched.similarity,
            "gap": matched.gap,
        }
        for node, matched in nodes.items()
    }
    metadata = {
        "format": _FORMAT,
        "spec": spec.to_json(),
        "nodes": json.dumps(figures),
        **{name: json.dumps(fields[name]) for name in FIELDS},
    }
    tensors = {node: matched.cluster_of_unit.cpu().contiguous() for node, matched in nodes.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: PathLike, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a :class:`mudsc_fast.Matching` that a file holds.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it holds no matching, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with Path(path).open("rb"):
        pass  # raise OSError for an unreadable file, whatever safetensors raises
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
        return _parsed(metadata, tensors)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{os.fspath(path)} must be a file of Matching.save: {reason}") from error


def _parsed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    fields = {name: json.loads(metadata[name]) for name in FIELDS}
    mode = fields["mode"]
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    weights = tuple(float(weight) for weight in fields["weights"])
    spec = PermutationSpec.from_json(metadata["spec"])
    nodes = {}
    for node, figures in json.loads(metadata["nodes"]).items():
        if node not in spec.nodes:
            raise ValueError(f"the spec has no node {node!r}")
        _check_clusters(node, tensors[node], mode, len(weights), int(figures["num_clusters"]))
        nodes[node] = NodeMatching(
            mode=mode,
            cluster_of_unit=tensors[node],
            num_clusters=int(figures["num_clusters"]),
            similarity_before=float(figures["similarity_before"]),
            similarity=float(figures["similarity"]),
            gap=figures["gap"],
        )
    return {
        **fields,
        "spec": spec,
        "nodes": nodes,
        "weights": weights,
        "shapes": {name: tuple(map(int, shape)) for name, shape in fields["shapes"].items()},
        "task_heads": tuple(fields["task_heads"]),
        "fingerprints": tuple(map(int, fields["fingerprints"])),
    }


def _check_clusters(node: str, clusters: Tensor, mode: Mode, num_models: int, num_clusters: int) -> None:
    if clusters.dtype != torch.int64 or clusters.ndim != 2 or len(clusters) != num_models:
        raise ValueError(
            f"the clusters of node {node!r} must be [{num_models}, units] int64, got {list(clusters.shape)} "
            f"{clusters.dtype}"
        )
    if clusters.numel() and not (int(clusters.min()) >= 0 and int(clusters.max()) < num_clusters):
        raise ValueError(f"the clusters of node {node!r} must be numbered from 0 to {num_clusters - 1}")
    if mode == "align":
        order = torch.arange(num_clusters, device=clusters.device)
        if clusters.shape[1] != num_clusters or not torch.equal(clusters.sort(1).values, order.expand_as(clusters)):
            raise ValueError(f"the units of node {node!r} must be permuted, one unit of every model in each place")
