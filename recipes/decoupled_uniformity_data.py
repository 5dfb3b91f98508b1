"""Images of the recipe `decoupled_uniformity`: training, held-out and test ones, and what else a set says about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.source_arrays import FileSource
from ..adapters.source_base import Source
from ..eval.datasets import SETS, default_data_dir, open_named
from .decoupled_uniformity_folders import (
    PATHOLOGIES,
    Attributes,
    LabelledFiles,
    read_chexpert,
    read_cub,
    read_imagenet100,
    read_utzappos,
)
from .image_files import FileImages, Pictures
from .image_sets import Chosen, bright, shaped
from .pretraining import trained_on
from .view_batches import Images, images_of

if TYPE_CHECKING:
    from .decoupled_uniformity import UniformityConfig

READERS: dict[str, Callable[[Path], tuple[LabelledFiles, LabelledFiles]]] = {
    "imagenet100": read_imagenet100, "cub200": read_cub, "utzappos": read_utzappos, "chexpert": read_chexpert,
}  # fmt: skip
SEVERAL = ("chexpert",)
"""Sets whose images have several labels each."""
SIDES = {"utzappos": 32}
"""Pixels of a view where it is not `SIDE`."""
SIDE, OMNIGLOT = 224, 28
DRAWERS = 15
"""Of Omniglot's 20 drawers of a character those whose images are trained on; the others' are tested on."""
ORDER = 701  # place of the random numbers


@dataclass(frozen=True)
class Sets:
    """What a run works on.

    Attributes:
        train, held_out, test: apart. Labels int64 [N], or of CheXpert float32 [N, 13] with NaN.
        source: all training images that the set has, in its own order; label: theirs. rows: which of them `train` are, int64.
        attributes: what the set says about all of those; None: nothing. labels: names, where an image has several.
    """

    train: Pictures
    held_out: Pictures
    test: Pictures
    source: Source
    label: np.ndarray
    rows: np.ndarray
    attributes: Callable[[], Attributes] | None = None
    labels: tuple[str, ...] | None = None

    def content(self) -> list[np.ndarray | str]:
        """What the run stands on, of all images."""
        found: list[np.ndarray | str] = [self.rows]
        for part in (self.train, self.held_out, self.test):
            found += [part.label, part.fingerprint()]
        return found


def load_sets(config: UniformityConfig) -> Sets:
    """The images by the options.

    Raises OptionError for an unknown set, DataError for what is not there, damaged or too little.
    """
    root = Path(config.data_dir or default_data_dir()).expanduser()
    if config.dataset in READERS:
        return _of_files(config, root)
    if config.dataset == "omniglot":
        return _omniglot(config, root)
    if config.dataset not in SETS:
        raise OptionError(f"--dataset {config.dataset!r} is unknown; {suggest(config.dataset, [*READERS, *SETS])}")
    source = open_named(config.dataset, "train", root)
    train, test = images_of(source), images_of(open_named(config.dataset, "test", root))
    if train.pixels.shape[2] != train.pixels.shape[3] or train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(f"the images of {config.dataset} are {list(train.pixels.shape[1:])}; expected square ones")
    return _apart(config, source, np.arange(len(source)), train, test)


def _apart(
    config: UniformityConfig, source: Source, order: np.ndarray, train: Pictures, test: Pictures,
    attributes: Callable[[], Attributes] | None = None, label: np.ndarray | None = None,
) -> Sets:  # fmt: skip
    """The first images of `train`, which are the source's rows `order`, to train on; then those that are held out."""
    order = order[: config.train_images]
    kept = trained_on(len(order), config.batch_size)
    held_out = train.rows(np.arange(kept, len(order)))
    whole = train.label if label is None else label
    several = PATHOLOGIES if whole.ndim == 2 else None
    return Sets(train.first(kept), held_out, test, source, whole, order[:kept], attributes, several)


def _of_files(config: UniformityConfig, root: Path) -> Sets:
    train, test = READERS[config.dataset](root)
    side = config.size or SIDES.get(config.dataset, SIDE)
    channels = 1 if config.dataset == "chexpert" else 3
    whole = config.dataset in ("utzappos", "chexpert")
    order = np.random.default_rng(ORDER).permutation(len(train.paths))  # folders are sorted by class
    images = FileImages(train.paths, train.label, side, channels, whole, train.base)
    source = images.source()
    asked = FileImages(test.paths, test.label, side, channels, whole, test.base)
    return _apart(config, source, order, images.rows(order), asked, train.attributes, train.label)


def _omniglot(config: UniformityConfig, root: Path) -> Sets:
    """Characters of the training alphabets: most drawers' images to train on, the others' to test on. Ink is bright."""
    source = open_named("omniglot", "train", root)
    label = np.asarray(source.column("label"), np.int64)
    if isinstance(source, FileSource):  # ALPHABET/CHARACTER/NUMBER_DRAWER.png
        drawer = np.array([int(Path(path).stem.split("_")[-1]) for path in source.paths])
        alphabet = np.array([Path(path).parent.parent.name for path in source.paths])
    else:
        drawer, alphabet = np.asarray(source.column("drawer")), np.asarray(source.column("alphabet"))
    order = np.random.default_rng(ORDER).permutation(np.flatnonzero(drawer <= DRAWERS))
    train, test = (
        Images(bright("omniglot", shaped(Chosen(source, rows), 1, OMNIGLOT)), label[rows])
        for rows in (order, np.flatnonzero(drawer > DRAWERS))
    )

    def attributes() -> Attributes:
        values, names = [], []
        for group, column in (("alphabet", alphabet), ("character", label)):
            kinds, place = np.unique(column, return_inverse=True)
            values.append(np.eye(len(kinds), dtype=np.float32)[place])
            names += [f"{group}:{kind}" for kind in kinds]
        return Attributes(np.concatenate(values, 1), tuple(names))

    return _apart(config, source, order, train, test, attributes, label)
