"""What is told about image sets beside their scores: equal images by their pixels, shared classes, preprocessing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapters.errors import DataError
from ..adapters.features import Features
from ..adapters.files import replace_file
from ..adapters.source_base import Source
from ..adapters.source_loader import load_image
from ..adapters.store import read_manifest
from .dataset_classes import CLASSES, UNREMOVED, shared_classes
from .datasets import KIND

PIXELS = "pixels.keys"
"""The file beside stored features that keeps the hashes, so that images are decoded for them once."""
_BLOCK = 256


def pixel_keys(features: Features) -> np.ndarray | None:
    """A hash of each image's decoded pixels, str [N]; None where the images are not known and none were kept.

    Two images are equal if they decode to the same RGB pixels, whatever their files, and whatever batch they were in: the
    embedding of one image differs in its last bits with the size of the batch. The hashes of stored features are kept in
    their folder.
    """
    path = None if features.folder is None else features.folder / PIXELS
    known = None if path is None else _kept(path)
    if known is None and features.source is not None and features.source.length is not None:
        known = hash_pixels(features.source, np.load(path.parent / "row.npy") if path is not None else features.row)
        if path is not None:
            with io.BytesIO() as file, contextlib.suppress(OSError):  # a store that others own stays as it is
                np.save(file, known)
                replace_file(path, file.getvalue())
    if known is None or path is None:
        return known
    return known[np.searchsorted(np.load(path.parent / "row.npy"), features.row)]  # features may be some of the rows


def _kept(path: Path) -> np.ndarray | None:
    with contextlib.suppress(OSError, ValueError, EOFError):
        keys = np.load(path, allow_pickle=False)
        if keys.shape == np.load(path.parent / "row.npy", mmap_mode="r").shape:
            return keys
    return None


def hash_pixels(source: Source, rows: np.ndarray) -> np.ndarray:
    """The hash of these rows' images, str [N], read by as many threads as there are cores, a block at a time."""

    def key(row: int) -> str:
        image = load_image(source.item(row).image)
        array = np.asarray(image)
        return hashlib.sha256(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest()[:32]

    blocks = range(0, len(rows), _BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [list(pool.map(key, rows[start : start + _BLOCK].tolist())) for start in blocks]
    return np.array([one for part in parts for one in part], dtype="U32")


def registered_name(features: Features) -> str | None:
    """The name of the set that stored features are of, if they were extracted from a set by name."""
    data = _manifest(features).get("data", {})
    return data.get("name") if data.get("kind") == KIND else None


class Part(NamedTuple):
    """Images of an OOD set that are shown together: a name for the title, which rows (a mask [M] or all), what to tell."""

    name: str
    rows: np.ndarray | slice
    notes: tuple[str, ...] = ()


def parts_by_class(inside: Any, outside: Any) -> list[Part]:
    """The whole OOD set and, where it shares classes with the ID set, what is left without them: one or two parts.

    inside, outside: `Scored`, of sets read by name, or features that were stored from such. Raises DataError where the sets
    share classes and the labels that would tell are missing.
    """
    shared = shared_classes(inside.dataset, outside.dataset)
    if not shared:
        return [Part(outside.name, slice(None))]
    classes = CLASSES[outside.dataset]
    if outside.label is None or outside.label.ndim != 1:
        raise DataError(f"{outside.name} shares classes with {inside.name}, and has no labels that tell which images")
    odd = np.isin(outside.label, [classes.index(name) for name in shared])
    seen = len(np.unique(outside.label[odd]))
    what = (
        f"{odd.sum()} of the {outside.rows} images are of {seen} class{'es' * (seen > 1)} that {inside.dataset} has too"
    )
    whole = Part(f"{outside.name}, all images", slice(None), (f"{what}: the next table is without them",))
    if not odd.any():
        return [Part(outside.name, slice(None))]
    if odd.all():
        return [whole._replace(notes=(f"{what}: nothing would be left without them",))]
    return [whole, Part(f"{outside.name} without classes of {inside.dataset}", ~odd, (f"{what}: left out here",))]


def unremoved_classes(inside: Any, outside: Any) -> list[str]:
    """A note where two sets share classes that no list can take away; else none."""
    why = UNREMOVED.get(frozenset((inside.dataset, outside.dataset)))
    return [] if why is None else [f"nothing was left out, although {why}"]


def preprocessing_notes(sets: Sequence[Any]) -> list[str]:
    """How the backbone's own preprocessing treated the images, one note for all sets or, if they differ, one for each."""
    texts = [None if one.features is None else preprocessing_text(_settings(one.features)) for one in sets]
    if len(set(texts)) == 1 and texts[0] is not None:
        return [f"images {texts[0]}"]
    return [f"images of {one.name} {text}" for one, text in zip(sets, texts, strict=True) if text is not None]


def preprocessing_text(settings: Mapping[str, Any] | None) -> str | None:
    """One line from a backbone's settings: size, interpolation and crop of timm's, the text of a transform of one's own."""
    if not settings:
        return None
    if "transform" in settings:
        return f"went through {' '.join(settings['transform'].split())}"
    height, width = settings["input_size"][-2:]
    crop = settings.get("crop_pct")
    more = "" if crop is None else f", crop {crop:g}, {settings.get('crop_mode', 'center')}"
    return f"resized to {height} x {width} pixels ({settings.get('interpolation', 'unknown interpolation')}{more})"


def _settings(features: Features) -> dict[str, Any] | None:
    return _manifest(features).get("backbone", {}).get("preprocessing")


def _manifest(features: Features) -> dict[str, Any]:
    return {} if features.folder is None else read_manifest(features.folder) or {}
