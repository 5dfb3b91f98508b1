"""Views with known parameters for readouts, of images or as stored features, and pairs of stored views for a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapters.backbone import Backbone
from ..adapters.distributed import Launch
from ..adapters.training_loop import step_generator
from .augmentations import Augmentation, augment, draw, join
from .view_batches import BLOCK, CHUNK, FIXED, BlockRows, Images

Batch = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Part:
    """Images to fit readouts on or to score them on.

    Attributes:
        plain, view: what an encoder takes, a chunk at a time, of the images as they are and of an augmented view of each.
        label: int64 [N]. parameters: float64 [N] each, of the views.
    """

    plain: Callable[[], Iterator[Tensor]]
    view: Callable[[], Iterator[Tensor]]
    label: np.ndarray
    parameters: dict[str, Tensor]


def feature_batches(features: Tensor, batch_size: int, seed: int, launch: Launch) -> Batch:
    """Batches of two of the views of the same images, [b, D], out of stored features [N, V, D], V >= 2. Raises the same."""
    rows = BlockRows(len(features), batch_size, seed, launch)

    def batch(step: int) -> tuple[Tensor, ...]:
        chosen = rows(step)
        drawn = [torch.rand(BLOCK, features.shape[1], generator=g) for g in rows.generators(step)]
        two = torch.cat(drawn).argsort(1)[:, :2]
        return features[chosen, two[:, 0]], features[chosen, two[:, 1]]

    return batch


def image_part(images: Images, how: Augmentation, seed: int, stream: int, device: torch.device) -> Part:
    """Images and one fixed view of each, which depends on (seed, stream, row) alone."""
    starts = range(0, len(images.pixels), CHUNK)
    shape = images.pixels.shape[1:]
    done = [
        draw(how, min(CHUNK, len(images.pixels) - start), shape, step_generator(seed, FIXED, stream, start))
        for start in starts
    ]

    def view() -> Iterator[Tensor]:
        return (augment(x, one) for x, one in zip(images.chunks(device), done, strict=True))

    return Part(lambda: images.chunks(device), view, images.label, join(done).table())


def stored_part(part: Part, backbone: Backbone, cache_dir: Path | None) -> Part:
    """The same images as features of a frozen backbone, which sees each of them and each view once: both are stored."""
    embedded = [_stored(inputs(), part.label, backbone, cache_dir) for inputs in (part.plain, part.view)]
    plain, view = (lambda one=one: iter(one.split(CHUNK)) for one in embedded)
    return Part(plain, view, part.label, part.parameters)


def stored_views(parts: Sequence[Part], backbone: Backbone, cache_dir: Path | None) -> Tensor:
    """Features [N, V, D] of the views of the same images in several parts."""
    return torch.stack([_stored(part.view(), part.label, backbone, cache_dir) for part in parts], 1)


def _stored(chunks: Iterator[Tensor], label: np.ndarray, backbone: Backbone, cache_dir: Path | None) -> Tensor:
    """A backbone's preprocessing takes images of 8 bits: the views are rounded, as torchvision's of PIL images are."""
    pixels = torch.cat([(255.0 * part).round().byte().cpu() for part in chunks])
    data = (pixels.permute(0, 2, 3, 1).numpy(), label)
    return torch.from_numpy(np.array(backbone.extract(data, cache_dir=cache_dir, batch_size=256).embedding))
