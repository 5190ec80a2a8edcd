"""ResNets with bottleneck blocks: ResNet-26, ResNet-50, and Taskonomy's encoder with its decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

#: Returns a norm layer for a number of channels.
Norm = Callable[[int], nn.Module]


def group_norm(groups: int) -> Norm:
    """Return a function that makes GroupNorm layers."""
    return lambda channels: nn.GroupNorm(groups, channels)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, and a shortcut with a 1 x 1 convolution if the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, 4 * channels, H / stride, W / stride]."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(self.bn3(self.conv3(hidden)) + shortcut)


class _Trunk(nn.Module):
    """The stem and the four stages, with the names of torchvision and timm."""

    def __init__(self, blocks: Sequence[int], width: int, norm: Norm, strides: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        channels = width
        for stage, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            modules = []
            for index in range(count):
                modules.append(Bottleneck(channels, width * 2**stage, stride if index == 0 else 1, norm))
                channels = 4 * width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
        self.out_channels = channels

    def features(self, x: Tensor) -> Tensor:
        """Return the feature maps of the last stage."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def initialize(self) -> None:
        """Initialize the weights of all convolutions and linear layers (Kaiming, normal)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)


class BottleneckResNet(_Trunk):
    """ResNet-26 (2, 2, 2, 2 blocks) or ResNet-50 (3, 4, 6, 3) with `outputs` outputs."""

    def __init__(self, blocks: Sequence[int], width: int = 64, outputs: int = 512, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__(blocks, width, norm, strides=(1, 2, 2, 2))
        self.fc = nn.Linear(self.out_channels, outputs)
        self.initialize()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to vectors [B, outputs]."""
        vectors: Tensor = self.fc(self.features(x).mean((2, 3)))
        return vectors


class TaskonomyEncoder(_Trunk):
    """ResNet-50 without stride in its last stage, followed by a projection to `projected` channels.

    It maps a 256 x 256 image to 8 maps of 16 x 16, the input of every Taskonomy decoder.
    """

    def __init__(self, width: int = 64, projected: int = 8, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__(blocks, width, nn.BatchNorm2d, strides=(1, 2, 2, 1))
        self.compress1 = nn.Conv2d(self.out_channels, projected, 3, 1, 1, bias=False)
        self.compress_bn = nn.BatchNorm2d(projected)
        self.initialize()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to maps [B, projected, H / 16, W / 16]."""
        return functional.relu(self.compress_bn(self.compress1(self.features(x))))


class PixelDecoder(nn.Module):
    """Upsamples an encoder's maps to an image with `channels` channels by doubling their size four times."""

    def __init__(self, channels: int, width: int = 64, projected: int = 8) -> None:
        super().__init__()
        sizes = [width * factor for factor in (8, 4, 2, 1)]
        self.conv1 = nn.Conv2d(projected, sizes[0], 3, padding=1)
        ups = zip(sizes, [*sizes[1:], sizes[-1]], strict=True)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in ups)
        self.last = nn.Conv2d(sizes[-1], channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, projected, H, W] to [B, channels, 16 H, 16 W]."""
        x = functional.relu(self.conv1(maps))
        for up in self.ups:
            x = functional.relu(up(x))
        image: Tensor = self.last(x)
        return image


class ClassDecoder(nn.Module):
    """Maps an encoder's pooled maps to the logits of `classes` classes."""

    def __init__(self, classes: int, width: int = 64, projected: int = 8, grid: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self.fc1 = nn.Linear(projected * grid * grid, 8 * width)
        self.fc2 = nn.Linear(8 * width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, projected, H, W] to logits [B, classes]."""
        pooled = functional.adaptive_avg_pool2d(maps, self.grid).flatten(1)
        logits: Tensor = self.fc2(functional.relu(self.fc1(pooled)))
        return logits
