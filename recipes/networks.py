"""Small networks of the experiments."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:  # option A: every second pixel, new channels are zero on both sides
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(x + y)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 8 groups, or of as many as divide 8 and the channels."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class CifarResNet(nn.Module):
    """The CIFAR-10 residual networks of He et al. (arXiv 1512.03385, section 4.2) with option-A shortcuts.

    depth 20 has 0.27 M parameters, 56 has 0.85 M. Images [B, channels, 32, 32], normalised -> logits
    [B, classes], or the pooled features [B, 64] of no classes.
    """

    def __init__(self, depth: int = 20, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes) if classes else nn.Identity()

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class SmallConvNet(nn.Module):
    """Three convolutions for small images [B, channels, H, W] -> logits [B, classes]; embedding of 4 `width` numbers.

    Group normalisation, so that processes need no common statistics. `width` 32 has 94,000 parameters and an embedding of 128.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), group_norm(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2) if outputs < sizes[-1] else nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.linear = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))


class StridedConvNet(nn.Module):
    """Four convolutions, three of them of stride 2, for many passes on a CPU: images [B, channels, H, W] -> [B, 8 `width`].

    Group normalisation, as in `SmallConvNet`; of width 32 and on 32 px a pass costs a third of its time.
    """

    def __init__(self, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        shapes = ((channels, 5, 2), (width, 3, 2), (2 * width, 3, 2), (4 * width, 3, 1))
        for (inputs, kernel, stride), outputs in zip(shapes, (width, 2 * width, 4 * width, 8 * width), strict=True):
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
            layers += [group_norm(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = 8 * width

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.contiguous(memory_format=torch.channels_last))
