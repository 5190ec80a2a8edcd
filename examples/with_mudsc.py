"""The script of the MuDSC authors' program with one changed import."""

from __future__ import annotations

import torch
from torch import nn

# import mudsc as weight_fusion
from mudsc_fast.compat import mudsc as weight_fusion


def network(seed: int) -> nn.Sequential:
    """Return a small network with random weights, in place of a trained one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    """Merge two networks by their weights and activations at once."""
    perm = {0: [[0, "0.weight"], [0, "0.bias"], [1, "2.weight", {"in": {"dim": -1}}]]}
    loader = [(torch.randn(100, 20), torch.zeros(100)) for _ in range(5)]
    fusion = weight_fusion.WeightFusion(a=0.5, b=1, fix_sims=True, fix_rate=0.5)
    merged = fusion.transform([network(0), network(1)], perm, act_loader=loader, in_weight_space=True)
    _, unmerge = fusion.perm_mats[0]
    print(f"merged {tuple(unmerge.shape)} units: {merged(loader[0][0]).shape[1]} outputs")
    print(f"nodes of a ViT: {len(weight_fusion.get_vit_perm(num_layer=12, num_heads=6))}")


if __name__ == "__main__":
    main()
