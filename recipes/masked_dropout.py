"""Dropout of whole channels by masks that are made beforehand: by the generators of a batch's blocks, or one for all images.

kept = draw_masks(network, BLOCK, generators)   # with the batch: the same for one process and several
with dropping(network, kept):
    network(images)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MaskedDropout(nn.Module):
    """Drops whole channels of [B, C, ...] inside `dropping`, and nothing outside it or with a probability of 0."""

    def __init__(self, probability: float, channels: int) -> None:
        super().__init__()
        self.probability, self.channels = probability, channels
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return x
        return x * (self.kept / (1.0 - self.probability)).to(x)[(...,) + (None,) * (x.ndim - 2)]


def dropouts(network: nn.Module) -> list[MaskedDropout]:
    """Its layers of dropout that drop anything."""
    return [part for part in network.modules() if isinstance(part, MaskedDropout) and part.probability]


def draw_masks(network: nn.Module, rows: int, generators: Sequence[torch.Generator]) -> Tensor | None:
    """Which channels are kept, bool [rows of all generators, channels of all layers] on the CPU, `rows` by each generator.

    None where nothing is dropped.
    """
    layers = dropouts(network)
    if not layers:
        return None
    dropped = torch.cat([torch.full((layer.channels,), layer.probability) for layer in layers])
    return torch.cat([torch.rand(rows, len(dropped), generator=one) >= dropped for one in generators])


@contextmanager
def dropping(network: nn.Module, kept: Tensor | None) -> Iterator[None]:
    """Inside, the network drops channels by these masks (`draw_masks`); None: none.

    A mask is of each row, or one of all rows: one draw of the network's weights.
    """
    layers = [] if kept is None else dropouts(network)
    if kept is not None:
        kept = kept.to(next(network.parameters(), kept).device)  # in one copy
        for layer, mask in zip(layers, kept.split([layer.channels for layer in layers], dim=1), strict=True):
            layer.kept = mask
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None
