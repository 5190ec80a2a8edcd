"""The small networks of the paper's experiments: the MNIST network and the CIFAR ResNets."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from paper.resnets import Norm


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a strided 3 x 3 convolution if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = norm(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet20(nn.Module):
    """CIFAR ResNet of three stages of three blocks with 16, 32 and 64 channels times `width`."""

    def __init__(self, width: int = 1, outputs: int = 512, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        channels = [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = norm(channels[0])
        self.layer1 = _stage(channels[0], channels[0], 1, norm)
        self.layer2 = _stage(channels[0], channels[1], 2, norm)
        self.layer3 = _stage(channels[1], channels[2], 2, norm)
        self.linear = nn.Linear(channels[2], outputs)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to vectors [B, outputs]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        vectors: Tensor = self.linear(x.mean((2, 3)))
        return vectors


def _stage(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, norm),
        BasicBlock(out_channels, out_channels, 1, norm),
        BasicBlock(out_channels, out_channels, 1, norm),
    )


class MnistMlp(nn.Sequential):
    """784-1024-1024-1024-512 without biases, with a ReLU after every layer, including the last.

    Weights have PyTorch's default initialization. With the larger weights of Kaiming's normal initialization the
    networks reach the same accuracy, but merge worse (docs/results.md).
    """

    def __init__(self, width: int = 1024, outputs: int = 512) -> None:
        super().__init__()
        sizes = [784, width, width, width, outputs]
        for index, (inputs, units) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{index}", nn.Linear(inputs, units, bias=False))
            self.add_module(f"relu{index}", nn.ReLU())
