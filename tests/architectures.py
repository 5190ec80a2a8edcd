"""Small networks with the module names of published ones, so that tests do not need their libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Fill all parameters and statistics with random values, so that no two units are alike."""
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
    """Two or three convolutions with a residual connection."""

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
    """Maps patches to tokens, as in timm."""

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


class Vgg(nn.Module):
    """A VGG with the names of torchvision."""

    def __init__(self, stages: Sequence[Sequence[int]], image: int, hidden: Sequence[int], batch_norms: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in stages:
            for width in widths:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norms else []
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        sizes = [channels * (image >> len(stages)) ** 2, *hidden]
        head: list[nn.Module] = []
        for read, written in zip(sizes, hidden, strict=False):
            # Leaky, because random units on features that are all positive are often dead.
            head += [nn.Linear(read, written), nn.LeakyReLU(0.1), nn.Dropout()]
        self.classifier = nn.Sequential(*head, nn.Linear(sizes[-1], 4))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images).flatten(1))
        return scores


class ClipBlock(nn.Module):
    """A block of OpenAI's CLIP, sequence first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        normalized = self.ln_1(tokens)
        tokens = tokens + self.attn(normalized, normalized, normalized, need_weights=False)[0]
        result: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return result


class ClipTransformer(nn.Module):
    """The blocks of a tower of OpenAI's CLIP."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ClipBlock(width, heads) for _ in range(blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.resblocks(tokens.transpose(0, 1)).transpose(0, 1)
        return result


class ClipVision(nn.Module):
    """The image tower of OpenAI's CLIP."""

    def __init__(self, width: int, heads: int, blocks: int, output: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, stride=4, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(5, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ClipTransformer(width, heads, blocks)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, output))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1) + self.positional_embedding
        result: Tensor = self.ln_post(self.transformer(self.ln_pre(tokens))[:, 0]) @ self.proj
        return result


class Clip(nn.Module):
    """OpenAI's CLIP for images of 8 x 8 and texts of 12 tokens of 60."""

    def __init__(self, vision: tuple[int, int, int], text: tuple[int, int, int], output: int = 10) -> None:
        super().__init__()
        blocks, heads, width = text
        self.visual = ClipVision(vision[2], vision[1], vision[0], output)
        self.transformer = ClipTransformer(width, heads, blocks)
        self.token_embedding = nn.Embedding(60, width)
        self.positional_embedding = nn.Parameter(torch.zeros(12, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, output))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        tokens = self.ln_final(self.transformer(self.token_embedding(texts) + self.positional_embedding))
        of_texts = F.normalize(tokens[:, -1] @ self.text_projection, dim=-1)
        return self.logit_scale.exp() * F.normalize(self.visual(images), dim=-1) @ of_texts.T


class WindowAttention(nn.Module):
    """Attention within a window of 2 x 2 positions, with a table of relative positions, as in timm's Swin."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, heads))
        place = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        difference = place[:, None] - place[None] + 1
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", difference[..., 0] * 3 + difference[..., 1])

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        mixed = self.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias) @ value
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class SwinBlock(nn.Module):
    """A block of timm's Swin on maps with channels last, without the shift of windows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, length, width = maps.shape
        windows = self.norm1(maps).view(batch, height // 2, 2, length // 2, 2, width).transpose(2, 3)
        mixed = self.attn(windows.reshape(-1, 4, width)).view(windows.shape).transpose(2, 3)
        maps = maps + mixed.reshape(maps.shape)
        result: Tensor = maps + self.mlp(self.norm2(maps))
        return result


class PatchMerging(nn.Module):
    """Merges four neighboring positions into one, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, length, width = maps.shape
        joined = maps.view(batch, height // 2, 2, length // 2, 2, width).permute(0, 1, 3, 4, 2, 5).flatten(3)
        result: Tensor = self.reduction(self.norm(joined))
        return result


class SwinStage(nn.Module):
    """A stage of timm's Swin. All stages but the first begin by merging patches."""

    def __init__(self, width: int, heads: int, blocks: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else PatchMerging(width // 2)
        self.blocks = nn.Sequential(*(SwinBlock(width, heads) for _ in range(blocks)))

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.downsample(maps))
        return result


class Swin(nn.Module):
    """A Swin transformer with the names of timm."""

    def __init__(self, blocks: Sequence[int], heads: Sequence[int], width: int) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, width, 2, stride=2))
        self.patch_embed.add_module("norm", nn.LayerNorm(width))
        stages = enumerate(zip(blocks, heads, strict=True))
        self.layers = nn.Sequential(*(SwinStage(width << s, h, count, s == 0) for s, (count, h) in stages))
        self.norm = nn.LayerNorm(width << (len(blocks) - 1))
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(width << (len(blocks) - 1), 4))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.get_submodule("proj")(images).permute(0, 2, 3, 1)
        maps = self.layers(self.patch_embed.get_submodule("norm")(patches))
        scores: Tensor = self.head(self.norm(maps).mean((1, 2)))
        return scores
