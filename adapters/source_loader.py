"""From a source to preprocessed batches: decoding and augmentation in loader workers, broken images told apart."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .errors import BackboneError, DataError, PosthocError
from .images import Transform, is_ready, to_pil
from .source_base import Item, Source, forked_rng


class Broken(NamedTuple):
    """An image that could not be read: its row, its file (or "row N") and why."""

    row: int
    name: str
    why: str


class Batch(NamedTuple):
    """Rows that were read: numbers, images [B*V,C,H,W] (None if all are broken), labels; and those that were not."""

    row: list[int]
    images: Tensor | None
    label: list[Any]
    broken: list[Broken]
    ready: bool = False  # the images came as float tensors, untouched by the transform


def load_image(image: Any) -> Image.Image | Tensor:
    """An RGB PIL image from a path, encoded bytes, {"bytes", "path"}, PIL image or uint8 array; float images as tensor.

    Raises whatever the decoder raises for a damaged image.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str) and "://" in image:
        import fsspec

        with fsspec.open(image, "rb") as file:
            image = file.read()
    if isinstance(image, bytes | str | Path):
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()  # decodes: a truncated file fails here, not later in the transform
            return to_pil(opened)
    if isinstance(image, Image.Image):
        image.load()
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)  # the usual array needs no more checks: they cost as much as a small network
    return torch.as_tensor(image) if is_ready(image) else to_pil(image)


def image_name(image: Any) -> str | None:
    """The file an item's image comes from, None if it is not known."""
    if isinstance(image, dict):
        image = image.get("path")
    return str(image) if isinstance(image, str | Path) else None


class _Reader(Dataset):
    """Reads one job: a row number, or (row number, item) of a stream. Runs in the loader's workers."""

    def __init__(self, source: Source, transform: Transform | None, views: int, seed: int) -> None:
        self.source, self.transform, self.views, self.seed = source, transform, views, seed

    def __getitem__(self, job: int | tuple[int, Item]) -> tuple[int, Tensor, Any, bool] | Broken | PosthocError:
        row, item = job if isinstance(job, tuple) else (job, None)
        try:
            try:
                item = self.source.item(row) if item is None else item
                image = load_image(item.image)
            except (PosthocError, MemoryError):
                raise
            except Exception as error:  # a decoder may raise nearly anything for a damaged file
                why = re.sub(r" <_io\.\w+ object at \w+>", "", str(error))
                return Broken(row, self._name(row, item), f"{type(error).__name__}: {why}")
            return row, self._prepare(row, image), item.label, isinstance(image, Tensor)
        except PosthocError as error:  # returned, not raised: a worker's traceback would bury the message
            return type(error)(f"{self._name(row, item)}: {error}")

    def _name(self, row: int, item: Item | None) -> str:
        name = image_name(item.image) if item is not None else None
        if name is None and item is None and (names := self.source.names()) is not None:
            name = names[row]
        return f"row {row}" if name is None else f"{name} (row {row})"

    def _prepare(self, row: int, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            if self.views > 1:
                raise DataError(
                    f"views={self.views} needs images to augment, but this is a float tensor, already "
                    "preprocessed. Give PIL or uint8 images (leave the data set's own transform out), or views=1."
                )
            if image.ndim != 3:
                raise DataError(f"a float tensor {list(image.shape)} was given; expected one image [C,H,W]")
            return image.to(torch.float32)
        if self.transform is None:
            raise BackboneError(
                "the backbone has no preprocessing, so PIL and uint8 images cannot be prepared for it. Give "
                "`transform=` (PIL image to tensor) when wrapping, or data that is already preprocessed."
            )
        if self.views == 1:
            return self.transform(image)
        views = []
        with forked_rng() as reseed:
            for view in range(self.views):
                reseed(self.seed, row, view)
                views.append(self.transform(image))
        return torch.stack(views)


def _collate(results: list[Any]) -> Batch | PosthocError:
    good: list[tuple[int, Tensor, Any, bool]] = []
    broken: list[Broken] = []
    for result in results:
        if isinstance(result, PosthocError):
            return result
        if isinstance(result, Broken):
            broken.append(result)
        else:
            good.append(result)
    if not good:
        return Batch([], None, [], broken)
    rows, images, labels, ready = zip(*good, strict=True)
    if len({image.shape for image in images}) > 1:
        shapes = ", ".join(sorted({str(list(image.shape)) for image in images}))
        return DataError(f"images of one batch have different shapes: {shapes}. Resize them to one size.")
    batch = default_collate(list(images))
    return Batch(list(rows), batch.flatten(0, 1) if batch.ndim == 5 else batch, list(labels), broken, any(ready))


def workers_for(source: Source, device: torch.device, processes: int = 1) -> int:
    """Loader workers when nobody asked for a number: the DataLoader's own, none on CPU, else up to 8 of the cores."""
    if source.num_workers is not None:
        return source.num_workers
    if device.type == "cpu":
        return 0  # the backbone already uses every core
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)  # processes that share this machine's cores
    return min(8, len(os.sched_getaffinity(0)) // here if hasattr(os, "sched_getaffinity") else 4)


def read_batches(
    source: Source,
    jobs: Iterable[list[Any]],
    transform: Transform | None,
    *,
    views: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """One `Batch` for each list of jobs (row numbers, or (row, item) pairs of a stream), in order.

    With views > 1 the transform is random: its randomness depends on (seed, row, view) alone, so it is the same for
    every batch size, number of workers and processes; no global random state is changed. Raises DataError or
    BackboneError for data that cannot be used as it is; broken images are in the batch.
    """
    loader: DataLoader = DataLoader(
        _Reader(source, transform, views, seed),
        batch_sampler=jobs,  # type: ignore[arg-type]
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed: not from the caller's generator
    )
    for batch in loader:
        if isinstance(batch, PosthocError):
            raise batch
        yield batch
