"""Networks of the recipe `lam`: the paper's two small ones, a timm network with generalised-mean pooling, a linear head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.errors import BackboneError
from ..adapters.timm_backbone import create_timm
from .masked_dropout import MaskedDropout
from .small_image_networks import Normalised, group_normalised

SMALL = ("pooled", "wide")


class Prepared(nn.Module):
    """Images [B, C, H, W] in 0..1 as the convolutions take them: colours normalised, grey ones as they are (as in the paper).

    Channels last, which takes a quarter of the time off on a CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.colours = Normalised(channels) if channels == 3 else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.colours(images).contiguous(memory_format=torch.channels_last)


class GeneralisedMean(nn.Module):
    """Pooling by the mean of p-th powers, p trained: maps [B, C, H, W] -> [B, C] (Radenovic et al., TPAMI 2019)."""

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.power, self.eps = nn.Parameter(torch.tensor(power)), eps

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):  # a third power leaves float16
            return maps.float().clamp(min=self.eps).pow(self.power).mean((-2, -1)).pow(1.0 / self.power)


class TimmTrunk(nn.Module):
    """A convolutional timm network before its classifier, with generalised-mean pooling: images in 0..1 -> [B, C].

    BatchNorm keeps its statistics and trains its scale alone: features are an image's own, and processes need no common
    statistics.
    """

    module: Any

    def __init__(self, module: nn.Module, rate: float) -> None:
        super().__init__()
        self.module = module.eval()
        for name in ("fc", "classifier", "head"):  # not used, and an unused weight has no gradient
            if hasattr(module, name):
                setattr(module, name, nn.Identity())
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, 64, 64))
        if maps.ndim != 4:
            raise BackboneError(
                f"--network: maps [B, C, H, W] are expected before the classifier, these are {list(maps.shape)}: "
                "give a convolutional network of timm"
            )
        self.prepared, self.pool = Prepared(3), GeneralisedMean()
        self.dropout = MaskedDropout(rate, maps.shape[1])

    def _maps(self, images: Tensor) -> Tensor:
        return self.module.forward_features(images)

    def train(self, mode: bool = True) -> TimmTrunk:
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.dropout(self._maps(self.prepared(images))))


def pooled(channels: int, rate: float) -> nn.Sequential:
    """The paper's for CIFAR-10: three convolutions, two poolings; 1024 features of 32 px, 576 of 28."""
    return nn.Sequential(
        *(Prepared(channels), nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2), MaskedDropout(rate, 32)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), MaskedDropout(rate, 64)),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), MaskedDropout(rate, 64), nn.Flatten()),
    )


def wide(channels: int, rate: float) -> nn.Sequential:
    """The paper's for FashionMNIST: two convolutions, one pooling; 9216 features of 28 px."""
    return nn.Sequential(
        *(Prepared(channels), nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(MaskedDropout(rate, 64), nn.MaxPool2d(2), nn.Flatten()),
    )


class EmbeddingNetwork(nn.Module):
    """Images [B, C, H, W] in 0..1 -> embeddings [B, D] of any length: `trunk` gives features, `head`, a linear layer, embeds."""

    def __init__(self, trunk: nn.Module, size: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, *size)).shape[1]
        self.trunk = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = nn.Linear(features, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images).float())


def make_network(
    name: str,
    size: tuple[int, int, int],
    dim: int,
    *,
    rate: float = 0.0,
    pretrained: bool = False,
    checkpoint: Path | None = None,
) -> EmbeddingNetwork:
    """A fresh network for images of `size` (C, H, W) by one of the names of `SMALL`, or a name of timm (with random weights
    normalised by groups).

    Raises BackboneError for a name that is neither, weights that are not there or do not fit, and images too small.
    """
    if name in SMALL and (pretrained or checkpoint is not None):
        raise BackboneError(
            f"--network {name} has no weights of its own: give --pretrained or --checkpoint a timm network"
        )
    channels = size[0]
    try:
        if name in SMALL:
            trunk: nn.Module = pooled(channels, rate) if name == "pooled" else wide(channels, rate)
        else:
            module = create_timm(name, pretrained, checkpoint)
            if not pretrained and checkpoint is None:  # BatchNorm would keep statistics of nothing
                group_normalised(module)
            trunk = TimmTrunk(module, rate)
        return EmbeddingNetwork(trunk, size, dim)
    except RuntimeError as error:
        raise BackboneError(f"--network {name} does not take images of {size}: {str(error).splitlines()[0]}") from error
