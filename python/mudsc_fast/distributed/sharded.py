"""Networks sharded over processes: state dicts of DTensors, such as those of FSDP2 modules.

Each process gathers only the tensors that it compares and merges. Tensors are gathered one at a time, so no process
holds a whole network. Merged tensors get the placements of the original ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks, same_on_all


@dataclass(frozen=True)
class Sharded:
    """The tensors of networks that are sharded over processes.

    Attributes
    ----------
    given
        The state dicts, which hold DTensors and tensors that are whole in every process.
    described
        The same state dicts with a meta tensor for each DTensor. Tied tensors share one meta tensor.
    device
        The device of this process's shards.
    """

    given: tuple[Mapping[str, Tensor], ...]
    described: tuple[dict[str, Tensor], ...]
    device: torch.device

    @classmethod
    def of(cls, state_dicts: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> Sharded | None:
        """Return the networks if they hold DTensors, else None.

        Raises
        ------
        TypeError
            If they hold DTensors, but no process group was given.
        ValueError
            If only some processes have DTensors, or a tensor of the first model is whole and another model's is not.
        """
        same = {"number of models": str(len(state_dicts))}
        for index, tensors in enumerate(state_dicts):
            is_divided = any(map(is_sharded, tensors.values()))
            same[f"kind of models[{index}]"] = "DTensors" if is_divided else "whole tensors"
        ranks.check_same(same)
        sharded = [tensor for tensors in state_dicts for tensor in tensors.values() if is_sharded(tensor)]
        if not sharded:
            return None
        whole = {name for name, tensor in state_dicts[0].items() if not is_sharded(tensor)}
        for index, tensors in enumerate(state_dicts):
            mixed = [name for name, tensor in tensors.items() if name in whole and is_sharded(tensor)]
            if mixed:
                raise same_on_all(
                    ValueError(
                        f"{mixed[0]!r} of models[{index}] is a DTensor, but that of models[0] is not: the result is "
                        "sharded like models[0]. Put a sharded model first, or shard all models"
                    )
                )
        if not ranks.has_group:
            raise TypeError(
                "models hold DTensors, which are sharded over processes: call mudsc_fast.merge or another function "
                "that takes group=, for example with group=torch.distributed.group.WORLD"
            )
        described = []
        for tensors in state_dicts:
            # Ask rank 0, which has a part of every tensor. Shards of other ranks may be empty, and then look alike.
            names = ranks.broadcast_object(_first_names(tensors), "describing the tensors")
            empty: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                if not is_sharded(tensor):
                    empty[name] = tensor
                elif names[name] != name:
                    empty[name] = empty[names[name]]
                else:
                    empty[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            described.append(empty)
        return cls(tuple(state_dicts), tuple(described), sharded[0].device)

    def gathered(self, needed: set[str]) -> tuple[dict[str, Tensor], ...]:
        """Return the networks with the tensors that this process needs, gathered. All processes must call this."""
        return tuple(
            {name: self._whole(tensors[name], description, name in needed) for name, description in described.items()}
            for tensors, described in zip(self.given, self.described, strict=True)
        )

    def _whole(self, tensor: Tensor, description: Tensor, needed: bool) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]  # of DTensor
        return whole if needed else description

    def shard(self, name: str, whole: Tensor | None, holder: int, ranks: Ranks, model: int = 0) -> Tensor:
        """Shard a tensor that rank `holder` has like the same tensor of a model. All processes must call this."""
        from torch.distributed.tensor import distribute_tensor

        like: Any = self.given[model][name]
        if not is_sharded(like):
            assert whole is not None  # it is whole in every process
            return whole
        if whole is None:
            whole = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        whole = whole.contiguous()
        ranks.broadcast([whole], holder, "sharding the merged tensors")
        return distribute_tensor(whole, like.device_mesh, like.placements)


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is sharded over processes."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name to the first name of the same tensor."""
    first: dict[object, str] = {}
    names = {}
    for name, tensor in tensors.items():
        local: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        place = (local.data_ptr(), tuple(tensor.shape), local.stride()) if local.numel() else name
        names[name] = first.setdefault(place, name)
    return names
