"""Check whether networks in files can be merged, and find the tensors that each network keeps for itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mudsc_fast._labels import label_problem
from mudsc_fast._similar_names import similar_names
from mudsc_fast.checkpoints.checkpoint import Checkpoint, read_json
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.names import is_derived, matches
from mudsc_fast.spec.permutation_spec import PermutationSpec

_MAX_LISTED = 20

#: Embedding tables. Their rows belong to the tokens of one tokenizer.
TABLES = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|shared|tok_embeddings|embed_in)\.weight$")

#: Value of `task_heads` with which the layers that differ are found automatically.
AUTO = "auto"


def check_configs(checkpoints: Sequence[Checkpoint], *, task_heads: Sequence[str]) -> None:
    """Raise a CheckpointError if configurations name different model types or, without `task_heads`, classes."""
    first = checkpoints[0]
    keys = ("model_type",) if task_heads else ("model_type", "architectures")
    for other in checkpoints[1:]:
        for key in keys:
            ours, theirs = (checkpoint.config.get(key) if checkpoint.config else None for checkpoint in (first, other))
            if ours is not None and theirs is not None and ours != theirs:
                hint = "; to merge only the common layers, add task_heads='auto'" if key == "architectures" else ""
                raise CheckpointError(
                    f"{first.path} and {other.path} are incompatible: {key} is {ours!r} in one config.json and "
                    f"{theirs!r} in the other{hint}"
                )


def check_versions(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise a CheckpointError if a module was saved in different versions of its format.

    Such tensors have different meanings. The versions of BatchNorm are ignored: they differ only in a counter.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for module, ours in first.versions.items():
            theirs = other.versions.get(module)
            if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
                continue
            is_norm = f"{module}.running_mean" in first.tensors
            if ours.get("version") != theirs.get("version") and not is_norm:
                raise CheckpointError(
                    f"{first.path} and {other.path} are incompatible: the module {module!r} was saved in version "
                    f"{ours.get('version')} of its format in one and {theirs.get('version')} in the other: load the "
                    "older file into the model and save it again"
                )


def kept_tensors(
    checkpoints: Sequence[Checkpoint], *, ignore: Sequence[str], task_heads: Sequence[str], check_shapes: bool = True
) -> frozenset[str]:
    """Return the names of the tensors that are not merged. Each network keeps its own, if it has one.

    These are:

    - the tensors that `ignore` and `task_heads` name;
    - tensors that modules compute for themselves, if only some networks have them;
    - with ``"auto"`` among `task_heads`, all tensors of layers in which a tensor is missing in some networks or differs
      in shape.

    Raises
    ------
    CheckpointError
        If any other tensor is missing in some network or differs in dtype or (with `check_shapes`) in shape, or if a
        pattern matches nothing.
    """
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors))
    kept = set()
    for argument, patterns in (("ignore", ignore), ("task_heads", task_heads)):
        for pattern in patterns:
            found = {name for name in names if matches(name, pattern)}
            if not found and pattern != AUTO:
                raise CheckpointError(
                    f"{argument}={pattern!r} matches no tensor of the networks; {similar_names(pattern, names)}"
                )
            kept |= found
    uncommon = [name for name in names if any(name not in checkpoint.tensors for checkpoint in checkpoints)]
    kept |= {name for name in uncommon if is_derived(name)}
    if AUTO in task_heads:
        differing = {name for name in names if name not in kept and _differs(name, checkpoints)}
        layers = {name.rpartition(".")[0] for name in differing}
        kept |= {name for name in names if name.rpartition(".")[0] in layers}
    for other in checkpoints[1:]:
        _check_tensors(checkpoints[0], other, kept, check_shapes)
    return frozenset(kept)


def check_integers(checkpoints: Sequence[Checkpoint], kept: frozenset[str], spec: PermutationSpec) -> None:
    """Raise a CheckpointError for integer tensors that would be wrong in the result, such as quantized weights.

    The result has the integer tensors of the first network. This is right for tables and masks that are equal in all.
    """
    first = checkpoints[0]
    for name in first.tensors:
        if name in kept or is_derived(name):
            continue
        tensor = first.tensors[name]
        if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim == 0:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name in spec.layouts:
            raise CheckpointError(
                f"{first.path}: {name!r} has dtype {dtype}, which cannot be averaged: dequantize the network first"
            )
        for other in checkpoints[1:]:
            if not _equal(tensor, other.tensors[name]):
                raise CheckpointError(
                    f"{name!r} differs in {first.path} and {other.path}, and its dtype {dtype} cannot be averaged: "
                    f"dequantize the networks first if these are weights, or add ignore={name!r} to keep the tensor of "
                    f"{first.path}"
                )


def check_tokenizers(checkpoints: Sequence[Checkpoint], kept: frozenset[str]) -> None:
    """Raise a CheckpointError if embedding tables are merged and some token id has different texts."""
    tables = [name for name in checkpoints[0].tensors if TABLES.search(name)]
    if tables and all(name in kept for name in tables):
        return
    first = checkpoints[0]
    ours = _texts_of_tokens(first.path)
    for other in checkpoints[1:]:
        theirs = _texts_of_tokens(other.path) if ours else {}
        for number, text in ours.items():
            if theirs.get(number, text) != text:
                raise CheckpointError(
                    f"{first.path} and {other.path} are incompatible: their tokenizers differ: token {number} is "
                    f"{text!r} in one and {theirs[number]!r} in the other; to keep the embedding table of each, "
                    f"name it and the output layer: task_heads={','.join(tables) or 'NAMES'!r}"
                )


def check_labels(checkpoints: Sequence[Checkpoint], kept: frozenset[str], spec: PermutationSpec) -> None:
    """Raise a CheckpointError if classifiers that would be averaged have different labels."""
    problem = label_problem(
        [checkpoint.path for checkpoint in checkpoints],
        [checkpoint.config for checkpoint in checkpoints],
        checkpoints[0].tensors,
        kept,
        spec,
    )
    if problem is not None:
        raise CheckpointError(problem)


def _differs(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    if any(name not in checkpoint.tensors for checkpoint in checkpoints):
        return True
    return len({checkpoint.tensors[name].shape for checkpoint in checkpoints}) > 1


def _check_tensors(first: Checkpoint, other: Checkpoint, kept: set[str], check_shapes: bool) -> None:
    missing = [
        f"{name!r} is not in {other.path}" for name in first.tensors if name not in other.tensors and name not in kept
    ]
    missing += [
        f"{name!r} is not in {first.path}" for name in other.tensors if name not in first.tensors and name not in kept
    ]
    shapes, dtypes = [], []
    for name in first.tensors:
        if name not in other.tensors or name in kept:
            continue
        ours, theirs = first.tensors[name], other.tensors[name]
        if check_shapes and ours.shape != theirs.shape:
            shapes.append(
                f"{name!r} has shape {list(ours.shape)} in {first.path}, but {list(theirs.shape)} in {other.path}"
            )
        elif ours.dtype != theirs.dtype:
            dtypes.append(f"{name!r} has dtype {ours.dtype} in {first.path}, but {theirs.dtype} in {other.path}")
    problems = missing + shapes + dtypes
    if not problems:
        return
    more = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    hints = []
    if missing or shapes:
        hints = [
            "to keep a layer that differs for each network, add task_heads='auto' or task_heads='NAME,...';",
            f"to keep only the layer of {first.path}, add ignore='PATTERN'",
        ]
    raise CheckpointError(
        "\n  ".join([f"{first.path} and {other.path} are incompatible:", *problems[:_MAX_LISTED], *more, *hints])
    )


def _equal(first: Tensor, other: Tensor) -> bool:
    return first.shape == other.shape and bool((first == other).all())


def _texts_of_tokens(path: Path) -> dict[int, str]:
    if (path / "tokenizer.json").is_file():
        tokenizer = read_json(path / "tokenizer.json")
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        entries = enumerate(text for text, _ in vocabulary) if isinstance(vocabulary, list) else None
        texts = dict(entries) if entries else {number: text for text, number in vocabulary.items()}
        return texts | {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    if (path / "vocab.json").is_file():
        return {number: text for text, number in read_json(path / "vocab.json").items()}
    if (path / "vocab.txt").is_file():
        return dict(enumerate((path / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    return {}
