"""Altered copies of a data set, made while they are read: what corruptions and crops are scored on.

The store is keyed by the images' content and the alteration's name, so the backbone sees every altered image once, and
no copy of the data is held in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..adapters.data import open_source
from ..adapters.errors import DataError, OptionError
from ..adapters.perturbations import center_crop
from ..adapters.source_base import LABEL_COLUMNS, Item, Source, digest
from ..adapters.source_loader import load_image
from ..adapters.store import MANIFEST
from .command import TableCommand
from .corruptions import VERSION, corrupt
from .datasets import is_named, open_named
from .inputs import Scored, from_features, read
from .score_rows import REFERENCE

Change = Callable[[Image.Image], Image.Image]


class AlteredSource(Source):
    """Some rows of a map-style source (None: all), each image passed through `change` (None: as it is) when it is read.

    `key` names the change with all its options: two changes of one key share stored features.
    Raises DataError for a stream, and on reading for float images, which are preprocessed already.
    """

    def __init__(
        self, inner: Source, change: Change | None = None, key: str = "", rows: np.ndarray | None = None
    ) -> None:
        if inner.length is None:
            raise DataError(f"the {inner.kind} {inner.name!r} is a stream; altered copies need data with numbered rows")
        self.inner, self.change, self.key = inner, change, key
        self.rows = np.arange(inner.length) if rows is None else np.asarray(rows, np.int64)
        self.kind, self.name, self.split = f"altered {inner.kind}", f"{inner.name} ({key})", inner.split
        self.length, self.num_workers = len(self.rows), inner.num_workers
        self.taken_from = inner if change is None else None
        """The source that these images are some of, unaltered; None: they are altered."""

    def item(self, row: int) -> Item:
        item = self.inner.item(int(self.rows[row]))
        if self.change is None:
            return item
        image = load_image(item.image)
        if not isinstance(image, Image.Image):
            raise DataError("float images are taken as preprocessed and cannot be altered; give PIL or uint8 images")
        return Item(self.change(image), item.label)

    def column(self, name: str) -> np.ndarray:
        return super().column(name) if name in LABEL_COLUMNS else self.inner.column(name)[self.rows]

    def names(self) -> list[str] | None:
        names = self.inner.names()
        return None if names is None else [names[row] for row in self.rows]

    def _fingerprint(self, progress: bool) -> str:
        return digest("altered", self.inner.fingerprint(progress), self.key, self.rows)


def holds_images(place: str) -> bool:
    """Whether it names images, rather than a score file (.npz, .csv) or a folder of stored features."""
    path = Path(place).expanduser()
    return path.suffix not in (".npz", ".csv") and not (path / MANIFEST).is_file()


def open_rows(data: Any, rows: int | None = None, seed: int = 0, split: str = "test") -> Source:
    """A source of `rows` images of the data (None, or as many as there are: all), drawn by the seed and kept in order.

    `data`: whatever `open_source` takes, or the name of a set (`datasets.SETS`), which a file or folder of that name wins over.
    Raises OptionError for fewer than one row, DataError for data that cannot be opened and for a stream.
    """
    if rows is not None and rows < 1:
        raise OptionError(f"rows={rows} was given; expected at least 1")
    named = isinstance(data, str) and is_named(data)
    source = open_named(data, split) if named else open_source(data, split)
    if source.length is None or rows is None or rows >= source.length:
        return source
    chosen = np.sort(np.random.default_rng(seed).permutation(source.length)[:rows])
    return AlteredSource(source, None, f"{rows} rows of seed {seed}", chosen)


def corrupted(source: Source, kind: str, severity: int, seed: int = 0) -> Source:
    """The source's images under a corruption of `corruptions.KINDS`."""
    change = partial(corrupt, kind=kind, severity=severity, seed=seed)
    return AlteredSource(source, change, f"{kind} {severity}, seed {seed}, version {VERSION}")


def cropped(source: Source, fraction: float) -> Source:
    """The middle of the source's images, that share of each side, enlarged again (`perturbations.center_crop`)."""
    return AlteredSource(source, partial(center_crop, fraction=fraction), f"centre crop {fraction:.6g}")


def scored_source(model: Any, source: Source, cache_dir: Any = None) -> Scored:
    """Features of a source, from the store where they are, with the scores of the model's heads.

    `model`: a fitted `UncertainModel`, or a `Backbone`, which has no heads.
    """
    backbone = getattr(model, "backbone", model)
    features = backbone.extract(source, cache_dir=cache_dir, progress=False)
    return from_features(source.name, features, model)


@dataclass(kw_only=True)
class ViewsCommand(TableCommand):
    """The options of a table whose rows are scores of images and of their altered copies."""

    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    held_out: str | None = None
    """labelled images of the classifier that are neither scored nor trained on: its temperature is fitted on them"""
    reference: str = REFERENCE
    """score that paired differences are taken from"""

    def fitted_on(self, model: Any) -> tuple[Scored | None, Scored | None]:
        """The sets of --train and --held-out."""
        train = None if self.train is None else read(self.train, model, "train")
        return train, None if self.held_out is None else read(self.held_out, model, self.split)
