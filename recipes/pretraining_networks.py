"""Networks for pretraining on small images: an encoder with pooled features, and a projection that the loss looks at."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast

import timm
import torch
from torch import Tensor, nn

from ..adapters.distributed import Launch
from ..adapters.errors import BackboneError, suggest
from .networks import StridedConvNet, group_norm
from .small_image_networks import DEPTHS, Normalised, group_normalised, small_image_network

Norm = Literal["group", "batch"]
Stem = Literal["cifar", "own"]
M = TypeVar("M", bound=nn.Module)
SMALL = "small"
"""The name of `StridedConvNet`, for two cores."""
CIFARS = 64
"""Pixels up to which a network gets CIFAR's stem."""


class Encoder(nn.Module):
    """Images [B, C, H, W] in 0..1 -> pooled features [B, size] of a network that takes `Normalised` ones, channels last."""

    def __init__(self, network: nn.Module, channels: int, pixels: int) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalised = Normalised(channels)
        with torch.no_grad():
            self.size = int(self.eval()(torch.zeros(2, channels, pixels, pixels)).shape[1])

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalised(images).contiguous(memory_format=torch.channels_last))


class PretrainingNetwork(nn.Module):
    """Images [B, C, H, W] in 0..1 -> pooled features [B, F] and what the projection makes of them [B, D]."""

    def __init__(self, encoder: Encoder, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.encoder(images)
        return feature, self.projection(feature)


def image_encoder(
    name: str, channels: int, pixels: int, norm: Norm = "group", width: int = 32, stem: Stem = "cifar"
) -> Encoder:
    """An encoder with random weights for square images.

    name: "small" (`StridedConvNet` of that `width`, which has GroupNorm), "resnet20", "resnet56", or a timm network. stem: of
    a timm network, "cifar" for images of up to `CIFARS` pixels (`small_image_network`, without max-pool), else its own. Raises
    BackboneError for a name that there is not, or a network that takes no such images, or has no stem that becomes CIFAR's.
    """
    if name == SMALL:
        return Encoder(StridedConvNet(channels, width), channels, pixels)
    if name not in DEPTHS and not timm.is_model(name):
        raise BackboneError(f"--network {name!r} is unknown; {suggest(name, [SMALL, *DEPTHS, *timm.list_models()])}")
    if name not in DEPTHS and (pixels > CIFARS or stem == "own"):
        network = whole_network(name, channels, pixels)
    else:
        network = small_image_network(name, 0, channels, pixels, max_pool=False)
    if norm == "group":
        group_normalised(network)
    return Encoder(network, channels, pixels)


def whole_network(name: str, channels: int, pixels: int) -> nn.Module:
    """A timm network as it is, pooled features, for square images: told their size, where it is one that is built for a size.

    Raises BackboneError where it takes none such.
    """
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        state = torch.get_rng_state()
        try:
            network = timm.create_model(name, img_size=pixels, **options)
        except TypeError:  # it takes any size, and no such option
            torch.set_rng_state(state)
            network = timm.create_model(name, **options)
        with torch.no_grad():
            network.eval()(torch.zeros(1, channels, pixels, pixels))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise BackboneError(f"--network {name!r} takes no images of {pixels} px ({error})") from error
    return network


def projection_head(size: int, hidden: int, dim: int, norm: Norm = "group") -> nn.Sequential:
    """Features [B, size] -> [B, dim]: a hidden layer, normalised, and a linear one without bias."""
    layer: nn.Module = nn.BatchNorm1d(hidden) if norm == "batch" else group_norm(hidden)
    return nn.Sequential(nn.Linear(size, hidden), layer, nn.ReLU(), nn.Linear(hidden, dim, bias=False))


def synchronised(module: M, launch: Launch, device: torch.device) -> M:
    """BatchNorm with the statistics of all processes' rows, where there are several on GPUs; it is not there on CPUs."""
    if launch.world == 1 or device.type == "cpu":
        return module
    return cast("M", nn.SyncBatchNorm.convert_sync_batchnorm(module))
