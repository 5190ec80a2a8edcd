"""Weight matching with the interface of git-re-basin's PyTorch ports, on a network and a permuted copy."""

from __future__ import annotations

import torch
from torch import nn

# from weight_matching import PermutationSpec, apply_permutation, weight_matching
from mudsc_fast.compat.rebasin import PermutationSpec, apply_permutation, weight_matching


def main() -> None:
    """Permute the units of a network, find the permutation, and undo it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    params_a = model.state_dict()
    spec = PermutationSpec(
        perm_to_axes={"P_0": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]},
        axes_to_perm={"0.weight": ("P_0", None), "0.bias": ("P_0",), "2.weight": (None, "P_0"), "2.bias": (None,)},
    )
    params_b = apply_permutation(spec, {"P_0": torch.randperm(64)}, params_a)
    found = weight_matching(spec, params_a, params_b, silent=True)
    restored = apply_permutation(spec, found, params_b)
    same = all(torch.equal(restored[name], tensor) for name, tensor in params_a.items())
    print("the network was restored" if same else "the network differs")


if __name__ == "__main__":
    main()
