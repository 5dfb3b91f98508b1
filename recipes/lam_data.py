"""Images of the recipe `lam`: training, validation and test apart, and sets of other images (OOD).

A closed set (FashionMNIST, CIFAR-10) holds out images of its training part; an open one (Omniglot, CUB-200, LFW, MSLS)
holds out whole characters, species, people or cities. Test images are looked at once, when everything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels_of

from ..adapters.errors import DataError, OptionError
from ..adapters.source_arrays import ArraySource, FileSource
from ..adapters.source_base import Source
from ..adapters.source_loader import load_image
from ..eval.dataset_classes import CLASSES, shared_classes
from ..eval.datasets import SETS, default_data_dir, open_named
from .augmentations import Augmentation, augment, draw
from .image_files import in_threads, open_image
from .lam_folders import Files, hold_out, read_cub200, read_lfw, read_msls
from .small_image_networks import RESNET_STATISTICS

Dataset = Literal["fashion-mnist", "cifar10", "omniglot", "cub200", "lfw", "msls"]
SIDES: dict[str, tuple[int, int, int]] = {
    "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "omniglot": (1, 28, 28),
}  # fmt: skip
OTHERS: dict[str, tuple[str, ...]] = {
    "fashion-mnist": ("mnist",), "cifar10": ("tiny-imagenet", "dtd"), "omniglot": ("other-alphabets", "notmnist"),
    "cub200": ("cars196",), "lfw": ("cub200",), "msls": (),
}  # fmt: skip
"""The OOD sets of each data set, unless others are named."""
CARS = 98
"""Classes of Cars196 that metric learning trains on, as a rule: the others are the OOD set of CUB-200."""
SPLIT = 400  # place of the random numbers
CROPS = Augmentation(jitter=0.0, grayscale=0.0)


class Pictures(Protocol):
    """Images that a network takes, by their rows."""

    size: tuple[int, int, int]

    def __len__(self) -> int: ...

    def training(self, rows: np.ndarray, generators: Sequence[torch.Generator]) -> Tensor:
        """float32 [B, C, H, W], altered at random: each generator is of an equal share of the rows, in their order."""
        ...

    def plain(self, rows: np.ndarray) -> Tensor:
        """float32 [B, C, H, W], as they are."""
        ...

    def first(self, count: int) -> Pictures:
        """At most so many of them, evenly spaced."""
        ...

    def fingerprint(self) -> np.ndarray | str: ...

    def put(self, device: torch.device) -> None:
        """Where it helps, onto the device: answers are there then."""
        ...


class PixelPictures:
    """Small images in memory, uint8 [N, C, H, W], which lie on the device after `put`; none is altered, as in the paper."""

    def __init__(self, pixels: np.ndarray | Tensor, normalised: bool) -> None:
        self.pixels, self.normalised = torch.as_tensor(pixels), normalised
        self.size: tuple[int, int, int] = tuple(self.pixels.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.pixels)

    def plain(self, rows: np.ndarray) -> Tensor:
        x = self.pixels[torch.from_numpy(rows).to(self.pixels.device)].float() / 255.0
        return (x - _numbers(0).to(x)) / _numbers(1).to(x) if self.normalised else x

    def training(self, rows: np.ndarray, generators: Sequence[torch.Generator]) -> Tensor:
        return self.plain(rows)

    def first(self, count: int) -> PixelPictures:
        rows = torch.from_numpy(_spaced(len(self), count))
        return PixelPictures(self.pixels[rows.to(self.pixels.device)], self.normalised)

    def fingerprint(self) -> np.ndarray:
        return self.pixels.cpu().numpy()

    def put(self, device: torch.device) -> None:
        self.pixels = self.pixels.to(device)


class FilePictures:
    """Image files, read when asked for: random crops and mirrored images to train on, else the middle of the image."""

    def __init__(self, paths: Sequence[str | Path], base: Path | None, side: int) -> None:
        self.paths, self.base, self.size = [str(path) for path in paths], base, (3, side, side)

    def __len__(self) -> int:
        return len(self.paths)

    def plain(self, rows: np.ndarray) -> Tensor:
        side = self.size[1]
        whole = round(side * 256 / 227)

        def one(row: int) -> Tensor:
            image = open_image(self.paths[row])
            return pixels_of.center_crop(
                pixels_of.pil_to_tensor(pixels_of.resize(image, [whole], antialias=True)), [side]
            )

        return (torch.stack(in_threads(one, rows.tolist())).float() / 255.0 - _numbers(0)) / _numbers(1)

    def training(self, rows: np.ndarray, generators: Sequence[torch.Generator]) -> Tensor:
        images = in_threads(lambda row: pixels_of.pil_to_tensor(open_image(self.paths[row])), rows.tolist())
        each, parts = len(rows) // len(generators), []
        for place, x in enumerate(images):
            done = draw(CROPS, 1, x.shape, generators[place // each])
            parts.append(augment(x[None].float() / 255.0, done, self.size[1:])[0])
        return (torch.stack(parts) - _numbers(0)) / _numbers(1)

    def first(self, count: int) -> FilePictures:
        return FilePictures([self.paths[i] for i in _spaced(len(self), count)], self.base, self.size[1])

    def fingerprint(self) -> str:
        return FileSource(self.paths, base=self.base).fingerprint()

    def put(self, device: torch.device) -> None:
        """They stay in their files."""


@dataclass(frozen=True)
class Part:
    """Images and what they show: labels int64 [N], or positions float64 [N, 2] in metres. query: bool [N], which of them ask
    and which are found; None: all do both, and none finds itself."""

    pictures: Pictures
    target: np.ndarray
    query: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def of_places(self) -> bool:
        return self.target.ndim == 2

    def first(self, count: int) -> Part:
        rows = _spaced(len(self), count)
        return Part(self.pictures.first(count), self.target[rows], None if self.query is None else self.query[rows])


@dataclass(frozen=True)
class Sets:
    """What a run works on; no image is in two of them."""

    train: Part
    validation: Part
    test: Part
    ood: dict[str, Pictures]

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.train, self.validation, self.test

    def put(self, device: torch.device) -> None:
        """All of them, where it helps."""
        for pictures in (*(part.pictures for part in self.parts), *self.ood.values()):
            pictures.put(device)


@dataclass(frozen=True)
class DataOptions:
    """Which images: see the options of the recipe."""

    dataset: Dataset
    data_dir: Path | None
    ood: tuple[str, ...] | None
    train_images: int | None
    test_images: int | None
    held_out: float
    side: int
    seed: int


def load_sets(options: DataOptions) -> Sets:
    """All images of a run. Raises DataError for what is not there, is damaged or is too little, OptionError for unknown names."""
    root = Path(options.data_dir or default_data_dir()).expanduser()
    names = OTHERS[options.dataset] if options.ood is None else options.ood
    for name in names:
        known = [*SETS, "cub200"] + ["other-alphabets"] * (options.dataset == "omniglot")
        if name not in known or name == options.dataset:
            raise OptionError(f"--ood {name} was given; expected another set, of {', '.join(known)}")
    rng = np.random.default_rng((SPLIT, options.seed))
    if options.dataset in ("fashion-mnist", "cifar10"):
        parts = _closed(options, root, rng)
    elif options.dataset == "omniglot":
        parts = _omniglot(options, root, rng)
    else:
        parts = _of_files(options, root, rng)
    if options.train_images is not None:
        parts[0] = parts[0].first(options.train_images)
    if options.test_images is not None:
        parts[2] = parts[2].first(options.test_images)
    size = parts[0].pictures.size
    ood = {name: _ood(name, options, root, size) for name in names}
    if options.test_images is not None:
        ood = {name: one.first(options.test_images) for name, one in ood.items()}
    return Sets(parts[0], parts[1], parts[2], ood)


def _closed(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    normalised, size = options.dataset == "cifar10", SIDES[options.dataset]
    train, test = (_small(open_named(options.dataset, split, root), size) for split in ("train", "test"))
    order = rng.permutation(len(train[1]))
    held, rest = np.split(order, [max(1, round(options.held_out * len(order)))])
    parts = [(train[0][rows], train[1][rows]) for rows in (np.sort(rest), np.sort(held))]
    return [Part(PixelPictures(pixels, normalised), label) for pixels, label in (*parts, test)]


def _omniglot(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    """Characters of the training alphabets, apart: a share held out, as many to test on, the rest to train on."""
    pixels, label = _small(open_named("omniglot", "train", root), SIDES["omniglot"])
    characters = rng.permutation(np.unique(label))
    count = max(1, round(options.held_out * len(characters)))
    if len(characters) < 2 * count + 2:
        raise DataError(f"omniglot: {len(characters)} characters are too few to hold out {count} twice")
    held, asked, rest = np.split(characters, [count, 2 * count])
    rows = [np.flatnonzero(np.isin(label, part)) for part in (rest, held, asked)]
    return [Part(PixelPictures(255 - pixels[part], False), label[part]) for part in rows]


def _of_files(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    read = {"cub200": read_cub200, "lfw": read_lfw, "msls": read_msls}[options.dataset]
    train, test = read(root)
    return [_part(files, options.side) for files in (*hold_out(train, options.held_out, rng), test)]


def _part(files: Files, side: int) -> Part:
    return Part(FilePictures(files.paths, files.base, side), files.target, files.query)


def _ood(name: str, options: DataOptions, root: Path, size: tuple[int, int, int]) -> Pictures:
    of_files = options.dataset not in SIDES
    if name == "cub200":
        files = read_cub200(root)[1]
        if of_files:
            return FilePictures(files.paths, files.base, options.side)
        source: Source = FileSource(files.paths, files.target, base=files.base)
    else:
        source = open_named("omniglot" if name == "other-alphabets" else name, "test", root)
    rows = np.arange(len(source))
    shared = shared_classes(options.dataset, name)
    if shared:
        rows = rows[~np.isin(source.column("label"), [CLASSES[name].index(one) for one in shared])]
    if name == "cars196":
        rows = rows[source.column("label") >= CARS]
    if options.test_images is not None:
        rows = rows[_spaced(len(rows), options.test_images)]
    if of_files:
        paths = source.names()
        if paths is None:
            raise OptionError(f"--ood {name} of --dataset {options.dataset}: a set of image files is expected")
        return FilePictures([paths[row] for row in rows], None, options.side)
    pixels = _pixels(source, rows, size)
    return PixelPictures(
        255 - pixels if name in ("other-alphabets", "omniglot") else pixels, options.dataset == "cifar10"
    )


def _small(source: Source, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(source))
    return _pixels(source, rows, size), np.asarray(source.column("label"), dtype=np.int64)


def _pixels(source: Source, rows: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, C, H, W]: the largest middle part of the image's shape, resized."""
    channels, height, width = size
    if isinstance(source, ArraySource):
        array = source.images if source.images.ndim == 4 else source.images[..., None]
        if array.dtype == np.uint8 and array.shape[1:] == (height, width, channels):
            return np.ascontiguousarray(array[rows].transpose(0, 3, 1, 2))

    def one(row: int) -> np.ndarray:
        image = load_image(source.item(row).image)
        if isinstance(image, Tensor):
            raise DataError(f"{source.name}: images are expected, row {row} is a preprocessed tensor")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        array = np.asarray(image)
        return array[None] if channels == 1 else array.transpose(2, 0, 1)

    return np.stack([one(int(row)) for row in rows])


def _numbers(which: int) -> Tensor:
    return torch.tensor(RESNET_STATISTICS[which]).view(3, 1, 1)


def _spaced(length: int, count: int) -> np.ndarray:
    return np.arange(length) if count >= length else np.linspace(0, length - 1, count).round().astype(np.int64)
