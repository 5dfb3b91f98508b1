"""Images that stay in their files: read, cropped and augmented for each batch, by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels_of

from ..adapters.distributed import Launch
from ..adapters.errors import DataError
from ..adapters.source_arrays import FileSource
from ..adapters.source_loader import load_image
from .augmentations import Augmentation, augment, draw
from .view_batches import BLOCK, BlockRows

THREADS = 8
CHUNK = 64
"""Images that are read at a time outside the training."""
MARGIN = 256 / 224
"""The shorter side before the middle is cut out, over the side of the cut."""
T = TypeVar("T")
R = TypeVar("R")


def open_image(path: str | Path) -> Any:
    """An image file as a PIL image, RGB. Raises DataError, naming it, where it cannot be read."""
    try:
        return load_image(str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def in_threads(one: Callable[[T], R], many: Sequence[T]) -> list[R]:
    """What `one` makes of each, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, many))


@dataclass(frozen=True)
class FileImages:
    """Square images of `side` pixels and `channels` colours (1 or 3) from files; `label` int64 [N] or float [N, L].

    As they are, images are resized and cut to the middle; with `whole` both sides are resized to the square, and nothing is
    cut off. `base`: the folder that the files' fingerprint leaves out.
    """

    paths: Sequence[Path]
    label: np.ndarray
    side: int
    channels: int = 3
    whole: bool = False
    base: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, chosen: np.ndarray) -> FileImages:
        """Those images, int64 [n]."""
        return replace(self, paths=[self.paths[i] for i in chosen], label=self.label[chosen])

    def first(self, count: int) -> FileImages:
        return replace(self, paths=self.paths[:count], label=self.label[:count])

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All images, float32 [n, C, side, side] in 0..1, `CHUNK` at a time."""
        for start in range(0, len(self), CHUNK):
            yield torch.stack(in_threads(self._plain, self.paths[start : start + CHUNK])).to(device) / 255.0

    def source(self) -> FileSource:
        """The files without labels."""
        return FileSource(self.paths, base=self.base)

    def decoded(self, path: Path) -> Tensor:
        """A whole image, uint8 [C, H, W]."""
        return pixels_of.pil_to_tensor(self._open(path))

    def _open(self, path: Path) -> Any:
        return open_image(path).convert("L" if self.channels == 1 else "RGB")

    def _plain(self, path: Path) -> Tensor:
        image = self._open(path)
        size = [self.side, self.side] if self.whole else [round(MARGIN * self.side)]
        small = pixels_of.pil_to_tensor(pixels_of.resize(image, size, antialias=True))
        return small if self.whole else pixels_of.center_crop(small, [self.side])


class FileViewBatches:
    """`ViewBatches` of images in files: each image of a batch is read once, and its views are cropped from the whole."""

    def __init__(
        self, images: FileImages, how: Augmentation, batch_size: int, seed: int, launch: Launch, device: torch.device,
        views: int = 2,
    ) -> None:  # fmt: skip
        self.rows = BlockRows(len(images), batch_size, seed, launch)
        self.images, self.how, self.device, self.views = images, how, device, views

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        whole = in_threads(lambda row: self.images.decoded(self.images.paths[row]), self.rows(step).tolist())
        generators, size = self.rows.generators(step), (self.images.side, self.images.side)
        jobs = []
        for _ in range(self.views):
            for place, image in enumerate(whole):  # drawn in the order of the rows, whichever thread is first
                jobs.append((image, draw(self.how, 1, image.shape, generators[place // BLOCK])))
        done = in_threads(lambda job: augment(job[0][None].float() / 255.0, job[1], size)[0], jobs)
        return torch.stack(done).to(self.device).chunk(self.views)
