"""The model card of a merged network: ``README.md`` with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mudsc_fast
from mudsc_fast.checkpoints.checkpoint import read_json
from mudsc_fast.checkpoints.networks import PathLike
from mudsc_fast.io.result import WriteResult
from mudsc_fast.matching.node import Mode

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

_METHOD = {
    "align": "the units of each network were permuted to match those of the first, and the weights were averaged",
    "zip": "the units of all networks were clustered by similarity, and the weights of each cluster were averaged",
}


def write_model_card(
    directory: Path,
    result: WriteResult,
    inputs: Sequence[PathLike],
    weights: Sequence[float],
    mode: Mode,
    command: str | None,
) -> None:
    """Write ``README.md`` into the directory of a merged network.

    Parameters
    ----------
    directory
        The directory, with its ``config.json`` if it has one.
    result
        The result of the merge.
    inputs, weights, mode
        The networks, their shares in the result, and how units were matched.
    command
        The command line, or None if the merge was called from Python.
    """
    names = [model_name(Path(path)) for path in inputs]
    metadata = ["base_model:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(names))]
    library = _library(directory)
    if library:
        metadata.append(f"library_name: {library}")
    metadata += ["tags:", "- merge", "- mudsc-fast"]
    before, after = result.mean_similarities()
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# Merge of {' and '.join(dict.fromkeys(names))}",
        "",
        f"This network was merged without training by mudsc_fast {mudsc_fast.__version__}: {_METHOD[mode]}.",
        "",
        "| network | share |",
        "| --- | --- |",
        *(f"| {name} | {weight:.4g} |" for name, weight in zip(names, weights, strict=True)),
        "",
    ]
    if command is not None:
        lines += ["The command:", "", "```sh", command, "```", ""]
    if result.task_tensors:
        lines += ["These tensors were not merged: " + ", ".join(f"`{name}`" for name in result.task_tensors) + ".", ""]
    if result.unmatched_tensors:
        listed = ", ".join(f"`{name}`" for name in result.unmatched_tensors)
        lines += [f"These tensors were averaged in their own order: {listed}.", ""]
    lines += [
        "## Similarity of the matched units",
        "",
        f"The mean similarity over all nodes is {before:.4f} before matching and {after:.4f} after it. The gap is an "
        "upper bound on how far the similarity of a node's assignment may be below the optimum. Clusters have no gap.",
        "",
        "| node | units | before | after | gap |",
        "| --- | --- | --- | --- | --- |",
    ]
    for node, match in result.matching.items():
        name = node.replace("|", "\\|")
        gap = "" if match.gap is None else f"{match.gap:.1e}"
        lines.append(
            f"| {name} | {match.num_clusters} | {match.similarity_before:.4f} | {match.similarity:.4f} | {gap} |"
        )
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def model_name(path: Path) -> str:
    """Return the name of a network: its name on the hub if the path or configuration has it, else its file name."""
    for part in reversed(path.absolute().parts):
        cached = _CACHED.fullmatch(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    if (path / "config.json").is_file():
        name = read_json(path / "config.json").get("_name_or_path")
        if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
            return name
    return path.absolute().name


def _library(directory: Path) -> str | None:
    if (directory / "modules.json").exists():
        return "sentence-transformers"
    config: Mapping[str, Any] = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    keys = {"model_type": "transformers", "_diffusers_version": "diffusers", "architecture": "timm"}
    return next((library for key, library in keys.items() if key in config), None)
