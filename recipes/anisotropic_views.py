"""Pairs of views for a contrastive training, and views with known parameters for readouts: of images, or of stored features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapters.backbone import Backbone
from ..adapters.distributed import Launch
from ..adapters.errors import DataError, OptionError
from ..adapters.source_arrays import ArraySource
from ..adapters.training import EpochOrder
from ..adapters.training_loop import step_generator
from ..eval.datasets import open_named
from .augmentations import Augmentation, Parameters, augment, draw, join
from .running import row_blocks

BLOCK = 32
"""Rows of a batch that share a generator: so many rows, or a multiple, are a process's share."""
CHUNK = 512
"""Images that are augmented or encoded at a time outside the training."""
ORDER, TRAINING, FIXED = range(3)  # streams of random numbers

Batch = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W] in memory and their labels int64 [N]."""

    pixels: Tensor
    label: np.ndarray

    def first(self, count: int) -> Images:
        return Images(self.pixels[:count], self.label[:count])

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All images, float32 in 0..1, `CHUNK` at a time."""
        return (as_floats(part, device) for part in self.pixels.split(CHUNK))


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


def load_images(name: str, split: str, data_dir: Path | None) -> Images:
    """A named set whose images fit in memory. Raises DataError where it is not there, or holds files of images."""
    source = open_named(name, split, data_dir)
    if not isinstance(source, ArraySource):
        raise DataError(f"{name} is no array of small images; expected one that is, such as cifar10")
    array = source.images if source.images.ndim == 4 else source.images[..., None]
    return Images(torch.from_numpy(np.array(array.transpose(0, 3, 1, 2), order="C")), np.asarray(source.labels))


def as_floats(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float32 in 0..1, on the device."""
    return pixels.to(device).float() / 255.0


class _Rows:
    """This process's rows of each batch, in an order of their own for each epoch, and a generator for each `BLOCK` of them."""

    def __init__(self, rows: int, batch_size: int, seed: int, launch: Launch) -> None:
        if rows < batch_size:
            raise OptionError(
                f"a batch of {batch_size} rows was asked for and there are {rows} images: give a smaller one"
            )
        self.blocks = row_blocks(batch_size, BLOCK, launch)
        self.order = EpochOrder(np.arange(rows), step_generator(seed, ORDER).initial_seed())
        self.each, self.batch_size, self.seed = rows // batch_size, batch_size, seed

    def __call__(self, step: int) -> tuple[Tensor, list[torch.Generator]]:
        epoch, place = divmod(step, self.each)
        start = place * self.batch_size
        own = slice(start + self.blocks.start * BLOCK, start + self.blocks.stop * BLOCK)
        generators = [step_generator(self.seed, TRAINING, step, block) for block in self.blocks]
        return torch.from_numpy(self.order(epoch)[own]), generators


def image_batches(
    images: Images, how: Augmentation, batch_size: int, seed: int, launch: Launch, device: torch.device
) -> Batch:
    """Batches of two fresh views [b, C, H, W] of the same images; b is this process's share.

    Raises OptionError for fewer images than a batch, or a batch that the processes cannot share.
    """
    rows = _Rows(len(images.pixels), batch_size, seed, launch)
    shape = images.pixels.shape[1:]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen, generators = rows(step)
        x = as_floats(images.pixels[chosen], device)
        done = [join([draw(how, BLOCK, shape, g) for g in generators]) for _ in range(2)]
        return _augmented(x, done[0]), _augmented(x, done[1])

    return batch


def _augmented(images: Tensor, done: Parameters) -> Tensor:
    """Views of full precision, whatever the training is of: an autocast around them would round crops and colours."""
    with torch.autocast(images.device.type, enabled=False):
        return augment(images, done)


def feature_batches(features: Tensor, batch_size: int, seed: int, launch: Launch) -> Batch:
    """Batches of two of the views of the same images, [b, D], out of stored features [N, V, D], V >= 2. Raises the same."""
    rows = _Rows(len(features), batch_size, seed, launch)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen, generators = rows(step)
        drawn = [torch.rand(BLOCK, features.shape[1], generator=g) for g in generators]
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
        return (_augmented(x, one) for x, one in zip(images.chunks(device), done, strict=True))

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
