"""Images in memory and image files: arrays, lists of PIL images, folders and lists of paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import DataError
from .source_base import LABEL_COLUMNS, Item, Source, check_labels, digest, file_stamp, item_digest, join

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
IMAGE_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".jp2",
    ".avif",
)


class ArraySource(Source):
    """Images in one array: uint8 [N,H,W,3], [N,H,W] or [N,3,H,W], or float [N,C,H,W] taken as preprocessed."""

    kind = "array"

    def __init__(self, images: np.ndarray | torch.Tensor, labels: Any = None, name: str = "array") -> None:
        array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images
        self.images, self.ready = _check_images(array)
        self.length, self.name = len(array), name
        self.labels = check_labels(labels, self.length)

    def item(self, row: int) -> Item:
        image = self.images[row]
        label = None if self.labels is None else self.labels[row]
        if self.ready:
            image = torch.from_numpy(np.array(image, dtype=np.float32))
        return Item(image, int(label) if label is not None and label.ndim == 0 else label)

    def _fingerprint(self, progress: bool) -> str:
        return digest("array", self.images, self.labels)

    def column(self, name: str) -> np.ndarray:
        if name in LABEL_COLUMNS and self.labels is not None:
            return self.labels
        raise DataError(f"no column {name!r}: arrays have {'labels only' if self.labels is not None else 'no labels'}")


def _check_images(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """uint8 images as [N,H,W] or [N,H,W,C] with False, or float [N,C,H,W] with True (ready for the backbone)."""
    shape = list(array.shape)
    if array.dtype == np.uint8 and array.ndim == 3 and shape[2] != 3:
        return array, False
    if array.dtype == np.uint8 and array.ndim == 4:
        if shape[3] in (1, 3, 4):
            return array, False
        if shape[1] in (1, 3, 4):
            return array.transpose(0, 2, 3, 1), False
    if array.dtype.kind == "f" and array.ndim == 4 and shape[1] in (1, 3, 4):
        return array, True
    raise DataError(
        f"cannot tell the images in an array of {array.dtype} {shape}: expected uint8 [N,H,W,3], [N,H,W] or [N,3,H,W], "
        "or float [N,3,H,W] that is already preprocessed. Add a leading axis for a single image."
    )


class ListSource(Source):
    """A list of PIL images or arrays [H,W,3], with labels or without."""

    kind = "list"

    def __init__(self, images: Sequence[Any], labels: Any = None, name: str = "list") -> None:
        self.images, self.length, self.name = list(images), len(images), name
        self.labels = check_labels(labels, self.length)

    def item(self, row: int) -> Item:
        label = None if self.labels is None else self.labels[row]
        return Item(self.images[row], int(label) if label is not None and label.ndim == 0 else label)

    def _fingerprint(self, progress: bool) -> str:
        return join(item_digest(self, row) for row in range(len(self)))


class FileSource(Source):
    """Image files, in the given order; `base` is what is left out of the fingerprint, so a folder may move."""

    kind = "files"

    def __init__(
        self, paths: Sequence[str | Path], labels: Any = None, *, base: Path | None = None, name: str = "files"
    ) -> None:
        self.paths = [str(path) for path in paths]
        self.base, self.length, self.name = base, len(self.paths), name
        self.labels = check_labels(labels, self.length)
        self.classes: list[str] | None = None

    def item(self, row: int) -> Item:
        label = None if self.labels is None else self.labels[row]
        return Item(self.paths[row], int(label) if label is not None and label.ndim == 0 else label)

    def names(self) -> list[str]:
        return self.paths

    def _fingerprint(self, progress: bool) -> str:
        paths = [Path(path) for path in self.paths]
        short = [str(path.relative_to(self.base) if self.base else path.absolute()) for path in paths]
        return digest("files", short, np.array([file_stamp(path) for path in paths]), self.labels)


def open_folder(folder: Path, split: str) -> FileSource:
    """A folder of images: class subfolders give labels (sorted names), a flat folder gives none.

    A folder that holds only splits (train, val, test, ...) is entered at `split`. Raises DataError when there is no
    image, or images both beside and inside subfolders.
    """

    def images(where: Path, deep: bool) -> list[Path]:
        found = where.rglob("*") if deep else where.iterdir()
        visible = (path for path in found if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."))
        return sorted(path for path in visible if path.is_file())

    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    flat = images(folder, deep=False)
    names = [p.name for p in subfolders]
    if not flat and names and set(names) <= SPLIT_NAMES:
        if split not in names:
            raise DataError(
                f"{folder} has the splits {', '.join(names)}, not {split!r}; give the folder of one of them"
            )
        source = open_folder(folder / split, split)
        source.name, source.split = folder.name, split
        return source
    inside = [images(p, deep=True) for p in subfolders]
    if flat and any(inside):
        raise DataError(
            f"{folder} has images both beside its subfolders and inside them: class subfolders give labels, a flat "
            "folder gives none, and this is neither. Move one kind away, or give a list of paths."
        )
    paths = flat or [path for group in inside for path in group]
    if not paths:
        raise DataError(f"no image in {folder} (endings: {', '.join(IMAGE_ENDINGS)})")
    labels = None if flat else np.repeat(np.arange(len(inside)), [len(group) for group in inside])
    source = FileSource(paths, labels, base=folder, name=folder.name)
    source.kind, source.classes = "folder", None if flat else names
    return source
