"""Small networks with the module names of published ones whose libraries the tests do without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and statistic random values under which all units differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                values = 0.5 + values.abs()
            elif name.endswith(("running_mean", "bias")):
                values = 0.3 * values
            elif tensor.ndim < 2:
                values = 1 + 0.3 * values
            elif "emb" not in name and "token" not in name:
                values = values * tensor[0].numel() ** -0.5
            tensor.copy_(values)
    return model.eval()


def calibrate(model: nn.Module, inputs: Tensor) -> None:
    """Set the statistics of BatchNorms to those of the inputs, so that no unit is dead."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(inputs)
    model.eval()


class ResidualBlock(nn.Module):
    """Two or three convolutions around which the input is added."""

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: str, norm_groups: int | None, bottleneck: bool
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = (
            [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride), (width, width, 3, 1)]
        )
        self.count = len(shapes)
        for number, (read, written, size, step) in enumerate(shapes, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(read, written, size, stride=step, padding=size // 2, bias=False))
            self.add_module(f"bn{number}", channel_norm(written, norm_groups))
        self.shortcut_name = shortcut
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.add_module(shortcut, nn.Sequential(convolution, channel_norm(outputs, norm_groups)))

    def forward(self, images: Tensor) -> Tensor:
        modules = dict(self.named_children())
        value = images
        for number in range(1, self.count + 1):
            value = modules[f"bn{number}"](modules[f"conv{number}"](value))
            value = F.relu(value) if number < self.count else value
        kept = modules[self.shortcut_name](images) if self.shortcut_name in modules else images
        return F.relu(value + kept)


class ResNet(nn.Module):
    """A ResNet with the names of torchvision (`shortcut` "downsample", `head` "fc") or of CIFAR networks."""

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        shortcut: str = "shortcut",
        head: str = "linear",
        norm_groups: int | None = None,
        bottleneck: bool = False,
        classes: int = 4,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = channel_norm(widths[0], norm_groups)
        inputs = widths[0]
        self.stages = len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layers = []
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                layers.append(ResidualBlock(inputs, width, stride, shortcut, norm_groups, bottleneck))
                inputs = 4 * width if bottleneck else width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.head_name = head
        self.add_module(head, nn.Linear(inputs, classes))

    def forward(self, images: Tensor) -> Tensor:
        value = F.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.stages + 1):
            value = self.get_submodule(f"layer{stage}")(value)
        scores: Tensor = self.get_submodule(self.head_name)(value.mean((2, 3)))
        return scores


def channel_norm(channels: int, groups: int | None) -> nn.Module:
    return nn.BatchNorm2d(channels) if groups is None else nn.GroupNorm(groups, channels)


class Attention(nn.Module):
    """Multi-head attention with a fused layer of queries, keys and values, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class FeedForward(nn.Module):
    """Two linear layers, as in timm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return result


class TransformerBlock(nn.Module):
    """A block of a vision transformer, as in timm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class PatchEmbedding(nn.Module):
    """Patches to tokens, as in timm."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return result


class VisionTransformer(nn.Module):
    """A vision transformer with the names of timm."""

    def __init__(
        self,
        image: int = 8,
        patch: int = 4,
        width: int = 24,
        heads: int = 3,
        hidden: int = 48,
        blocks: int = 2,
        classes: int = 4,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        scores: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return scores
