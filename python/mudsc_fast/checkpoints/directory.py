"""Find the files of a directory that hold the weights.

The order of preference is that of ``from_pretrained`` in transformers: a single file before an index of shards,
safetensors before torch files. Names of other libraries and variants (``model.fp16.safetensors``) come last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mudsc_fast.checkpoints.errors import CheckpointError

Format = Literal["safetensors", "torch"]

#: The format that each suffix of a file means.
FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
}

#: The name of a directory's single file of weights, by format. With shards, ``<name>.index.json`` lists them.
WEIGHTS_NAME: dict[Format, str] = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}

#: Names to look for, in order of preference, also with ``.index.json`` appended.
_NAMES = (
    *WEIGHTS_NAME.values(),
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "consolidated.safetensors",
)

_INDEX = ".index.json"

#: Names with a variant before the last suffix: model.fp16.safetensors, model.safetensors.index.fp16.json.
_VARIANT = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)\.(?P<variant>[\w-]+)(?P<suffix>\.safetensors|\.bin)"
    r"|(?P<indexed>(?:model|diffusion_pytorch_model)\.safetensors|pytorch_model\.bin)\.index\.[\w-]+\.json"
)

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.|\.\d{2,}\.pth$")

#: Files that trainers write with ``torch.save`` and that hold no network.
_NO_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states_\d+)\.(bin|pt|pth)$")


@dataclass(frozen=True)
class Weights:
    """One set of weights in a directory.

    Attributes
    ----------
    file
        Name of the weights file, or of the index of shards.
    format
        Format of the files.
    name
        Name to write these weights under, as a single file and without a variant.
    """

    file: str
    format: Format
    name: str

    @property
    def is_index(self) -> bool:
        """Whether the file is an index of shards."""
        return self.file.endswith(".json")


def find_weights(path: Path) -> list[Weights]:
    """Return the sets of weights in a directory. The first one is the one to read.

    Raises
    ------
    CheckpointError
        If there is none, or there are several without an order of preference.
    """
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    found = []
    for name in _NAMES:
        kind = FORMAT_OF_SUFFIX[Path(name).suffix]
        found += [Weights(file, kind, name) for file in (name, name + _INDEX) if file in names]
    if found:
        return found
    others = [weights for name in sorted(names) if (weights := _other(name)) is not None]
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(
            f"{path}: contains several weights files, {', '.join(weights.file for weights in others)}: give one of them"
        )
    raise CheckpointError(_why_none(path, names))


def resolve_hub_cache(path: Path) -> Path:
    """Return the snapshot in a folder ``models--OWNER--NAME`` of the Hugging Face cache; return other paths as is."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        current = snapshots / main.read_text(encoding="utf-8").strip()
        if current.is_dir():
            return current
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    if len(found) != 1:
        listed = ", ".join(entry.name for entry in found) or "none"
        raise CheckpointError(f"{path}: give one of its snapshots (snapshots/REVISION); found: {listed}")
    return found[0]


def _other(name: str) -> Weights | None:
    """Return the weights in a file whose name is not one of the usual ones, or None if it holds no weights."""
    match = _VARIANT.fullmatch(name)
    if match and match["indexed"]:
        return Weights(name, FORMAT_OF_SUFFIX[Path(match["indexed"]).suffix], match["indexed"])
    kind = FORMAT_OF_SUFFIX.get(Path(name).suffix)
    if kind is None or _SHARD.search(name) or _NO_WEIGHTS.match(name) or name.startswith("adapter_model."):
        return None
    return Weights(name, kind, match["stem"] + match["suffix"] if match else name)


def _why_none(path: Path, names: set[str]) -> str:
    if "adapter_config.json" in names:
        return f"{path}: contains an adapter, not a whole network: merge it into its base model first"
    if any(_SHARD.search(name) for name in names):
        return f"{path}: contains shards of weights, but not their index (model.safetensors.index.json)"
    if "model_index.json" in names:
        return (
            f"{path}: is a pipeline of several networks: give the folder of one, e.g. {path / 'unet'} or "
            f"{path / 'transformer'}"
        )
    return (
        f"{path}: not a checkpoint: expected {', '.join(WEIGHTS_NAME.values())}, an index of shards, or a single "
        ".safetensors, .bin, .pt, .pth or .ckpt file"
    )
