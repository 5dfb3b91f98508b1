"""Named sets as recipes take them: some of a set's rows, other sets beside the recipe's own, and all of them in one shape.

others, notes = other_sets(dataset, folder, most, test_images)  # every named set that is at hand
pixels = shaped(Chosen(source, rows), channels=1, side=28)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..adapters.errors import DataError
from ..adapters.source_arrays import ArraySource
from ..adapters.source_base import Item, Source, digest
from ..adapters.source_loader import load_image
from ..eval.dataset_classes import CLASSES, UNREMOVED, shared_classes
from ..eval.datasets import SETS, open_named
from .view_batches import Images


class Chosen(Source):
    """Some rows of another source, int64 [n], in that order."""

    kind = "rows of a source"

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.name, self.length = source.name, len(rows)

    def item(self, row: int) -> Item:
        return self.source.item(int(self.rows[row]))

    def _fingerprint(self, progress: bool) -> str:
        return digest("rows", self.source.fingerprint(progress), self.rows)


def spread_over(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]


def other_sources(dataset: str, data_dir: Path | None, most: int) -> tuple[dict[str, Chosen], dict[str, str]]:
    """The test images of every other named set that is at hand, and notes by the set's name.

    At most so many of each, evenly spread over the set. Images of classes that both sets have are left out
    (`eval.dataset_classes`). A set whose files are damaged is left out, and the note says why.
    """
    found: dict[str, Chosen] = {}
    notes: dict[str, str] = {}
    for name in SETS:
        if name == dataset:
            continue
        try:
            source = open_named(name, "test", data_dir)
        except DataError as error:
            if " are not in " not in str(error):  # there, and damaged
                notes[name] = str(error)
            continue
        rows, note = rows_of_other_classes(dataset, name, source)
        found[name] = Chosen(source, spread_over(rows, most))
        if note:
            notes[name] = note
    return found, notes


def rows_of_other_classes(inside: str, name: str, source: Source) -> tuple[np.ndarray, str]:
    """The rows of the set `name`, int64, whose classes the set `inside` does not have, and a note where it has some of them."""
    rows = np.arange(len(source))
    shared = shared_classes(inside, name)
    if not shared:
        return rows, UNREMOVED.get(frozenset((inside, name)), "")
    odd = np.isin(source.column("label"), [CLASSES[name].index(one) for one in shared])
    return rows[~odd], f"without {odd.sum()} images of classes that {inside} has too"


def other_sets(
    dataset: str, data_dir: Path | None, most: int, like: Images
) -> tuple[dict[str, Images], dict[str, str]]:
    """`other_sources` in the shape of `like` (`shaped`); labels are rows. Strokes are bright on dark, as MNIST's, in all."""
    sources, notes = other_sources(dataset, data_dir, most)
    channels, side = like.size[:2]
    found = {name: bright(name, shaped(source, channels, side)) for name, source in sources.items()}
    return {name: Images(pixels, np.arange(len(pixels))) for name, pixels in found.items()}, notes


def bright(name: str, pixels: Tensor) -> Tensor:
    """Images uint8 of the set `name` with bright strokes on dark: Omniglot's are black on white."""
    return 255 - pixels if name == "omniglot" else pixels


def shaped(source: Source, channels: int, side: int) -> Tensor:
    """The images of a source, uint8 [N, channels, side, side], in grey or in colour.

    They are resized by their shorter side (bilinear, antialiased) and cut to the middle. Raises DataError for tensors.
    """
    whole, rows = (source.source, source.rows) if isinstance(source, Chosen) else (source, np.arange(len(source)))
    if isinstance(whole, ArraySource):
        array = whole.images if whole.images.ndim == 4 else whole.images[..., None]
        if array.dtype == np.uint8 and array.shape[1:] == (side, side, channels):
            return torch.from_numpy(np.ascontiguousarray(array[rows].transpose(0, 3, 1, 2)))
    pixels = torch.empty(len(rows), channels, side, side, dtype=torch.uint8)
    for place, row in enumerate(rows):
        image = load_image(whole.item(int(row)).image)
        if not isinstance(image, Image.Image):
            raise DataError(f"{source.name} holds tensors; expected images")
        pixels[place] = _square(image.convert("L" if channels == 1 else "RGB"), side)
    return pixels


def _square(image: Image.Image, side: int) -> Tensor:
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    left, top = (round((length - side) / 2) for length in (width, height))
    small = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    array = np.array(small)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
