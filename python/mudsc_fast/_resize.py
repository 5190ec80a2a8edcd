"""Changes the sizes of a module's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def resize(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Resize the layers of a model in place to the shapes of other tensors. The new tensors are not initialized.

    Raises
    ------
    TypeError
        If a layer has another size and is not a linear layer, a convolution or BatchNorm.
    """
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the old tensors are kept so that ids stay unique
    for prefix, module in model.named_modules():
        own: dict[str, Tensor] = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        names = {leaf: f"{prefix}.{leaf}" if prefix else leaf for leaf in own}
        changed = [leaf for leaf, name in names.items() if name in tensors and tensors[name].shape != own[leaf].shape]
        for leaf in changed:
            old = own[leaf]
            if id(old) not in replaced:
                new = old.detach().new_empty(tensors[names[leaf]].shape)
                is_parameter = isinstance(old, nn.Parameter)
                replaced[id(old)] = old, nn.Parameter(new, old.requires_grad) if is_parameter else new
            setattr(module, leaf, replaced[id(old)][1])
        if changed and not _set_sizes(module):
            raise TypeError(
                f"expand cannot change the size of {prefix!r}, a {type(module).__name__}: only linear layers, "
                "depthwise and ungrouped convolutions and BatchNorm can be resized. Expand only the nodes of such "
                "layers, expand={node: number}, or merge the state dicts"
            )


def _set_sizes(module: nn.Module) -> bool:
    """Set the attributes of a layer to the sizes of its tensors; return False if its type cannot be resized."""
    if type(module) is nn.Linear:
        module.out_features, module.in_features = module.weight.shape
        return True
    if isinstance(module, _BatchNorm):
        sizes = [len(tensor) for tensor in (module.weight, module.running_mean) if tensor is not None]
        module.num_features = sizes[0]
        return True
    if not isinstance(module, (_Convolution, _Transposed)):
        return False
    first, second = module.weight.shape[:2]
    if module.groups == module.in_channels == module.out_channels and second == 1:
        module.in_channels = module.out_channels = module.groups = first
    elif module.groups == 1:
        sizes = [first, second]
        module.out_channels, module.in_channels = reversed(sizes) if isinstance(module, _Transposed) else sizes
    else:
        return False
    return True
