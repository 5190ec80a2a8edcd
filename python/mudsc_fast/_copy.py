"""Copying modules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def copy_module(model: _Module) -> _Module:
    """Return a deep copy of a module, even if it keeps computed tensors, which ``copy.deepcopy`` rejects.

    ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` keep a weight that the layer recomputes in every
    forward. The copy holds its values.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, dict(computed))
