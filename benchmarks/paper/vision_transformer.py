"""The vision transformer of the experiments. Its parameters are named as in timm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2])
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return hidden


class Block(nn.Module):
    """A transformer block with pre-normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        x = x + self.attn(self.norm1(x))
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


class PatchEmbedding(nn.Module):
    """Maps the patches of an image to vectors."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 3, H, W] to [B, H W / patch^2, width]."""
        maps: Tensor = self.proj(x)
        return maps.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT with patches of 16 pixels: ViT-S has 12 blocks, width 384 and 6 heads."""

    def __init__(
        self, image_size: int, width: int = 384, heads: int = 6, blocks: int = 12, outputs: int = 512, patch: int = 16
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of {patch}, got {image_size}")
        self.patch_embed = PatchEmbedding(width, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to vectors [B, outputs]."""
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        vectors: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return vectors
