"""Networks whose tensors are divided over the processes: state dicts of DTensors, as those of modules under FSDP2.

Each process gets the whole of those tensors that it compares and merges, and no others. Tensors are gathered one by
one, so no process holds a whole network; results are divided again in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks


@dataclass(frozen=True)
class Sharded:
    """The tensors of networks, divided over processes.

    Attributes
    ----------
    given
        The state dicts, of DTensors and of tensors that every process has.
    described
        The same with a tensor without memory in place of each DTensor; names of one tensor have one such tensor.
    device
        Where the parts of this process are.
    """

    given: tuple[Mapping[str, Tensor], ...]
    described: tuple[dict[str, Tensor], ...]
    device: torch.device

    @classmethod
    def of(cls, state_dicts: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> Sharded | None:
        """Return the networks if they are divided, else None.

        Raises
        ------
        TypeError
            If they are, but there is no group of processes.
        """
        sharded = [tensor for tensors in state_dicts for tensor in tensors.values() if is_sharded(tensor)]
        if not sharded:
            return None
        if not ranks.has_group:
            raise TypeError(
                "models hold DTensors, which are divided over processes: pass the group of these processes, e.g. "
                "group=torch.distributed.group.WORLD"
            )
        described = []
        for tensors in state_dicts:
            # The first rank has a part of every tensor; those of others may be empty, and then look alike.
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
        """Return the networks with those tensors whole that this process needs. All processes make this call."""
        return tuple(
            {name: self._whole(tensors[name], description, name in needed) for name, description in described.items()}
            for tensors, described in zip(self.given, self.described, strict=True)
        )

    def _whole(self, tensor: Tensor, description: Tensor, needed: bool) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]  # of DTensor
        return whole if needed else description

    def divided(self, name: str, whole: Tensor | None, holder: int, ranks: Ranks, model: int = 0) -> Tensor:
        """Return a tensor that process `holder` has, divided as that of a network is. All processes make this call."""
        from torch.distributed.tensor import distribute_tensor

        like: Any = self.given[model][name]
        if not is_sharded(like):
            assert whole is not None  # every process has it
            return whole
        if whole is None:
            whole = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        whole = whole.contiguous()
        ranks.broadcast([whole], holder, "dividing the merged tensors")
        return distribute_tensor(whole, like.device_mesh, like.placements)


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is divided over processes."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same tensor."""
    first: dict[object, str] = {}
    names = {}
    for name, tensor in tensors.items():
        local: Any = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        place = (local.data_ptr(), tuple(tensor.shape), local.stride()) if local.numel() else name
        names[name] = first.setdefault(place, name)
    return names
