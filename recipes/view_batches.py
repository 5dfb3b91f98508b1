"""Small images in memory, and batches of several augmented views of them for a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..adapters.distributed import Launch
from ..adapters.errors import DataError, OptionError
from ..adapters.source_arrays import ArraySource
from ..adapters.source_base import Source
from ..adapters.training import EpochOrder
from ..adapters.training_loop import step_generator
from ..eval.datasets import open_named
from .augmentations import Augmentation, augment, draw, join
from .running import row_blocks

BLOCK = 32
"""Rows of a batch that share a generator: so many rows, or a multiple, are a process's share."""
CHUNK, PIXELS = 512, 1 << 22
"""Images that are augmented or encoded at a time outside the training, and their pixels: fewer images of large ones."""
ORDER, TRAINING, FIXED = range(3)  # streams of random numbers


class Labelled(Protocol):
    """Images and their labels, one for each, in a fixed order."""

    @property
    def label(self) -> np.ndarray: ...

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All images as they are, float32 [n, C, H, W] in 0..1, some at a time."""
        ...


class Viewed(Protocol):
    """Images that views are made of: `Images`, or `image_files.FileImages`."""

    def __len__(self) -> int: ...
    def to(self, device: torch.device) -> Viewed: ...
    def views(
        self, chosen: np.ndarray, how: Augmentation, generators: Sequence[torch.Generator], count: int = 1
    ) -> Tensor: ...


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W] in memory and their labels int64 [N]."""

    pixels: Tensor
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def first(self, count: int) -> Images:
        return Images(self.pixels[:count], self.label[:count])

    def rows(self, chosen: np.ndarray) -> Images:
        """Those images, int64 [n]."""
        return Images(self._at(chosen), self.label[chosen])

    def to(self, device: torch.device) -> Images:
        """The same images on the device: what is made of them is there too."""
        return Images(self.pixels.to(device), self.label)

    def plain(self, chosen: np.ndarray) -> Tensor:
        """Those images as they are, float32 [n, C, H, W] in 0..1, where they lie."""
        return as_floats(self._at(chosen), self.pixels.device)

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All images, float32 in 0..1, `CHUNK` at a time, or as many as have `PIXELS`."""
        each = min(CHUNK, max(1, PIXELS // (self.size[1] * self.size[2])))
        return (as_floats(part, device) for part in self.pixels.split(each))

    def views(
        self, chosen: np.ndarray, how: Augmentation, generators: Sequence[torch.Generator], count: int = 1
    ) -> Tensor:
        """So many views of those images, one view of all after another, float32 [count n, C, H, W] in 0..1, where they lie.

        Each generator is of an equal share of the images, in their order.
        """
        each = len(chosen) // len(generators)
        done = join([draw(how, each, self.size, one) for _ in range(count) for one in generators])
        return augment(self.plain(chosen).repeat(count, 1, 1, 1), done)

    def fingerprint(self) -> np.ndarray:
        """What a run stands on that is made of them."""
        return self.pixels.cpu().numpy()

    def _at(self, chosen: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(chosen).to(self.pixels.device)]


def load_images(name: str, split: str, data_dir: Path | None) -> Images:
    """A named set whose images fit in memory. Raises DataError where it is not there, or holds files of images."""
    return images_of(open_named(name, split, data_dir))


def images_of(source: Source) -> Images:
    """The images and labels of a source in memory. Raises DataError where it is none."""
    if not isinstance(source, ArraySource):
        raise DataError(f"{source.name} is no array of small images; expected one that is, such as cifar10")
    array = source.images if source.images.ndim == 4 else source.images[..., None]
    return Images(torch.from_numpy(np.array(array.transpose(0, 3, 1, 2), order="C")), np.asarray(source.labels))


def as_floats(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 -> float32 in 0..1, on the device."""
    return pixels.to(device).float() / 255.0


class BlockRows:
    """This process's rows of each batch, int64 [b], in an order of their own for each epoch.

    each: batches of an epoch, of which what is left over is dropped. block: rows that share a generator; order: the stream of
    random numbers that the rows' order is of. Raises OptionError for fewer rows than a batch, or a batch that the processes
    cannot share.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int, launch: Launch, block: int = BLOCK, order: int = ORDER
    ) -> None:
        if rows < batch_size:
            raise OptionError(
                f"a batch of {batch_size} rows was asked for and there are {rows} images: give a smaller one"
            )
        self.blocks = row_blocks(batch_size, block, launch)
        self.own = slice(self.blocks.start * block, self.blocks.stop * block)
        self.order = EpochOrder(np.arange(rows), step_generator(seed, order).initial_seed())
        self.each, self.batch_size, self.seed = rows // batch_size, batch_size, seed

    def __call__(self, step: int) -> Tensor:
        return self.whole(step)[self.own]

    def whole(self, step: int) -> Tensor:
        """The rows of all processes."""
        epoch, place = divmod(step, self.each)
        return torch.from_numpy(self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size])

    def generators(self, step: int, stream: int = TRAINING) -> list[torch.Generator]:
        """One for each block of this process's rows; those of another stream draw other numbers."""
        return [step_generator(self.seed, stream, step, block) for block in self.blocks]


class ViewBatches:
    """Batches of `views` fresh views [b, C, H, W] in 0..1 of the same images; b is this process's share.

        batches = ViewBatches(images, Augmentation(), 256, seed, launch, device)
        first, second = batches(step)
        images.label[batches.rows(step)]  # of the same images

    Images in memory lie on the device, 8 bits a number, and are augmented there. Raises as `BlockRows`.
    """

    def __init__(
        self, images: Viewed, how: Augmentation, batch_size: int, seed: int, launch: Launch, device: torch.device,
        views: int = 2,
    ) -> None:  # fmt: skip
        self.rows = BlockRows(len(images), batch_size, seed, launch)
        self.images, self.how, self.device, self.views = images.to(device), how, device, views

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        rows, generators = self.rows(step).numpy(), self.rows.generators(step)
        return self.images.views(rows, self.how, generators, self.views).to(self.device).chunk(self.views)


@dataclass(frozen=True)
class Augmented:
    """A view of every image, `Labelled`: the same at each look, by the seed and the number of the view alone."""

    images: Labelled
    how: Augmentation
    seed: int
    view: int

    @property
    def label(self) -> np.ndarray:
        return self.images.label

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        for number, x in enumerate(self.images.chunks(device)):
            generator = step_generator(self.seed, FIXED, self.view, number)
            yield augment(x, draw(self.how, len(x), x.shape[1:], generator))


def kept(images: Labelled, device: torch.device) -> Images:
    """Images that are made only once, on the device, and kept on the CPU, 8 bits a number."""
    parts = [(255.0 * x.clamp(0.0, 1.0)).round().byte().cpu() for x in images.chunks(device)]
    return Images(torch.cat(parts), images.label)


def fixed_views(
    images: Labelled, how: Augmentation, seed: int, device: torch.device, views: int = 2
) -> tuple[Tensor, ...]:
    """Views [N, C, H, W] in 0..1 that are the same whenever they are asked for: they depend on (seed, view, row) alone."""
    each = (Augmented(images, how, seed, view) for view in range(views))
    return tuple(torch.cat(list(one.chunks(device))) for one in each)
