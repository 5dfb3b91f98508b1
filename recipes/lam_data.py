"""Images of the recipe `lam`: training, validation and test apart, and sets of other images (OOD).

A closed set (FashionMNIST, CIFAR-10) holds out images of its training part; an open one (Omniglot, CUB-200, LFW, MSLS)
holds out whole characters, species, people or cities. Test images are looked at once, when everything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from ..adapters.source_arrays import FileSource
from ..adapters.source_base import Source
from ..eval.datasets import SETS, default_data_dir, open_named
from .image_files import FileImages, Pictures
from .image_sets import Chosen, bright, rows_of_other_classes, shaped, spread_over
from .lam_folders import Files, hold_out, read_cub200, read_lfw, read_msls
from .view_batches import Images

Dataset = Literal["fashion-mnist", "cifar10", "omniglot", "cub200", "lfw", "msls"]
SHAPES: dict[str, tuple[int, int]] = {"fashion-mnist": (1, 28), "cifar10": (3, 32), "omniglot": (1, 28)}
"""Channels and side of the sets of small images."""
OTHERS: dict[str, tuple[str, ...]] = {
    "fashion-mnist": ("mnist",), "cifar10": ("tiny-imagenet", "dtd"), "omniglot": ("other-alphabets", "notmnist"),
    "cub200": ("cars196",), "lfw": ("cub200",), "msls": (),
}  # fmt: skip
"""The OOD sets of each data set, unless others are named."""
CARS = 98
"""Classes of Cars196 that metric learning trains on, as a rule: the others are the OOD set of CUB-200."""
SPLIT = 400  # place of the random numbers
MARGIN = 256 / 227
"""The shorter side of a test image before its middle is cut out, over the side of the cut."""


@dataclass(frozen=True)
class Part:
    """Images, whose labels are classes, int64 [N], or positions, float64 [N, 2] in metres. query: bool [N], which of them ask
    and which are found; None: all do both, and none finds itself."""

    pictures: Pictures
    query: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def target(self) -> np.ndarray:
        return self.pictures.label

    @property
    def of_places(self) -> bool:
        return self.target.ndim == 2

    def some(self, count: int) -> Part:
        """At most so many of them, evenly spread."""
        rows = spread_over(np.arange(len(self)), count)
        return Part(self.pictures.rows(rows), None if self.query is None else self.query[rows])


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

    def to(self, device: torch.device) -> Sets:
        """The same sets, on the device where they are not in files."""
        train, validation, test = (replace(part, pictures=part.pictures.to(device)) for part in self.parts)
        return Sets(train, validation, test, {name: one.to(device) for name, one in self.ood.items()})


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
        train, validation, test = _closed(options, root, rng)
    elif options.dataset == "omniglot":
        train, validation, test = _omniglot(options, root, rng)
    else:
        train, validation, test = _of_files(options, root, rng)
    if options.train_images is not None:
        train = train.some(options.train_images)
    if options.test_images is not None:
        test = test.some(options.test_images)
    return Sets(train, validation, test, {name: _ood(name, options, root) for name in names})


def _closed(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    train, test = (_small(options.dataset, open_named(options.dataset, split, root)) for split in ("train", "test"))
    order = rng.permutation(len(train))
    held, rest = np.split(order, [max(1, round(options.held_out * len(order)))])
    return [Part(images) for images in (train.rows(np.sort(rest)), train.rows(np.sort(held)), test)]


def _omniglot(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    """Characters of the training alphabets, apart: a share held out, as many to test on, the rest to train on."""
    images = _small("omniglot", open_named("omniglot", "train", root))
    characters = rng.permutation(np.unique(images.label))
    count = max(1, round(options.held_out * len(characters)))
    if len(characters) < 2 * count + 2:
        raise DataError(f"omniglot: {len(characters)} characters are too few to hold out {count} twice")
    held, asked, rest = np.split(characters, [count, 2 * count])
    inked = replace(images, pixels=bright("omniglot", images.pixels))
    return [Part(inked.rows(np.flatnonzero(np.isin(images.label, part)))) for part in (rest, held, asked)]


def _of_files(options: DataOptions, root: Path, rng: np.random.Generator) -> list[Part]:
    read = {"cub200": read_cub200, "lfw": read_lfw, "msls": read_msls}[options.dataset]
    train, test = read(root)
    return [
        Part(_pictures(files, options.side), files.query) for files in (*hold_out(train, options.held_out, rng), test)
    ]


def _pictures(files: Files, side: int) -> FileImages:
    return FileImages(files.paths, files.target, side, base=files.base, margin=MARGIN)


def _ood(name: str, options: DataOptions, root: Path) -> Pictures:
    """At most so many test images of another set, in the shape of the run's own."""
    if name == "cub200":
        files = read_cub200(root)[1]
        source: Source = FileSource(files.paths, files.target, base=files.base)
    else:
        files, source = None, open_named("omniglot" if name == "other-alphabets" else name, "test", root)
    rows, _ = rows_of_other_classes(options.dataset, name, source)
    if name == "cars196":
        rows = rows[source.column("label") >= CARS]
    rows = spread_over(rows, options.test_images or len(rows))
    if options.dataset in SHAPES:
        pixels = shaped(Chosen(source, rows), *SHAPES[options.dataset])
        return Images(bright("omniglot" if name == "other-alphabets" else name, pixels), rows)
    if files is not None:
        return _pictures(files, options.side).rows(rows)
    paths = source.names()
    if paths is None:
        raise OptionError(f"--ood {name} of --dataset {options.dataset}: a set of image files is expected")
    return FileImages([Path(paths[row]) for row in rows], rows, options.side, margin=MARGIN)


def _small(name: str, source: Source) -> Images:
    return Images(shaped(source, *SHAPES[name]), np.asarray(source.column("label"), dtype=np.int64))
