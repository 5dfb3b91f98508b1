"""A tiny network and its images, every number of which follows from whole numbers: the same bits everywhere, for ever."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 3


def numbers(*shape: int, key: int = 1) -> Tensor:
    """Numbers in [-0.5, 0.5): a float32 each of k/1009 - 0.5, k from a linear congruence."""
    count = torch.Size(shape).numel()
    k = (torch.arange(count, dtype=torch.int64) * 7919 + key * 104729) * (key + 17) % 1009
    return (k.double() / 1009 - 0.5).float().reshape(shape)


class Tiny(nn.Module):
    """Images [B,3,9,9] to 3 logits, over 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def tiny() -> Tiny:
    """The network, with its weights (twice `numbers`)."""
    with torch.random.fork_rng(devices=[]):
        network = Tiny()
    with torch.no_grad():
        for key, value in enumerate(network.parameters(), start=2):
            value.copy_(2 * numbers(*value.shape, key=key))
    return network


def images(rows: int, key: int = 1) -> tuple[Tensor, Tensor]:
    """Images [rows,3,9,9] and their classes: of each class in turn, one channel brighter."""
    label = torch.arange(rows) % CLASSES
    brighter = nn.functional.one_hot(label, 3)[:, :, None, None] * (
        0.2 + numbers(rows, key=key + 40)[:, None, None, None]
    )
    return 3 * numbers(rows, 3, 9, 9, key=key) + 2 * brighter, label
