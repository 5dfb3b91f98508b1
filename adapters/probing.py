"""Showing a network noise right after it is wrapped, so that its structure is known before its first image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import BackboneError
from .images import Transform, apply_transform
from .module_backbone import ModuleReader
from .timm_backbone import TimmReader, is_timm

_SIDES = (32, 64, 96, 128, 224, 384, 28)  # cheap ones first; a network that takes any size accepts two of them
_TWO_SIZES = ((256, 256), (200, 320))  # width, height of the images that tell whether a transform gives one size


class NotAcceptedError(BackboneError):
    """The network raised an error for a batch of this shape."""


def read_network(
    module: nn.Module, images: Tensor, feature_layer: str | None, classifier_layer: str | bool | None
) -> TimmReader | ModuleReader:
    """Finds out, with a batch [B,C,H,W], how to take embedding and logits out of one pass.

    Raises NotAcceptedError if the network fails on the batch, BackboneError if it cannot be told.
    """
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise BackboneError(
            f"{type(module).__name__} has lazy layers without weights; run it once on a batch and load its weights."
        )
    try:
        if is_timm(module) and feature_layer is None and classifier_layer in (None, False):
            return TimmReader(module, images, use_classifier=classifier_layer is None)
        return ModuleReader(module, images, feature_layer, classifier_layer)
    except BackboneError:
        raise
    except Exception as error:  # whatever the network itself raises
        raise NotAcceptedError(
            f"{type(module).__name__} failed on a batch of shape {tuple(images.shape)} ({type(error).__name__}: "
            f"{error}). Its forward must take one batch of images; check the size and channels that transform= gives."
        ) from error


def first_reader(
    read: Callable[[Tensor], TimmReader | ModuleReader], probes: Iterator[Tensor]
) -> TimmReader | ModuleReader:
    """The reader from the first batch that the network accepts; NotAcceptedError of the last if there is none."""
    refused: NotAcceptedError | None = None
    for images in probes:
        try:
            return read(images)
        except NotAcceptedError as error:
            refused = error
    raise refused or BackboneError("there was no batch to probe the network with.")


def settled_reader(
    read: Callable[[Tensor], TimmReader | ModuleReader], probes: Iterator[Tensor]
) -> TimmReader | ModuleReader | None:
    """The reader on which two sizes agree, or the only size accepted; None where none is, or dimensions differ."""
    found: list[TimmReader | ModuleReader] = []
    for images in probes:
        try:
            found.append(read(images))
        except NotAcceptedError:
            continue
        if len(found) == 2:
            break
    shapes = {(r.structure.embedding_dim, r.structure.penultimate_dim, r.structure.linear_name) for r in found}
    return found[0] if len(shapes) == 1 else None


def noise(shape: Sequence[int]) -> Tensor:
    """Two images of seeded standard normal noise, [2, *shape]."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def timm_probes(preprocessing: dict[str, Any]) -> Iterator[Tensor]:
    """Its own size, but two cheaper ones first where a network is said to take any; some need more than 64 pixels."""
    channels, *size = preprocessing["input_size"]
    if not preprocessing["fixed_input_size"]:
        yield from (noise([channels, side, side]) for side in (64, 128) if side < min(size))
    yield noise([channels, *size])


def transform_probe(transform: Transform) -> Tensor:
    """Two noise images of different sizes through `transform`: [2,C,H,W], or [1,C,H,W] if its size follows theirs.

    Raises DataError if it does not make float tensors [C,H,W] of them.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (320, 256, 3), dtype=np.uint8)
    first, second = (apply_transform(transform, [Image.fromarray(pixels[:h, :w])]) for w, h in _TWO_SIZES)
    return torch.cat([first, second]) if first.shape == second.shape else first


def free_probes(transform: Transform | None) -> Iterator[Tensor]:
    """Batches of several sizes, for a network of unknown input size: through `transform`, or in colour, then grey."""
    for channels in (3, 1):
        for side in _SIDES:
            if transform is None:
                yield noise([channels, side, side])
            elif channels == 3:
                pixels = np.random.default_rng(side).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
                yield apply_transform(transform, list(pixels))
