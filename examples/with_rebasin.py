"""Weight matching by the interface of the git-re-basin ports, on networks that differ by the order of their units."""

from __future__ import annotations

import torch
from torch import nn

# from weight_matching import PermutationSpec, apply_permutation, weight_matching
from mudsc_fast.compat.rebasin import PermutationSpec, apply_permutation, weight_matching


def main() -> None:
    """Find the order in which a network's units were shuffled."""
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
    print(f"the network is {'the same again' if same else 'another'}")


if __name__ == "__main__":
    main()
