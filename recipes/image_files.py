"""Images that stay in their files: read, cropped and augmented when they are asked for, by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels_of

from ..adapters.errors import DataError
from ..adapters.images import to_pil
from ..adapters.source_arrays import FileSource
from .augmentations import Augmentation, change, crop, draw, join
from .view_batches import Images, as_floats

CPU = torch.device("cpu")
CHUNK = 64
"""Images that are read at a time outside the training."""
MARGIN = 256 / 224
"""The shorter side before the middle is cut out, over the side of the cut."""
T = TypeVar("T")
R = TypeVar("R")


def open_image(path: str | Path, least: int | None = None) -> Any:
    """An image file as a PIL image, RGB. Raises DataError, naming it, where it cannot be read.

    least: pixels that both sides must keep; a JPEG that is twice, four or eight times as large is decoded that much smaller.
    """
    try:
        with Image.open(path) as opened:
            if least is not None:
                opened.draft(None, (least, least))
            opened.load()
            return to_pil(opened)
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def threads() -> int:
    """This process's share of the machine's cores; two at least, since files are waited for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def pool() -> ThreadPoolExecutor:
    """Threads that live as long as the process: a batch does not wait for new ones."""
    return ThreadPoolExecutor(threads(), "images")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not come along


def in_threads(one: Callable[[T], R], many: Sequence[T]) -> list[R]:
    """What `one` makes of each, in their order. Not to be called by what it calls."""
    return list(pool().map(one, many))


@dataclass(frozen=True)
class FileImages:
    """Square images of `side` pixels and `channels` colours (1 or 3) from files; `label` int64 [N] or float [N, L].

    As they are, images are resized and cut to the middle (`margin`: the shorter side before the cut, over `side`); with `whole`
    both sides are resized to the square, and nothing is cut off. `base`: the folder that the files' fingerprint leaves out.
    `device`: where views and images are, once they have left their files.
    """

    paths: Sequence[Path]
    label: np.ndarray
    side: int
    channels: int = 3
    whole: bool = False
    base: Path | None = None
    margin: float = MARGIN
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.side, self.side

    def rows(self, chosen: np.ndarray) -> FileImages:
        """Those images, int64 [n]."""
        return replace(self, paths=[self.paths[i] for i in chosen], label=self.label[chosen])

    def first(self, count: int) -> FileImages:
        return replace(self, paths=self.paths[:count], label=self.label[:count])

    def to(self, device: torch.device) -> FileImages:
        """They stay in their files; what is made of them is on the device."""
        return replace(self, device=device)

    def plain(self, chosen: np.ndarray) -> Tensor:
        """Those images as they are, float32 [n, C, side, side] in 0..1."""
        return as_floats(self._plain(chosen), self.device)

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """All images, float32 [n, C, side, side] in 0..1, `CHUNK` at a time."""
        for start in range(0, len(self), CHUNK):
            yield as_floats(self._plain(np.arange(start, min(start + CHUNK, len(self)))), device)

    def views(
        self, chosen: np.ndarray, how: Augmentation, generators: Sequence[torch.Generator], count: int = 1
    ) -> Tensor:
        """So many views of those images, one view of all after another, float32 [count n, C, side, side] in 0..1.

        Each image is read once; its views are cropped by threads, and leave for the device with 8 bits a number, where all of
        them get their colours together. Each generator is of an equal share of the images, in their order.
        """
        each, jobs = len(chosen) // len(generators), []
        least = round(self.side * (how.ratio[1] / how.scale[0]) ** 0.5)  # the smallest crop is not enlarged for it
        whole = in_threads(lambda row: pixels_of.pil_to_tensor(self._open(row, least)), chosen.tolist())
        for _ in range(count):
            for place, image in enumerate(whole):  # drawn in the order of the rows, whichever thread is first
                jobs.append((image, draw(how, 1, image.shape, generators[place // each])))
        crops = torch.stack(in_threads(lambda job: crop(*job, self.size[1:]), jobs))
        return change(as_floats(crops, self.device), join([done for _, done in jobs]))

    def source(self) -> FileSource:
        """The files without labels."""
        return FileSource(self.paths, base=self.base)

    def fingerprint(self) -> str:
        """What a run stands on that is made of them."""
        return self.source().fingerprint()

    def _open(self, row: int, least: int) -> Any:
        return open_image(self.paths[row], least).convert("L" if self.channels == 1 else "RGB")

    def _plain(self, chosen: np.ndarray) -> Tensor:
        """uint8 [n, C, side, side]."""

        size = [self.side, self.side] if self.whole else [round(self.margin * self.side)]

        def one(row: int) -> Tensor:  # decoded at twice the size or more, what is left is done by the filter
            small = pixels_of.pil_to_tensor(pixels_of.resize(self._open(row, 2 * size[0]), size, antialias=True))
            return small if self.whole else pixels_of.center_crop(small, [self.side])

        return torch.stack(in_threads(one, chosen.tolist()))


Pictures = Images | FileImages
"""In memory, or in files."""
