"""Networks for small images: CIFAR's own and timm's with a stem for 32 px, with GroupNorm where processes share a batch."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..adapters.errors import BackboneError
from .networks import CifarResNet, group_norm

CLASSES = 10
DEPTHS = {"resnet20": 20, "resnet56": 56}
"""The networks of CIFAR's own, `CifarResNet`, by name."""
SMALL_IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 32, "patch_size": 4},
    "convnext": {"patch_size": 2},
}
"""What timm is told so that a family takes images of 32 px, by how the name begins; their stems need nothing else."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
"""Means and deviations of the colours of ImageNet and of CIFAR-10.

Networks get ImageNet's (`Normalised`), which timm's weights and those of ResNet-20 and 56 were trained with; but those of the
recipe `cifar10h` without weights, which get CIFAR-10's (`statistics`)."""


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and deviations of the colours that a network of the recipe `cifar10h` is given."""
    return IMAGENET if name in DEPTHS else CIFAR10


class Normalised(nn.Module):
    """Images [B, C, H, W] in 0..1 by ImageNet's means and deviations of the colours; grey ones by the averages of these."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            colours = torch.tensor(values if channels == 3 else [sum(values) / 3])
            self.register_buffer(name, colours[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def small_image_network(
    name: str, classes: int = CLASSES, channels: int = 3, size: int = 32, max_pool: bool = True
) -> nn.Module:
    """A network for small images [B, channels, size, size]: ViT with patches of 4 px, ConvNeXt with patches of 2, VGG with pooled
    features, and whatever begins with one convolution (`cifar_stem`), which becomes 3x3 without stride.

    classes: 0 gives the pooled features. max_pool: whether a ResNet's stem keeps its own. Raises BackboneError for a network
    that takes no such images.
    """
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], classes, channels)
    family = next((one for one in SMALL_IMAGES if name.startswith(one)), None)
    more: dict[str, Any] = {} if family is None else dict(SMALL_IMAGES[family])
    if "img_size" in more:
        more["img_size"] = size
    try:
        module: Any = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **more)
        if name.startswith("vgg"):
            module.pre_logits = nn.Identity()  # three linear layers of 4,096 for a map of 7 x 7
            width = [part for part in module.features if isinstance(part, nn.Conv2d)][-1].out_channels
            module.head = timm.layers.ClassifierHead(width, classes)
        elif family is None:
            cifar_stem(name, module, max_pool)
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, size, size))
    except BackboneError:
        raise
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise BackboneError(
            f"the network {name!r} takes no images of {size} px ({type(error).__name__}: {error})"
        ) from error
    return module


def cifar_stem(name: str, module: Any, max_pool: bool) -> None:
    """A 3x3 convolution of stride 1 in the place of a network's first, and no max-pool behind it, unless it is to be kept.

    That is of timm's ResNets, in which it is `conv1` before `maxpool`, and of its EfficientNets and MobileNets, in which it is
    `conv_stem`. Raises BackboneError for a network that begins otherwise, with three convolutions for instance.
    """
    layer = "conv_stem" if hasattr(module, "conv_stem") else "conv1"
    old = getattr(module, layer, None)
    if not isinstance(old, nn.Conv2d) or (layer == "conv1" and not hasattr(module, "maxpool")):
        raise BackboneError(
            f"the network {name!r} has no stem that becomes CIFAR's (3x3, stride 1), as ResNets and EfficientNets have; in a "
            "pretraining --stem own takes it as it is, if images may be that small for it"
        )
    bias = old.bias is not None
    setattr(module, layer, nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=bias))
    if layer == "conv1" and not max_pool:
        module.maxpool = nn.Identity()


def group_normalised(module: nn.Module) -> None:
    """Puts GroupNorm in the place of every BatchNorm2d: no statistics of a batch, so processes need none in common."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm: nn.Module = group_norm(child.num_features)
            activation = getattr(child, "act", None)  # timm has both in one
            setattr(module, name, norm if activation is None else nn.Sequential(norm, activation))
        else:
            group_normalised(child)
